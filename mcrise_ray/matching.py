"""Nearest neighbours in a gallery of any size, exactly: a search by matrix products that is then checked.

Blocks of float32 products give every distance to within a bound; whatever the bound leaves in doubt is
computed again in float64. So the answer is that of brute force, ties by place included, at the speed of the
products. The gallery may be an array in memory, a memory map or a view of shared memory: it is only sliced.

Axes: Q queries; N gallery images; D dimensions; k neighbours; q, g the rows of a block of each.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from mcrise_ray.errors import ModelError, SpecError, TargetError
from mcrise_ray.identity import Protocol
from mcrise_ray.reid import DistanceKind, distance

Mask = Callable[[slice, slice], Bool[np.ndarray, "q g"]]
"""For a block of queries and one of the gallery, which pairs count."""

_QUERIES = 256  # of a block, and
_GALLERY = 8192  # so many gallery images: 8 MiB of distances
_PAIRS = 4096  # checked at a time in float64

_ROUNDING = 2.0**-24  # of float32
_TINY = 2.0**-126  # below which float32 loses more than that
_NORMS = 1e-15, 1e15  # whose squares float32 holds, sums and all

_WORD = re.compile(r"correct|wrong|named|top([1-9][0-9]*)")


@dataclass(frozen=True)
class Neighbours:
    """The nearest of the gallery for each query, in order of distance, then of place.

    Attributes:
        places: in the gallery; -1 where fewer than k count.
        distances: infinite there.
    """

    places: Int64[np.ndarray, "Q k"]
    distances: Float64[np.ndarray, "Q k"]


@dataclass(frozen=True)
class Match:
    """One gallery image that a query is explained against.

    Attributes:
        place: in the gallery.
        role: `match` (the nearest), `top2` and so on, `correct`, `wrong` or `named`.
        rank: 1 plus the number of eligible gallery images that are nearer.
        distance: of the embeddings.
    """

    place: int
    role: str
    rank: int
    distance: float


def nearest(
    queries: Float32[np.ndarray, "Q D"],
    gallery: Float32[np.ndarray, "N _"],
    asked: Sequence[tuple[int, Mask]],
    kind: DistanceKind = "euclidean",
) -> list[Neighbours]:
    """For each of `asked`, the k nearest that count, in one pass over the gallery.

    Raises:
        ModelError: queries and gallery differ in their dimensions, or embeddings are not finite.
    """
    found = [Neighbours(np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)) for k, _ in asked]
    for block in _blocks(queries, gallery, kind):
        for best, (k, mask) in zip(found, asked, strict=True):
            _keep_nearest(best, k, mask, block)
    return found


def ranks(
    queries: Float32[np.ndarray, "Q D"],
    gallery: Float32[np.ndarray, "N _"],
    marked: Sequence[Int64[np.ndarray, " _"]],
    mask: Mask,
    kind: DistanceKind = "euclidean",
) -> list[Int64[np.ndarray, " _"]]:
    """The ranks of marked gallery images of each query among those that count.

    Raises:
        ModelError: see `nearest()`.
    """
    counted = [
        _Marks(np.asarray(places, np.int64), distance(gallery[places], query, kind))
        for query, places in zip(queries, marked, strict=True)
    ]
    for block in _blocks(queries, gallery, kind):
        counts = mask(block.queries, block.gallery)
        for row, marks in enumerate(counted[block.queries]):
            if len(marks.places):
                marks.count(block, row, counts[row])
    return [marks.ranks() for marks in counted]


def parse_matches(asked: Any) -> tuple[str, ...]:
    """What to explain a query against, as a tuple of words; they may be joined by `+`.

    `topN`: the N nearest. `correct`, `wrong`: the nearest image of the same and of another person. `named`:
    those that the list of pairs names.

    Raises:
        SpecError: another word.
    """
    parts = asked if isinstance(asked, list | tuple) else [asked]
    words = [word for part in parts for word in str(part).split("+")]
    unknown = [word for word in words if not _WORD.fullmatch(word)]
    if unknown or not words:
        raise SpecError(f"expected matches top1, topN, correct, wrong or named, joined by +, found {asked!r}")
    return tuple(words)


def find_matches(
    queries: Float32[np.ndarray, "Q D"],
    gallery: Float32[np.ndarray, "N _"],
    protocol: Protocol,
    words: Sequence[str] = ("top1",),
    named: Sequence[Sequence[int]] = (),
    kind: DistanceKind = "euclidean",
) -> list[tuple[Match, ...] | TargetError]:
    """The matches of each query, each once, with the first reason for which it was chosen.

    Args:
        queries: embeddings.
        gallery: embeddings.
        protocol: who is on them.
        words: see `parse_matches()`.
        named: for each query, places in the gallery.
        kind: of distance.

    Returns:
        For a query that has no such match, a `TargetError` that says so in place of its matches.

    Raises:
        ModelError: see `nearest()`.
    """
    most = min(max([1, *(int(word[3:]) for word in words if _family(word) == "top")]), len(gallery))
    masks = {"top": protocol.eligible, "correct": protocol.correct, "wrong": protocol.wrong}
    needed = sorted({_family(word) for word in words} & masks.keys())
    asked = [(most if family == "top" else 1, masks[family]) for family in needed]
    found = dict(zip(needed, nearest(queries, gallery, asked, kind), strict=True))
    chosen: list[dict[int, str] | TargetError] = []
    for query in range(len(queries)):
        best = {family: neighbours.places[query] for family, neighbours in found.items()}
        best["named"] = np.asarray(named[query] if len(named) else (), np.int64)
        try:
            chosen.append(_roles(words, best, protocol.is_known(query)))
        except TargetError as error:
            chosen.append(error)
    marked = [np.array([] if isinstance(c, TargetError) else [*c], np.int64) for c in chosen]
    ranked = ranks(queries, gallery, marked, protocol.eligible, kind)
    return [
        roles if isinstance(roles, TargetError) else _matches(roles, rank, distance(gallery[at], query, kind))
        for query, roles, at, rank in zip(queries, chosen, marked, ranked, strict=True)
    ]


def correct_ranks(
    queries: Float32[np.ndarray, "Q D"],
    gallery: Float32[np.ndarray, "N _"],
    protocol: Protocol,
    kind: DistanceKind = "euclidean",
) -> list[Int64[np.ndarray, " _"]]:
    """The ranks of every right match of each query, for `retrieval()`.

    Raises:
        ModelError: see `nearest()`.
    """
    right = [protocol.correct_places(query) for query in range(len(queries))]
    return ranks(queries, gallery, right, protocol.eligible, kind)


def _family(word: str) -> str:
    return "top" if word.startswith("top") else word


def _roles(words: Sequence[str], best: dict[str, Int64[np.ndarray, " _"]], known: bool) -> dict[int, str]:
    """Places and their roles for one query."""
    roles: dict[int, str] = {}
    for word in words:
        depth = int(word[3:]) if _family(word) == "top" else None
        places = best[_family(word)][:depth]
        places = places[places >= 0]
        if not len(places):
            raise TargetError(_nothing(word, known))
        for rank, place in enumerate(places.tolist(), start=1):
            role = word if depth is None else "match" if rank == 1 else f"top{rank}"
            roles.setdefault(place, role)
    return roles


def _nothing(word: str, known: bool) -> str:
    if word == "named":
        return "expected a named match, found none for this query; check --pairs"
    if word in {"correct", "wrong"} and not known:
        return (
            f"expected a query of a known person (a pid from 1) for match {word!r}, found none; "
            "give a pid in a manifest, or names as in Market-1501"
        )
    if word == "correct":
        return "expected the same person on another camera in --gallery for match 'correct', found nobody"
    if word == "wrong":
        return "expected another person in --gallery for match 'wrong', found nobody"
    return (
        "expected a gallery image to match, found none but junk, the query itself, and the same person on "
        "the same camera; check --gallery"
    )


def _matches(
    roles: dict[int, str], rank: Int64[np.ndarray, " n"], distances: Float64[np.ndarray, " n"]
) -> tuple[Match, ...]:
    return tuple(
        Match(place, role, int(at), float(far))
        for (place, role), at, far in zip(roles.items(), rank, distances, strict=True)
    )


@dataclass(frozen=True)
class _Block:
    """Distances between some queries and some of the gallery, to within a bound.

    Attributes:
        queries, gallery: which.
        rows, columns: their embeddings.
        about: roughly the distances; the squared ones if Euclidean.
        bound: how far off `about` may be, for each query.
        kind: of distance.
    """

    queries: slice
    gallery: slice
    rows: Float32[np.ndarray, "q D"]
    columns: Float32[np.ndarray, "g D"]
    about: Float32[np.ndarray, "q g"]
    bound: Float64[np.ndarray, " q"]
    kind: DistanceKind

    def key(self, distances: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Distances as `about` has them."""
        return distances**2 if self.kind == "euclidean" else distances

    def exact(
        self, rows: Int64[np.ndarray, " n"], columns: Int64[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"]:
        """The distances of some pairs."""
        parts = [
            distance(self.columns[columns[at : at + _PAIRS]], self.rows[rows[at : at + _PAIRS]], self.kind)
            for at in range(0, len(rows), _PAIRS)
        ]
        return np.concatenate(parts) if parts else np.empty(0)


def _blocks(
    queries: Float32[np.ndarray, "Q D"], gallery: Float32[np.ndarray, "N _"], kind: DistanceKind
) -> Iterator[_Block]:
    if queries.shape[1] != gallery.shape[1]:
        raise ModelError(
            f"expected a gallery of {queries.shape[1]} dimensions, as the queries have, found "
            f"{gallery.shape[1]}; was it embedded with another --model"
        )
    lengths = _norms(queries, "queries")
    for g in range(0, len(gallery), _GALLERY):
        columns = gallery[g : g + _GALLERY]
        widths = _norms(columns, "gallery")
        for q in range(0, len(queries), _QUERIES):
            rows, norms = queries[q : q + _QUERIES], lengths[q : q + _QUERIES]
            about = rows @ columns.T
            # D roundings of each dot product and squared norm, in whatever order the library adds, and a few
            # of the rest; a tenth more, because they compound.
            roundings = 1.1 * queries.shape[1] + 8
            if kind == "euclidean":
                about *= -2
                about += np.square(norms).astype(np.float32)[:, None]
                about += np.square(widths).astype(np.float32)
                bound = roundings * (_ROUNDING * np.square(norms + widths.max()) + _TINY)
            else:
                inverse, inverses = _inverse(norms), _inverse(widths)
                about *= inverse[:, None]
                about *= inverses
                np.subtract(1, about, out=about)
                bound = 2 * roundings * (_ROUNDING + _TINY * inverse.astype(np.float64) * inverses.max())
            yield _Block(
                slice(q, q + len(rows)), slice(g, g + len(columns)), rows, columns, about, bound, kind
            )


def _norms(embeddings: Float32[np.ndarray, "n D"], whose: str) -> Float64[np.ndarray, " n"]:
    norms: np.ndarray = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings).astype(np.float64))
    if not ((norms == 0) | ((norms > _NORMS[0]) & (norms < _NORMS[1]))).all():
        raise ModelError(
            f"expected finite embeddings with norms from {_NORMS[0]:g} to {_NORMS[1]:g} in the {whose}, "
            f"found {norms.min():g} to {norms.max():g}; check the model's weights and normalisation"
        )
    return norms


def _inverse(norms: Float64[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """1 / norm, and 0 for an embedding of zeros, whose cosine is 0."""
    inverse: np.ndarray = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    return inverse.astype(np.float32)


def _keep_nearest(best: Neighbours, k: int, mask: Mask, block: _Block) -> None:
    """Merge one block into the k nearest so far, in place."""
    about = np.where(mask(block.queries, block.gallery), block.about, np.float32(np.inf))
    depth = min(k, about.shape[1]) - 1
    kth = np.partition(about, depth, axis=1)[:, depth]
    places, distances = best.places[block.queries], best.distances[block.queries]
    # The k-th of this block is at most `kth + bound`, and what may be nearer is at least `about - bound`.
    limit = np.minimum(kth + block.bound, block.key(distances[:, -1])) + block.bound
    # Rounded up, and never so far that the infinite ones pass.
    limit32 = np.minimum(np.nextafter(limit.astype(np.float32), np.float32(np.inf)), np.finfo(np.float32).max)
    rows, columns = np.nonzero(about <= limit32[:, None])
    if not len(rows):
        return
    # Every query has its k entries of before, some of them still empty.
    all_rows = np.concatenate([np.repeat(np.arange(len(places)), k), rows])
    all_places = np.concatenate([places.ravel(), columns + block.gallery.start])
    all_distances = np.concatenate([distances.ravel(), block.exact(rows, columns)])
    order = np.lexsort((all_places, all_distances, all_rows))
    starts = np.searchsorted(all_rows[order], np.arange(len(places)))
    kept = order[starts[:, None] + np.arange(k)]
    best.places[block.queries] = all_places[kept]
    best.distances[block.queries] = all_distances[kept]


class _Marks:
    """Marked gallery images of one query, and how many others were met that come before each."""

    def __init__(self, places: Int64[np.ndarray, " n"], distances: Float64[np.ndarray, " n"]) -> None:
        self.places = places
        self._order = np.lexsort((places, distances))
        self._distances = distances[self._order]
        self._keys = list(zip(self._distances.tolist(), places[self._order].tolist(), strict=True))
        self._before = np.zeros(len(places) + 1, np.int64)

    def count(self, block: _Block, row: int, counts: Bool[np.ndarray, " g"]) -> None:
        """Meet one row of a block: `_before[j]` grows by those that come before mark j, not before j - 1."""
        keys, bound = block.key(self._distances), block.bound[row]
        near = np.flatnonzero(counts & (block.about[row] <= keys[-1] + bound))
        about = block.about[row, near].astype(np.float64)
        first = np.searchsorted(keys - bound, about, side="right")
        doubtful = np.flatnonzero(np.searchsorted(keys + bound, about, side="left") < first)
        places = near[doubtful]
        exact = block.exact(np.full(len(places), row), places)
        for at, far, place in zip(doubtful, exact.tolist(), places.tolist(), strict=True):
            first[at] = bisect_right(self._keys, (far, place + block.gallery.start))
        self._before += np.bincount(first, minlength=len(self._before))

    def ranks(self) -> Int64[np.ndarray, " n"]:
        """In the order in which the places were given."""
        ranked = np.empty(len(self.places), np.int64)
        ranked[self._order] = 1 + np.cumsum(self._before[:-1])
        return ranked
