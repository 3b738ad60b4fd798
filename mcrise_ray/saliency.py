"""Scores of masks to saliency maps: zero, accumulate, combine (all in float64), finalize.

The sums of equation 9 are linear in the cells, so scores are added into one bucket per shift at low
resolution (`UnitSums.accumulate`), combined so, and upsampled once (`Partial.finalize`). `Partial` is what a
unit sends home.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels; Y, X
points of a coarse lattice, or patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from mcrise_ray.masks import (
    Masks,
    cell_size,
    method_weights,
    overlap_kernels,
    sampled,
    stretched,
    upsampling_tables,
)
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import expectation

_STRETCHES = 4, 2  # of rows and columns: half the products, and each of them is large enough to be quick
_SMALL, _LARGE = 1e-9, 1e9  # of scores between them float32 holds the squares, and those of a thousandth
_TINY = 1e-30  # the least unit of scores: float32 holds it and its inverse
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
        # The axes lie as they are multiplied.
        self._buckets = np.zeros((targets, h, span_y, spec.K, w, span_x))
        self._fill_stride = w * span_x
        row = spec.K * self._fill_stride
        # Bucket of (y, sy, k, x, sx) without the fill and the shift.
        self._cell_offset = (np.arange(h)[:, None] * span_y * row + np.arange(w) * span_x).ravel()
        self._shift_strides = np.array([row, 1])
        self._points = rows, columns, values = _weights_at_points(spec, size)
        self._squares = np.zeros((targets, rows.shape[1], values.shape[1], columns.shape[1]))

    def accumulate(self, masks: Masks, scores: Float64[np.ndarray, "B L"]) -> None:
        """Add `f_n`, or what a prediction leaves of it, to the bucket of every masked cell of mask n
        (Algorithm 1, lines 14 and 15).
        """
        cells = masks.cells.reshape(-1)
        masked = np.flatnonzero(cells != 0)
        shift_offset = masks.shifts(self._size) @ self._shift_strides
        bucket = (shift_offset[:, None] + self._cell_offset).reshape(-1)[masked]
        bucket += (cells[masked].astype(np.int64) - 1) * self._fill_stride
        mask, buckets = masked // len(self._cell_offset), torch.from_numpy(bucket)
        # One after the other, as `np.add.at` does it, in a twentieth of the time.
        into = torch.from_numpy(self._buckets).flatten(1)
        for target, column in zip(into, scores.T, strict=True):
            target.index_add_(0, buckets, torch.from_numpy(column[mask]))
        self._score_sum += scores.sum(axis=0)

    def square(self, masks: Masks, scores: Float64[np.ndarray, "B L"]) -> None:
        """Add the squares of what each mask adds to the maps, at the points of `lattice`."""
        rows, columns, values = self._points
        weights = sampled(masks, self._size, rows, columns, values).square_().flatten(1)
        unit = _unit(np.abs(scores).max(axis=0))
        squares = (scores if unit is None else scores / unit) ** 2
        added = (torch.from_numpy(squares).float().T @ weights).view(self._squares.shape).numpy()
        self._squares += added if unit is None else added * (unit**2)[:, None, None, None]

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
            masks=masks,
            weight=float(masks) if weight is None else weight,
            squared_weight=float(masks) if squared_weight is None else squared_weight,
            size=self._size,
            scores=self._score_sum,
            buckets=self._buckets,
            squares=self._squares,
            means=np.zeros(targets) if means is None else means,
            slopes=np.zeros((targets, 0, self._spec.K, 0)) if slopes is None else slopes,
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
        buckets: `(L, h, sy, K, w, sx)`, the same sum over the masks of each shift that have the cell masked
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
    buckets: Float64[np.ndarray, "L h sy K w sx"]
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
        return replace(
            self,
            masks=self.masks + other.masks,
            weight=self.weight + other.weight,
            squared_weight=self.squared_weight + other.squared_weight,
            scores=self.scores + other.scores,
            buckets=self.buckets + other.buckets,
            squares=self.squares + other.squares,
            means=self.means + other.means,
            slopes=self.slopes + other.slopes,
        )

    def of_targets(self, places: slice) -> Partial:
        """The sums of some targets alone."""
        return replace(
            self,
            scores=self.scores[places],
            buckets=self.buckets[places],
            squares=self.squares[places],
            means=self.means[places],
            slopes=self.slopes[places],
        )

    def finalize(self, spec: ExplainSpec, dtype: torch.dtype = torch.float64) -> Maps:
        """Means and standard errors (eq. 2, 5 or 9, by the method).

        Args:
            spec: what was asked for.
            dtype: in which the sums are upsampled. What is predicted never meets what it would cancel with,
                so float32 rounds what predictions leave, not the scores.
        """
        # Many targets make this a good part of all time. By torch, because the threads of two libraries would
        # wait for each other; in place, and with axes that lie as L H K W.
        raw, baseline = self._measured(spec, dtype)
        maps = method_maps(spec, raw, baseline)
        sizes = _unit((self.squares.max(axis=(1, 2, 3)) / self.weight) ** 0.5)
        unit = None if sizes is None else torch.from_numpy(sizes).to(dtype)[:, None, None, None]
        measured = (maps if unit is None else maps / unit).float().square()
        predicted = expectation(spec, self.size, self.slopes / self.weight, dtype)
        kept = predicted.sum(dim=1).mul_(-spec.p_mask / spec.K)
        kept += (_as_tensor(self.means)[:, None, None] / self.weight).to(dtype)
        if spec.method != "rise":  # whose map is `baseline`
            maps.add_(predicted, alpha=1 if spec.method == "mc-rise" else -1)
        raw.add_(predicted).add_(kept[:, None])
        baseline += kept
        if self.masks > 1:
            mean = measured.mul_(self.squared_weight / self.weight)
            # Rounding may leave -1e-20.
            variance = self._second_moments(spec, unit).sub_(mean).clamp_(min=0)
            variance *= self.masks / (self.masks - 1) / self.weight
        else:
            variance = torch.full_like(measured, torch.nan)
        relative_error = _relative_error(maps if unit is None else maps / unit, variance)
        standard_error = variance.sqrt_() if unit is None else variance.sqrt_().mul_(unit)
        found = (maps, raw, baseline, standard_error, relative_error)
        return Maps(*(tensor.numpy() for tensor in found))

    def _measured(
        self, spec: ExplainSpec, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "L K H W"], Float[Tensor, "L H W"]]:
        """Mean raw and baseline sums."""
        raw = _upsampled(_as_tensor(self.buckets).to(dtype), self.size)
        kept = _as_tensor(self.scores).to(dtype)[:, None, None] - raw.sum(dim=1)
        return raw.mul_(spec.K / spec.p_mask / self.weight), kept.div_((1 - spec.p_mask) * self.weight)

    def _second_moments(
        self, spec: ExplainSpec, unit: Float[Tensor, "L 1 1 1"] | None
    ) -> Float32[Tensor, "L M H W"]:
        """Mean square of what a mask adds to a map, at every pixel, in squares of the unit.

        Over the mean square of the weight, which is known exactly, it is an average of squared scores that
        changes slowly from pixel to pixel, so it is interpolated between the points of the lattice.
        """
        points, weight, rows, columns = _lattice_to_pixels(spec, self.size)
        at_points = _as_tensor(self.squares) / (self.weight * points)
        if unit is not None:
            at_points /= unit.double().square()
        return stretched(at_points.float(), rows, columns).mul_(weight).transpose(1, 2)


@dataclass(frozen=True)
class Maps:
    """Finished maps; see `Explanation` for the meaning of each."""

    maps: Float[np.ndarray, "L M H W"]
    raw: Float[np.ndarray, "L K H W"]
    baseline: Float[np.ndarray, "L H W"]
    standard_error: Float32[np.ndarray, "L M H W"]
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


@lru_cache(maxsize=4)
def _weights_at_points(
    spec: ExplainSpec, size: tuple[int, int]
) -> tuple[Float32[Tensor, "sy Y h"], Float32[Tensor, "sx X w"], Float32[Tensor, "states M"]]:
    """`method_weights`, and the upsampling that gives them at the points of `lattice`."""
    rows, columns = (
        torch.from_numpy(upsampling_tables(cells, pixels)[:, chosen]).float()
        for cells, pixels, chosen in zip(spec.grid, size, lattice(spec, size), strict=True)
    )
    return rows, columns, method_weights(spec).float()


def _unit(sizes: Float64[np.ndarray, " L"]) -> Float64[np.ndarray, " L"] | None:
    """In which squares of numbers of such sizes are taken in float32; None where that is 1 for all. Of scores
    near 1e-20, float32 would take the squares for 0, of those near 1e20 for infinite.
    """
    fits = ((sizes > _SMALL) & (sizes < _LARGE)) | (sizes == 0)
    if fits.all():
        return None
    unit: np.ndarray = np.where(fits, 1, np.maximum(sizes, _TINY))  # whatever the other targets are like
    return unit


def _as_tensor(array: np.ndarray) -> Tensor:
    """The same memory where that may be written to, which Ray's may not: torch warns of it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _upsampled(buckets: Float[Tensor, "L h sy K w sx"], size: tuple[int, int]) -> Float[Tensor, "L K H W"]:
    """Each bucket upsampled at its shift, and all of them added."""
    targets, h, span_y, fills, w, span_x = buckets.shape
    height, width = size
    low = buckets.view(targets, h * span_y, -1)
    high = buckets.new_empty(targets, height, fills * w * span_x)
    for pixels, seen, table in _stretches(h, height, _STRETCHES[0], buckets.dtype):
        # Copied, because written there by the product it would take longer.
        high[:, pixels] = torch.matmul(table.T, low[:, seen])
    found = buckets.new_empty(targets, height, fills, width)
    for pixels, seen, table in _stretches(w, width, _STRETCHES[1], buckets.dtype):
        out = found.view(-1, width)[:, pixels]
        torch.mm(high.view(-1, w * span_x)[:, seen], table, out=out)
    return found.transpose(1, 2)


@lru_cache(maxsize=4)
def _stretches(
    cells: int, pixels: int, count: int, dtype: torch.dtype
) -> list[tuple[slice, slice, Float[Tensor, "seen pixels"]]]:
    """The upsampling of one axis in so many stretches of pixels, each of which sees some of the cells.

    Returns:
        The pixels of each stretch, the (cell, shift) pairs that they see, and what each pixel takes of them.
    """
    tables = torch.from_numpy(upsampling_tables(cells, pixels).transpose(2, 0, 1).copy())
    span, found = tables.shape[1], []
    for start, stop in pairwise(np.linspace(0, pixels, min(count, pixels) + 1).round().astype(int)):
        table = tables[:, :, start:stop]
        seen = table.flatten(1).any(dim=1).nonzero().flatten().tolist()
        first, last = seen[0], seen[-1] + 1
        found.append(
            (
                slice(start, stop),
                slice(first * span, last * span),
                table[first:last].reshape(-1, stop - start).to(dtype),
            )
        )
    return found


@lru_cache(maxsize=4)
def _lattice_to_pixels(
    spec: ExplainSpec, size: tuple[int, int]
) -> tuple[
    Float64[Tensor, "Y 1 X"], Float32[Tensor, "H 1 W"], Float32[Tensor, "H Y"], Float32[Tensor, "W X"]
]:
    """`weight_moments` at the points of `lattice` and at all pixels, and linear interpolation along each axis
    from the points to the pixels.
    """
    points, weight = lattice(spec, size), weight_moments(spec, size)
    rows, columns = (
        torch.from_numpy(
            np.stack([np.interp(np.arange(pixels), chosen, one) for one in np.eye(len(chosen))], axis=1)
        ).float()
        for chosen, pixels in zip(points, size, strict=True)
    )
    at_points = torch.from_numpy(weight[np.ix_(*points)])
    return at_points[:, None], torch.from_numpy(weight).float()[:, None], rows, columns


def weight_moments(spec: ExplainSpec, size: tuple[int, int]) -> Float64[np.ndarray, "H W"]:
    """Mean square of `method_weights` at every pixel, over all masks.

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
    spec: ExplainSpec, raw: Float[Tensor, "L K H W"], baseline: Float[Tensor, "L H W"]
) -> Float[Tensor, "L M H W"]:
    """The method's maps out of the two sums (or means) that all three methods share.

    MC-RISE is `raw_k - baseline` (eq. 9). With one black fill, RISE is `baseline` (eq. 2, where the paper's
    p is `1 - p_mask`), and debiased RISE is `-(raw_0 - baseline)` (eq. 5: it measures the effect of
    retaining a pixel, MC-RISE that of masking it). That of RISE shares the memory of `baseline`.
    """
    if spec.method == "rise":
        return baseline[:, None]
    return raw - baseline[:, None] if spec.method == "mc-rise" else baseline[:, None] - raw


def _relative_error(
    maps: Float[Tensor, "L M H W"], variance: Float32[Tensor, "L M H W"]
) -> Float64[Tensor, " L"]:
    """`rms(standard error) / rms(map)` of each target; NaN for a map that is zero without error."""
    squares = variance.mean(dim=(1, 2, 3)), maps.square().mean(dim=(1, 2, 3))
    return (squares[0].double() / squares[1].double()).sqrt_()
