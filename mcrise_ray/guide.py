"""Which masks are worth asking the model about: importance sampling by what the masks scored so far tell.

Scores of rare events are close to zero for most masks, and linear predictions explain little of them; but
their logits can be predicted well enough to say of any mask how uncertain its score is. A `Guide` looks at 8
or more masks for each one that is scored, and picks masks with odds in proportion to that uncertainty, times
what a mask adds to the maps. With `g` the predicted score and `l` linear in the coverages,

    S = E[eq9[l]] + mean of eq9[g - l] + mean of eq9[(f - g) / odds where picked, else 0]

with means over candidates, which is unbiased whatever was predicted: the first term has a closed form, the
second needs no model, and the third is a Horvitz-Thompson sum. Where the third has little noise, most is that
of the second, and a guide looks at more candidates. Masks that it has learnt from are never among them; the
first masks, which nobody picked, are predicted by guides that learnt from other folds.

Where classes exclude each other, a target's logit is also predicted from the logarithms of its own
probability and of its rivals': these follow from the masks more simply than their difference does.

Axes: N masks scored or picked; C candidates; S masks learnt from; L targets; R rivals; Q quantities that are
predicted; D features (see `variates`), of which a window has V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float64, Int64

from mcrise_ray.kernels import TESTED, Metric, Windows, kernel_ridge, learn_metric
from mcrise_ray.masks import Masks, draw, uniform
from mcrise_ray.plan import MOST_LEARNT, Unit
from mcrise_ray.regression import Basis, logistic_moments, ridge
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.threads import one_blas_thread
from mcrise_ray.variates import Features, leverage, patches

CANDIDATES = 8  # at least, for each mask that is picked
OPENING_FOLDS = 3  # of the first masks, each predicted by a guide of its own: more tell hardly more
_MOST_CANDIDATES = 32
# A model takes about so many times as long for a mask as all takes that a candidate needs, or longer.
_CANDIDATES_IN_TIME = 40

_FIRST_CANDIDATE = 1 << 59  # the index of the first candidate, beyond every mask that can be asked for
_FIRST_FRESH = 3 << 58  # the same of the masks that the linear part is fitted on
_FRESH_PER_FEATURE = 4  # of those
_FLOOR = 0.1  # share of the odds that is the same for all masks, so that no weight exceeds ten
# Of the variance that cross-fitted predictions leave, at most, or they are kept. On pure noise a guide hardly
# ever seems to save a fifth, unless most scores are near 0: then in one of twenty cases.
_WORTH = 0.8
_ROUNDING = 1e-4  # how far probabilities may lie outside [0, 1]
_NOT_ONE = 1e-2  # how far the sum of probabilities may lie from 1: bfloat16 rounds them
_PER_CELL = 1.75  # patches along an axis, with one fill (see `variates`): smaller ones tell hardly more
_RIVALS, _MORE_RIVALS = 7, 15  # at most; more only of those that score
_LEAST_RIVAL = 3e-3  # in the mean, or more: of rarer ones too little is seen
_TESTED_BY_FOLD = 128  # guides that pick nothing need not know how far they are to be believed
_CHUNK = 1024  # masks predicted at a time
_KEPT = 4  # guides whose windows a worker keeps: they take up to 8 MiB each
_SMALLEST = 1e-6  # of the largest score, or below 1: a score nearer than this to 0 or 1 has no finite logit


@dataclass(frozen=True, eq=False)
class Guide:
    """Predictions of scores by their likeness to scores that are known: kernel ridge regression of logits.

    The kernel is a sum, over overlapping windows of the image, of Gaussians of the features in each: what
    neighbouring cells do together is learnt, and what cells far apart do is added up. Lines in the features
    join it where they predict well.

    Attributes:
        learnt: the S masks.
        patches: (Y, X), of the features.
        scale, by_patch, by_fill: how far apart masks are (see `kernels.Metric`).
        weights: `(S, Q)`, of the kernels in the logits of the targets and, where there are rivals, in the
            logarithms of all probabilities.
        constants: `(Q,)`, of the same.
        lines: `(D, Q)`, of the features in the same.
        mix: `(L, 2)` or `(L, 3)`, how a logit comes of them (see `_inputs`).
        rivals: classes whose scores are wanted too.
        spread: `(L,)`, standard deviation of what is left of the logits.
        means: `(L,)`, the constant of `l`.
        slopes: `(L, D)`, its slopes.
        variance: `(L,)`, mean variance of a score around its prediction.
        candidates: for each mask that is picked.
    """

    learnt: Masks
    patches: tuple[int, int]
    scale: float
    by_patch: Float64[np.ndarray, "Y X"]
    by_fill: Float64[np.ndarray, "K K"]
    weights: Float64[np.ndarray, "S Q"]
    constants: Float64[np.ndarray, " Q"]
    lines: Float64[np.ndarray, "D Q"]
    mix: Float64[np.ndarray, "L inputs"]
    rivals: tuple[int, ...]
    spread: Float64[np.ndarray, " L"]
    means: Float64[np.ndarray, " L"]
    slopes: Float64[np.ndarray, "L D"]
    variance: Float64[np.ndarray, " L"]
    candidates: int

    @property
    def weight(self) -> float:
        """Of a mask picked, beside 1 of one that nobody picked: its score tells that much more, or more.

        It does not depend on the scores: if what seems luckier weighed more, the maps would be biased. (That
        there is a guide may depend on the opening's: a bias of some hundredths of a standard error.)
        """
        return 2.2 + 0.4 * float(np.log2(max(len(self.learnt), 512) / 512))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a guide makes of the candidates of one unit.

    Attributes:
        picked: `(N,)`, places of the masks to be scored among the candidates.
        odds: `(N,)`, the probability with which each of them was picked.
        best: `(N, L)`, `g` of each of them.
        bend: `(C, L)`, `g - l` of every candidate.
    """

    picked: Int64[np.ndarray, " N"]
    odds: Float64[np.ndarray, " N"]
    best: Float64[np.ndarray, "N L"]
    bend: Float64[np.ndarray, "C L"]


@dataclass(frozen=True, eq=False)
class Picked(Choice):
    """A choice, with the scores of the masks picked: of the targets, then of their rivals."""

    scores: Float64[np.ndarray, "N L+R"]


def candidates(spec: ExplainSpec, unit: Unit, each: int) -> Masks:
    """The masks among which those of a unit are picked, so many for each; no two units have one in common."""
    first = _FIRST_CANDIDATE + _MOST_CANDIDATES * unit.start
    return draw(spec, first, first + each * len(unit))


@one_blas_thread
def choose(
    spec: ExplainSpec,
    size: tuple[int, int],
    guide: Guide,
    unit: Unit,
    device: torch.device | str = "cpu",
) -> tuple[Choice, Masks]:
    """As many of a unit's candidates as it has masks, and these masks: a pure function of its arguments.

    Every candidate is picked with its own odds exactly, by systematic sampling.
    """
    masks = candidates(spec, unit, guide.candidates)
    best, noise, line = predict(spec, size, guide, masks, device)
    odds = _odds(noise, len(unit))
    until = np.cumsum(odds)
    ticks = uniform(spec, _FIRST_CANDIDATE + _MOST_CANDIDATES * unit.start) + np.arange(len(unit))
    picked = np.minimum(np.searchsorted(until, ticks, side="right"), len(masks) - 1)
    return Choice(picked, odds[picked], best[picked], best - line), masks[picked]


def predict(
    spec: ExplainSpec,
    size: tuple[int, int],
    guide: Guide,
    masks: Masks,
    device: torch.device | str = "cpu",
) -> tuple[Float64[np.ndarray, "C L"], Float64[np.ndarray, " C"], Float64[np.ndarray, "C L"]]:
    """`g` of any masks, how much noise what it leaves of their scores brings, and `l`; the device does the
    better part of it.
    """
    features = Features(spec, size, guide.patches)
    parts = guide.learnt.cells, guide.learnt.shift_words, guide.by_patch, guide.by_fill
    contents = [part.tobytes() for part in parts]
    windows = _windows_of(spec, size, guide.patches, guide.scale, *contents, str(device))
    best, line = (np.empty((len(masks), len(guide.means))) for _ in range(2))
    noise = np.empty(len(masks))
    for start in range(0, len(masks), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = features(masks[part])
        line[part] = guide.means + found @ guide.slopes.T
        known = guide.constants + windows.similar(found, guide.weights) + found @ guide.lines
        best[part], doubt = logistic_moments(_mixed(guide.mix, known), guide.spread)
        doubts = (doubt / np.maximum(guide.variance, 1e-300)).sum(axis=1)
        noise[part] = doubts**0.5 * leverage(spec, found, guide.patches)
    return best, noise, line


def learn(
    spec: ExplainSpec,
    size: tuple[int, int],
    masks: Masks,
    scores: Float64[np.ndarray, "N L+R"],
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
    if not -_ROUNDING <= scores.min() <= scores.max() <= 1 + _ROUNDING:
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
    inputs, seen = _inputs(unseen, targets), truth[judges]
    mix = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(inputs, seen.T, strict=True)])
    spread = (seen - _mixed(mix, unseen)).std(axis=0)

    basis, fresh = _fresh_features(spec, size, grid)
    unknown = constants + windows.similar(fresh, weights) + fresh @ lines
    best, doubt = logistic_moments(_mixed(mix, unknown), spread)
    variance = doubt.mean(axis=0)
    missed = scores[judges, :targets] - logistic_moments(_mixed(mix, unseen), spread)[0]
    gain = np.where(variance > 0, (doubt**0.5).mean(axis=0) ** 2 / np.maximum(variance, 1e-300), 1)
    mine = (missed**2).mean(axis=0) * gain
    if left is not None:
        theirs = (left[-MOST_LEARNT:][judges] ** 2).mean(axis=0)
        if not (mine / np.maximum(theirs, 1e-300)).mean() < _WORTH:
            return None
    line = ridge(basis, fresh, best, np.ones(len(fresh), dtype=bool))
    bend = best - line.means - fresh @ line.slopes.T
    measure = metric.scale, metric.by_patch, metric.by_fill
    found = masks, grid, *measure, weights, constants, lines, mix, rivals, spread
    return Guide(*found, line.means, line.slopes, variance, _candidates(bend, mine))


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
    share: Float64[np.ndarray, "N L"], scores: Float64[np.ndarray, "N L+R"]
) -> Float64[np.ndarray, "N L+R+1"]:
    """Of the probabilities, and of all others together; from their mean, as logits of a softmax are known."""
    others = np.append(scores[:, share.shape[1] :], 1 - scores.sum(axis=1, keepdims=True), axis=1)
    logs = np.log(np.append(share, np.clip(others, _SMALLEST, 1), axis=1))
    centred: np.ndarray = logs - logs.mean(axis=1, keepdims=True)
    return centred


def _inputs(known: Float64[np.ndarray, "N Q"], targets: int) -> Float64[np.ndarray, "L N inputs"]:
    """What the logit of each target is a mixture of: 1, its own prediction, and where there are rivals the
    logit of the softmax of the predicted logarithms.
    """
    own, logs = known[:, :targets].T, known[:, targets:]
    columns = [np.ones_like(own), own]
    if logs.shape[1]:
        others = [np.delete(logs, target, axis=1) for target in range(targets)]
        top = [other.max(axis=1) for other in others]
        columns.append(
            np.stack(
                [
                    logs[:, target] - top[target] - np.log(np.exp(other - top[target][:, None]).sum(axis=1))
                    for target, other in enumerate(others)
                ]
            )
        )
    return np.stack(columns, axis=2)


def _mixed(
    mix: Float64[np.ndarray, "L inputs"], known: Float64[np.ndarray, "N Q"]
) -> Float64[np.ndarray, "N L"]:
    """The logits of the targets."""
    mixed: np.ndarray = np.einsum("lni,li->nl", _inputs(known, len(mix)), mix)
    return mixed


@lru_cache(maxsize=_KEPT)
def _windows_of(
    spec: ExplainSpec,
    size: tuple[int, int],
    grid: tuple[int, int],
    scale: float,
    cells: bytes,
    words: bytes,
    by_patch: bytes,
    by_fill: bytes,
    device: str,
) -> Windows:
    """Those of the masks that a guide has learnt from; it comes anew with every call, they do not."""
    learnt = Masks(
        np.frombuffer(cells, np.uint8).reshape(-1, *spec.grid).copy(),
        np.frombuffer(words, np.uint64).reshape(-1, 2),
    )
    metric = Metric(
        np.frombuffer(by_patch).reshape(grid), np.frombuffer(by_fill).reshape(spec.K, spec.K), scale
    )
    return Windows.of(Features(spec, size, grid)(learnt), metric, device)


@lru_cache(maxsize=_KEPT)
def _fresh_features(
    spec: ExplainSpec, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Basis, Float64[np.ndarray, "N D"]]:
    """Masks that no model sees, the same for all images: on them predictions are made linear."""
    count = _FRESH_PER_FEATURE * spec.K * grid[0] * grid[1]
    found = Features(spec, size, grid)(draw(spec, _FIRST_FRESH, _FIRST_FRESH + count))
    return Basis.of(count, found.sum(axis=0), found.T @ found), found


def _candidates(bend: Float64[np.ndarray, "N L"], left: Float64[np.ndarray, " L"]) -> int:
    """A power of two, near the number for which noise and time have the least product.

    Noise is that of picks, of which so much variance is left, and of `g - l` of so many candidates.
    """
    share = ((bend**2).mean(axis=0) / np.maximum(left, 1e-300)).mean()
    wanted = np.clip((share * _CANDIDATES_IN_TIME) ** 0.5, CANDIDATES, _MOST_CANDIDATES)
    return int(2 ** round(float(np.log2(wanted))))


def _odds(noise: Float64[np.ndarray, " C"], count: int) -> Float64[np.ndarray, " C"]:
    """Probabilities that sum to `count`, in proportion to the noise but for a floor, and at most 1."""
    mean = noise.mean()
    share = (1 - _FLOOR) * noise / mean + _FLOOR if mean > 0 else np.ones(len(noise))
    certain = np.zeros(len(noise), dtype=bool)
    while True:
        odds = np.where(certain, 1.0, share * (count - certain.sum()) / share[~certain].sum())
        if not (odds > 1).any():
            return odds
        certain |= odds > 1
