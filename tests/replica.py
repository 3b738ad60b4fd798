"""The paper's equations as slow, readable loops in float64: what the fast code is compared with.

Nothing here is shared with the package but the cells and shifts of a mask, which are data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def source_position(pixel: int, cells: int, length: int) -> float:
    """Half-pixel centres: where a pixel of an axis of `length` falls on an axis of `cells`."""
    position = (pixel + 0.5) * cells / length - 0.5
    return min(max(position, 0.0), cells - 1.0)


def bilinear(low: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize `(h, w)` to `(height, width)`, pixel by pixel."""
    h, w = low.shape
    out = np.zeros((height, width))
    for y in range(height):
        sy = source_position(y, h, height)
        y0 = math.floor(sy)
        y1 = min(y0 + 1, h - 1)
        for x in range(width):
            sx = source_position(x, w, width)
            x0 = math.floor(sx)
            x1 = min(x0 + 1, w - 1)
            top = low[y0, x0] * (1 - (sx - x0)) + low[y0, x1] * (sx - x0)
            bottom = low[y1, x0] * (1 - (sx - x0)) + low[y1, x1] * (sx - x0)
            out[y, x] = top * (1 - (sy - y0)) + bottom * (sy - y0)
    return out


def color_mask(cells: np.ndarray, shift: Sequence[int], K: int, size: tuple[int, int]) -> np.ndarray:
    """`m^c(lambda, k)` of shape `(K, H, W)`: eq. 6, bilinear interpolation, random shift."""
    (h, w), (H, W) = cells.shape, size
    span_y, span_x = math.ceil(H / h), math.ceil(W / w)
    mask = np.zeros((K, H, W))
    for k in range(K):
        low = np.zeros((h, w))
        for y in range(h):
            for x in range(w):
                low[y, x] = 1.0 if cells[y, x] == k + 1 else 0.0
        high = bilinear(low, (h + 1) * span_y, (w + 1) * span_x)
        mask[k] = high[shift[0] : shift[0] + H, shift[1] : shift[1] + W]
    return mask


def algorithm_1(
    image: np.ndarray,
    model: Callable[[np.ndarray], np.ndarray],
    colors: np.ndarray,
    cells: np.ndarray,
    shifts: np.ndarray,
    p_mask: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper, with sampled cells and shifts given.

    Args:
        image: `(H, W, 3)` in [0, 1].
        model: from an image `(H, W, 3)` to the score of the target.
        colors: `(K, 3)` in [0, 1].
        cells: `(N, h, w)`, 0 = kept, k + 1 = fill k.
        shifts: `(N, 2)`.
        p_mask: probability that a cell is masked.

    Returns:
        `S^MC (K, H, W)`, `S^raw / N` and `S^baseline / N`.
    """
    H, W, _ = image.shape
    K, N = len(colors), len(cells)
    s_raw, s_baseline = np.zeros((K, H, W)), np.zeros((H, W))
    for n in range(N):
        m = color_mask(cells[n], shifts[n], K, (H, W))
        m_0 = 1 - m.sum(axis=0)  # eq. 7
        masked = np.zeros_like(image)
        for y in range(H):
            for x in range(W):
                masked[y, x] = image[y, x] * m_0[y, x]
                for k in range(K):
                    masked[y, x] += colors[k] * m[k, y, x]
        p_out = float(model(masked))
        for k in range(K):
            s_raw[k] += K * m[k] / p_mask * p_out
        s_baseline += m_0 / (1 - p_mask) * p_out
    return (s_raw - s_baseline) / N, s_raw / N, s_baseline / N


def rise(kept: np.ndarray, scores: np.ndarray, p_keep: float) -> np.ndarray:
    """Equation 2: masks `(N, H, W)` that are 1 where a pixel is retained."""
    total = np.zeros(kept.shape[1:])
    for m, f in zip(kept, scores, strict=True):
        total += m / p_keep * f
    return total / len(kept)


def debiased_rise(kept: np.ndarray, scores: np.ndarray, p_keep: float) -> np.ndarray:
    """Equation 5."""
    total = np.zeros(kept.shape[1:])
    for m, f in zip(kept, scores, strict=True):
        total += (m - p_keep) / (p_keep * (1 - p_keep)) * f
    return total / len(kept)
