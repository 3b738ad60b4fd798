"""Maps without noise: every mask with its probability, or scores that are linear in the coverages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mcrise_ray.estimators import residual_unit
from mcrise_ray.explanations import Explanation, explanation
from mcrise_ray.guide import Picked, choose
from mcrise_ray.masks import Masks, cell_size, draw, one_per_fill, overlap_kernels, sampled, upsampling_tables
from mcrise_ray.plan import unit, unit_count
from mcrise_ray.reduction import Conclude, Reduction, ScoreUnit, Work, WorkResult, conclude
from mcrise_ray.saliency import Maps, UnitSums, method_maps
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import fit_scores


def every_mask(spec: ExplainSpec, size: tuple[int, int]) -> tuple[Masks, np.ndarray]:
    """All masks of a small grid at all shifts, and their probabilities."""
    h, w = spec.grid
    spans = cell_size(spec.grid, size)
    states = np.array(list(itertools.product(range(spec.K + 1), repeat=h * w)), dtype=np.uint8)
    chance = np.where(states == 0, 1 - spec.p_mask, spec.p_mask / spec.K).prod(axis=1)
    words = [[-(-((s << 32) + 1) // span) for s in range(span)] for span in spans]
    shifts = np.array(list(itertools.product(*words)), dtype=np.uint64)
    masks = Masks(states.repeat(len(shifts), axis=0).reshape(-1, h, w), np.tile(shifts, (len(states), 1)))
    assert len(np.unique(masks.shifts(size), axis=0)) == spans[0] * spans[1]
    return masks, chance.repeat(len(shifts)) / len(shifts)


def enumerated(spec: ExplainSpec, size: tuple[int, int], scores: Callable[[Masks], np.ndarray]) -> Maps:
    """The expectation of equation 9 (or 2, or 5), term by term."""
    masks, chance = every_mask(spec, size)
    sums = UnitSums(spec, 1, size)
    sums.accumulate(masks, (scores(masks) * chance)[:, None])
    return sums.partial(1).finalize(spec)


def pixels(spec: ExplainSpec, size: tuple[int, int], masks: Masks) -> np.ndarray:
    """Coverages `(N, K, H, W)` of any masks."""
    rows, columns = (
        torch.tensor(upsampling_tables(cells, length)) for cells, length in zip(spec.grid, size, strict=True)
    )
    return sampled(masks, size, rows, columns, one_per_fill(spec.K)).numpy().transpose(0, 2, 1, 3)


def linear_maps(spec: ExplainSpec, slopes: np.ndarray, constant: float) -> np.ndarray:
    """Maps `(M, H, W)` of scores `constant + sum of slopes (m - p_mask / K)`, with slopes `(K, H, W)`."""
    ky, kx = overlap_kernels(spec.grid, slopes.shape[1:])
    filled = ky @ slopes @ kx
    kept = constant - spec.p_mask / spec.K * filled.sum(axis=0)
    return method_maps(spec, torch.from_numpy(filled + kept)[None], torch.from_numpy(kept)[None])[0].numpy()


def explained(
    spec: ExplainSpec, size: tuple[int, int], scores: Callable[[int, int], np.ndarray]
) -> Explanation:
    """`explain()` of scores `(N, L)` that are given for a range of masks, without images."""
    all_units = [unit(spec, index) for index in range(unit_count(spec))]
    known = [scores(one.start, one.stop) for one in all_units]
    fit = None if spec.estimator == "paper" else fit_scores(spec, size, np.concatenate(known))
    parts = [residual_unit(spec, size, *pair, fit) for pair in zip(all_units, known, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total.combine(part)
    targets = range(known[0].shape[1])
    return explanation(spec, targets, np.zeros(len(targets)), total)


def picked(
    spec: ExplainSpec,
    size: tuple[int, int],
    scores: Callable[[Masks], np.ndarray],
    targets: Sequence[int] = (0,),
) -> Explanation:
    """`explain()` of scores `(N, classes)` that are given for masks, without images."""
    reduction = Reduction(spec, targets, np.zeros(len(targets)), size)
    while reduction.explanation is None:
        for work in reduction.works():
            reduction.take(work, done(spec, size, work, scores, targets))
    return reduction.explanation


def done(
    spec: ExplainSpec,
    size: tuple[int, int],
    work: Work,
    scores: Callable[[Masks], np.ndarray],
    targets: Sequence[int],
) -> WorkResult:
    """What a worker would return."""
    if isinstance(work, Conclude):
        return conclude(spec, work)
    assert isinstance(work, ScoreUnit)
    if work.guide is None:
        found = scores(draw(spec, work.unit.start, work.unit.stop))
        also = range(found.shape[1]) if work.also is None else work.also
        return found[:, [*targets, *also]]
    choice, masks = choose(spec, size, work.guide, work.unit)
    assert work.also is not None
    return Picked(**vars(choice), scores=scores(masks)[:, [*targets, *work.also]])
