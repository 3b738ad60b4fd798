"""Scores that are known to sums: what each estimator makes of the masks of a unit; no model is asked.

Axes: N masks; L targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64

from mcrise_ray import masks as mask_source
from mcrise_ray.guide import CANDIDATES, Guide, Picked, candidates, predict
from mcrise_ray.learning import OPENING_FOLDS
from mcrise_ray.masks import Masks
from mcrise_ray.plan import Unit
from mcrise_ray.saliency import Partial, UnitSums
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.threads import one_blas_thread
from mcrise_ray.variates import CHUNK, FIRST_FRESH, FRESH_PER_MASK, Features, Fit, fresh

# What came of asking the model about one unit: columns are the targets, then the other classes asked for.
Scored = Float64[np.ndarray, "_ columns"] | Picked


def scores_of(scored: Scored) -> Float64[np.ndarray, "_ columns"]:
    """The scores alone."""
    return scored.scores if isinstance(scored, Picked) else scored


def masks_of(spec: ExplainSpec, unit: Unit, scored: Scored) -> Masks:
    """The masks that were scored."""
    if isinstance(scored, Picked):
        return candidates(spec, unit, len(scored.bend) // len(unit))[scored.picked]
    return mask_source.draw(spec, unit.start, unit.stop)


@one_blas_thread
def residual_unit(
    spec: ExplainSpec,
    size: tuple[int, int],
    unit: Unit,
    scores: Float64[np.ndarray, "N L"],
    fit: Fit | None,
) -> Partial:
    """The sums of one unit, or of a stretch of them, whose masks nobody picked.

    Masks are drawn again rather than kept: it takes microseconds.

    Raises:
        ValueError: there is a fit for the estimator `"paper"`, or none for another.
    """
    if (fit is None) != (spec.estimator == "paper"):
        raise ValueError(
            f"expected {'no fit' if fit else 'a fit'} for the estimator {spec.estimator!r}, found "
            f"{'one' if fit else 'none'}; see `fit_scores`"
        )
    sums = UnitSums(spec, scores.shape[1], size)
    features = None if fit is None else Features(spec, size, fit.patches)
    for start in range(unit.start, unit.stop, CHUNK):
        stop = min(start + CHUNK, unit.stop)
        masks = mask_source.draw(spec, start, stop)
        left = scores[start - unit.start : stop - unit.start]
        if fit is not None and features is not None:
            left = left - fit.predict(features(masks), fit.rows(start, stop))[0]
            curved = fresh(spec, fit, features, start, stop)
            if curved is not None:
                extra, bend = curved
                sums.accumulate(extra, bend / FRESH_PER_MASK)
                # One of each mask's fresh masks is sample enough of their small part of the variance.
                sums.square(extra[::FRESH_PER_MASK], bend[::FRESH_PER_MASK] / FRESH_PER_MASK**0.5)
        sums.accumulate(masks, left)
        sums.square(masks, left)
    if fit is None:
        return sums.partial(len(unit))
    return sums.partial(len(unit), *fit.expected(fit.rows(unit.start, unit.stop), spec.K))


def opening_unit(
    spec: ExplainSpec,
    size: tuple[int, int],
    scores: Float64[np.ndarray, "N L"],
    guides: Sequence[Guide],
    device: torch.device | str = "cpu",
) -> Partial:
    """The sums of masks 0 to N - 1, which nobody picked, by one guide for each fold, learnt without it.

    As for `residual_unit`: what a guide leaves of the scores, and `g - l` on fresh masks, `CANDIDATES` for
    each of these, as for those that are picked.
    """
    count, targets = scores.shape
    sums, masks = UnitSums(spec, targets, size), mask_source.draw(spec, 0, count)
    fresh_masks = mask_source.draw(spec, FIRST_FRESH, FIRST_FRESH + CANDIDATES * count)
    means = slopes = np.zeros(())
    for fold, guide in enumerate(guides):
        mine = np.arange(fold, count, OPENING_FOLDS)
        extra = fresh_masks[(CANDIDATES * mine[:, None] + np.arange(CANDIDATES)).ravel()]
        both = Masks.concatenate([masks[mine], extra])
        best, _, line = predict(spec, size, guide, both, device)
        left, bend = scores[mine] - best[: len(mine)], (best - line)[len(mine) :]
        sums.accumulate(masks[mine], left)
        sums.square(masks[mine], left)
        sums.accumulate(extra, bend / CANDIDATES)
        sums.square(extra[::CANDIDATES], bend[::CANDIDATES] / CANDIDATES**0.5)
        means, slopes = means + len(mine) * guide.means, slopes + len(mine) * guide.slopes
    return sums.partial(count, means, _by_patch(spec, guides[0], slopes))


def _by_patch(
    spec: ExplainSpec, guide: Guide, slopes: Float64[np.ndarray, "L D"]
) -> Float64[np.ndarray, "L Y K X"]:
    by_patch: np.ndarray = slopes.reshape(-1, guide.patches[0], spec.K, guide.patches[1])
    return by_patch


@one_blas_thread
def picked_unit(
    spec: ExplainSpec, size: tuple[int, int], unit: Unit, picked: Picked, guide: Guide
) -> Partial:
    """The sums of one unit whose masks a guide picked (see `mcrise_ray.guide`).

    Each candidate adds `g - l`, and each mask picked `(f - g) / odds` besides.
    """
    masks = candidates(spec, unit, guide.candidates)
    targets = len(guide.means)
    sums = UnitSums(spec, targets, size)
    weight = guide.weight / guide.candidates
    for start in range(0, len(masks), CHUNK):
        part = slice(start, start + CHUNK)
        sums.accumulate(masks[part], weight * picked.bend[part])
    own, left = masks[picked.picked], (picked.scores[:, :targets] - picked.best) / picked.odds[:, None]
    sums.accumulate(own, weight * left)
    sums.square(own, weight * (picked.bend[picked.picked] + left))
    # As many as were picked, of those that were not, are sample enough. Were they taken from all, picks with
    # equal odds would keep in step with them.
    others = np.delete(np.arange(len(masks)), picked.picked)
    some = others[:: guide.candidates - 1]
    sums.square(masks[some], weight * (len(others) / len(some)) ** 0.5 * picked.bend[some])
    return sums.partial(
        len(unit),
        weight * len(masks) * guide.means,
        _by_patch(spec, guide, weight * len(masks) * guide.slopes),
        weight=weight * len(masks),
        squared_weight=weight**2 * len(masks),
    )
