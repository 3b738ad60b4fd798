"""One image in one process: `run_unit()`, which actors run too, and `explain()`, the oracle of the cluster.

Axes: L targets; K fills; M maps of the method (K for MC-RISE, 1 for the two RISE methods); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8

from mcrise_ray import masks as mask_source
from mcrise_ray.blend import Blender
from mcrise_ray.errors import ImageError
from mcrise_ray.plan import Unit, enough, stages, unit
from mcrise_ray.saliency import Partial, UnitSums
from mcrise_ray.scores import BlackBox, ask, check_targets, input_space
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import CHUNK, FRESH_PER_MASK, Features, Fit, fit_scores, fresh

DEFAULT_BATCH_SIZE = 64


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
        self.blend = Blender(self.image, space.normalize(fills).flatten(1), spec.grid)

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


def run_unit(
    subject: Subject, unit: Unit, targets: Sequence[int], batch_size: int, fit: Fit | None = None
) -> Partial:
    """The sums of one unit (Algorithm 1, lines 2 to 15): a pure function of its arguments.

    With a fit, those of what its predictions leave of the scores, and the predictions' own part.
    """
    return residual_unit(
        subject.spec, subject.size, unit, score_unit(subject, unit, targets, batch_size), fit
    )


def score_unit(
    subject: Subject, unit: Unit, targets: Sequence[int], batch_size: int
) -> Float64[np.ndarray, "N L"]:
    """The scores of one unit's masks: all that needs the model."""
    columns = list(targets)
    scores = np.empty((len(unit), len(columns)))
    for start in range(unit.start, unit.stop, batch_size):
        masks = mask_source.draw(subject.spec, start, min(start + batch_size, unit.stop))
        answer = ask(subject.function, subject.blend(masks))
        check_targets(columns, answer.shape[1])
        scores[start - unit.start :][: len(masks)] = answer[:, columns]
    return scores


def residual_unit(
    spec: ExplainSpec,
    size: tuple[int, int],
    unit: Unit,
    scores: Float64[np.ndarray, "N L"],
    fit: Fit | None,
) -> Partial:
    """The sums of one unit whose scores are known; no model is asked.

    Masks are drawn again rather than kept: it takes microseconds.

    Raises:
        ValueError: there is a fit for the estimator `"paper"`, or none for the other.
    """
    if (fit is None) != (spec.estimator == "paper"):
        raise ValueError(
            f"expected {'no fit' if fit else 'a fit'} for the estimator {spec.estimator!r}, found "
            f"{'one' if fit else 'none'}; see `fit_scores`"
        )
    sums = UnitSums(spec, scores.shape[1], size)
    features = None if fit is None else Features(spec, size, fit.patches)
    for start in range(unit.start, unit.stop, CHUNK):
        stop = min(start + CHUNK, unit.stop)
        masks = mask_source.draw(spec, start, stop)
        left = scores[start - unit.start : stop - unit.start]
        if fit is not None and features is not None:
            left = left - fit.predict(features(masks), fit.rows(start, stop))[0]
            curved = fresh(spec, fit, features, start, stop)
            if curved is not None:
                extra, bend = curved
                sums.accumulate(extra, bend / FRESH_PER_MASK)
                # One of each mask's fresh masks is sample enough of their small part of the variance.
                sums.square(extra[::FRESH_PER_MASK], bend[::FRESH_PER_MASK] / FRESH_PER_MASK**0.5)
        sums.accumulate(masks, left)
        sums.square(masks, left)
    if fit is None:
        return sums.partial(len(unit))
    return sums.partial(len(unit), *fit.expected(fit.rows(unit.start, unit.stop), spec.K))


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
    tell = on_progress if on_progress is not None else lambda masks: None
    total, fit = Partial.zero(spec, len(chosen), subject.size), None
    kept: list[Float64[np.ndarray, "N L"]] = []
    for stage in stages(spec):
        for index in stage.score:
            kept.append(score_unit(subject, unit(spec, index), chosen, batch_size))
            tell(len(kept[-1]))
        if stage.score:
            total = Partial.zero(spec, len(chosen), subject.size)
            fit = fit_scores(spec, subject.size, np.concatenate(kept))
        for index in stage.resum:
            part = residual_unit(spec, subject.size, unit(spec, index), kept[index], fit)
            total = total.combine(part)
        for index in stage.run:
            part = run_unit(subject, unit(spec, index), chosen, batch_size, fit)
            total = total.combine(part)
            tell(part.masks)
        result = explanation(spec, chosen, scores[list(chosen)], total)
        if enough(spec, result.relative_error):
            break
    return result


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
