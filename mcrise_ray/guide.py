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

How it is learnt is in `mcrise_ray.learning`.

Axes: N masks picked; C candidates; M masks that candidates are compared with; L targets; R rivals; Q
quantities that are predicted; D features (see `variates`); W windows (see `kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from mcrise_ray.kernels import Metric, Windows
from mcrise_ray.masks import Masks, draw, uniform
from mcrise_ray.plan import MOST_LEARNT, Unit
from mcrise_ray.regression import logistic_moments
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.threads import one_blas_thread
from mcrise_ray.variates import Features, leverage

CANDIDATES = 8  # at least, for each mask that is picked
MOST_CANDIDATES = 32

_FIRST_CANDIDATE = 1 << 59  # the index of the first candidate, beyond every mask that can be asked for
_FLOOR = 0.1  # least share of the odds that is the same for all masks, so that no weight exceeds ten
# A guide that has learnt from a quarter of the most masks has three times that floor: one mask that such a
# guide was sure of, and wrong, had a third of all squares of an explanation. Over 20 images of GTSRB with 3
# seeds each, the worst error fell from 77 % of equation 9's variance to 41 %, the geometric mean by 3 %.
_FEWER = 4
_CHUNK = 1024  # masks predicted at a time
_KEPT = 4  # guides whose windows a worker keeps: they take up to 2 MiB each


@dataclass(frozen=True, eq=False)
class Guide:
    """Predictions of scores by their likeness to scores that are known: kernel ridge regression of logits.

    The kernel is a sum, over overlapping windows of the image, of Gaussians of the features in each: what
    neighbouring cells do together is learnt, and what cells far apart do is added up. Lines in the features
    join it where they predict well.

    Attributes:
        learnt: from how many masks.
        centres: M of these, which other masks are compared with.
        patches: (Y, X), of the features.
        scale, by_patch, by_fill: how far apart masks are (see `kernels.Metric`).
        weights: `(W, M, Q)`, of the kernels in the logits of the targets and, where there are rivals, in the
            logarithms of all probabilities, for each window.
        constants: `(Q,)`, of the same.
        lines: `(D, Q)`, of the features in the same.
        mix: `(L, 2)` or `(L, 3)`, how a logit comes of them (see `inputs_of`).
        rivals: classes whose scores are wanted too.
        spread: `(L,)`, standard deviation of what is left of the logits.
        means: `(L,)`, the constant of `l`.
        slopes: `(L, D)`, its slopes.
        variance: `(L,)`, mean variance of a score around its prediction.
        candidates: for each mask that is picked.
    """

    learnt: int
    centres: Masks
    patches: tuple[int, int]
    scale: float
    by_patch: Float64[np.ndarray, "Y X"]
    by_fill: Float64[np.ndarray, "K K"]
    weights: Float32[np.ndarray, "W M Q"]
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
        return 2.2 + 0.4 * float(np.log2(max(self.learnt, 512) / 512))

    @property
    def floor(self) -> float:
        """Share of the odds that is the same for all masks: larger where it has learnt from few."""
        return _FLOOR * (1 + float(np.log2(np.clip(MOST_LEARNT / self.learnt, 1, _FEWER))))


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

    scores: Float64[np.ndarray, "N columns"]


def candidates(spec: ExplainSpec, unit: Unit, each: int) -> Masks:
    """The masks among which those of a unit are picked, so many for each; no two units have one in common."""
    first = _FIRST_CANDIDATE + MOST_CANDIDATES * unit.start
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
    odds = _odds(noise, len(unit), guide.floor)
    until = np.cumsum(odds)
    ticks = uniform(spec, _FIRST_CANDIDATE + MOST_CANDIDATES * unit.start) + np.arange(len(unit))
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
    parts = guide.centres.cells, guide.centres.shift_words, guide.by_patch, guide.by_fill
    contents = [part.tobytes() for part in parts]
    windows = _windows_of(spec, size, guide.patches, guide.scale, *contents, str(device))
    targets = len(guide.means)
    best, line = (np.empty((len(masks), targets)) for _ in range(2))
    noise = np.empty(len(masks))
    # By torch, which has all threads (see `one_blas_thread`).
    lines = torch.from_numpy(np.concatenate([guide.slopes.T, guide.lines], axis=1))
    for start in range(0, len(masks), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = features(masks[part])
        along = (torch.from_numpy(found) @ lines).numpy()
        line[part] = guide.means + along[:, :targets]
        known = guide.constants + windows.similar(found, guide.weights) + along[:, targets:]
        best[part], doubt = logistic_moments(mixed(guide.mix, known), guide.spread)
        doubts = (doubt / np.maximum(guide.variance, 1e-300)).sum(axis=1)
        noise[part] = doubts**0.5 * leverage(spec, found, guide.patches)
    return best, noise, line


def inputs_of(known: Float64[np.ndarray, "N Q"], targets: int) -> Float64[np.ndarray, "L N inputs"]:
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


def mixed(
    mix: Float64[np.ndarray, "L inputs"], known: Float64[np.ndarray, "N Q"]
) -> Float64[np.ndarray, "N L"]:
    """The logits of the targets."""
    mixed: np.ndarray = np.einsum("lni,li->nl", inputs_of(known, len(mix)), mix)
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
    """Those of a guide's centres; it comes anew with every call, they do not."""
    centres = Masks(
        np.frombuffer(cells, np.uint8).reshape(-1, *spec.grid).copy(),
        np.frombuffer(words, np.uint64).reshape(-1, 2),
    )
    metric = Metric(
        np.frombuffer(by_patch).reshape(grid), np.frombuffer(by_fill).reshape(spec.K, spec.K), scale
    )
    return Windows.of(Features(spec, size, grid)(centres), metric, device)


def _odds(noise: Float64[np.ndarray, " C"], count: int, floor: float) -> Float64[np.ndarray, " C"]:
    """Probabilities that sum to `count`, in proportion to the noise but for a floor, and at most 1."""
    mean = noise.mean()
    share = (1 - floor) * noise / mean + floor if mean > 0 else np.ones(len(noise))
    certain = np.zeros(len(noise), dtype=bool)
    while True:
        odds = np.where(certain, 1.0, share * (count - certain.sum()) / share[~certain].sum())
        if not (odds > 1).any():
            return odds
        certain |= odds > 1
