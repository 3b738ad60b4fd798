"""One worker's share of a job, in whatever process it runs: an actor on a cluster, or the driver itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mcrise_ray.decode import DecodeOptions
from mcrise_ray.dispatch import Failure, Inspection, UnitResult
from mcrise_ray.errors import MCRiseError
from mcrise_ray.explainer import Subject, run_unit
from mcrise_ray.images import ImageRef, read_image
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import Model, ModelFacts, facts, load_model
from mcrise_ray.plan import Unit
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.targets import choose_targets, parse_targets

_SUBJECTS_KEPT = 4  # images held ready: those whose units may still come


class Worker:
    """Builds the model once, decodes images itself, and returns sums.

    Errors of one image come back as a `Failure`; anything else is raised, because it would meet every image.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: ExplainSpec,
        targets: str | Sequence[int | str],
        batch_size: int,
        threads: int | None = None,
        decode: DecodeOptions | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._model_spec, self._spec = model, spec
        self._targets, self._batch_size = parse_targets(targets), batch_size
        self._decode = decode
        self._subjects: dict[ImageRef, tuple[Subject, tuple[int, int]]] = {}

    def load(self) -> ModelFacts:
        """Build the model, and say what it is; not in the constructor, whose errors Ray turns into text.

        Raises:
            ModelError: it cannot be built.
        """
        self._model: Model = load_model(self._model_spec)
        return facts(self._model_spec, self._model)

    def inspect(self, image: ImageRef) -> Inspection | Failure:
        """Decode an image, score it unmasked, and settle its targets."""
        if image.problem is not None:
            return Failure("list", image.problem)
        began = time.perf_counter()
        stage = "read"
        try:
            subject, original_size = self._subject(image)
            stage = "explain"
            scores = subject.scores()
            targets = choose_targets(self._targets, image, scores, self._model)
        except MCRiseError as error:
            return Failure(stage, str(error))
        return Inspection(targets, subject.size, time.perf_counter() - began, original_size)

    def run(self, image: ImageRef, targets: Sequence[int], unit: Unit) -> UnitResult | Failure:
        """The sums of one unit of one image."""
        began = time.perf_counter()
        stage = "read"
        try:
            subject, _ = self._subject(image)
            stage = "explain"
            partial = run_unit(subject, unit, targets, self._batch_size)
        except MCRiseError as error:
            return Failure(stage, str(error))
        return UnitResult(partial, time.perf_counter() - began)

    def _subject(self, image: ImageRef) -> tuple[Subject, tuple[int, int]]:
        """An image ready to be masked, and the size it was decoded at."""
        subject = self._subjects.pop(image, None)
        if subject is None:
            decoded = read_image(image.uri, self._decode)
            height, width = decoded.shape[:2]
            subject = Subject(self._model, self._model.prepare(decoded), self._spec), (height, width)
            while len(self._subjects) >= _SUBJECTS_KEPT:
                del self._subjects[next(iter(self._subjects))]
        self._subjects[image] = subject
        return subject
