"""Scores of masks to saliency maps: zero, accumulate, combine, finalize, in float64.

The sums of equation 9 are linear in the cells, so scores are added into one bucket per shift at low
resolution (`UnitSums.accumulate`), combined so, and upsampled once (`Partial.finalize`). `Partial` is what a
unit sends home.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels; Y, X
points of a coarse lattice, or patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from mcrise_ray.masks import Masks, cell_size, one_per_fill, overlap_kernels, sampled, upsampling_tables
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import expectation

_MOST_SQUARES = 4096  # sums of squares per target: with more, they would cost more than the masks


class UnitSums:
    """Sums over the masks of one unit, at low resolution; memory does not depend on their number.

    Args:
        spec: decides the weights of equation 9.
        targets: L.
        size: (H, W).
    """

    def __init__(self, spec: ExplainSpec, targets: int, size: tuple[int, int]) -> None:
        self._spec, self._size = spec, size
        self._score_sum = np.zeros(targets)
        (h, w), (span_y, span_x) = spec.grid, cell_size(spec.grid, size)
        self._buckets = np.zeros((targets, spec.K, span_y, h, span_x, w))
        self._fill_stride = span_y * h * span_x * w
        # Bucket of (sy, y, sx, x) without the fill and the shift: the axes lie as they are multiplied.
        self._cell_offset = (np.arange(h)[:, None] * span_x * w + np.arange(w)).ravel()
        self._shift_strides = np.array([h * span_x * w, w])
        self._points = rows, columns, values = _weights_at_points(spec, size)
        self._squares = np.zeros((targets, rows.shape[1], values.shape[1], columns.shape[1]))

    def accumulate(self, masks: Masks, scores: Float64[np.ndarray, "B L"]) -> None:
        """Add `f_n`, or what a prediction leaves of it, to the bucket of every masked cell of mask n
        (Algorithm 1, lines 14 and 15).
        """
        cells = masks.cells.reshape(len(masks), -1)
        mask, cell = np.nonzero(cells)
        fill = cells[mask, cell].astype(np.int64) - 1
        shift_offset = masks.shifts(self._size) @ self._shift_strides
        bucket = fill * self._fill_stride + self._cell_offset[cell] + shift_offset[mask]
        for target, column in enumerate(scores.T):
            np.add.at(self._buckets[target].reshape(-1), bucket, column[mask])
        self._score_sum += scores.sum(axis=0)

    def square(self, masks: Masks, scores: Float64[np.ndarray, "B L"]) -> None:
        """Add the squares of what each mask adds to the maps, at the points of `lattice`."""
        rows, columns, values = self._points
        weights = sampled(masks, self._size, rows, columns, values).square_().flatten(1)
        added = torch.from_numpy(scores**2).float().T @ weights
        self._squares += added.view(self._squares.shape).numpy()

    def partial(
        self,
        masks: int,
        means: Float64[np.ndarray, " L"] | None = None,
        slopes: Float64[np.ndarray, "L Y K X"] | None = None,
        weight: float | None = None,
        squared_weight: float | None = None,
    ) -> Partial:
        """The sums over so many masks, with what was predicted of their scores (see `Partial`)."""
        targets = len(self._score_sum)
        return Partial(
            masks,
            float(masks) if weight is None else weight,
            float(masks) if squared_weight is None else squared_weight,
            self._size,
            self._score_sum,
            self._buckets,
            self._squares,
            np.zeros(targets) if means is None else means,
            np.zeros((targets, 0, self._spec.K, 0)) if slopes is None else slopes,
        )


@dataclass(frozen=True)
class Partial:
    """Sums over any set of whole units.

    Attributes:
        masks: number of masks that were scored.
        weight: sum of the weights of all masks summed; each has the weight 1 where none are picked.
        squared_weight: sum of the squares of those weights.
        size: (H, W) of the maps.
        scores: `(L,)`, sum of `f_n`, or of what a prediction left of it.
        buckets: `(L, K, sy, h, sx, w)`, the same sum over the masks of each shift that have the cell masked
            with fill k.
        squares: `(L, Y, M, X)`, sum of squares of what each mask adds to a map, at the points of `lattice`.
        means: `(L,)`, sum of the constants of the linear predictions; zero without predictions.
        slopes: `(L, Y, K, X)`, sum of their slopes.
    """

    masks: int
    weight: float
    squared_weight: float
    size: tuple[int, int]
    scores: Float64[np.ndarray, " L"]
    buckets: Float64[np.ndarray, "L K sy h sx w"]
    squares: Float64[np.ndarray, "L Y M X"]
    means: Float64[np.ndarray, " L"]
    slopes: Float64[np.ndarray, "L PY K PX"]

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return self.buckets.nbytes + self.squares.nbytes

    @staticmethod
    @lru_cache(maxsize=2)  # a driver begins many images with the same
    def zero(spec: ExplainSpec, targets: int, size: tuple[int, int]) -> Partial:
        """The sums over no masks; they are shared, and never written to."""
        return UnitSums(spec, targets, size).partial(0)

    def combine(self, other: Partial) -> Partial:
        """The sums over both; floating point makes the order matter, so units are combined by index."""
        if not self.masks:
            return other
        return Partial(
            self.masks + other.masks,
            self.weight + other.weight,
            self.squared_weight + other.squared_weight,
            self.size,
            self.scores + other.scores,
            self.buckets + other.buckets,
            self.squares + other.squares,
            self.means + other.means,
            self.slopes + other.slopes,
        )

    def of_target(self, place: int) -> Partial:
        """The sums of one target alone."""
        one = slice(place, place + 1)
        return Partial(
            self.masks,
            self.weight,
            self.squared_weight,
            self.size,
            self.scores[one],
            self.buckets[one],
            self.squares[one],
            self.means[one],
            self.slopes[one],
        )

    def finalize(self, spec: ExplainSpec) -> Maps:
        """Means and standard errors (eq. 2, 5 or 9, by the method)."""
        raw, baseline = self._measured(spec)
        measured = method_maps(spec, raw, baseline)
        predicted = expectation(spec, self.size, self.slopes) / self.weight
        kept = self.means[:, None, None] / self.weight - (spec.p_mask / spec.K) * predicted.sum(axis=1)
        raw, baseline = raw + (predicted + kept[:, None]), baseline + kept
        maps = method_maps(spec, raw, baseline)
        standard_error = np.full_like(maps, np.nan)
        if self.masks > 1:
            # Rounding may leave -1e-20.
            mean = measured**2 * (self.squared_weight / self.weight)
            variance = np.maximum(self._second_moments(spec) - mean, 0) / self.weight
            standard_error = np.sqrt(variance * (self.masks / (self.masks - 1)))
        return Maps(maps, raw, baseline, standard_error, _relative_error(maps, standard_error))

    def _measured(
        self, spec: ExplainSpec
    ) -> tuple[Float64[np.ndarray, "L K H W"], Float64[np.ndarray, "L H W"]]:
        """Mean raw and baseline sums: two matrix products for all shifts, fills and targets at once."""
        (height, width), K = self.size, spec.K
        rows, columns = (_all_shifts(*axis) for axis in zip(spec.grid, self.size, strict=True))
        wide = torch.tensor(self.buckets).view(-1, len(columns)) @ columns  # Ray hands out read-only arrays
        masked = (rows.T @ wide.view(-1, len(rows), width)).view(-1, K, height, width).numpy()
        kept = self.scores[:, None, None] - masked.sum(axis=1)
        return masked * (K / spec.p_mask) / self.weight, kept / (1 - spec.p_mask) / self.weight

    def _second_moments(self, spec: ExplainSpec) -> Float64[np.ndarray, "L M H W"]:
        """Mean square of what a mask adds to a map, at every pixel.

        Over the mean square of the weight, which is known exactly, it is an average of squared scores that
        changes slowly from pixel to pixel, so it is interpolated between the points of the lattice.
        """
        points = lattice(spec, self.size)
        weight = weight_moments(spec, self.size)
        at_points = self.squares.transpose(0, 2, 1, 3) / self.weight / weight[np.ix_(*points)]
        rows, columns = _between_points(spec, self.size)
        # By torch, like all of this: the threads of two libraries would wait for each other.
        between = torch.matmul(rows, torch.from_numpy(at_points)).matmul(columns.T)
        moments: np.ndarray = weight * between.numpy()
        return moments


@dataclass(frozen=True)
class Maps:
    """Finished maps in float64; see `Explanation` for the meaning of each."""

    maps: Float64[np.ndarray, "L M H W"]
    raw: Float64[np.ndarray, "L K H W"]
    baseline: Float64[np.ndarray, "L H W"]
    standard_error: Float64[np.ndarray, "L M H W"]
    relative_error: Float64[np.ndarray, " L"]


def lattice(
    spec: ExplainSpec, size: tuple[int, int]
) -> tuple[Int64[np.ndarray, " Y"], Int64[np.ndarray, " X"]]:
    """Rows and columns of the pixels at which squares are summed: every half cell, or fewer for many maps."""
    wanted = [min(2 * cells + 1, pixels) for cells, pixels in zip(spec.grid, size, strict=True)]
    shrink = (_MOST_SQUARES / (spec.K * wanted[0] * wanted[1])) ** 0.5
    rows, columns = (
        np.linspace(0, pixels - 1, max(1, int(count * min(1.0, shrink)))).round().astype(np.int64)
        for count, pixels in zip(wanted, size, strict=True)
    )
    return rows, columns


@lru_cache(maxsize=8)
def _weights_at_points(
    spec: ExplainSpec, size: tuple[int, int]
) -> tuple[Float32[Tensor, "sy Y h"], Float32[Tensor, "sx X w"], Float32[Tensor, "states M"]]:
    """`method_weights`, and the upsampling that gives them at the points of `lattice`."""
    rows, columns = (
        torch.from_numpy(upsampling_tables(cells, pixels)[:, chosen]).float()
        for cells, pixels, chosen in zip(spec.grid, size, lattice(spec, size), strict=True)
    )
    return rows, columns, method_weights(spec).float()


@lru_cache(maxsize=16)
def _all_shifts(cells: int, pixels: int) -> Float64[Tensor, "shifted pixels"]:
    """The transposed upsampling tables of one axis, one below the other."""
    return torch.tensor(upsampling_tables(cells, pixels)).transpose(1, 2).reshape(-1, pixels)


@lru_cache(maxsize=8)
def _between_points(
    spec: ExplainSpec, size: tuple[int, int]
) -> tuple[Float64[Tensor, "H Y"], Float64[Tensor, "W X"]]:
    """Linear interpolation along each axis from the points of `lattice` to all pixels."""
    rows, columns = (
        torch.from_numpy(
            np.stack([np.interp(np.arange(pixels), chosen, one) for one in np.eye(len(chosen))], axis=1)
        )
        for chosen, pixels in zip(lattice(spec, size), size, strict=True)
    )
    return rows, columns


def method_weights(spec: ExplainSpec) -> Float64[Tensor, "states M"]:
    """What a cell in each state (0 kept, then the fills) multiplies the score with in a map; what a mask does
    is upsampled from it.
    """
    kept = torch.zeros(spec.K + 1, 1, dtype=torch.float64)
    kept[0] = 1 / (1 - spec.p_mask)
    return kept if spec.method == "rise" else one_per_fill(spec.K) * (spec.K / spec.p_mask) - kept


@lru_cache(maxsize=8)
def weight_moments(spec: ExplainSpec, size: tuple[int, int]) -> Float64[np.ndarray, "H W"]:
    """Mean square of `method_weights` at every pixel, over all masks, in an array that is shared.

    The weights are linear in the cells, which are independent: it is that of a pixel inside one cell, times
    the share `Ky(y, y) Kx(x, x)` of its variance that interpolation leaves.
    """
    ky, kx = overlap_kernels(spec.grid, size)
    left = np.outer(np.diag(ky), np.diag(kx))
    if spec.method == "rise":
        return 1 + left * spec.p_mask / (1 - spec.p_mask)
    moment: np.ndarray = left * (spec.K / spec.p_mask + 1 / (1 - spec.p_mask))
    return moment


def method_maps(
    spec: ExplainSpec, raw: Float64[np.ndarray, "L K H W"], baseline: Float64[np.ndarray, "L H W"]
) -> Float64[np.ndarray, "L M H W"]:
    """The method's maps out of the two sums (or means) that all three methods share.

    MC-RISE is `raw_k - baseline` (eq. 9). With one black fill, RISE is `baseline` (eq. 2, where the paper's
    p is `1 - p_mask`), and debiased RISE is `-(raw_0 - baseline)` (eq. 5: it measures the effect of
    retaining a pixel, MC-RISE that of masking it).
    """
    if spec.method == "rise":
        return baseline[:, None].copy()
    difference: np.ndarray = raw - baseline[:, None]
    return difference if spec.method == "mc-rise" else -difference


def _relative_error(
    maps: Float64[np.ndarray, "L M H W"], standard_error: Float64[np.ndarray, "L M H W"]
) -> Float64[np.ndarray, " L"]:
    """`rms(standard error) / rms(map)` of each target; NaN for a map that is zero without error."""
    axes = (1, 2, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = np.sqrt((standard_error**2).mean(axis=axes) / (maps**2).mean(axis=axes))
    return ratio
