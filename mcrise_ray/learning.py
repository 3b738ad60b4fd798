"""How a guide is learnt from the scores of masks (see `mcrise_ray.guide`).

Where classes exclude each other, a target's logit is also predicted from the logarithms of its own
probability and of its rivals': these follow from the masks more simply than their difference does.

Axes: N masks scored; S masks learnt from, of which M are kept; L targets; R rivals; Q quantities that are
predicted; D features (see `variates`); W windows (see `kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float64

from mcrise_ray.guide import CANDIDATES, MOST_CANDIDATES, Guide, inputs_of, mixed
from mcrise_ray.kernel_regression import TESTED, kernel_ridge
from mcrise_ray.kernels import Windows, learn_metric
from mcrise_ray.masks import Masks, draw
from mcrise_ray.plan import MOST_LEARNT
from mcrise_ray.regression import ROUNDING, Basis, logistic_moments, ridge
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import Features, patches

OPENING_FOLDS = 3  # of the first masks, each predicted by a guide of its own: more tell hardly more
# Networks take about so many times as long for a mask as a candidate takes: a compiled ResNet-18 at 96 x 96
# pixels 140 times, a MobileNetV2 at 224 x 224 under ONNX Runtime 400, larger ones more.
_CANDIDATES_IN_TIME = 200
_FIRST_FRESH = 3 << 58  # the index of the first of the masks that the linear part is fitted on
_FRESH_PER_FEATURE, _FEWEST_FRESH = 4, 256  # of those
# Of the variance that cross-fitted predictions leave, at most, or they are kept. On pure noise a guide hardly
# ever seems to save a fifth, unless most scores are near 0: then in one of twenty cases.
_WORTH = 0.8
_NOT_ONE = 1e-2  # how far the sum of probabilities may lie from 1: bfloat16 rounds them
_PER_CELL = 1.75  # patches along an axis, with one fill (see `variates`): smaller ones tell hardly more
_SMALLEST = 1e-6  # of the largest score, or below 1: a score nearer than this to 0 or 1 has no finite logit
# At most; more only of those that score. With one target, 16 quantities are predicted then: products of a few
# more columns take twice as long.
_RIVALS, _MORE_RIVALS = 7, 13
_LEAST_RIVAL = 3e-3  # in the mean, or more: of rarer ones too little is seen
_TESTED_BY_FOLD = 128  # guides that pick nothing need not know how far they are to be believed
# Masks that candidates are compared with, of those learnt from: so many for each feature of a window, or such
# a share of all, between two bounds, or a few more. With all, predictions leave 1 to 7 % less variance, and
# take two to five times as long.
_CENTRES_PER_FEATURE = 4
_SHARE_OF_CENTRES = 1 / 6
_FEWEST_CENTRES, _MOST_CENTRES = 128, 256
_WORTH_CONDENSING = 3  # times fewer, at least: it takes as long as some thousand predictions
_CONDENSED_BY = 4  # times as many masks, of which the centres are to say what all masks learnt from do


def learn(
    spec: ExplainSpec,
    size: tuple[int, int],
    masks: Masks,
    scores: Float64[np.ndarray, "N columns"],
    rivals: tuple[int, ...] = (),
    left: Float64[np.ndarray, "N L"] | None = None,
    device: torch.device | str = "cpu",
    tested: int = TESTED,
) -> Guide | None:
    """A guide from all scores that are known, or the newest where they are too many.

    Args:
        spec: decides the features.
        size: (H, W).
        masks: all masks that were scored; how they were picked does not matter.
        scores: of theirs, for the targets, then for the rivals.
        rivals: R other classes, which must exclude each other and the targets.
        left: what predictions of another kind, made without seeing it, leave of each score.
        device: where masks are compared: where the model is.
        tested: about how many masks it is judged by.

    Returns:
        None where scores are not probabilities, or a target's are all the same or too close to 1 to be told
        apart, or masks are all the same, as those of a tiny `p_mask` are, or where the other predictions
        promise less noise.
    """
    targets = scores.shape[1] - len(rivals)
    if not -ROUNDING <= scores.min() <= scores.max() <= 1 + ROUNDING:
        return None
    masks, scores = masks[-MOST_LEARNT:], scores[-MOST_LEARNT:]
    grid = patches(spec, size, MOST_LEARNT, _PER_CELL)
    known = Features(spec, size, grid)(masks)
    scale = float(known.std())
    largest = np.maximum(scores[:, :targets].max(axis=0), np.finfo(np.float32).tiny)
    share = np.clip(scores[:, :targets], _SMALLEST * largest, 1 - _SMALLEST)
    truth = np.log(share / (1 - share))
    if not scale or np.ptp(truth, axis=0).min() == 0:
        return None
    shape = (grid[0], spec.K, grid[1])
    metric = learn_metric(known, truth, shape, scale, device, tested)
    windows = Windows.of(known, metric, device)
    everything = np.concatenate([truth, _logarithms(share, scores)], axis=1) if rivals else truth
    constants, weights, lines, judges, unseen = kernel_ridge(windows.alike(known), known, everything, tested)
    # How far predictions are to be believed is judged by masks that are predicted without their own scores.
    inputs, seen = inputs_of(unseen, targets), truth[judges]
    mix = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(inputs, seen.T, strict=True)])
    spread = (seen - mixed(mix, unseen)).std(axis=0)

    telling = max(_CENTRES_PER_FEATURE * windows.features, int(_SHARE_OF_CENTRES * len(masks)))
    wanted = min(max(telling, _FEWEST_CENTRES), _MOST_CENTRES)
    apart = len(masks) // wanted
    few = slice(None, None, apart if apart >= _WORTH_CONDENSING else 1)
    condensed = windows.condensed(known[-_CONDENSED_BY * wanted :], weights, few)
    basis, fresh = _fresh_features(spec, size, grid)
    centres = Windows.of(known[few], metric, device)
    unknown = constants + centres.similar(fresh, condensed) + fresh @ lines
    best, doubt = logistic_moments(mixed(mix, unknown), spread)
    variance = doubt.mean(axis=0)
    missed = scores[judges, :targets] - logistic_moments(mixed(mix, unseen), spread)[0]
    gain = np.where(variance > 0, (doubt**0.5).mean(axis=0) ** 2 / np.maximum(variance, 1e-300), 1)
    mine = (missed**2).mean(axis=0) * gain
    if left is not None:
        theirs = (left[-MOST_LEARNT:][judges] ** 2).mean(axis=0)
        if not (mine / np.maximum(theirs, 1e-300)).mean() < _WORTH:
            return None
    line = ridge(basis, fresh, best, np.ones(len(fresh), dtype=bool))
    bend = best - line.means - fresh @ line.slopes.T
    return Guide(
        learnt=len(masks),
        centres=masks[few],
        patches=grid,
        scale=metric.scale,
        by_patch=metric.by_patch,
        by_fill=metric.by_fill,
        weights=np.ascontiguousarray(condensed),
        constants=constants,
        lines=lines,
        mix=mix,
        rivals=rivals,
        spread=spread,
        means=line.means,
        slopes=np.ascontiguousarray(line.slopes),
        variance=variance,
        candidates=_candidates(bend, mine),
    )


def learn_by_fold(
    spec: ExplainSpec,
    size: tuple[int, int],
    scores: Float64[np.ndarray, "N classes"],
    targets: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[Guide] | None:
    """A guide for each fold of masks 0 to N - 1, all of whose choices are made from the other folds alone.

    Args:
        spec: decides the masks and the features.
        size: (H, W).
        scores: of theirs, for the L targets, then for all classes.
        targets: class indices.
        device: where masks are compared: where the model is.

    Returns:
        None where the scores of some fold's others are all the same.
    """
    masks, guides, own = draw(spec, 0, len(scores)), [], len(targets)
    for fold in range(OPENING_FOLDS):
        others = np.arange(len(scores)) % OPENING_FOLDS != fold
        rivals = find_rivals(scores[others, own:], targets)
        wanted = [*range(own), *(own + rival for rival in rivals)]
        known = scores[others][:, wanted]
        guide = learn(spec, size, masks[others], known, rivals, device=device, tested=_TESTED_BY_FOLD)
        if guide is None:
            return None
        guides.append(guide)
    return guides


def find_rivals(everything: Float64[np.ndarray, "N classes"], targets: Sequence[int]) -> tuple[int, ...]:
    """The classes that score most behind masks, but for the targets; none where they do not exclude each
    other, that is, where the scores of a mask do not sum to 1, and of two, whose logits are the same.
    """
    if everything.shape[1] <= 2 or np.abs(everything.sum(axis=1) - 1).max() > _NOT_ONE:
        return ()
    mean = everything.mean(axis=0)
    others = [index for index in np.argsort(-mean, kind="stable").tolist() if index not in targets]
    return tuple(
        sorted([*others[:_RIVALS], *(i for i in others[_RIVALS:_MORE_RIVALS] if mean[i] >= _LEAST_RIVAL)])
    )


def _logarithms(
    share: Float64[np.ndarray, "N L"], scores: Float64[np.ndarray, "N columns"]
) -> Float64[np.ndarray, "N columns+1"]:
    """Of the probabilities, and of all others together; from their mean, as logits of a softmax are known."""
    others = np.append(scores[:, share.shape[1] :], 1 - scores.sum(axis=1, keepdims=True), axis=1)
    logs = np.log(np.append(share, np.clip(others, _SMALLEST, 1), axis=1))
    centred: np.ndarray = logs - logs.mean(axis=1, keepdims=True)
    return centred


@lru_cache(maxsize=4)
def _fresh_features(
    spec: ExplainSpec, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Basis, Float64[np.ndarray, "N D"]]:
    """Masks that no model sees, the same for all images: on them predictions are made linear."""
    count = max(_FRESH_PER_FEATURE * spec.K * grid[0] * grid[1], _FEWEST_FRESH)
    found = Features(spec, size, grid)(draw(spec, _FIRST_FRESH, _FIRST_FRESH + count))
    return Basis.of(count, found.sum(axis=0), found.T @ found), found


def _candidates(bend: Float64[np.ndarray, "N L"], left: Float64[np.ndarray, " L"]) -> int:
    """A power of two, near the number for which noise and time have the least product.

    Noise is that of picks, of which so much variance is left, and of `g - l` of so many candidates.
    """
    share = ((bend**2).mean(axis=0) / np.maximum(left, 1e-300)).mean()
    wanted = np.clip((share * _CANDIDATES_IN_TIME) ** 0.5, CANDIDATES, MOST_CANDIDATES)
    return int(2 ** round(float(np.log2(wanted))))
