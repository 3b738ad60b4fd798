"""Who is on an image, and which gallery images may match a query: the protocol of Market-1501.

Axes: Q queries; N gallery images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float64, Int64

JUNK = -1
"""The pid of images that show no usable person: they match nobody, and cost nobody a rank."""

DISTRACTOR = 0
"""The pid of images that are wrong for every query. People are counted from 1."""

UNKNOWN = -(2**62)
"""What stands in arrays for a pid or camid that nobody told."""

_MARKET_NAME = re.compile(r"(-?\d{1,18})_c(\d{1,18})")  # more digits are a hash or a time, and fit no column


def identity_of_name(name: str) -> tuple[int | None, int | None]:
    """(pid, camid) of a file named as in Market-1501, such as `0001_c1s1_000151_01.jpg`; None for others.

    `-1_c...` is `JUNK` and `0000_c...` a `DISTRACTOR`, as the data set has them.
    """
    match = _MARKET_NAME.match(name.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else (None, None)


@dataclass(frozen=True)
class Identities:
    """Person and camera of each of some images.

    Attributes:
        pids, camids: `UNKNOWN` where nobody told.
    """

    pids: Int64[np.ndarray, " n"]
    camids: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Protocol:
    """Which gallery images a query may match, and which of them are right.

    - Never: the query's own image, and junk.
    - Not: the same person on the same camera, which a tracker finds, not re-identification.
    - Right: the same person on another camera. Where no cameras are known: anywhere.
    - Wrong: any other person, and distractors. An image of an unknown person is neither.

    Attributes:
        queries, gallery: their identities.
        own: place of each query's own image in the gallery, -1 where it is not there.
    """

    queries: Identities
    gallery: Identities
    own: Int64[np.ndarray, " Q"]

    def is_known(self, query: int) -> bool:
        """Whether a query shows a person who can be told right from wrong."""
        return bool(self.queries.pids[query] > DISTRACTOR)

    def eligible(self, queries: slice, gallery: slice) -> Bool[np.ndarray, "q g"]:
        """What the queries may match, for a block of both."""
        allowed: np.ndarray = ~self._same_camera(queries, gallery) & (self.gallery.pids[gallery] != JUNK)
        places = np.arange(gallery.start, gallery.stop)
        allowed &= self.own[queries][:, None] != places
        return allowed

    def correct(self, queries: slice, gallery: slice) -> Bool[np.ndarray, "q g"]:
        """The right ones among them."""
        right: np.ndarray = self.eligible(queries, gallery) & self._same_person(queries, gallery)
        return right

    def wrong(self, queries: slice, gallery: slice) -> Bool[np.ndarray, "q g"]:
        """The wrong ones among them."""
        told = (self.queries.pids[queries][:, None] > DISTRACTOR) & (self.gallery.pids[gallery] != UNKNOWN)
        others: np.ndarray = self.eligible(queries, gallery) & told & ~self._same_person(queries, gallery)
        return others

    def correct_places(self, query: int) -> Int64[np.ndarray, " n"]:
        """Where in the gallery the right matches of one query are, in order."""
        if not self.is_known(query):
            return np.empty(0, np.int64)
        order, pids = self._by_pid
        pid, camid = self.queries.pids[query], self.queries.camids[query]
        places = order[np.searchsorted(pids, pid) : np.searchsorted(pids, pid, side="right")]
        camids = self.gallery.camids[places]
        found: np.ndarray = places[((camids != camid) | (camids == UNKNOWN)) & (places != self.own[query])]
        return found

    @cached_property
    def _by_pid(self) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
        order = np.argsort(self.gallery.pids, kind="stable")
        return order, self.gallery.pids[order]

    def _same_person(self, queries: slice, gallery: slice) -> Bool[np.ndarray, "q g"]:
        people = self.queries.pids[queries][:, None]
        same: np.ndarray = (people == self.gallery.pids[gallery]) & (people > DISTRACTOR)
        return same

    def _same_camera(self, queries: slice, gallery: slice) -> Bool[np.ndarray, "q g"]:
        """The same person on the same camera."""
        cameras = self.queries.camids[queries][:, None]
        same: np.ndarray = self._same_person(queries, gallery) & (cameras != UNKNOWN)
        same &= cameras == self.gallery.camids[gallery]
        return same


@dataclass(frozen=True)
class Retrieval:
    """How well embeddings re-identify.

    Attributes:
        queries: those that count: of a known person who is in the gallery on another camera.
        recall_at_1: share of them whose nearest match is right.
        mean_average_precision: mean over them of the precision at each right match.
    """

    queries: int
    recall_at_1: float
    mean_average_precision: float


def retrieval(ranks: Sequence[Int64[np.ndarray, " _"]]) -> Retrieval | None:
    """Recall@1 and mAP from the ranks of every right match of each query; None where no query counts.

    Notes:
        The average precision is the mean of the precision at each right match, as torchreid and later
        evaluations have it; the code that came with Market-1501 interpolates it with trapezoids.
    """
    counted = [np.sort(found) for found in ranks if len(found)]
    if not counted:
        return None
    first = np.array([found[0] == 1 for found in counted])
    precision: Float64[np.ndarray, " q"] = np.array(
        [np.mean(np.arange(1, len(found) + 1) / found) for found in counted]
    )
    return Retrieval(len(counted), float(first.mean()), float(precision.mean()))
