"""One image in one process: `run_unit()`, which actors run too, and `explain()`, the oracle of the cluster.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8

from mcrise_ray.blend import Blender
from mcrise_ray.errors import ImageError
from mcrise_ray.masks import draw
from mcrise_ray.pipeline import score_units
from mcrise_ray.plan import Unit, units
from mcrise_ray.saliency import Partial, UnitSums
from mcrise_ray.scores import BlackBox, ask, check_targets, input_space
from mcrise_ray.spec import ExplainSpec

DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Explanation:
    """The maps of one image.

    Attributes:
        maps: `(L, M, H, W)`: MC-RISE (eq. 9): change of the score when a pixel takes the fill's colour;
            debiased RISE (eq. 5): change when it is retained; RISE (eq. 2): mean score where it is retained.
        raw: `(L, K, H, W)`, mean of `(K / p_mask) m_k f_n`.
        baseline: `(L, H, W)`, mean of `m_0 / (1 - p_mask) f_n`.
        standard_error: `(L, M, H, W)`, of each pixel of `maps`; NaN with a single unit of masks.
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


class Subject:
    """One image before one black box: normalised once, masked as often as asked.

    Args:
        black_box: see `mcrise_ray.scores`.
        image: uint8 RGB at the model's input size.
        dtype: of blending; float64 is for checking.
    """

    def __init__(
        self,
        black_box: BlackBox,
        image: UInt8[np.ndarray, "H W 3"],
        spec: ExplainSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        image = check_image(image)
        space = input_space(black_box)
        device = space.device if device is None else torch.device(device)
        rgb = torch.from_numpy(image).to(device, dtype).permute(2, 0, 1) / 255
        fills = torch.tensor(spec.palette, dtype=dtype, device=device).view(-1, 3, 1, 1)
        self.spec = spec
        self.size: tuple[int, int] = image.shape[:2]
        self.function = space.function
        self.image = space.normalize(rgb).contiguous()
        self.blend = Blender(
            self.image, space.normalize(fills).flatten(1), spec.grid, channels_last=space.channels_last
        )

    def scores(self) -> Float64[np.ndarray, " C"]:
        """All scores of the unmasked image."""
        scores: np.ndarray = ask(self.function, self.image[None])[0]
        return scores


def check_image(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """The image as a contiguous array, or an `ImageError` that says what it is instead."""
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(
            f"expected an image as a uint8 RGB array (H, W, 3), found {array.dtype} of shape {array.shape}; "
            "convert with np.asarray(PIL_image.convert('RGB'))"
        )
    # torch warns about sharing memory that it must not write to.
    return array if array.flags.writeable else array.copy()


def run_unit(subject: Subject, unit: Unit, targets: Sequence[int], batch_size: int) -> Partial:
    """The sums of one unit (Algorithm 1, lines 2 to 15): a pure function of its arguments."""
    (partial,) = run_units(subject, [unit], targets, batch_size)
    return partial


def run_units(
    subject: Subject, units: Iterable[Unit], targets: Sequence[int], batch_size: int
) -> Iterator[Partial]:
    """The sums of each unit in turn, bit for bit those of `run_unit`, without a pause of a GPU in between."""
    spec = subject.spec
    for unit, scores in score_units(spec, subject.blend, subject.function, units, targets, batch_size):
        sums = UnitSums(spec, len(targets), subject.size)
        # Drawn again rather than kept: it takes microseconds.
        sums.accumulate(draw(spec, unit.start, unit.stop), scores)
        yield sums.partial()


def explain(
    black_box: BlackBox,
    image: UInt8[np.ndarray, "H W 3"],
    targets: int | Sequence[int] | None = None,
    spec: ExplainSpec | None = None,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] | None = None,
) -> Explanation:
    """Explain one image in this process.

    Args:
        black_box: callable from RGB in [0, 1], float `(B, 3, H, W)`, to scores `(B, C)`.
        image: uint8 RGB `(H, W, 3)` at the size that the model reads.
        targets: class indices, all explained in one pass; the predicted class by default.
        spec: method, number of masks, fills and so on.
        batch_size: masked images per call of the black box.
        device: where masked images are made; that of a module's parameters by default.
        dtype: of blending.
        on_progress: called with the number of masks done since the last call.

    Raises:
        ImageError, TargetError, ScoreError, ModelError, SpecError.
    """
    spec = ExplainSpec() if spec is None else spec
    subject = Subject(black_box, image, spec, device=device, dtype=dtype)
    scores = subject.scores()
    chosen = _chosen_targets(targets, scores)
    total = Partial.zero(spec, len(chosen), subject.size)
    for partial in run_units(subject, units(spec), chosen, batch_size):
        total = total.combine(partial)
        if on_progress is not None:
            on_progress(partial.masks)
    return explanation(spec, chosen, scores[list(chosen)], total)


def explanation(
    spec: ExplainSpec, targets: Sequence[int], score: Float64[np.ndarray, " L"], total: Partial
) -> Explanation:
    """The finished result of a reduction over all units."""
    maps = total.finalize(spec)
    return Explanation(
        maps=maps.maps.astype(np.float32),
        raw=maps.raw.astype(np.float32),
        baseline=maps.baseline.astype(np.float32),
        standard_error=maps.standard_error.astype(np.float32),
        relative_error=maps.relative_error,
        score=score,
        targets=tuple(targets),
        masks=total.masks,
        spec=spec,
    )


def _chosen_targets(
    targets: int | Sequence[int] | None, scores: Float64[np.ndarray, " C"]
) -> tuple[int, ...]:
    if targets is None:
        return (int(scores.argmax()),)
    chosen = (targets,) if isinstance(targets, int) else tuple(int(target) for target in targets)
    check_targets(chosen, len(scores))
    return chosen
