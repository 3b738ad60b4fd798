"""How a network of ours is asked: everything besides the spec that can change a rounding, as a value.

It is chosen once (`mcrise_ray.tuning`), stored with the plan, and applied by every worker. A black box that
is no torch module of ours is asked as it is.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mcrise_ray.embedders import Embedder
from mcrise_ray.errors import ModelError
from mcrise_ray.loading import first_line
from mcrise_ray.memory import keep_freed
from mcrise_ray.models import Model
from mcrise_ray.programs import ExportedProgram, converted
from mcrise_ray.scores import BlackBox, Classifier, ask
from mcrise_ray.spec import StrictModel

AnyModel = TypeVar("AnyModel", Model, Embedder)

STEPS: Final = ("channels_last", "bfloat16", "float16", "onnxruntime", "compiled")
"""What may be done to a network, in the order in which it is tried."""


# Layers that do nothing else with their weights; kinds of these may, such as those that normalise them first.
_CAST: Final = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d})


class Precision(StrictModel):
    """What is done to a network for speed, and what came of it; nothing at all is plain float32.

    Args:
        channels_last: weights and images with their channels last in memory.
        bfloat16: torch's autocast.
        float16: the same in float16, which rounds an eighth as much, but ends at 65,504; not with bfloat16.
        onnxruntime: converted, and run by ONNX Runtime in float32; of the CPU, and with none of the others.
        compiled: whole batches by torch.compile; shorter ones without.
        difference: of the scores from float32, over the scores' spread: root mean squares; this and the next
            two are None where nothing was measured.
        largest_difference: of any score, over the largest score.
        speedup: over float32.
        notes: what was tried, and what came of each.
    """

    channels_last: bool = False
    bfloat16: bool = False
    float16: bool = False
    onnxruntime: bool = False
    compiled: bool = False
    difference: float | None = Field(default=None, ge=0)
    largest_difference: float | None = Field(default=None, ge=0)
    speedup: float | None = Field(default=None, gt=0)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Precision:
        if self.onnxruntime and any(getattr(self, step) for step in STEPS if step != "onnxruntime"):
            raise ValueError("expected onnxruntime alone, because it runs the network instead of torch")
        if self.bfloat16 and self.float16:
            raise ValueError("expected bfloat16 or float16, found both")
        return self

    @classmethod
    def named(cls, name: str) -> Precision:
        """As a job names it: `float32`, or steps such as `channels_last+bfloat16`."""
        asked = name.split("+")
        return cls(**{step: step in asked for step in STEPS}, notes=(f"{name}: as asked",))

    @property
    def is_float32(self) -> bool:
        """Nothing is done to the network."""
        return not any(getattr(self, step) for step in STEPS)

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in; None without it."""
        if self.bfloat16:
            return torch.bfloat16
        return torch.float16 if self.float16 else None

    @property
    def steps(self) -> str:
        """What `named` makes the same of."""
        return "+".join(step for step in STEPS if getattr(self, step)) or "float32"

    def __str__(self) -> str:
        if self.speedup is None or self.difference is None:
            return self.steps
        return (
            f"{self.steps} ({self.speedup:.2g} times as fast as float32, scores within {self.difference:.2%} "
            "of their spread)"
        )


class Execution(StrictModel):
    """How one job asks its model.

    Args:
        batch_size: masked images per call.
        threads: of torch.
        precision: what is done to the network.
    """

    batch_size: int = Field(ge=1)
    threads: int = Field(ge=1)
    precision: Precision = Precision()

    def __str__(self) -> str:
        return f"{self.precision}, batches of {self.batch_size}, threads {self.threads}"


class Adapted(nn.Module):
    """A network asked in a certain precision.

    Args:
        network: its weights lie as `precision` says.
        precision: for each batch.
        batch_size: of whole batches. It is compiled for these alone, because another shape would be compiled
            anew, and padding a short batch costs more than to ask it without.
    """

    def __init__(self, network: nn.Module, precision: Precision, batch_size: int) -> None:
        super().__init__()
        dtype = precision.autocast
        self.network = network if dtype is None else _with_cast_weights(network, dtype)
        self._precision, self._batch_size = precision, batch_size
        self._compiled = _compiled(self.network) if precision.compiled else None

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """What the network returns."""
        images = images.contiguous(memory_format=layout_of(self._precision))
        whole = self._compiled is not None and len(images) == self._batch_size
        network = self._compiled if whole else self.network
        dtype = self._precision.autocast
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return network(images)  # type: ignore[misc]


def _with_cast_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose layers hold in that precision what autocast would cast again in every call: the same
    bits, but casting the weights of a ResNet-50 takes longer than it takes for an image of 96 x 96 pixels. A
    network that cannot be copied is left as it is.
    """
    try:
        network = copy.deepcopy(network)
    except Exception:  # noqa: BLE001 - whatever it dislikes about copies, it can be asked without
        return network
    cast = [layer for layer in network.modules() if type(layer) in _CAST and not layer._forward_pre_hooks]
    others = [layer for layer in network.modules() if layer not in cast]
    shared = {id(weight) for layer in others for weight in layer.parameters(recurse=False)}
    for layer in cast:
        if shared.isdisjoint(map(id, layer.parameters())):
            layer.to(dtype)
    return network


def _compiled(network: nn.Module) -> BlackBox:
    """The network by torch.compile, for one shape, when it is first called."""
    import torch._inductor.config as inductor

    # By default every process starts as many compilers as there are cores, and so would every actor.
    inductor.compile_threads = torch.get_num_threads()
    # In one graph or not at all: a network that looks at numbers of its batch would be compiled anew for each
    # of them, up to a limit, and which batches round as compiled ones would depend on their order.
    whole: Any = partial(torch.compile, dynamic=False, fullgraph=True)
    compiled: BlackBox
    if isinstance(network, ExportedProgram):
        # Without the loop over its batches, every turn of which would be compiled.
        asked = whole(network.program), network.least, network.most, network.mean, network.std
        compiled = ExportedProgram(*asked)
    else:
        compiled = whole(network)

    def ask(images: Float[Tensor, "B 3 H W"]) -> Any:
        # Freezing folds normalisation layers and casts into the weights, and then activations into layers.
        # It is no option of `torch.compile`, to which weights are inputs by the time that it reads those, nor
        # a setting for good: networks of others that are compiled in this process keep their weights.
        with inductor.patch(freezing=True):
            return compiled(images)

    return ask


def layout_of(precision: Precision) -> torch.memory_format:
    """How batches lie in memory."""
    return torch.channels_last if precision.channels_last else torch.contiguous_format


def network_of(model: Model | Embedder) -> nn.Module | None:
    """The torch module inside of a model of ours; None for ONNX, servers and foreign callables."""
    network = model.black_box.network if isinstance(model.black_box, Classifier) else None
    return network if isinstance(network, nn.Module) else None


def adapted(model: AnyModel, network: nn.Module, precision: Precision, batch_size: int) -> AnyModel:
    """The model with its network asked in a certain precision."""
    classifier = model.black_box
    if not isinstance(classifier, Classifier):
        raise TypeError(f"expected a Classifier, found {type(classifier).__name__}")
    layers: BlackBox
    if precision.onnxruntime:
        if model.device.type != "cpu":
            raise TypeError(f"onnxruntime is for the CPU, and the model is on {model.device}")
        layers = converted(network, model.preprocessing.size, batch_size)
    else:
        layers = Adapted(network, precision, batch_size)
    black_box = Classifier(
        layers, classifier.mean, classifier.std, classifier.activation, precision.channels_last
    )
    return replace(model, black_box=black_box)


def apply(model: AnyModel, execution: Execution) -> AnyModel:
    """The model asked as the plan says. Its weights are moved: use the model that is returned alone.

    Sets the number of torch's threads, which is part of the plan too, and lets this process keep the memory
    that it frees.

    Raises:
        ModelError: it cannot be asked so here; any other way would give other roundings.
    """
    torch.set_num_threads(execution.threads)
    keep_freed()
    precision, network = execution.precision, network_of(model)
    if precision.is_float32:
        return model
    try:
        if network is None:
            raise TypeError("it is no torch module")
        if precision.channels_last:
            network.to(memory_format=torch.channels_last)
        ready = adapted(model, network, precision, execution.batch_size)
        # It compiles at the first call, for tensors of just the kind that a `Blender` makes.
        # No blank ones: a network that divides by an image's own spread would return NaN for them.
        height, width = model.preprocessing.size
        ramp = torch.linspace(-1, 1, 3 * height * width, device=model.device).view(3, height, width)
        images = ramp.expand(execution.batch_size, -1, -1, -1)
        ask(ready.input_space().function, images.clone(memory_format=layout_of(precision)))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"the plan asks the model with {precision}, which fails here: {first_line(error)}; "
            "use machines of one kind, or --precision float32"
        ) from error
    return ready
