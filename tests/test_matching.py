"""The search in a gallery against brute force, and Market-1501's protocol against a readable reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people import identities

from mcrise_ray import matching
from mcrise_ray.errors import ModelError, SpecError, TargetError
from mcrise_ray.identity import Identities, Protocol, identity_of_name, retrieval
from mcrise_ray.matching import correct_ranks, find_matches, nearest, parse_matches, ranks
from mcrise_ray.reid import distance

KINDS = ("euclidean", "cosine")


def all_pairs(queries: slice, gallery: slice) -> np.ndarray:
    return np.ones((queries.stop - queries.start, gallery.stop - gallery.start), bool)


def brute_force(query: np.ndarray, gallery: np.ndarray, kind: str) -> np.ndarray:
    """Every distance, one at a time."""
    found = []
    for other in gallery:
        q, g = query.astype(np.float64), other.astype(np.float64)
        if kind == "euclidean":
            found.append(np.sqrt(((q - g) ** 2).sum()))
        else:
            norms = np.sqrt((q**2).sum() * (g**2).sum())
            found.append(max(0.0, 1 - (q * g).sum() / norms) if norms else 1.0)
    return np.array(found)


def market_reference(
    query: np.ndarray, pid: int, camid: int, gallery: np.ndarray, pids: list[int], camids: list[int]
) -> tuple[float, float] | None:
    """Rank-1 and average precision of one query as Market-1501's evaluation counts them, step by step."""
    order = np.argsort(brute_force(query, gallery, "euclidean"), kind="stable")
    hits = seen = 0
    precisions = []
    first_is_right = None
    for place in order:
        if pids[place] == -1:
            continue  # junk
        if pids[place] == pid and camids[place] == camid:
            continue  # the same camera
        seen += 1
        right = pids[place] == pid
        if first_is_right is None:
            first_is_right = float(right)
        if right:
            hits += 1
            precisions.append(hits / seen)
    return (first_is_right, sum(precisions) / hits) if hits else None


@st.composite
def galleries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Small whole numbers, so that ties abound, or noise, scaled and far from the origin or not."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    D, N, Q = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        gallery, queries = rng.integers(-1, 2, (N, D)), rng.integers(-1, 2, (Q, D))
    else:
        offset = draw(st.sampled_from([0.0, 1.0, 1000.0]))
        gallery, queries = rng.normal(offset, 1, (N, D)), rng.normal(offset, 1, (Q, D))
    scale = draw(st.sampled_from([1.0, 1e-9, 1e9]))
    return (queries * scale).astype(np.float32), (gallery * scale).astype(np.float32), seed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_QUERIES", 4)
    monkeypatch.setattr(matching, "_GALLERY", 16)
    monkeypatch.setattr(matching, "_PAIRS", 5)


@pytest.mark.parametrize("kind", KINDS)
@given(galleries(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_nearest_is_brute_force(kind: str, given_: tuple[np.ndarray, np.ndarray, int], k: int) -> None:
    queries, gallery, seed = given_
    counts = np.random.default_rng(seed).random((len(queries), len(gallery))) < 0.7
    found, masked = nearest(queries, gallery, [(k, all_pairs), (k, lambda q, g: counts[q, g])], kind)
    for i, query in enumerate(queries):
        exact = brute_force(query, gallery, kind)
        order = np.argsort(exact, kind="stable")
        for result, expected in ((found, order[:k]), (masked, order[counts[i][order]][:k])):
            many = len(expected)
            np.testing.assert_array_equal(result.places[i][:many], expected)
            np.testing.assert_array_equal(result.distances[i][:many], exact[expected])
            assert (result.places[i][many:] == -1).all()
            assert np.isinf(result.distances[i][many:]).all()


@pytest.mark.parametrize("kind", KINDS)
@given(galleries())
@settings(max_examples=60, deadline=None)
def test_ranks_are_brute_force(kind: str, given_: tuple[np.ndarray, np.ndarray, int]) -> None:
    queries, gallery, seed = given_
    rng = np.random.default_rng(seed)
    counts = rng.random((len(queries), len(gallery))) < 0.7
    marked = [rng.permutation(len(gallery))[: rng.integers(0, 6)] for _ in queries]
    found = ranks(queries, gallery, marked, lambda q, g: counts[q, g], kind)
    for i, query in enumerate(queries):
        exact = brute_force(query, gallery, kind)
        ahead = [sum((exact[j], j) < (exact[m], m) for j in np.flatnonzero(counts[i])) for m in marked[i]]
        np.testing.assert_array_equal(found[i], np.array(ahead, int) + 1)


def random_identities(rng: np.random.Generator, many: int, lowest: int) -> Identities:
    return Identities(rng.integers(lowest, 6, many), rng.integers(1, 4, many))


@given(galleries())
@settings(max_examples=60, deadline=None)
def test_recall_and_map_are_those_of_the_reference(given_: tuple[np.ndarray, np.ndarray, int]) -> None:
    queries, gallery, seed = given_
    rng = np.random.default_rng(seed)
    who, whom = random_identities(rng, len(queries), 1), random_identities(rng, len(gallery), -1)
    protocol = Protocol(who, whom, np.full(len(queries), -1))
    found = retrieval(correct_ranks(queries, gallery, protocol))
    results = [
        market_reference(query, pid, camid, gallery, whom.pids.tolist(), whom.camids.tolist())
        for query, pid, camid in zip(queries, who.pids, who.camids, strict=True)
    ]
    counted = [result for result in results if result is not None]
    if not counted:
        assert found is None
        return
    assert found is not None
    assert found.queries == len(counted)
    assert found.recall_at_1 == pytest.approx(np.mean([first for first, _ in counted]), abs=1e-12)
    assert found.mean_average_precision == pytest.approx(np.mean([ap for _, ap in counted]), abs=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recall_and_map_are_those_of_torchreid(rng: np.random.Generator) -> None:
    rank = pytest.importorskip("torchreid.reid.metrics.rank")
    queries = rng.normal(size=(40, 8)).astype(np.float32)
    gallery = rng.normal(size=(300, 8)).astype(np.float32)
    who, whom = random_identities(rng, 40, 1), random_identities(rng, 300, 0)
    found = retrieval(correct_ranks(queries, gallery, Protocol(who, whom, np.full(40, -1))))
    matrix = np.stack([brute_force(query, gallery, "euclidean") for query in queries])
    cmc, mean = rank.evaluate_rank(
        matrix, who.pids, whom.pids, who.camids, whom.camids, max_rank=50, use_cython=False
    )
    assert found is not None
    assert found.recall_at_1 == pytest.approx(float(cmc[0]), abs=1e-6)
    assert found.mean_average_precision == pytest.approx(float(mean), abs=1e-12)


LINE = np.arange(8, dtype=np.float32)[:, None]  # place i is at distance i + 1 of a query at -1
QUERY = np.array([[-1.0]], np.float32)


def matches(
    pids: list[int | None], camids: list[int | None], pid: int | None, camid: int | None, **settings_: object
) -> object:
    own = settings_.pop("own", -1)
    protocol = Protocol(identities([pid], [camid]), identities(pids, camids), np.array([own]))
    (found,) = find_matches(QUERY, LINE[: len(pids)], protocol, **settings_)  # type: ignore[arg-type]
    return found if isinstance(found, TargetError) else [(m.place, m.role, m.rank) for m in found]


def test_junk_same_camera_and_the_query_itself_are_passed_over() -> None:
    pids, camids = [-1, 1, 1, 0, 1], [1, 1, 2, 2, 3]
    found = matches(pids, camids, 1, 1, own=2, words=("top2", "correct", "wrong"))
    assert found == [(3, "match", 1), (4, "top2", 2)]
    assert matches(pids, camids, 1, 1, words=("top1",)) == [(2, "match", 1)]
    assert matches(pids, camids, 2, 1, words=("top1",)) == [(1, "match", 1)]


def test_best_correct_and_best_wrong_side_by_side() -> None:
    found = matches([2, None, 0, 1, 1], [1, 1, 1, 2, 3], 1, 1, words=("correct", "wrong"))
    assert found == [(3, "correct", 4), (0, "wrong", 1)]
    assert matches([None, 0, 1], [1, 1, 2], 1, 1, words=("wrong",)) == [(1, "wrong", 2)]


def test_without_cameras_nobody_is_excluded_but_the_image_itself() -> None:
    assert matches([1, 1], [None, None], 1, None, own=0, words=("correct",)) == [(1, "correct", 1)]
    assert matches([None, None], [1, 1], None, 1, words=("top1",)) == [(0, "match", 1)]


def test_named_matches_have_their_rank_even_where_they_are_excluded() -> None:
    assert matches([1, 2, 1], [1, 1, 2], 1, 1, words=("named",), named=[[2, 0]]) == [
        (2, "named", 2),
        (0, "named", 1),
    ]


@pytest.mark.parametrize(
    ("pids", "pid", "word", "message"),
    [
        ([-1, 1], 1, "top1", "expected a gallery image to match, found none but junk.*check --gallery"),
        ([2, 3], 1, "correct", "expected the same person on another camera in --gallery.*found nobody"),
        ([1, 2], 0, "correct", r"expected a query of a known person \(a pid from 1\) for match 'correct'"),
        ([1, 2], None, "wrong", "for match 'wrong', found none; give a pid in a manifest"),
        ([None, 1], 1, "wrong", "expected another person in --gallery.*found nobody"),
        ([1, 2], 1, "named", "expected a named match, found none for this query; check --pairs"),
    ],
)
def test_a_query_without_a_match_is_told_why(
    pids: list[int | None], pid: int | None, word: str, message: str
) -> None:
    error = matches(pids, [1, 1], pid, 1, words=(word,))
    with pytest.raises(TargetError, match=message):
        raise error  # type: ignore[misc]


def test_words_for_matches() -> None:
    assert parse_matches("top5") == ("top5",)
    assert parse_matches("correct+wrong") == ("correct", "wrong")
    assert parse_matches(["top1", "named"]) == ("top1", "named")
    for wrong in ("top0", "best", "", "correct+"):
        with pytest.raises(SpecError, match="expected matches top1, topN, correct, wrong or named"):
            parse_matches(wrong)


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        ("0001_c1s1_000151_01.jpg", (1, 1)),
        ("gallery/1501_c6s4_013926_03.jpg", (1501, 6)),
        ("-1_c3s2_000001_00.jpg", (-1, 3)),
        ("0000_c5s3_000010_02.jpg", (0, 5)),
        ("0042_c12_f0001.png", (42, 12)),
        ("cat.jpg", (None, None)),
        ("0001_c1s1/cat.jpg", (None, None)),
        (f"{2**64}_c1.jpg", (None, None)),
    ],
)
def test_market_names(name: str, identity: tuple[int | None, int | None]) -> None:
    assert identity_of_name(name) == identity


def test_other_dimensions_and_infinite_embeddings_are_refused() -> None:
    with pytest.raises(ModelError, match=r"expected a gallery of 3 dimensions.*found 1; was it embedded"):
        nearest(np.ones((1, 3), np.float32), LINE, [(1, all_pairs)])
    bad = LINE.copy()
    bad[3] = np.nan
    with pytest.raises(ModelError, match=r"finite embeddings with norms .* in the gallery, found nan"):
        nearest(QUERY, bad, [(1, all_pairs)])


def test_distances_of_a_pair_do_not_depend_on_its_company(rng: np.random.Generator) -> None:
    many = rng.normal(size=(50, 300)).astype(np.float32)
    for kind in KINDS:
        alone = [float(distance(many[0], other, kind)) for other in many]
        np.testing.assert_array_equal(distance(many[0], many, kind), alone)
        assert alone[0] == 0
