"""Ridge and logistic regression of many scores on the same features, with every choice made by itself.

The features' second moments do not depend on the scores, so they are diagonalised once (`Basis`) and every
ridge strength of every target costs only products.

Axes: N samples; L targets; D features; C columns, which are regressions done side by side; F fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

ROUNDING = 1e-4  # how far probabilities may lie outside [0, 1]

_RATIOS = 10.0 ** np.arange(-3, 2.1, 0.5)  # ridge strengths tried, in units of the mean eigenvalue
_FEWEST = 8  # samples to fit slopes to
_VISIBLE = 1e-12  # of all squares, at least: smaller second moments are roundings
_CAUTION = 2.0  # standard deviations by which a ridge must beat what it gains on pure noise
_OUTLIERS = 4.0  # how much more those are where few scores make most of the variance
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_STEPS = 12  # of a descent: it has converged in every direction that the ridge leaves visible


@dataclass(frozen=True)
class Basis:
    """Second moments of centred features over `count` samples, as `vectors @ diag(values) @ vectors.T`."""

    count: int
    mean: Float64[np.ndarray, " D"]
    values: Float64[np.ndarray, " D"]
    vectors: Float64[np.ndarray, "D D"]

    @staticmethod
    def of(count: int, total: Float64[np.ndarray, " D"], squares: Float64[np.ndarray, "D D"]) -> Basis:
        """From the features' number, sum and sum of outer products."""
        mean = total / max(count, 1)
        values, vectors = np.linalg.eigh(squares - count * np.outer(mean, mean))
        # Of features that are all the same, as where no mask has a masked cell, roundings are left: a ridge
        # in units of these would hold nothing back.
        return Basis(count, mean, np.where(values > _VISIBLE * np.trace(squares), values, 0), vectors)


@dataclass(frozen=True)
class Line:
    """`means + features @ slopes.T`; the strength of the ridge is infinite where the slopes are zero."""

    means: Float64[np.ndarray, " L"]
    slopes: Float64[np.ndarray, "L D"]
    strengths: Float64[np.ndarray, " L"]


def ridge(
    basis: Basis,
    features: Float64[np.ndarray, "N D"],
    scores: Float64[np.ndarray, "N L"],
    trained: Bool[np.ndarray, " N"],
) -> Line:
    """Ridge regression on the trained samples, each target with the strength that predicts it best.

    Prediction errors are estimated by generalised cross-validation, which knows the samples it fits and no
    others. It is too kind to weak ridges where samples are few, so a ridge must also beat the mean by more
    than it would on noise, and may spend at most a quarter of a degree of freedom per sample.
    """
    targets, count = scores.shape[1], basis.count
    flat = np.zeros((targets, features.shape[1])), np.full(targets, np.inf)
    if count == 0:
        return Line(np.zeros(targets), *flat)
    pivot = scores[trained.argmax()]  # so that the mean of equal scores is exactly their value
    means = pivot + (scores[trained] - pivot).mean(axis=0)
    if count < _FEWEST or not basis.values.any():
        return Line(means, *flat)
    left = np.where(trained[:, None], scores - means, 0)
    along = basis.vectors.T @ (features.T @ left)
    energy = (left**2).sum(axis=0)

    strengths = basis.values.mean() * _RATIOS
    shrunk = basis.values / (basis.values + strengths[:, None])
    weight = (basis.values + 2 * strengths[:, None]) / (basis.values + strengths[:, None]) ** 2
    error = np.maximum(energy - weight @ along**2, 0)
    spent = 1 + shrunk.sum(axis=1)
    # On noise a fit removes shrunk.sum() squares of `count`, give or take the root of this.
    outliers = count * ((left**2 / np.maximum(energy, 1e-300)) ** 2).sum(axis=0)
    chance = 2 * (shrunk**2).sum(axis=1)[:, None] + _OUTLIERS * np.outer(spent**2 / count, outliers)
    luck = 1 + _CAUTION * np.sqrt(chance) / count
    allowed = spent <= count / 4
    error = (error * luck / (1 - spent[:, None] / count) ** 2)[allowed]
    if not len(error):
        return Line(means, *flat)
    best = error.argmin(axis=0)
    better = error.min(axis=0) < energy / (1 - 1 / count) ** 2
    chosen = np.where(better, strengths[allowed][best], np.inf)
    slopes = (basis.vectors @ (along / (basis.values[:, None] + chosen))).T
    return Line(means - slopes @ basis.mean, slopes, chosen)


@dataclass(frozen=True)
class Curve:
    """`low + (high - low) * logistic(logits + features @ slopes.T)`, one per fit.

    Attributes:
        chosen: `(F,)`, whether it predicts better than the line; the rest means nothing where it does not.
        bounds: `(F, 2)`, low and high.
        logits: `(F,)`.
        slopes: `(F, D)`.
    """

    chosen: Bool[np.ndarray, " F"]
    bounds: Float64[np.ndarray, "F 2"]
    logits: Float64[np.ndarray, " F"]
    slopes: Float64[np.ndarray, "F D"]

    def values(self, fit: int, features: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, " N"]:
        """The curve of one fit."""
        low, high = self.bounds[fit]
        values: np.ndarray = low + (high - low) * logistic(self.logits[fit] + features @ self.slopes[fit])
        return values


def curve(
    basis: Basis,
    features: Float64[np.ndarray, "N D"],
    scores: Float64[np.ndarray, " N"],
    trained: Bool[np.ndarray, "F N"],
    strengths: Float64[np.ndarray, " F"],
    price: float,
) -> Curve:
    """Logistic regressions, and for each whether it beats the line with the given strength.

    The last fit is trained on everything; fit v of the others leaves fold v out. Whether its curve is better
    is judged on the next fold, by a curve and a line fitted to the remaining ones; the last fit is judged on
    what all the others were.

    Args:
        basis: of all samples.
        features: of all samples.
        scores: of all samples.
        trained: which samples each fit may see.
        strengths: of each fit's line; no curve is tried where it is infinite.
        price: share of the squared difference between curve and line that the curve must pay for.
    """
    fits, folds = len(trained), len(trained) - 1
    bounds = np.array([_bounds(scores[mine]) for mine in trained])
    low, span = bounds.T[0], bounds.T[1] - bounds.T[0]
    tried = np.isfinite(strengths) & (span > 0)
    if not tried.any():
        return Curve(tried, bounds, np.zeros(fits), np.zeros((fits, features.shape[1])))
    units = np.clip((scores[:, None] - low) / np.where(tried, span, 1), 0, 1)
    next_fold = [(fold + 1) % folds for fold in range(folds)]
    without_both = trained[:folds] & trained[next_fold]

    # Side by side: the curves asked for, then per fold a curve and a line to judge by.
    mean = (units * trained.T).sum(axis=0) / np.maximum(trained.sum(axis=1), 1)
    line = np.where(tried, strengths, 1)
    # A curve is flatter than a line by its variance; half of it, because scores crowd at the bounds.
    bent = np.maximum(mean * (1 - mean) / 2, 1e-6) * line
    column = np.concatenate([np.arange(fits), np.arange(folds), np.arange(folds)])
    constants, slopes = _descend(
        basis,
        features,
        units[:, column],
        np.concatenate([trained, without_both, without_both]).T,
        np.concatenate([bent, bent[:folds], line[:folds]]),
        np.arange(len(column)) < fits + folds,
    )

    excess = []
    for fold in range(folds):
        judged = ~trained[next_fold[fold]]
        pair = [fits + fold, fits + folds + fold]
        by_curve, by_line = (constants[pair] + features[judged] @ slopes[:, pair]).T
        by_curve = logistic(by_curve)
        truth = units[judged, fold]
        error = (truth - by_curve) ** 2 + price * (by_curve - by_line) ** 2
        excess.append(error - (truth - by_line) ** 2)
    excess.append(np.concatenate(excess))
    chosen = tried & [_clearly_negative(values) for values in excess]
    return Curve(chosen, bounds, constants[:fits], slopes[:, :fits].T)


def logistic(logits: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-logits))`, without overflow, and as exact near 0 as elsewhere."""
    shares: np.ndarray = 1 / (1 + np.exp(np.minimum(-logits, 700.0)))
    return shares


def logistic_moments(
    logits: Float64[np.ndarray, "N L"], spread: Float64[np.ndarray, " L"]
) -> tuple[Float64[np.ndarray, "N L"], Float64[np.ndarray, "N L"]]:
    """Mean and variance of a probability whose logit is normally distributed (Gauss-Hermite quadrature)."""
    shares = logistic(logits[..., None] + spread[:, None] * _NODES)
    mean: np.ndarray = shares @ _NODE_WEIGHTS
    return mean, np.maximum((shares**2) @ _NODE_WEIGHTS - mean**2, 0)


def _bounds(scores: np.ndarray) -> tuple[float, float]:
    """0 and 1 for what may be probabilities; for any other scores, a little beyond those seen."""
    if not len(scores):
        return 0.0, 0.0
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        return low, high
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return 0.0, 1.0
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def _clearly_negative(values: np.ndarray) -> bool:
    """The mean is below zero by more than its standard error."""
    if len(values) < _FEWEST:
        return False
    return bool(values.mean() + values.std() / np.sqrt(len(values)) < 0)


def _descend(
    basis: Basis,
    features: Float64[np.ndarray, "N D"],
    values: Float64[np.ndarray, "N C"],
    trained: Bool[np.ndarray, "N C"],
    strengths: Float64[np.ndarray, " C"],
    bent: Bool[np.ndarray, " C"],
) -> tuple[Float64[np.ndarray, " C"], Float64[np.ndarray, "D C"]]:
    """Constants and slopes of penalised least squares, or of maximal likelihood where `bent`.

    Steps are those of a quadratic that lies above the loss everywhere (a logistic loss curves by at most a
    quarter), so they cannot overshoot, with Nesterov's momentum. It has the features around their mean: a
    feature that never changes would else stand for the constant, with slopes that nothing holds back.
    """
    features = features - basis.mean
    curvature = np.where(bent, 0.25, 1.0)
    samples = np.maximum(trained.sum(axis=0), 1)
    damping = 1 / (basis.values[:, None] * curvature + strengths)
    mean = np.where(trained, values, 0).sum(axis=0) / samples
    safe = np.clip(mean, 1e-6, 1 - 1e-6)
    constants = np.where(bent, np.log(safe / (1 - safe)), mean)
    slopes = previous = np.zeros((features.shape[1], values.shape[1]))
    for step in range(_STEPS):
        ahead = slopes + step / (step + 3) * (slopes - previous)
        predicted = constants + features @ ahead
        left = np.where(trained, values - np.where(bent, logistic(predicted), predicted), 0)
        gradient = features.T @ left - strengths * ahead
        previous, slopes = slopes, ahead + basis.vectors @ (damping * (basis.vectors.T @ gradient))
        constants = constants + left.sum(axis=0) / (samples * curvature)
    return constants - basis.mean @ slopes, slopes
