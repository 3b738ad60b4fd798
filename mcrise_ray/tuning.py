"""The fastest way to ask a model that still gives the scores of plain float32, by trial on masked images.

How far scores may move. A map is linear in the scores, so what rounding adds to it is the map of the
differences. Let these be r times the scores' spread over masks (root mean squares). As far as they are
independent of the masks, and roundings nearly are, they add r**2 to the variance of the map's sampling noise;
what they have in common with the masks changes the map itself, by at most r of it. `TOLERANCE` is r = 0.03:
at most 0.1 % more variance, and at the very worst 3 % of a map whose sampling noise is 10 to 25 %. Of a model
that embeds, the scores are those that will be explained: similarities to a match.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Generic, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from pydantic import BeforeValidator
from torch import Tensor, nn

from mcrise_ray.batching import OUT_OF_MEMORY, candidates, fastest, largest
from mcrise_ray.errors import ModelError, ScoreError, SpecError
from mcrise_ray.explainer import DEFAULT_BATCH_SIZE, Subject
from mcrise_ray.loading import first_line
from mcrise_ray.masks import draw
from mcrise_ray.memory import keep_freed
from mcrise_ray.precision import AnyModel, Execution, Precision, adapted, apply, layout_of, network_of
from mcrise_ray.scores import BlackBox, Classifier, ask, input_space
from mcrise_ray.servers import ServerModel
from mcrise_ray.sessions import can_convert
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.timing import seconds, speed_ratio

PrecisionChoice = Literal[
    "auto",
    "float32",
    "channels_last",
    "bfloat16",
    "float16",
    "onnxruntime",
    "compiled",
    "channels_last+bfloat16",
    "channels_last+float16",
    "channels_last+compiled",
    "bfloat16+compiled",
    "float16+compiled",
    "channels_last+bfloat16+compiled",
    "channels_last+float16+compiled",
]


def _check_batch_size(batch_size: object) -> Any:
    # Before the union is tried, whose message would list the failure of each of its members.
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(str(batch_size))):
        raise ValueError(f"expected auto or a whole number of at least 1, found {batch_size!r}")
    return batch_size


BatchSizeChoice = Annotated[Literal["auto"] | int, BeforeValidator(_check_batch_size)]
Step = Literal["channels_last", "bfloat16", "float16", "onnxruntime", "compiled"]
Scored = Callable[[AnyModel, UInt8[np.ndarray, "H W 3"]], BlackBox]
"""From a model and an image at its size to what is asked about that image while it is masked."""

TOLERANCE = 0.03
"""Of the scores' differences, over their spread: root mean squares over masks and classes."""

LARGEST_DIFFERENCE = 0.05
"""Of any score, over the largest score: no masked image may be taken for something else."""

_COMPARED = 64  # masked images
_AT_ONCE = {"cpu": 16, "cuda": 64}  # large batches fall out of a CPU's caches, small ones leave a GPU idle
_OF_A_THREAD = 2  # images; with fewer, threads that share a batch by its images are idle
_FAST_IN_FLOAT16 = {"cuda"}  # a CPU without instructions for it takes many times as long as for float32
_GAIN = 1.05  # what gains less is not worth a rounding
_REPEATS = 5
_FEW = 1000  # masks; the trials cost a few hundred
_WORK: dict[Step, float] = {  # seconds, which a step must have to save some of
    "onnxruntime": 30.0,  # exporting costs 3 to 6
    "compiled": 120.0,  # compiling costs 10 to 60
}


@dataclass(frozen=True)
class Settled(Generic[AnyModel]):
    """What was chosen, and the model asked so."""

    execution: Execution
    model: AnyModel


def settle(
    model: AnyModel,
    spec: ExplainSpec,
    image: UInt8[np.ndarray, "h w 3"] | None = None,
    *,
    scored: Scored = lambda model, image: model,
    precision: PrecisionChoice = "auto",
    batch_size: BatchSizeChoice = "auto",
    masks: int | None = None,
    memory_share: float = 0.5,
) -> Settled[AnyModel]:
    """Choose precision and batch size. Weights are moved: use the model that is returned alone.

    Args:
        model: as it was loaded.
        spec: of the masks.
        image: one of the job's, of any size; where there is none yet, or the model fails on it, random
            colours stand in.
        scored: whose scores are compared; those of the model itself by default.
        precision: `"float32"` changes nothing; `"auto"` tries channels_last, bfloat16 (on a GPU float16 where
            that is not kept), ONNX Runtime in place of torch, and torch.compile on top of what was kept of
            the first; steps that are named are taken untried, for a batch size that is given.
        batch_size: `"auto"` tries several; of a number, no trial asks for more images at once.
        masks: how many one worker will score, where that is known: trials are not worth it for a few.
        memory_share: of the memory that is free now, which the batches may take.

    Raises:
        MCRiseError: the model fails on masked images of random colours as it is.
    """
    if precision not in ("auto", "float32"):
        if batch_size == "auto":
            raise SpecError(
                f"precision: expected a number as batch_size beside {precision}, because both were found "
                "together, found auto"
            )
        execution = as_named(precision, batch_size, spec, torch.get_num_threads())
        return Settled(execution, apply(model, execution))
    keep_freed()
    tried = partial(_tried, model, spec, scored, precision, batch_size, masks, memory_share)
    if image is not None:
        with suppress(ModelError, ScoreError):  # of this image, whose own turn will tell, or of any
            return tried(image)
    return tried(None)


def as_named(precision: PrecisionChoice, batch_size: int, spec: ExplainSpec, threads: int) -> Execution:
    """How a model is asked where everything is named, and nothing is tried."""
    # No batch is larger than a unit: one that is would never be whole, so never compiled, and halved in vain.
    return Execution(
        batch_size=min(batch_size, largest(spec)), threads=threads, precision=Precision.named(precision)
    )


def _tried(
    model: AnyModel,
    spec: ExplainSpec,
    scored: Scored,
    precision: Literal["auto", "float32"],
    batch_size: BatchSizeChoice,
    masks: int | None,
    memory_share: float,
    image: UInt8[np.ndarray, "h w 3"] | None,
) -> Settled[AnyModel]:
    at_most = largest(spec) if batch_size == "auto" else min(batch_size, largest(spec))
    trials = _Trials(model, spec, image, masks, scored, at_most)
    if network_of(model) is None:
        trials.notes.append("float32: the model is no torch module of ours to change")
    elif precision == "float32":
        trials.notes.append("float32: as asked")
    elif trials.few:
        trials.notes.append(f"float32: {masks} masks are not worth trials")
    else:
        trials.try_eager()
        trials.try_onnxruntime()
    size = trials.fastest_batch(memory_share) if batch_size == "auto" else at_most
    trials.try_compiled(size)
    kept = trials.kept.precision.model_copy(update={"notes": tuple(trials.notes)})
    execution = Execution(batch_size=size, threads=torch.get_num_threads(), precision=kept)
    return Settled(execution, trials.kept.model)


@dataclass(frozen=True)
class _Asked(Generic[AnyModel]):
    """A model, what is asked, and what is done to its network (None where that is not ours)."""

    model: AnyModel
    black_box: BlackBox
    network: nn.Module | None
    precision: Precision

    def scores(self, images: Float[Tensor, "B 3 H W"]) -> Float64[np.ndarray, "B C"]:
        """All scores of images in the model's own space."""
        return ask(input_space(self.black_box).function, images.clone())


class _Trials(Generic[AnyModel]):
    """What was kept so far, and the masked images that decide about more."""

    def __init__(
        self,
        model: AnyModel,
        spec: ExplainSpec,
        image: UInt8[np.ndarray, "h w 3"] | None,
        masks: int | None,
        scored: Scored,
        at_most: int,
    ) -> None:
        self._prepared = model.prepare(_random_colours() if image is None else image)
        self._images = Subject(model, self._prepared, spec).blend(draw(spec, 0, _COMPARED)).clone()
        self._spec, self._masks, self._scored = spec, masks, scored
        busy = _OF_A_THREAD * torch.get_num_threads() if model.device.type == "cpu" else 1
        self._at_once = min(max(_AT_ONCE[model.device.type], busy), at_most)
        self._reference: np.ndarray | None = None  # scores in float32, once precision is tried
        self.few = masks is not None and masks < _FEW
        black_box = scored(model, self._prepared)
        self._plain: _Asked[AnyModel] = _Asked(model, black_box, network_of(model), Precision())
        self._eager: _Asked[AnyModel] = self._plain
        self.kept: _Asked[AnyModel] = self._plain
        self.notes: list[str] = []

    def try_eager(self) -> None:
        """Try channels_last, then bfloat16; on a GPU float16 where that is not kept, because the scores need
        more digits, or because GPUs of before 2020 are fast in float16 alone.
        """
        while self._reference is None:
            try:
                self._reference = self._scores(self.kept, self._at_once)
            except (*OUT_OF_MEMORY, ModelError):
                if self._at_once == 1:
                    raise
                self._at_once //= 2
        steps: tuple[Step, ...] = ("channels_last", "bfloat16")
        for step in steps:
            self._try(step, self._at_once)
        if not self.kept.precision.bfloat16 and self.kept.model.device.type in _FAST_IN_FLOAT16:
            self._try("float16", self._at_once)
        self._eager = self.kept

    def try_onnxruntime(self) -> None:
        """Try ONNX Runtime instead of torch, on the CPU, where there is work enough."""
        if self.kept.model.device.type != "cpu" or not self._is_worth("onnxruntime"):
            return
        if not can_convert():
            self.notes.append('onnxruntime: not tried, but often faster: pip install "mcrise-ray[onnx]"')
            return
        self._try("onnxruntime", self._at_once)

    def try_compiled(self, batch_size: int) -> None:
        """Try torch.compile for batches of that size, where precision is tried and there is work enough."""
        if self._reference is not None and self._is_worth("compiled"):
            self._try("compiled", batch_size)

    def _is_worth(self, step: Step) -> bool:
        """There is work enough to gain more than the step costs, as far as is known."""
        if self._masks is None:
            return True
        part = self._batch(self._at_once, self.kept)
        work = seconds(lambda: self.kept.scores(part), _REPEATS) / len(part) * self._masks
        if work < _WORK[step]:
            self.notes.append(f"{step}: not tried, for {work:.0f} s of work")
            return False
        return True

    def fastest_batch(self, memory_share: float) -> int:
        """The batch size for what was kept so far."""
        device = self.kept.model.device
        if self.few or _is_remote(self.kept.model):
            return min(DEFAULT_BATCH_SIZE, self._spec.masks)
        size, why = fastest(
            lambda count: self.kept.scores(self._batch(count, self.kept)),
            candidates(self._spec),
            device,
            memory_share,
        )
        self.notes.append(f"batches of {size}: {why}")
        return size

    def _try(self, step: Step, batch_size: int) -> None:
        """Keep one step more where it is faster and gives the scores of float32."""
        kept, reference = self.kept, self._reference
        if reference is None:
            raise AssertionError("nothing is tried without scores in float32")
        try:
            trial = self._with(step, batch_size)
            before, after = (self._batch(batch_size, asked) for asked in (kept, trial))
            ratio = speed_ratio(lambda: kept.scores(before), lambda: trial.scores(after), _REPEATS)
            found = f"{step}: {ratio:.2f} times as fast"
            if ratio < _GAIN:
                self.notes.append(f"{found}, not kept")
                return
            difference, largest = deviation(self._scores(trial, batch_size), reference)
        except Exception as error:  # noqa: BLE001 - whatever a network or a compiler dislikes, float32 remains
            self.notes.append(f"{step}: fails, {type(error).__name__}: {first_line(error)}")
            return
        found += f", differences {difference:.2%} of the scores' spread, {largest:.2g} of the largest score"
        if not (difference <= TOLERANCE and largest <= LARGEST_DIFFERENCE):
            self.notes.append(f"{found}, beyond {TOLERANCE:.0%} or {LARGEST_DIFFERENCE}, not kept")
            return
        self.notes.append(f"{found}, kept")
        seen = {
            "difference": difference,
            "largest_difference": largest,
            "speedup": (kept.precision.speedup or 1.0) * ratio,
        }
        self.kept = replace(trial, precision=trial.precision.model_copy(update=seen))

    def _with(self, step: Step, batch_size: int) -> _Asked[AnyModel]:
        """What was kept, with one step more; instead of all others, where that is ONNX Runtime."""
        base = {"onnxruntime": self._plain, "compiled": self._eager}.get(step, self.kept)
        network = base.network
        if network is None:
            raise AssertionError("only a network of ours is tried")
        if step == "channels_last":
            # A copy, because both are timed in turn.
            network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        precision = base.precision.model_copy(update={step: True})
        model = adapted(base.model, network, precision, batch_size)
        return _Asked(model, self._scored(model, self._prepared), network, precision)

    def _scores(self, asked: _Asked[AnyModel], batch_size: int) -> Float64[np.ndarray, "N C"]:
        """The scores of all masked images, in whole batches."""
        count = -(-_COMPARED // batch_size) * batch_size
        batches = torch.split(self._batch(count, asked), batch_size)
        return np.concatenate([asked.scores(batch) for batch in batches])[:_COMPARED]

    def _batch(self, count: int, asked: _Asked[AnyModel]) -> Float[Tensor, "B 3 H W"]:
        """Masked images, again and again, as the model wants them to lie in memory."""
        images = self._images[torch.arange(count, device=self._images.device) % _COMPARED]
        return images.contiguous(memory_format=layout_of(asked.precision))


def deviation(
    scores: Float64[np.ndarray, "N C"], reference: Float64[np.ndarray, "N C"]
) -> tuple[float, float]:
    """Differences of scores: root mean square over the reference's spread, and largest over largest score.

    Spread is the standard deviation over the N masks, its mean square taken over the C classes.
    """
    differences = np.abs(scores - reference)
    if not differences.any():
        return 0.0, 0.0
    with np.errstate(divide="ignore"):
        spread = np.sqrt((differences**2).mean(axis=0).sum() / reference.var(axis=0).sum())
        largest = differences.max() / np.abs(reference).max()
    return float(spread), float(largest)


def _is_remote(model: AnyModel) -> bool:
    black_box = model.black_box
    return isinstance(black_box.network if isinstance(black_box, Classifier) else black_box, ServerModel)


def _random_colours() -> UInt8[np.ndarray, "h w 3"]:
    """A smooth image of many colours."""
    cells = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((256, 256), Image.Resampling.BICUBIC))
