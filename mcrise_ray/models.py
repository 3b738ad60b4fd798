"""From a model string, as users write it, to a black box with its preprocessing and class names."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor, nn

from mcrise_ray.errors import MCRiseError, ModelError, TargetError
from mcrise_ray.scores import Activation, BlackBox, Classifier, InputSpace, input_space
from mcrise_ray.spec import StrictModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Preprocessing(StrictModel):
    """How an image becomes the model's input.

    Args:
        size: (H, W) of the model's input.
        resize: `"stretch"` brings the whole image to `size`; `"crop"` brings its shorter side to
            `shorter_side` and cuts `size` out of the centre, as torchvision's weights were evaluated.
        shorter_side: for `"crop"`.
        interpolation: of the resize, with antialiasing.
        mean, std: of the normalisation, per channel, in RGB in [0, 1].
        activation: turns the network's output into scores.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["stretch", "crop"] = "stretch"
    shorter_side: int = 256
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    activation: Activation = "softmax"

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError(f"expected a height and a width of at least 1, found {size[0]} x {size[1]}")
        return size

    @field_validator("std")
    @classmethod
    def _check_std(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"expected standard deviations above 0, found {std}")
        return std

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The image at the model's input size, still RGB bytes: masks are applied to this."""
        picture = Image.fromarray(image)
        height, width = self.size
        resampling = _RESAMPLING[self.interpolation]
        if self.resize == "stretch":
            return np.asarray(picture.resize((width, height), resampling))
        scale = self.shorter_side / min(picture.size)
        scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        picture = picture.resize(scaled, resampling)
        return np.asarray(picture.crop((left, top, left + width, top + height)))


class ModelSpec(StrictModel):
    """Which model, with which weights, and what differs from its own preprocessing.

    Args:
        model: `torchvision:NAME[?num_classes=..&weights=..]`, or `package.module:factory`.
        weights: a safetensors file, or a state dict saved by `torch.save`; no pickled code is run.
        classes: a text file with one class name per line, in index order.
        args: keyword arguments of a factory.
        preprocessing: fields of `Preprocessing` that replace the model's own.
        device: `cuda`, `cuda:1`, `cpu`; the first GPU where there is one by default.
    """

    model: str
    weights: str | None = None
    classes: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    device: str | None = None


@dataclass(frozen=True)
class Model:
    """A black box with what is known of its input and output; call it as `explain()` does.

    Attributes:
        black_box: takes RGB in [0, 1] at the size of `preprocessing`.
        preprocessing: how images get there.
        class_names: in index order; empty where nobody told.
        device: where it runs.
    """

    black_box: BlackBox
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    device: torch.device

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Scores of RGB images in [0, 1]."""
        return self.black_box(images)

    def input_space(self) -> InputSpace:
        """That of the black box."""
        return input_space(self.black_box)

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """An image of any size at the model's input size."""
        return self.preprocessing.prepare(image)

    def class_name(self, target: int) -> str | None:
        """The name of a class, if known."""
        return self.class_names[target] if target < len(self.class_names) else None

    def class_index(self, target: int | str) -> int:
        """The index of a class given by index or by name.

        Raises:
            TargetError: no class has that name.
        """
        if isinstance(target, int):
            return target
        if target in self.class_names:
            return self.class_names.index(target)
        near = difflib.get_close_matches(target, self.class_names)
        hint = f"; did you mean {', '.join(near)}" if near else ""
        known = (
            f"{len(self.class_names)} class names" if self.class_names else "no class names (see --classes)"
        )
        raise TargetError(
            f"expected a class index or a class name, found {target!r}; the model has {known}{hint}"
        )


@dataclass(frozen=True)
class _Loaded:
    """What a loader knows; `Preprocessing` fields that it does not know take their defaults."""

    black_box: BlackBox
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...] = ()


def load_model(model: str | ModelSpec, **settings: Any) -> Model:
    """Build a model from its string; the further settings are the fields of `ModelSpec`.

    Example:
        `load_model("torchvision:resnet18?num_classes=43", weights="gtsrb.safetensors",
        preprocessing={"size": (96, 96)})`

    Raises:
        ModelError: it cannot be built or loaded; the message says why and names the setting.
        SpecError: a setting is unknown or out of range.
    """
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model=model, **settings)
    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = _loader_of(spec.model)(spec)
    preprocessing = Preprocessing(**{**loaded.preprocessing, **spec.preprocessing})
    black_box = loaded.black_box
    if isinstance(black_box, nn.Module):
        if not isinstance(black_box, Classifier):
            black_box = Classifier(black_box, preprocessing.mean, preprocessing.std, preprocessing.activation)
        try:
            black_box = black_box.eval().requires_grad_(False).to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"cannot move the model to device {device}: {_first_line(error)}") from error
    names = read_class_names(spec.classes) if spec.classes else loaded.class_names
    return Model(black_box, preprocessing, names, device)


def read_class_names(path: str) -> tuple[str, ...]:
    """Class names from a text file, one per line in index order."""
    try:
        return tuple(Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read class names from {path}: {error}; check --classes") from error


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from a safetensors file or from `torch.save`, without running pickled code."""
    if not Path(path).is_file():
        raise ModelError(f"expected a file of weights, found nothing at {path}; check --weights")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"cannot read weights from {path}: {_first_line(error)}; expected safetensors or a plain state "
            "dict (pickled code is never run); safetensors.torch.save_file(model.state_dict(), ...) makes one"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"expected a state dict of tensors in {path}, found {type(content).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _loader_of(model: str) -> Callable[[ModelSpec], _Loaded]:
    prefix, separator, rest = model.partition(":")
    if separator and rest and prefix == "torchvision":
        return _load_torchvision
    if separator and rest and all(part.isidentifier() for part in prefix.split(".")):
        return _load_factory
    raise ModelError(f"expected --model torchvision:NAME or package.module:factory, found {model!r}")


def _load_torchvision(spec: ModelSpec) -> _Loaded:
    import torchvision

    name, _, query = spec.model.removeprefix("torchvision:").partition("?")
    options: dict[str, Any] = dict(parse_qsl(query))
    unknown = options.keys() - {"weights", "num_classes"}
    if unknown:
        raise ModelError(
            f"expected ?weights= or ?num_classes= after torchvision:{name}, found {sorted(unknown)}"
        )
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known)) or "see torchvision.models.list_models()"
        raise ModelError(f"torchvision has no classification model {name!r}; did you mean: {near}")
    if "weights" in options:
        try:
            weights = torchvision.models.get_model_weights(name)[options["weights"]]
            network = torchvision.models.get_model(name, weights=weights)
        except KeyError:
            have = ", ".join(torchvision.models.get_model_weights(name).__members__)
            raise ModelError(f"{name} has weights {have}; found {options['weights']!r}") from None
        except OSError as error:
            raise ModelError(f"cannot download weights of {name}: {error}; use --weights FILE") from error
        preset = weights.transforms()
        preprocessing = {
            "size": (preset.crop_size[0], preset.crop_size[0]),
            "resize": "crop",
            "shorter_side": preset.resize_size[0],
            "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
        }
        return _Loaded(network, preprocessing, tuple(weights.meta["categories"]))
    state = read_weights(spec.weights) if spec.weights else None
    arguments = {key: int(value) for key, value in options.items()}
    if state is not None and not arguments:
        arguments = _class_count(torchvision.models.get_model(name), state)
    network = torchvision.models.get_model(name, **arguments)
    if state is not None:
        _load_state(network, state, spec)
    return _Loaded(network, {})


def _class_count(network: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """`num_classes` where the weights differ from the default network in their last bias alone."""
    last, bias = [(key, value) for key, value in network.state_dict().items() if key.endswith("bias")][-1]
    found = state.get(last)
    return {} if found is None or found.shape == bias.shape else {"num_classes": len(found)}


def _load_factory(spec: ModelSpec) -> _Loaded:
    path, _, attribute = spec.model.partition(":")
    if os.getcwd() not in sys.path:
        # As `python -m` does: a model beside the user is found without installing it.
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"cannot import --model {spec.model}: {_first_line(error)}; "
            "expected package.module:factory, importable from here"
        ) from error
    try:
        built = factory(**spec.args)
    except MCRiseError:
        raise
    except Exception as error:
        raise ModelError(
            f"--model {spec.model} raised {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not callable(built):
        raise ModelError(
            f"expected an nn.Module or a callable from --model {spec.model}, found {type(built).__name__}"
        )
    if spec.weights is not None:
        if not isinstance(built, nn.Module):
            raise ModelError(f"--weights needs an nn.Module, but --model {spec.model} returned {built!r}")
        _load_state(built, read_weights(spec.weights), spec)
    return _Loaded(built, {})


def _load_state(network: nn.Module, state: dict[str, Tensor], spec: ModelSpec) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        shown = " ".join(problems)[:300]
        raise ModelError(f"--weights {spec.weights} do not fit --model {spec.model}: {shown}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
