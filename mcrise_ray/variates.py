"""What a mask's score can be predicted from, so that only what is left over carries noise into the maps.

The features `phi(n)` are the coverages averaged over patches of the image, minus their mean `p_mask / K`. A
score is predicted by `g(phi)`: a ridge regression, or a logistic curve of one where that predicts better.
Then `S = eq9[f - g] + E[eq9[g - l]] + E[eq9[l]]` with `l` linear in `phi`: the first term is measured on the
masks that were scored, the second on fresh masks that no model sees, the third has a closed form. No mask is
predicted by a fit that saw its score (cross-fitting), so each term is unbiased whatever was fitted.

Axes: N masks; L targets; F fits (one per fold of the masks, then one of all); D features, which are Y patch
rows, K fills and X patch columns; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from mcrise_ray.masks import (
    Masks,
    draw,
    method_weights,
    one_per_fill,
    overlap_kernels,
    sampled,
    stretched,
    upsampling_tables,
)
from mcrise_ray.regression import Basis, curve, logistic, ridge
from mcrise_ray.spec import ExplainSpec

FOLDS = 5  # mask n belongs to fold n % FOLDS
FRESH_PER_MASK = 4  # fresh masks for each scored one: what is left of their noise is small beside the rest
FIRST_FRESH = 1 << 60  # the index of the first fresh mask, beyond every mask that can be asked for
CHUNK = 256  # masks whose features are held at a time

_MOST_FEATURES = 400  # a factorisation takes 0.05 s
# Patches for each cell along an axis, where there is one fill: scores depend on where in a cell a mask was
# cut. Lines tell no more from smaller ones, and with more fills, masks are too few to tell much of that.
_PER_CELL = 1.25
_MOST_CURVES = 8  # targets that logistic curves are tried for; with more, they would cost more than they gain


@dataclass(frozen=True)
class Fit:
    """Predictions of scores, one row of coefficients per fold that was left out, and a last one from all.

    Attributes:
        masks: masks 0 to `masks - 1` were fitted; the predictions of later masks are those of the last row.
        patches: (Y, X).
        means: `(F, L)`, the constant of `l`.
        slopes: `(F, L, D)`, its slopes.
        curved: `(F, L)`, where `g` is logistic; elsewhere `g` is `l`.
        bounds: `(F, L, 2)`, the values between which the logistic curve runs.
        logits: `(F, L)`, its constant.
        logit_slopes: `(F, L, D)`, its slopes.
    """

    masks: int
    patches: tuple[int, int]
    means: Float64[np.ndarray, "F L"]
    slopes: Float64[np.ndarray, "F L D"]
    curved: Bool[np.ndarray, "F L"]
    bounds: Float64[np.ndarray, "F L 2"]
    logits: Float64[np.ndarray, "F L"]
    logit_slopes: Float64[np.ndarray, "F L D"]

    def rows(self, start: int, stop: int) -> Int64[np.ndarray, " N"]:
        """Which row predicts masks `start` to `stop - 1`: one whose fit did not see their scores."""
        index = np.arange(start, stop)
        return np.where(index < self.masks, index % FOLDS, FOLDS)

    def predict(
        self, features: Float64[np.ndarray, "N D"], rows: Int64[np.ndarray, " N"]
    ) -> tuple[Float64[np.ndarray, "N L"], Float64[np.ndarray, "N L"]]:
        """`g` and `l` of each mask, by the row given for it; they are equal where nothing is curved."""
        line = np.empty((len(rows), self.means.shape[1]))
        best = np.empty_like(line)
        for row in np.unique(rows):
            mine = rows == row
            line[mine] = self.means[row] + features[mine] @ self.slopes[row].T
            best[mine] = line[mine]
            if self.curved[row].any():
                low, high = self.bounds[row].T
                bent = logistic(self.logits[row] + features[mine] @ self.logit_slopes[row].T)
                best[mine] = np.where(self.curved[row], low + (high - low) * bent, line[mine])
        return best, line

    def expected(
        self, rows: Int64[np.ndarray, " N"], fills: int
    ) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, "L Y K X"]]:
        """Constants and slopes of `l`, summed over masks with these rows."""
        counts = np.bincount(rows, minlength=len(self.means)).astype(np.float64)
        slopes = np.tensordot(counts, self.slopes, 1)
        return counts @ self.means, slopes.reshape(-1, self.patches[0], fills, self.patches[1])


class Features:
    """Patch means of coverages.

    Args:
        spec: decides grid, fills and `p_mask`.
        size: (H, W).
        patches: (Y, X), how many there are along each axis.
    """

    def __init__(self, spec: ExplainSpec, size: tuple[int, int], patches: tuple[int, int]) -> None:
        self._fills, self._size = one_per_fill(spec.K), size
        self._mean = spec.p_mask / spec.K
        self._rows, self._columns = (
            torch.from_numpy(_patch_means(count, pixels) @ upsampling_tables(cells, pixels))
            for count, cells, pixels in zip(patches, spec.grid, size, strict=True)
        )

    def __call__(self, masks: Masks) -> Float64[np.ndarray, "N D"]:
        """`phi` of each mask."""
        means = sampled(masks, self._size, self._rows, self._columns, self._fills)
        features: np.ndarray = means.flatten(1).numpy() - self._mean
        return features


def fresh(
    spec: ExplainSpec, fit: Fit, features: Features, start: int, stop: int
) -> tuple[Masks, Float64[np.ndarray, "N L"]] | None:
    """Masks that no model sees, and `g - l` of each: the curved part of predictions, for masks `start` to
    `stop - 1`. Each mask whose prediction is curved has `FRESH_PER_MASK` of its own, one after the other.

    Returns:
        None where no prediction is curved.
    """
    rows = fit.rows(start, stop)
    rows = np.where(fit.curved[rows].any(axis=1), rows, -1).repeat(FRESH_PER_MASK)
    bent = rows >= 0
    if not bent.any():
        return None
    masks = draw(spec, FIRST_FRESH + FRESH_PER_MASK * start, FIRST_FRESH + FRESH_PER_MASK * stop)[bent]
    best, line = fit.predict(features(masks), rows[bent])
    return masks, best - line


def patches(
    spec: ExplainSpec, size: tuple[int, int], masks: int, per_cell: float = _PER_CELL
) -> tuple[int, int]:
    """Patch rows and columns for a fit to so many masks: so many per cell along an axis where there is one
    fill, one where there are more; or fewer and larger ones.

    Ridge regression makes good use of up to two features per mask; their number is bounded by the time that
    the factorisation takes.
    """
    finer = per_cell if spec.K == 1 else 1.0
    wanted = [min(int(finer * cells), pixels) for cells, pixels in zip(spec.grid, size, strict=True)]
    most = min(_MOST_FEATURES, 2 * masks) / spec.K
    shrink = min(1.0, (most / (wanted[0] * wanted[1])) ** 0.5)
    rows, columns = (max(1, int(count * shrink)) for count in wanted)
    return min(rows, max(1, int(most / columns))), min(columns, max(1, int(most / rows)))


def expectation(
    spec: ExplainSpec,
    size: tuple[int, int],
    slopes: Float64[np.ndarray, "L Y K X"],
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "L K H W"]:
    """`Ky B_k Kx` of scores `phi . slopes`, with `B_k` the slopes spread over their patches.

    It is what MC-RISE (eq. 9) gives for such scores in expectation. The raw sum alone gives
    `Ky B_k Kx - p_mask / K sum_j Ky B_j Kx`, and the baseline alone its second term, because
    `Cov(m_k, m_j) = (q delta_kj - q**2) Ky Kx` with `q = p_mask / K`.
    """
    ky, kx = _overlaps_with_patches(spec.grid, size, (slopes.shape[1], slopes.shape[3]))
    return stretched(torch.from_numpy(slopes).to(dtype), ky.to(dtype), kx.to(dtype)).transpose(1, 2)


def leverage(
    spec: ExplainSpec, features: Float64[np.ndarray, "N D"], patches: tuple[int, int]
) -> Float64[np.ndarray, " N"]:
    """Root mean square of what each mask adds to the maps for a score of 1 (eq. 9, or 2), patches for pixels.

    Masks with many of the rare cells that are filled add most.
    """
    # In float32, by torch, masks last: it must take no time beside a fast model.
    covered = torch.from_numpy(features).float().T.reshape(patches[0], spec.K, -1)
    weights = method_weights(spec).float()
    filled = weights[1:] - weights[0]  # what a fill covers is not kept
    constant = weights[0] + filled.mean(dim=0) * spec.p_mask
    added = torch.matmul(filled.T, covered).add_(constant[:, None])
    squares = added.square_().mean(dim=1).view(patches[0] * patches[1], -1).mean(dim=0)
    found: np.ndarray = squares.sqrt_().double().numpy()
    return found


@lru_cache(maxsize=4)
def _overlaps_with_patches(
    grid: tuple[int, int], size: tuple[int, int], patches: tuple[int, int]
) -> tuple[Float64[Tensor, "H Y"], Float64[Tensor, "W X"]]:
    """`(Ky, Kx)` of the means of patches."""
    ky, kx = (
        torch.from_numpy(kernel @ _patch_means(count, pixels).T)
        for kernel, count, pixels in zip(overlap_kernels(grid, size), patches, size, strict=True)
    )
    return ky, kx


def fit_scores(
    spec: ExplainSpec,
    size: tuple[int, int],
    scores: Float64[np.ndarray, "N L"],
    grid: tuple[int, int] | None = None,
) -> Fit:
    """Predictions fitted to the scores of masks 0 to N - 1, by the means of as many patches as suit them, or
    of those of a given grid.

    A mask is predicted by the fit to the other four folds; everything about that fit, its ridge and its curve
    too, is chosen without the fold. The mean alone is among the choices, and keeps its place where nothing
    predicts better.
    """
    count, targets = scores.shape
    grid = grid or patches(spec, size, count)
    bases = _bases(spec, size, count, grid)
    features = np.concatenate([part for _, part in _features(spec, size, count, grid)])
    trained = np.arange(count) % FOLDS != np.arange(FOLDS + 1)[:, None]
    lines = [ridge(basis, features, scores, mine) for basis, mine in zip(bases, trained, strict=True)]
    means, slopes = np.stack([line.means for line in lines]), np.stack([line.slopes for line in lines])
    strengths = np.stack([line.strengths for line in lines])

    curved = np.zeros(means.shape, dtype=bool)
    bounds, logits, logit_slopes = np.zeros((*means.shape, 2)), np.zeros_like(means), np.zeros_like(slopes)
    for target in range(targets if targets <= _MOST_CURVES else 0):
        found = curve(
            bases[-1], features, scores[:, target], trained, strengths[:, target], 1 / FRESH_PER_MASK
        )
        curved[:, target], bounds[:, target] = found.chosen, found.bounds
        logits[:, target], logit_slopes[:, target] = found.logits, found.slopes
        for row in np.flatnonzero(found.chosen).tolist():
            bent = found.values(row, features)[:, None]
            line = ridge(bases[row], features, bent, trained[row])
            means[row, target], slopes[row, target] = line.means[0], line.slopes[0]
    return Fit(count, grid, means, slopes, curved, bounds, logits, logit_slopes)


@lru_cache(maxsize=8)
def _bases(spec: ExplainSpec, size: tuple[int, int], count: int, grid: tuple[int, int]) -> tuple[Basis, ...]:
    """The basis of each fit: those of all folds but one, then that of all. No image has a part in them."""
    depth = spec.K * grid[0] * grid[1]
    samples, totals = np.zeros(FOLDS, dtype=int), np.zeros((FOLDS, depth))
    squares = np.zeros((FOLDS, depth, depth))
    for start, features in _features(spec, size, count, grid):
        for fold in range(FOLDS):
            mine = features[(fold - start) % FOLDS :: FOLDS]
            samples[fold] += len(mine)
            totals[fold] += mine.sum(axis=0)
            squares[fold] += mine.T @ mine
    # Added, not taken away from those of all: that would leave roundings of folds that are not there.
    trained = np.arange(FOLDS) != np.arange(FOLDS + 1)[:, None]
    return tuple(
        Basis.of(int(samples[mine].sum()), totals[mine].sum(axis=0), squares[mine].sum(axis=0))
        for mine in trained
    )


def _features(
    spec: ExplainSpec, size: tuple[int, int], count: int, grid: tuple[int, int]
) -> Iterator[tuple[int, Float64[np.ndarray, "N D"]]]:
    """Features of masks 0 to `count - 1`, a chunk at a time, each with the index of its first mask."""
    features = Features(spec, size, grid)
    for start in range(0, count, CHUNK):
        yield start, features(draw(spec, start, min(start + CHUNK, count)))


@lru_cache(maxsize=64)
def _patch_means(patches: int, pixels: int) -> Float64[np.ndarray, "patches pixels"]:
    """Weights of the mean over each of `patches` equal stretches of an axis; pixels on borders are shared."""
    edges = np.arange(patches + 1)[:, None] * (pixels / max(patches, 1))
    reached = np.clip(edges - np.arange(pixels), 0, 1)
    means: np.ndarray = (reached[1:] - reached[:-1]) * (patches / pixels)
    return means
