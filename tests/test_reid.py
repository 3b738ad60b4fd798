"""Equation 21 against a replica in loops: the match, d0, the score of each masked image, and the maps."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import replica
import torch
from people import identities
from torch import Tensor, nn

import mcrise_ray as mr
from mcrise_ray import render
from mcrise_ray.errors import ImageError, ModelError, ScoreError, SpecError, TargetError
from mcrise_ray.identity import Protocol
from mcrise_ray.masks import draw
from mcrise_ray.matching import find_matches
from mcrise_ray.reid import Similarity, distance, embeddings_of, reid_spec, similarity

H, W, D = 12, 9, 4
SPEC = reid_spec(masks=24, grid=(3, 2), seed=5, estimator="paper")


def embed_in_loops(image: np.ndarray) -> np.ndarray:
    """D numbers of an image `(H, W, 3)` in [0, 1]: products of means of its quarters."""
    quarters = [image[:6, :4], image[:6, 4:], image[6:, :4], image[6:, 4:]]
    means = [[float(part[..., c].mean()) for c in range(3)] for part in quarters]
    return np.array([red * red + green - 2 * blue * red + 0.1 for red, green, blue in means])


class Quarters(nn.Module):
    """The same on a batch, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        parts = (images[:, :, :6, :4], images[:, :, :6, 4:], images[:, :, 6:, :4], images[:, :, 6:, 4:])
        columns = []
        for part in parts:
            red, green, blue = part.mean(dim=(2, 3)).unbind(1)
            columns.append(red * red + green - 2 * blue * red + 0.1)
        return torch.stack(columns, dim=1)


def pictures(seed: int, many: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (many, H, W, 3), dtype=np.uint8)


def euclidean(f: np.ndarray, g: np.ndarray) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(f, g, strict=True)))


def cosine(f: np.ndarray, g: np.ndarray) -> float:
    dot = sum(a * b for a, b in zip(f, g, strict=True))
    return 1 - dot / math.sqrt(sum(a * a for a in f)) / math.sqrt(sum(b * b for b in g))


@pytest.mark.parametrize(("kind", "d"), [("euclidean", euclidean), ("cosine", cosine)])
@pytest.mark.parametrize("d0", [None, 0.07])
def test_maps_are_those_of_equation_21(kind: str, d: object, d0: float | None) -> None:
    query, gallery = pictures(1, 1)[0], pictures(2, 12)
    gallery[3] = query  # the query's own image
    gallery[4] = query // 2 * 2  # the same person on the same camera, nearly the same picture
    gallery[2] = query // 3 * 3  # junk
    pids = [2, 1, -1, 1, 1, 0, 2, 3, 3, 1, 2, -1]
    camids = [1, 2, 1, 1, 1, 2, 2, 1, 3, 3, 3, 2]

    f = embed_in_loops(query / 255)
    others = [embed_in_loops(image / 255) for image in gallery]
    best = None
    for place, other in enumerate(others):
        junk, own = pids[place] == -1, place == 3
        same_camera = pids[place] == 1 and camids[place] == 1
        if not (junk or own or same_camera) and (best is None or d(f, other) < d(f, others[best])):
            best = place
    assert best is not None
    assert all(d(f, others[place]) < d(f, others[best]) for place in (2, 3, 4))
    scale = d(f, others[best]) if d0 is None else d0
    masks = draw(SPEC, 0, SPEC.masks)
    expected, raw, baseline = replica.algorithm_1(
        query / 255,
        lambda image: math.exp(-d(embed_in_loops(image), others[best]) / scale),
        np.array(SPEC.palette),
        masks.cells,
        masks.shifts((H, W)),
        p_mask=0.1,
    )
    assert np.abs(expected).max() > 0.1

    embedder = Quarters()
    found = embeddings_of(embedder, np.concatenate([query[None], gallery])).astype(np.float32)
    protocol = Protocol(identities([1], [1]), identities(pids, camids), np.array([3]))
    (matches,) = find_matches(found[:1], found[1:], protocol, kind=kind)
    assert [(match.place, match.role, match.rank) for match in matches] == [(best, "match", 1)]
    # Maps are float32 in the end, whatever they are computed in.
    for dtype, tolerance, f_query, f_match in (
        (torch.float32, 1e-4, found[0], found[1 + best]),
        (torch.float64, 2e-7, f, others[best]),
    ):
        black_box = similarity(embedder, f_query, f_match[None], d0=d0, kind=kind)
        result = mr.explain(black_box, query, targets=[0], spec=SPEC, dtype=dtype)
        for ours, theirs in ((result.raw, raw), (result.baseline, baseline), (result.maps, expected)):
            np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
        np.testing.assert_allclose(result.score, math.exp(-d(f, others[best]) / scale), rtol=tolerance)


def test_p_mask_is_the_papers_unless_another_is_said() -> None:
    assert reid_spec().p_mask == 0.1
    assert reid_spec(p_mask=0.3, masks=7) == mr.ExplainSpec(p_mask=0.3, masks=7)


def test_several_matches_cost_one_pass_and_change_nothing() -> None:
    query, embedder = pictures(1, 1), Quarters()
    matches = embeddings_of(embedder, pictures(2, 3))
    f = embeddings_of(embedder, query)[0]
    together = similarity(embedder, f, matches)
    embedder.calls = 0
    result = mr.explain(together, query[0], targets=range(3), spec=SPEC, batch_size=8)
    assert embedder.calls == 1 + 24 // 8
    np.testing.assert_allclose(result.score, math.exp(-1), rtol=1e-6)
    for place in range(3):
        alone = mr.explain(similarity(embedder, f, matches[[place]]), query[0], targets=[0], spec=SPEC)
        np.testing.assert_array_equal(alone.maps[0], result.maps[place])


def test_an_embedder_of_ours_is_asked_in_its_own_space() -> None:
    query = pictures(1, 1)
    normalised = mr.Classifier(Quarters(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "none")
    matches = embeddings_of(normalised, pictures(2, 2))
    black_box = similarity(normalised, embeddings_of(normalised, query)[0], matches)
    assert black_box.input_space().mean == (0.4, 0.5, 0.6)
    foreign = similarity(normalised.forward, embeddings_of(normalised, query)[0], matches)
    ours, theirs = (mr.explain(box, query[0], targets=[0, 1], spec=SPEC) for box in (black_box, foreign))
    np.testing.assert_allclose(ours.maps, theirs.maps, atol=1e-4)
    np.testing.assert_allclose(ours.score, math.exp(-1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_a_copy_of_the_query_is_no_match(kind: str) -> None:
    embedder = Quarters()
    f = embeddings_of(embedder, pictures(1, 1))[0]
    matches = np.stack([embeddings_of(embedder, pictures(2, 1))[0], f * (1 + 1e-6)])
    with pytest.raises(
        TargetError, match=r"found b\.png at distance .*out of --gallery, or say --d0"
    ) as caught:
        similarity(embedder, f, matches, kind=kind, names=("a.png", "b.png"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(TargetError, match="found match 1 at distance"):
        similarity(embedder, f, matches, kind=kind)
    given = similarity(embedder, f, matches, d0=0.5, kind=kind)
    np.testing.assert_array_equal(given.d0, [0.5, 0.5])


def test_bad_scales_and_other_models_are_refused() -> None:
    f, matches = np.ones(4), np.zeros((1, 3))
    with pytest.raises(ModelError, match="expected matches of 4 dimensions, as the model embeds, found 3"):
        similarity(Quarters(), f, matches)
    for d0 in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(SpecError, match="d0: expected a distance above 0, found"):
            similarity(Quarters(), f, np.zeros((1, 4)), d0=d0)


def test_what_would_be_embedded_or_compared_as_something_else_is_refused(shapes_unchecked: None) -> None:
    embedder, images = Quarters(), pictures(1, 3)
    with pytest.raises(ImageError, match=r"uint8 RGB array.*found float64"):
        embeddings_of(embedder, images / 255)  # would be divided again
    with pytest.raises(ImageError, match=r"uint8 RGB array.*found uint8 of shape \(9, 3\)"):
        embeddings_of(embedder, images[0])
    f, *matches = embeddings_of(embedder, images)
    assert similarity(embedder, f, matches).matches.shape == (2, D)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"\(L, D\), found shape \(4,\)"):
        similarity(embedder, f, matches[0])
    with pytest.raises(TargetError, match=r"\(L, D\), found shape \(0, 4\)"):
        similarity(embedder, f, np.zeros((0, D)))
    with pytest.raises(SpecError, match="euclidean or cosine, found 'Euclidean'"):
        similarity(embedder, f, np.stack(matches), kind="Euclidean")  # type: ignore[arg-type]


def test_an_infinite_embedding_is_an_error_and_not_a_score_of_zero() -> None:
    def overflows(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * torch.inf

    box = Similarity(overflows, np.ones((1, 3)), np.ones(1))
    with pytest.raises(
        ScoreError, match="expected finite embeddings, found NaN or infinity for 1 of 1 images"
    ):
        mr.explain(box, pictures(1, 1)[0], targets=[0], spec=SPEC)


def test_cosine_distance_to_nothing_is_one() -> None:
    assert float(distance(np.zeros(3), np.ones(3), "cosine")) == 1
    assert float(distance(np.zeros(3), np.zeros(3), "cosine")) == 1
    assert float(distance(np.array([1.0, 0]), np.array([-2.0, 0]), "cosine")) == 2


def test_a_figure_shows_the_query_its_match_and_one_map_per_colour() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 5, H, W)).astype(np.float32)
    query, first, second = pictures(3, 3)
    rows = [
        render.FigureRow("query", "mc-rise", SPEC.colors, maps[0], 0.2, ("correct", first)),
        render.FigureRow("query", "mc-rise", SPEC.colors, maps[1], None, ("wrong", second)),
    ]
    figure = render.draw(query, rows)
    pictures_of = [axis for axis in figure.axes if axis.images]
    names = ["red", "green", "blue", "white", "black"]
    assert [axis.get_title() for axis in pictures_of] == [
        "query",
        "correct",
        *names,
        "query",
        "wrong",
        *names,
    ]
    shown = [axis.images[0].get_array() for axis in pictures_of]
    np.testing.assert_array_equal(shown[1], first)
    np.testing.assert_array_equal(shown[8], second)
    np.testing.assert_array_equal(shown[9 + 4], maps[1, 4])
    bars = [axis.get_ylabel() for axis in figure.axes if not axis.images and axis.get_ylabel()]
    assert bars[0] == "change of the similarity\nwhen a pixel takes the colour\nrelative error 0.20"
    assert bars[1] == "change of the similarity\nwhen a pixel takes the colour\nrelative error unknown"
    assert render.to_png(figure).startswith(b"\x89PNG")


def test_swatches_stay_below_their_names_whatever_the_shape_of_the_image() -> None:
    for size in ((60, 20), (20, 20), (20, 60)):
        row = render.FigureRow("query", "mc-rise", SPEC.colors, np.ones((5, *size), np.float32), None)
        figure = render.draw(np.zeros((*size, 3), np.uint8), [row])
        figure.canvas.draw()
        for axis in (axis for axis in figure.axes if axis.patches):
            swatch, name = axis.patches[0].get_window_extent(), axis.title.get_window_extent()
            assert 0 < swatch.y1 <= name.y0 + 1
