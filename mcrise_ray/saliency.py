"""Scores of masks to saliency maps: zero, accumulate, combine, finalize, in float64.

The sums of equation 9 are linear in the cells, so scores are added into one bucket per shift at low
resolution (`UnitSums.accumulate`) and upsampled once per unit. `Partial` is what a unit sends home.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from mcrise_ray.masks import Masks, cell_size, upsampling_tables
from mcrise_ray.spec import ExplainSpec


class UnitSums:
    """Sums over the masks of one unit, at low resolution; memory does not depend on their number."""

    def __init__(self, spec: ExplainSpec, targets: int, size: tuple[int, int]) -> None:
        self._spec, self._size = spec, size
        self._masks = 0
        self._score_sum = np.zeros(targets)
        (h, w), (span_y, span_x) = spec.grid, cell_size(spec.grid, size)
        self._buckets = np.zeros((targets, spec.K * span_y * h * span_x * w))
        self._fill_stride = span_y * h * span_x * w
        # Bucket of (sy, y, sx, x) without the fill and the shift: the axes lie as `partial` multiplies them.
        self._cell_offset = (np.arange(h)[:, None] * span_x * w + np.arange(w)).ravel()
        self._shift_strides = np.array([h * span_x * w, w])

    def accumulate(self, masks: Masks, scores: Float64[np.ndarray, "B L"]) -> None:
        """Add `f_n` to the bucket of every masked cell of mask n (Algorithm 1, lines 14 and 15)."""
        cells = masks.cells.reshape(len(masks), -1)
        mask, cell = np.nonzero(cells)
        fill = cells[mask, cell].astype(np.int64) - 1
        shift_offset = masks.shifts(self._size) @ self._shift_strides
        bucket = fill * self._fill_stride + self._cell_offset[cell] + shift_offset[mask]
        for target, column in enumerate(scores.T):
            np.add.at(self._buckets[target], bucket, column[mask])
        self._score_sum += scores.sum(axis=0)
        self._masks += len(masks)

    def partial(self) -> Partial:
        """Upsample the buckets: two matrix products for all shifts, fills and targets at once."""
        (h, w), (height, width) = self._spec.grid, self._size
        p_mask, K = self._spec.p_mask, self._spec.K
        rows, columns = (
            torch.tensor(upsampling_tables(cells, pixels)).transpose(1, 2).reshape(-1, pixels)
            for cells, pixels in ((h, height), (w, width))
        )
        wide = torch.from_numpy(self._buckets).view(-1, len(columns)) @ columns
        masked = (rows.T @ wide.view(-1, len(rows), width)).view(-1, K, height, width).numpy()
        kept = self._score_sum[:, None, None] - masked.sum(axis=1)
        raw, baseline = masked * (K / p_mask), kept / (1 - p_mask)
        squares = method_maps(self._spec, raw, baseline) ** 2 / self._masks
        return Partial(self._masks, 1, raw, baseline, squares)


@dataclass(frozen=True)
class Partial:
    """Sums over any set of whole units.

    Attributes:
        masks: number of masks summed.
        units: number of units summed.
        raw: `(L, K, H, W)`, `sum_n (K / p_mask) m_k f_n`.
        baseline: `(L, H, W)`, `sum_n m_0 / (1 - p_mask) f_n`.
        squares: `(L, M, H, W)`, sum over units of the squared map sum of a unit over its number of masks.
    """

    masks: int
    units: int
    raw: Float64[np.ndarray, "L K H W"]
    baseline: Float64[np.ndarray, "L H W"]
    squares: Float64[np.ndarray, "L M H W"]

    @property
    def nbytes(self) -> int:
        """Memory that the sums take."""
        return self.raw.nbytes + self.baseline.nbytes + self.squares.nbytes

    @staticmethod
    def zero(spec: ExplainSpec, targets: int, size: tuple[int, int]) -> Partial:
        """The sums over no units."""
        maps = spec.K if spec.method == "mc-rise" else 1
        return Partial(
            0,
            0,
            np.zeros((targets, spec.K, *size)),
            np.zeros((targets, *size)),
            np.zeros((targets, maps, *size)),
        )

    def combine(self, other: Partial) -> Partial:
        """The sums over both; floating point makes the order matter, so units are combined by index."""
        return Partial(
            self.masks + other.masks,
            self.units + other.units,
            self.raw + other.raw,
            self.baseline + other.baseline,
            self.squares + other.squares,
        )

    def finalize(self, spec: ExplainSpec) -> Maps:
        """Means and standard errors (eq. 2, 5 or 9, by the method)."""
        raw, baseline = self.raw / self.masks, self.baseline / self.masks
        maps = method_maps(spec, raw, baseline)
        standard_error = np.full_like(maps, np.nan)
        if self.units > 1:
            # Between-unit variance of the mean, units weighted by their masks; rounding may leave -1e-20.
            variance = (self.squares / self.masks - maps**2) / (self.units - 1)
            standard_error = np.sqrt(np.maximum(variance, 0))
        return Maps(maps, raw, baseline, standard_error, _relative_error(maps, standard_error))


@dataclass(frozen=True)
class Maps:
    """Finished maps in float64; see `Explanation` for the meaning of each."""

    maps: Float64[np.ndarray, "L M H W"]
    raw: Float64[np.ndarray, "L K H W"]
    baseline: Float64[np.ndarray, "L H W"]
    standard_error: Float64[np.ndarray, "L M H W"]
    relative_error: Float64[np.ndarray, " L"]


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
