"""One image in one process: `perform()`, which actors run too, and `explain()`, the oracle of the cluster.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float64, UInt8

from mcrise_ray.blend import Blender
from mcrise_ray.errors import SpecError, TargetError
from mcrise_ray.estimators import Scored, picked_unit, residual_unit
from mcrise_ray.explanations import Explanation
from mcrise_ray.guide import Choice, Guide, Picked, choose
from mcrise_ray.pipeline import Asked, score_units
from mcrise_ray.plan import Unit
from mcrise_ray.reduction import Conclude, Reduction, ScoreUnit, SumUnit, Work, WorkResult, conclude
from mcrise_ray.saliency import Partial
from mcrise_ray.scores import BlackBox, ask, check_image, check_targets, input_space
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import Fit

DEFAULT_BATCH_SIZE = 64
_MIXED = "cpu", "cuda"  # devices whose products torch.autocast rounds


class Subject:
    """One image before one black box: normalised once, masked as often as asked.

    Args:
        black_box: see `mcrise_ray.scores`.
        image: uint8 RGB at the model's input size.
        dtype: of blending; float64 is for checking.
    """

    def __init__(
        self,
        black_box: BlackBox,
        image: UInt8[np.ndarray, "H W 3"],
        spec: ExplainSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        space = input_space(black_box)
        image = check_image(image, space.size)
        if not image.flags.writeable:
            image = image.copy()  # torch warns about sharing memory that it must not write to
        device = space.device if device is None else torch.device(device)
        rgb = torch.from_numpy(image).to(device, dtype).permute(2, 0, 1) / 255
        fills = torch.tensor(spec.palette, dtype=dtype, device=device).view(-1, 3, 1, 1)
        self.spec = spec
        self.size: tuple[int, int] = image.shape[:2]
        self.function = _mixed_as_here(space.function)
        self.image = space.normalize(rgb).contiguous()
        self.blend = Blender(
            self.image, space.normalize(fills).flatten(1), spec.grid, channels_last=space.channels_last
        )

    def scores(self) -> Float64[np.ndarray, " C"]:
        """All scores of the unmasked image."""
        scores: np.ndarray = ask(self.function, self.image[None].clone())[0]
        return scores


def _mixed_as_here(function: BlackBox) -> BlackBox:
    """The function under the autocast of whoever makes this call, whatever holds when it is asked."""
    for kind in _MIXED:
        if torch.is_autocast_enabled(kind):
            function = torch.autocast(kind, torch.get_autocast_dtype(kind))(function)
    return function


def run_unit(
    subject: Subject,
    unit: Unit,
    targets: Sequence[int],
    batch_size: int,
    fit: Fit | None = None,
    guide: Guide | None = None,
) -> Partial:
    """The sums of one unit (Algorithm 1, lines 2 to 15): a pure function of its arguments.

    With a fit, those of what its predictions leave of the scores, and the predictions' own part; with a
    guide, of masks that it picks.
    """
    ((_, partial),) = perform(subject, [SumUnit(unit, fit, guide)], targets, batch_size)
    assert isinstance(partial, Partial)
    return partial


def perform(
    subject: Subject, works: Iterable[Work], targets: Sequence[int], batch_size: int
) -> Iterator[tuple[Work, WorkResult]]:
    """Do pieces of work of a `Reduction`, up to the first `Conclude`.

    Each result is the same whatever stands before and after its work; a GPU does not pause in between.
    """
    spec, size = subject.spec, subject.size
    begun: deque[tuple[Work, Choice | None]] = deque()

    def units() -> Iterator[Asked]:
        for work in works:
            choice, masks = None, None
            if not isinstance(work, Conclude) and work.guide is not None:
                choice, masks = choose(spec, size, work.guide, work.unit, subject.image.device)
            begun.append((work, choice))
            if isinstance(work, Conclude):
                return
            yield Asked(work.unit, masks, work.also if isinstance(work, ScoreUnit) else ())

    for scores in score_units(spec, subject.blend, subject.function, units(), targets, batch_size):
        work, choice = begun.popleft()
        scored = scores if choice is None else Picked(**vars(choice), scores=scores)
        yield work, scored if isinstance(work, ScoreUnit) else _summed(spec, size, work, scored)
    for work, _ in begun:
        assert isinstance(work, Conclude)
        yield work, conclude(spec, work, subject.image.device)


def _summed(spec: ExplainSpec, size: tuple[int, int], work: Work, scored: Scored) -> Partial:
    assert isinstance(work, SumUnit)
    if isinstance(scored, Picked):
        assert work.guide is not None
        return picked_unit(spec, size, work.unit, scored, work.guide)
    return residual_unit(spec, size, work.unit, scored, work.fit)


def explain(
    black_box: BlackBox,
    image: UInt8[np.ndarray, "H W 3"],
    targets: SupportsIndex | Iterable[SupportsIndex] | None = None,
    spec: ExplainSpec | None = None,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] | None = None,
) -> Explanation:
    """Explain one image in this process.

    Args:
        black_box: callable from RGB in [0, 1], float `(B, 3, H, W)`, to scores `(B, C)`.
        image: uint8 RGB `(H, W, 3)` at the size that the model reads.
        targets: class indices, all explained in one pass; the predicted class by default.
        spec: method, number of masks, fills and so on.
        batch_size: masked images per call of the black box.
        device: where masked images are made; that of a module's parameters by default.
        dtype: of blending.
        on_progress: called with the number of masks done since the last call.

    Raises:
        ImageError, TargetError, ScoreError, ModelError, SpecError: see there.
        MemoryError, torch.OutOfMemoryError: a batch is too large; turn `batch_size` down.
    """
    if batch_size < 1:
        raise SpecError(f"batch_size: expected at least 1, found {batch_size}")
    spec = ExplainSpec() if spec is None else spec
    subject = Subject(black_box, image, spec, device=device, dtype=dtype)
    scores = subject.scores()
    chosen = _chosen_targets(targets, scores)
    reduction = Reduction(spec, chosen, scores[list(chosen)], subject.size)
    # Mixed precision is for the model: it would round masks and sums as well.
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        while reduction.explanation is None:
            for work, result in perform(subject, reduction.works(), chosen, batch_size):
                reduction.take(work, result)
                if on_progress is not None and not isinstance(work, Conclude):
                    on_progress(len(work.unit))
    return reduction.explanation


def _chosen_targets(
    targets: SupportsIndex | Iterable[SupportsIndex] | None, scores: Float64[np.ndarray, " C"]
) -> tuple[int, ...]:
    if targets is None:
        return (int(scores.argmax()),)
    try:
        chosen: tuple[int, ...] = (operator.index(targets),)  # type: ignore[arg-type]
    except TypeError:
        try:
            chosen = tuple(map(operator.index, targets))  # type: ignore[arg-type]
        except TypeError as error:
            raise TargetError(
                f"expected targets as indices of classes, found {targets!r}; of names that a model knows, "
                "model.class_index(name) gives them"
            ) from error
    if not chosen:
        raise TargetError("expected at least one target, found none")
    check_targets(chosen, len(scores))
    return chosen
