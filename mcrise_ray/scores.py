"""Black boxes: what is asked for scores, how it is asked, and what its answer must look like.

A black box is any callable from a float tensor `(B, 3, H, W)` of RGB in [0, 1] to scores `(B, C)`. The
tensor it is given is a buffer that the next call overwrites: a black box may write to it, as `images -= mean`
does, and must clone it to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from mcrise_ray.errors import DeviceError, ImageError, ModelError, ScoreError, TargetError

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed")  # in lower case, of torch and others

BlackBox = Callable[[Tensor], Any]
Activation = Literal["softmax", "sigmoid", "none"]
Kind = Literal["scores", "embeddings"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=1),
    "sigmoid": torch.sigmoid,
    "none": lambda scores: scores,
}

_DIFFERENT_IN_TRAINING = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd

_AXES: dict[Kind, str] = {"scores": "classes", "embeddings": "dimensions"}


class Classifier(nn.Module):
    """A network with its normalisation and activation, as a black box that takes RGB in [0, 1].

    Args:
        network: from normalised images `(B, 3, H, W)` to logits or scores `(B, C)`, or to an object that has
            them as `logits`, as transformers returns.
        mean, std: per channel, in RGB in [0, 1].
        activation: turns the network's output into scores.
        channels_last: the network is fastest with images whose channels lie last in memory.
    """

    def __init__(
        self,
        network: BlackBox,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        activation: Activation = "softmax",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = tuple(mean), tuple(std)
        self.activation = activation
        self.channels_last = channels_last

    def input_space(self) -> InputSpace:
        """The network's own, normalised space."""
        return InputSpace(self.score_normalized, device_of(self), self.mean, self.std, self.channels_last)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Scores of RGB images in [0, 1]."""
        return self.score_normalized(self.input_space().normalize(images))

    def score_normalized(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """Scores of images that are normalised already."""
        return _ACTIVATIONS[self.activation](self.outputs(images))

    def outputs(self, images: Float[Tensor, "B 3 H W"]) -> Tensor:
        """What the network itself returns for images that are normalised already."""
        output = self.network(images)
        output = getattr(output, "logits", output)
        if isinstance(output, np.ndarray):
            output = torch.from_numpy(output)
        if not isinstance(output, Tensor):
            raise ModelError(
                f"expected the network to return one tensor (B, classes), found {type(output).__name__}; "
                "wrap it in a factory that picks the tensor"
            )
        return output.float()


@dataclass(frozen=True)
class InputSpace:
    """Where blending happens for a black box: the image and the palette are normalised once, not per mask.

    Attributes:
        function: takes batches in this space.
        device: where it wants them.
        mean, std: from RGB in [0, 1] into this space.
        channels_last: how it wants them to lie in memory.
        size: (H, W) of the images that it reads; None where it does not say.
    """

    function: BlackBox
    device: torch.device
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels_last: bool = False
    size: tuple[int, int] | None = None

    def normalize(self, images: Float[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
        """RGB in [0, 1] into this space."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


@runtime_checkable
class HasInputSpace(Protocol):
    """A black box of ours, which can take images that are normalised already."""

    def input_space(self) -> InputSpace:
        """The space in which this black box is cheapest to ask."""
        ...


def input_space(black_box: BlackBox) -> InputSpace:
    """The normalised space for a black box of ours (blending is affine: it commutes), RGB for any other.

    Raises:
        ModelError: a layer of the network is in training mode.
    """
    if isinstance(black_box, nn.Module):
        _check_evaluates(black_box)
    if isinstance(black_box, HasInputSpace):
        return black_box.input_space()
    return InputSpace(black_box, device_of(black_box))


def _check_evaluates(network: nn.Module) -> None:
    """Scores would depend on chance or on the rest of the batch, and averages in the network would move."""
    for name, layer in network.named_modules():
        if layer.training and isinstance(layer, _DIFFERENT_IN_TRAINING):
            raise ModelError(
                f"expected a network in evaluation mode, found its {type(layer).__name__} {name!r} in "
                "training mode; call .eval() on the network"
            )


def device_of(black_box: BlackBox) -> torch.device:
    """The device a module's parameters are on; the CPU for any other callable."""
    if isinstance(black_box, nn.Module):
        for tensor in (*black_box.parameters(), *black_box.buffers()):
            return tensor.device
    return torch.device("cpu")


@dataclass(frozen=True)
class Answer:
    """Scores of a batch that a GPU may still be working on.

    Attributes:
        scores: `(B, C)` float64 on the CPU, not to be looked at before `arrived`.
        arrived: None where they are there.
        kind: what they are, for the messages.
    """

    scores: Float64[Tensor, "B C"]
    arrived: torch.cuda.Event | None = None
    kind: Kind = "scores"

    def read(self) -> Float64[np.ndarray, "B C"]:
        """The scores, as soon as they are there.

        Raises:
            ScoreError: they are not finite.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        scores: np.ndarray = self.scores.numpy()
        if not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores).all(axis=1)).sum())
            raise ScoreError(
                f"expected finite {self.kind}, found NaN or infinity for {bad} of {len(scores)} images; "
                "check the model's weights, normalisation and precision"
            )
        return scores


def ask(
    function: BlackBox, images: Float[Tensor, "B 3 H W"], *, kind: Kind = "scores"
) -> Float64[np.ndarray, "B C"]:
    """All scores, or whole embeddings, of a batch, on the CPU in float64.

    Args:
        function: what is asked.
        images: in its space.
        kind: what it is expected to return, for the messages.

    Raises:
        ModelError: the black box raised.
        ScoreError: its answer is not `(B, C)`, or not finite.
        MemoryError: the batch is too large for the memory, whichever library said so.
        DeviceError: the GPU has failed: this process cannot use it any more.
    """
    return launch(function, images, kind=kind).read()


def launch(function: BlackBox, images: Float[Tensor, "B 3 H W"], *, kind: Kind = "scores") -> Answer:
    """Ask for the scores of a batch without waiting for a GPU; `images` may be overwritten at once.

    Raises:
        ModelError: the black box raised.
        ScoreError: its answer is not `(B, C)`.
    """
    try:
        with torch.inference_mode():
            answer = function(images)
    except (ModelError, ScoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raised = (
            f"the model raised {type(error).__name__} on a batch of shape {tuple(images.shape)}: "
            f"{' '.join(str(error).split())[:400]}"
        )
        raise (hardware_error(error, raised) or ModelError(raised)) from error
    try:
        # Copied: of arrays that are read-only, as those of JAX are, torch would warn.
        tensor = answer if isinstance(answer, Tensor) else torch.tensor(answer, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScoreError(
            f"expected {kind} as one tensor, array or list of numbers from the model, found "
            f"{type(answer).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    if tensor.ndim != 2 or len(tensor) != len(images) or not tensor.shape[1]:
        raise ScoreError(
            f"expected {kind} of shape ({len(images)}, {_AXES[kind]}) from the model, "
            f"found {tuple(tensor.shape)}"
        )
    scores = tensor.detach().double()
    if scores.is_cuda:
        # Copied in the order of the GPU's stream, before whatever overwrites the batch later.
        arriving = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
        arriving.copy_(scores, non_blocking=True)
        return Answer(arriving, torch.cuda.current_stream(scores.device).record_event(), kind)
    # A copy: the black box may have returned a view of the batch, which the next call overwrites.
    return Answer(scores.cpu().clone(), kind=kind)


def hardware_error(error: Exception, said: str) -> MemoryError | DeviceError | None:
    """What the error of any library comes down to where it is of memory or of a GPU; None for any other.

    A GPU tells late what went wrong: not always to the model, but to whoever next copies or waits.
    """
    if any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
        return MemoryError(said)
    is_device = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return DeviceError(said) if is_device else None


def check_image(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The image as a contiguous array, or an `ImageError` that says what it is instead.

    Args:
        image: of any size, but where one is given.
        size: (H, W).
    """
    array = np.ascontiguousarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(
            f"expected an image as a uint8 RGB array (H, W, 3), found {array.dtype} of shape {array.shape}; "
            "convert with np.asarray(PIL_image.convert('RGB'))"
        )
    if size is not None and array.shape[:2] != size:
        # Most networks take any size, and score what they were not trained for.
        raise ImageError(
            f"expected an image of {size[0]} x {size[1]} pixels, as the model reads, found "
            f"{array.shape[0]} x {array.shape[1]}; bring it there with model.prepare(image), or load the "
            "model with another size"
        )
    return array


def check_targets(targets: Sequence[int], classes: int) -> None:
    """Raise `TargetError` for a target that the model does not have."""
    for target in targets:
        if not 0 <= target < classes:
            raise TargetError(
                f"expected a target from 0 to {classes - 1} (the model's classes), found {target}"
            )
