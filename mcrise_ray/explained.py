"""What is explained of an image: classes of a classifier, or the likeness of a query to its matches.

The one place that knows both kinds of model; a worker asks either through `Explained`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64, UInt8

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.embed import embed
from mcrise_ray.embedders import Embedder, embedder_facts, load_embedder
from mcrise_ray.errors import TargetError
from mcrise_ray.explainer import Subject
from mcrise_ray.images import ImageRef
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import Model, ModelFacts, facts, load_model
from mcrise_ray.reid import Similarity, distance, embeddings_of, similarity
from mcrise_ray.reidspec import ReidSpec
from mcrise_ray.scores import BlackBox
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.targets import check_choice, choose_targets
from mcrise_ray.tasks import Embedded, EmbedTask, Query, Target


@dataclass(frozen=True)
class Prepared:
    """An image ready to be masked.

    Attributes:
        subject: it, before what is asked about it.
        original_size: (height, width) as it was decoded.
        choose: the targets that are asked for.
    """

    subject: Subject
    original_size: tuple[int, int]
    choose: Callable[[], tuple[Target, ...]]


class Explained(Protocol):
    """A model, and what of it is explained.

    Attributes:
        model: may be replaced by the same model asked in another way.
        facts: what is stored of it.
    """

    model: Any
    facts: ModelFacts

    def scored(self, model: Any, image: UInt8[np.ndarray, "H W 3"]) -> BlackBox:
        """What stands for the job's scores where there is an image and nothing else yet."""
        ...

    def prepare(self, image: ImageRef, pixels: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """An image of the job, from its pixels."""
        ...

    def embed(self, task: EmbedTask, batch_size: int) -> Embedded:
        """Some images of a gallery, or queries."""
        ...


class Classes:
    """A classifier, of which scores of classes are explained."""

    def __init__(self, model: ModelSpec, spec: ExplainSpec, targets: Sequence[int | str]) -> None:
        self._spec, self._targets = spec, targets
        self.model: Model = load_model(model)
        self.facts = facts(model, self.model)
        check_choice(self._targets, self.model)

    def scored(self, model: Model, image: UInt8[np.ndarray, "H W 3"]) -> BlackBox:
        """See `Explained`."""
        return model

    def prepare(self, image: ImageRef, pixels: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """See `Explained`."""
        subject = Subject(self.model, self.model.prepare(pixels), self._spec)

        def choose() -> tuple[Target, ...]:
            return choose_targets(self._targets, image, subject.scores(), self.model)

        return Prepared(subject, pixels.shape[:2], choose)

    def embed(self, task: EmbedTask, batch_size: int) -> Embedded:
        """See `Explained`."""
        raise TypeError("expected a model that embeds, found a classifier")


class Likeness:
    """A model that embeds, of which equation 21 is explained."""

    def __init__(self, model: ModelSpec, spec: ExplainSpec, reid: ReidSpec, decode: DecodeOptions) -> None:
        self._spec, self._reid, self._decode = spec, reid, decode
        self.model: Embedder = load_embedder(model)
        self.facts = embedder_facts(model, self.model)

    def scored(self, model: Embedder, image: UInt8[np.ndarray, "H W 3"]) -> BlackBox:
        """See `Explained`: the likeness to the mirrored image, which is as near as a match may be."""
        f, mirrored, noise = embeddings_of(model, np.stack([image, image[:, ::-1], _noise(image.shape)]))
        try:
            return self._similarity(f, mirrored[None], model)
        except TargetError:  # an image that is its own mirror image
            return self._similarity(f, noise[None], model)

    def prepare(self, image: ImageRef, pixels: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """See `Explained`; every worker finds the same d0, because the query is embedded alone."""
        assert isinstance(image, Query)
        query = self.model.prepare(pixels)
        f: np.ndarray = embeddings_of(self.model, query[None])[0]
        matches = np.stack([match.embedding for match in image.matches])
        names = [match.image_id for match in image.matches]
        black_box = self._similarity(f, matches, self.model, names)
        distances = distance(f, matches, self._reid.distance)
        scores = np.exp(-distances / black_box.d0)
        targets = tuple(
            Target(place, match.image_id, match.role, float(score), float(far), float(d0))
            for place, (match, score, far, d0) in enumerate(
                zip(image.matches, scores, distances, black_box.d0, strict=True)
            )
        )
        return Prepared(Subject(black_box, query, self._spec), pixels.shape[:2], lambda: targets)

    def embed(self, task: EmbedTask, batch_size: int) -> Embedded:
        """See `Explained`."""
        began = time.perf_counter()
        rows, errors = embed(self.model, task.refs, batch_size, self._decode)
        return Embedded(rows, errors, time.perf_counter() - began)

    def _similarity(
        self,
        query: Float64[np.ndarray, " D"],
        matches: np.ndarray,
        model: Embedder,
        names: Sequence[str] = (),
    ) -> Similarity:
        return similarity(model, query, matches, d0=self._reid.d0, kind=self._reid.distance, names=names)


def load_explained(
    model: ModelSpec,
    spec: ExplainSpec,
    targets: Sequence[int | str],
    reid: ReidSpec | None,
    decode: DecodeOptions,
) -> Explained:
    """Build a job's model.

    Raises:
        ModelError: it cannot be built.
    """
    return Classes(model, spec, targets) if reid is None else Likeness(model, spec, reid, decode)


def _noise(shape: tuple[int, ...]) -> UInt8[np.ndarray, "H W 3"]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
