"""What an image's sums come to: the maps that are stored and shown.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

from mcrise_ray.saliency import Maps, Partial
from mcrise_ray.spec import ExplainSpec


@dataclass(frozen=True)
class Explanation:
    """The maps of one image.

    Attributes:
        maps: `(L, M, H, W)`: MC-RISE (eq. 9): change of the score when a pixel takes the fill's colour;
            debiased RISE (eq. 5): change when it is retained; RISE (eq. 2): mean score where it is retained.
        raw: `(L, K, H, W)`, mean of `(K / p_mask) m_k f_n`.
        baseline: `(L, H, W)`, mean of `m_0 / (1 - p_mask) f_n`.
        standard_error: `(L, M, H, W)`, of each pixel of `maps`; NaN with a single mask.
        relative_error: `(L,)`, `rms(standard_error) / rms(maps)`.
        score: `(L,)`, of the unmasked image.
        targets: the L class indices.
        masks: the N used.
        spec: what was asked for.
    """

    maps: Float32[np.ndarray, "L M H W"]
    raw: Float32[np.ndarray, "L K H W"]
    baseline: Float32[np.ndarray, "L H W"]
    standard_error: Float32[np.ndarray, "L M H W"]
    relative_error: Float64[np.ndarray, " L"]
    score: Float64[np.ndarray, " L"]
    targets: tuple[int, ...]
    masks: int
    spec: ExplainSpec


def explanation(
    spec: ExplainSpec, targets: Sequence[int], score: Float64[np.ndarray, " L"], total: Partial
) -> Explanation:
    """The maps of a reduction over all units; of one target after the other, which takes less memory and so
    less time.
    """
    found = (total.of_target(place).finalize(spec) for place in range(len(targets)))
    columns = zip(*(_rounded(one) for one in found), strict=True)
    maps, raw, baseline, standard_error, relative_error = (np.concatenate(column) for column in columns)
    return Explanation(
        maps=maps,
        raw=raw,
        baseline=baseline,
        standard_error=standard_error,
        relative_error=relative_error,
        score=score,
        targets=tuple(targets),
        masks=total.masks,
        spec=spec,
    )


def _rounded(maps: Maps) -> tuple[np.ndarray, ...]:
    """In the order of `Explanation`, whose maps take half the memory."""
    wide = (maps.maps, maps.raw, maps.baseline, maps.standard_error)
    return (*(array.astype(np.float32) for array in wide), maps.relative_error)
