"""What an image's sums come to: the maps that are stored and shown.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64

from mcrise_ray.saliency import Partial
from mcrise_ray.spec import Estimator, ExplainSpec

_AT_ONCE = 2**20  # numbers of maps: more leave a CPU's caches, and take memory; fewer leave threads idle


@dataclass(frozen=True)
class Explanation:
    """The maps of one image.

    Attributes:
        maps: `(L, M, H, W)`: MC-RISE (eq. 9): change of the score when a pixel takes the fill's colour;
            debiased RISE (eq. 5): change when it is retained; RISE (eq. 2): mean score where it is retained.
        raw: `(L, K, H, W)`, mean of `(K / p_mask) m_k f_n`.
        baseline: `(L, H, W)`, mean of `m_0 / (1 - p_mask) f_n`.
        standard_error: `(L, M, H, W)`, of each pixel of `maps`; NaN with a single mask.
        relative_error: `(L,)`, `rms(standard_error) / rms(maps)`; NaN with a single mask, and for a map
            that is zero without error, as of a score that no mask has changed.
        score: `(L,)`, of the unmasked image.
        targets: the L class indices.
        masks: the N used.
        estimator: that made the maps: `importance` where masks were picked, and `control-variate` where that
            was asked for but no mask was.
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
    estimator: Estimator
    spec: ExplainSpec


def explanation(
    spec: ExplainSpec,
    targets: Sequence[int],
    score: Float64[np.ndarray, " L"],
    total: Partial,
    *,
    picked: bool = False,
) -> Explanation:
    """The maps of a reduction over all units.

    Args:
        spec: what was asked for.
        targets: class indices.
        score: of the unmasked image.
        total: the sums.
        picked: some of the masks were.
    """
    # Predictions leave so little to be summed that float32 rounds it finer than the maps.
    dtype = torch.float64 if spec.estimator == "paper" else torch.float32
    shape = (len(targets), spec.K, *total.size)
    maps, raw, standard_error = (np.empty(shape, np.float32) for _ in range(3))
    baseline, relative_error = np.empty((len(targets), *total.size), np.float32), np.empty(len(targets))
    step = max(1, _AT_ONCE // (spec.K * total.size[0] * total.size[1]))
    for start in range(0, len(targets), step):
        places = slice(start, start + step)
        found = total.of_targets(places).finalize(spec, dtype)
        rounded = (
            (maps, found.maps),
            (raw, found.raw),
            (baseline, found.baseline),
            (standard_error, found.standard_error),
            (relative_error, found.relative_error),
        )
        for array, of_some in rounded:
            torch.from_numpy(array[places]).copy_(torch.from_numpy(of_some))
    return Explanation(
        maps=maps,
        raw=raw,
        baseline=baseline,
        standard_error=standard_error,
        relative_error=relative_error,
        score=score,
        targets=tuple(targets),
        masks=total.masks,
        estimator="control-variate" if spec.estimator == "importance" and not picked else spec.estimator,
        spec=spec,
    )
