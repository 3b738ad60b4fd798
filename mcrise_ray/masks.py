"""Mask n as a pure function of (seed, n, grid, K, p_mask): its cells, its shift, and how they become pixels.

Axes: N masks; h, w cells; H, W pixels; sy, sx shifts; K fills. A cell is 0 where kept, k + 1 where masked
with fill k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8, UInt64
from torch import Tensor

from mcrise_ray.spec import ExplainSpec

_WORDS_PER_BLOCK = 4  # Philox4x64 yields four words per counter value
_UNIT = 1 << 53  # a word's upper 53 bits are a uniform integer below this
_CHUNK = 1024  # masks whose words are held at a time


@dataclass(frozen=True)
class Masks:
    """Masks at low resolution.

    Attributes:
        cells: `(N, h, w)`, 0 = kept, k + 1 = masked with fill k.
        shift_words: `(N, 2)` uniform 32-bit integers; `shifts` turns them into pixels for a given size.
    """

    cells: UInt8[np.ndarray, "N h w"]
    shift_words: UInt64[np.ndarray, "N 2"]

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, which: slice | np.ndarray) -> Masks:
        """Some of them."""
        return Masks(self.cells[which], self.shift_words[which])

    @staticmethod
    def concatenate(parts: Sequence[Masks]) -> Masks:
        """All of them, in order."""
        cells, words = ([getattr(part, name) for part in parts] for name in ("cells", "shift_words"))
        return Masks(np.concatenate(cells), np.concatenate(words))

    def shifts(self, size: tuple[int, int]) -> Int64[np.ndarray, "N 2"]:
        """Shifts (sy, sx) of every mask, uniform in [0, ceil(H/h)) x [0, ceil(W/w))."""
        spans = np.array(cell_size(self.cells.shape[1:], size), dtype=np.uint64)
        return ((self.shift_words * spans) >> np.uint64(32)).astype(np.int64)


def cell_size(grid: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Pixels per cell, `(ceil(H/h), ceil(W/w))`: also the number of different shifts per axis."""
    return -(-size[0] // grid[0]), -(-size[1] // grid[1])


def draw(spec: ExplainSpec, start: int, stop: int) -> Masks:
    """Masks `start` to `stop - 1` of the spec (paper, eq. 6; Algorithm 1, lines 3 to 8).

    Mask n owns a fixed run of Philox counters, so a range of masks is one contiguous stretch of the stream,
    and a mask is the same whatever range it is drawn in. Only raw words are taken from numpy (its Philox
    stream is frozen; its distributions are not); all arithmetic on them is exact, in 64-bit integers.
    """
    h, w = spec.grid
    blocks = -(-(h * w + 2) // _WORDS_PER_BLOCK)
    bits = np.random.Philox(key=spec.seed, counter=start * blocks)
    threshold = np.uint64(max(1, int(spec.p_mask * _UNIT)))
    cells = np.empty((stop - start, h * w), dtype=np.uint8)
    shift_words = np.empty((stop - start, 2), dtype=np.uint64)
    # A few at a time: words take eight times what cells do, and are held several times over.
    for place in range(0, stop - start, _CHUNK):
        part = slice(place, min(place + _CHUNK, stop - start))
        count = part.stop - part.start
        words = bits.random_raw(count * blocks * _WORDS_PER_BLOCK).reshape(count, -1)
        uniform = words[:, : h * w] >> np.uint64(11)
        fill = uniform * np.uint64(spec.K) // threshold  # < K exactly where uniform < threshold
        np.multiply((fill + np.uint64(1)).astype(np.uint8), uniform < threshold, out=cells[part])
        shift_words[part] = words[:, h * w : h * w + 2] >> np.uint64(32)
    return Masks(cells.reshape(-1, h, w), shift_words)


def uniform(spec: ExplainSpec, n: int) -> float:
    """A number in [0, 1) that belongs to mask n, out of bits that neither its cells nor its shift use."""
    h, w = spec.grid
    blocks = -(-(h * w + 2) // _WORDS_PER_BLOCK)
    words = np.random.Philox(key=spec.seed, counter=n * blocks).random_raw(h * w + 1)
    return int(words[h * w] & np.uint64(0xFFFFFFFF)) / 2**32


@lru_cache(maxsize=8)  # of a photograph, each may take 20 MiB
def upsampling_tables(cells: int, pixels: int) -> Float64[np.ndarray, "shifts pixels cells"]:
    """Linear interpolation along one axis, one matrix per shift: `up(z) = Ry[sy] @ z @ Rx[sx].T`.

    The axis is resized from `cells` to `(cells + 1) * ceil(pixels / cells)` with half-pixel centres and
    clamped edges, then cropped to `pixels` at the shift (the grid and crop of the original RISE code).
    Every row sums to one. The array is read-only, because it is shared.
    """
    span = -(-pixels // cells)
    position = np.arange(span)[:, None] + np.arange(pixels)
    source = np.clip((position + 0.5) * (cells / ((cells + 1) * span)) - 0.5, 0, cells - 1)
    lower = np.minimum(source.astype(np.int64), max(cells - 2, 0))
    weight = source - lower
    table = np.zeros((span, pixels, cells))
    np.put_along_axis(table, lower[..., None], (1 - weight)[..., None], axis=2)
    if cells > 1:
        np.put_along_axis(table, lower[..., None] + 1, weight[..., None], axis=2)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=4)
def overlap_kernels(
    grid: tuple[int, int], size: tuple[int, int]
) -> tuple[Float64[np.ndarray, "H H"], Float64[np.ndarray, "W W"]]:
    """`(Ky, Kx)`, `Ky = mean over shifts of Ry[s] Ry[s].T`: how much two pixels share the same cells.

    The covariance of coverages is `Cov(m_k(y, x), m_j(y', x')) = (q delta_kj - q**2) Ky(y, y') Kx(x, x')`
    with `q = p_mask / K`. The arrays are read-only, because they are shared.
    """
    kernels = []
    for cells, pixels in zip(grid, size, strict=True):
        table = upsampling_tables(cells, pixels)
        rows = table.transpose(1, 0, 2).reshape(pixels, -1)
        kernel = rows @ rows.T / len(table)
        kernel.flags.writeable = False
        kernels.append(kernel)
    return kernels[0], kernels[1]


def sampled(
    masks: Masks,
    size: tuple[int, int],
    rows: Float[Tensor, "sy Y h"],
    columns: Float[Tensor, "sx X w"],
    values: Float[Tensor, "states M"],
) -> Float[Tensor, "N Y M X"]:
    """Images that are linear in the cells, seen through linear functions of the two axes.

    Args:
        masks: the N masks.
        size: (H, W) in pixels, which decides their shifts.
        rows: a few functions of the image's rows (points, or means of patches), one table per shift, as
            `upsampling_tables(h, H)` multiplied by them from the left.
        columns: the same for its columns.
        values: of a cell in each of the M images, by its state (0 kept, then the fills); see `one_per_fill`.
    """
    count, h, w = masks.cells.shape
    shifts = torch.from_numpy(masks.shifts(size))
    low = torch.nn.functional.embedding(torch.from_numpy(masks.cells).int(), values)
    rows, columns = rows[shifts[:, 0]], columns[shifts[:, 1]].mT
    images, wanted = values.shape[1], rows.shape[1]
    # Images of many fills are large: they are rearranged after the axis that makes them smaller.
    if wanted < h:
        high = torch.bmm(rows, low.view(count, h, -1)).view(count, wanted, w, images)
        up = torch.bmm(high.transpose(2, 3).reshape(count, -1, w), columns)
    else:
        wide = torch.bmm(low.transpose(2, 3).reshape(count, -1, w), columns)
        up = torch.bmm(rows, wide.view(count, h, -1))
    return up.view(count, wanted, images, columns.shape[2])


def stretched(
    low: Float[Tensor, "L Y M X"], rows: Float[Tensor, "H Y"], columns: Float[Tensor, "W X"]
) -> Float[Tensor, "L H M W"]:
    """Images under a linear function of each axis: every row of the result is one of `rows @ low`."""
    high = torch.matmul(rows, low.flatten(2))
    return torch.matmul(high.view(len(low), len(rows), *low.shape[2:]), columns.T)


def one_per_fill(fills: int) -> Float64[Tensor, "states K"]:
    """The values of cells whose images are the coverages `m_k`."""
    return torch.from_numpy(np.eye(fills + 1)[:, 1:].copy())


def method_weights(spec: ExplainSpec) -> Float64[Tensor, "states M"]:
    """What a cell in each state (0 kept, then the fills) multiplies the score with in a map; what a mask does
    is upsampled from it.
    """
    kept = torch.from_numpy(np.eye(spec.K + 1, 1) / (1 - spec.p_mask))
    return kept if spec.method == "rise" else one_per_fill(spec.K) * (spec.K / spec.p_mask) - kept


def coverage(
    spec: ExplainSpec, size: tuple[int, int], indices: Sequence[int] | np.ndarray
) -> Float64[np.ndarray, "N K H W"]:
    """Coverages `m_k` of the masks with the given indices, for looking at and for checking.

    Args:
        spec: decides the masks.
        size: (H, W) in pixels.
        indices: which masks, in any order.

    Returns:
        Share of fill k at each pixel, in [0, 1]; the kept share (eq. 7) is one minus their sum over k.
    """
    rows, columns = upsampling_tables(spec.grid[0], size[0]), upsampling_tables(spec.grid[1], size[1])
    maps = np.empty((len(indices), spec.K, *size))
    for place, n in enumerate(indices):
        mask = draw(spec, int(n), int(n) + 1)
        sy, sx = mask.shifts(size)[0]
        masked = mask.cells[0] == np.arange(1, spec.K + 1)[:, None, None]
        maps[place] = rows[sy] @ masked @ columns[sx].T
    return maps
