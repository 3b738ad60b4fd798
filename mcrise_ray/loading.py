"""What a user says of a model, what a loader finds out about it, and the steps that all loaders share."""

from __future__ import annotations

import difflib
import importlib
import os
import pickle
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from urllib.parse import parse_qsl

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from mcrise_ray.errors import ModelError, SpecError
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.scores import BlackBox
from mcrise_ray.servers import ServerUrl, is_server
from mcrise_ray.spec import StrictModel

FORMS: Final = (
    "torchvision:NAME, timm:NAME, hf:PATH_OR_ID, FILE.pt2, FILE.onnx, package.module:factory, "
    "or http(s)://HOST/v2/models/NAME"
)

_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in messages of torch


class ModelSpec(StrictModel):
    """Which model, with which weights, and what differs from its own preprocessing.

    Args:
        model: `torchvision:NAME[?num_classes=..&weights=..]`, `timm:NAME[?num_classes=..&pretrained=true]`,
            `hf:PATH_OR_ID`, `FILE.pt2`, `FILE.onnx[?output=NAME]`, `package.module:factory`, or the URL of a
            model on a KServe v2 server (options: see `mcrise_ray.servers.ServerUrl`).
        weights: a safetensors file, or a state dict saved by `torch.save`; no pickled code is run.
        classes: a text file with one class name per line, in index order.
        args: keyword arguments of a factory. Text is read as the annotation of its parameter says, or the
            default: 64 for `width: int` and for `width=32`.
        preprocessing: fields of `Preprocessing` that replace the model's own. An `input_range` without `mean`
            and `std` means that there is no further normalisation.
        device: `cuda`, `cuda:1`, `cpu`; the first GPU where there is one by default.
    """

    model: str
    weights: str | None = None
    classes: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)
    device: str | None = None

    @field_validator("model")
    @classmethod
    def _check_server(cls, model: str) -> str:
        # Here and not only at connection: a spec is stored and shown, so it must not hold a password.
        if is_server(model):
            ServerUrl.parse(model)
        return model

    @field_validator("preprocessing")
    @classmethod
    def _check_preprocessing(cls, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            return Preprocessing.part(fields)
        except SpecError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_weights(self) -> ModelSpec:
        path = self.model.partition("?")[0]
        if self.weights and (is_server(self.model) or path.endswith((".pt2", ".onnx"))):
            raise ValueError(
                f"weights: expected none, because {self.model} has its own, found {self.weights}"
            )
        return self

    @property
    def is_untrained(self) -> bool:
        """Whether the weights are those that a library draws at random."""
        drawn = self.model.startswith(("torchvision:", "timm:")) and self.weights is None
        return drawn and not re.search(r"[?&](weights=|pretrained=true)", self.model)

    @property
    def guesses_normalisation(self) -> bool:
        """Whether weights of a file, which do not say it, are taken to want the library's usual one."""
        said = {"mean", "std", "input_range"} & set(self.preprocessing)
        return self.model.startswith(("torchvision:", "timm:")) and self.weights is not None and not said


@dataclass(frozen=True)
class Loaded:
    """What a loader found out.

    Attributes:
        network: takes batches `(B, 3, H, W)` in its own normalised space, on `device`, ready for inference.
        preprocessing: the fields of `Preprocessing` that the model itself tells.
        device: where it runs.
        class_names: in index order; empty where the model does not tell.
    """

    network: BlackBox
    preprocessing: dict[str, Any]
    device: torch.device
    class_names: tuple[str, ...] = ()


def options_of(model: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """`NAME?key=value&key=value` as a name and its options.

    Raises:
        ModelError: an option is not `known`.
    """
    name, _, query = model.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(known))
    if unknown:
        expected = " or ".join(f"?{option}=" for option in known) or "no options"
        raise ModelError(f"expected {expected} after {name}, found {', '.join(unknown)}; check --model")
    return name, options


def whole_number(option: str, text: str) -> int:
    """The value of an option such as `num_classes`."""
    if not text.isdigit() or int(text) < 1:
        raise ModelError(f"expected a whole number of at least 1 for ?{option}=, found {text!r}")
    return int(text)


def optional(module: str, extra: str) -> ModuleType:
    """An optional library, or a `ModelError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f'cannot import {module}: {error}; install it with: pip install "mcrise-ray[{extra}]"'
        ) from error


def ready(network: nn.Module, device: torch.device) -> nn.Module:
    """A network in inference mode on a device."""
    try:
        with suppress(NotImplementedError):  # of programs of torch.export, which have one mode alone
            network.eval()
        for weight in network.parameters():  # one by one: TorchScript knows no other way
            weight.requires_grad_(False)
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"cannot move the model to device {device}: {first_line(error)}; check --device"
        ) from error


def read_class_names(path: str) -> tuple[str, ...]:
    """Class names from a text file, one per line in index order."""
    try:
        return tuple(Path(path).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read class names from {path}: {error}; check --classes") from error


def read_weights(path: str, network: nn.Module) -> dict[str, Tensor]:
    """A state dict for a network, from safetensors or `torch.save`, without running pickled code.

    Raises:
        ModelError: it is neither; the message says why.
    """
    if not Path(path).is_file():
        raise ModelError(f"expected a file of weights, found nothing at {path}; check --weights")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return _under_its_names(load_file(path), network)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"cannot read weights from {path}: {_reason(error)}; expected safetensors or a plain state dict "
            "(pickled code is never run); safetensors.torch.save_file(model.state_dict(), ...) makes one"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"expected a state dict of tensors in {path}, found {_found(content)}; "
            "save the state dict alone, or check --weights"
        )
    return _under_its_names(content, network)


def load_state(network: nn.Module, state: dict[str, Tensor], spec: ModelSpec) -> None:
    """Put weights into a network that was built for them.

    Raises:
        ModelError: names or shapes differ; the message lists the first of them.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]]
        shown = " ".join(problems)[:300]
        raise ModelError(f"--weights {spec.weights} do not fit --model {spec.model}: {shown}") from error


def class_count(network: nn.Module, state: dict[str, Tensor]) -> dict[str, int]:
    """`num_classes` where the last layer of the weights differs from that of the default network."""
    parameters = dict(network.named_parameters())
    last = next(reversed(parameters), "")
    found = state.get(last)
    return {} if found is None or found.shape == parameters[last].shape else {"num_classes": len(found)}


def did_you_mean(name: str, known: Collection[str], otherwise: str) -> str:
    """The names near a misspelt one."""
    return ", ".join(difflib.get_close_matches(name, known)) or otherwise


def first_line(error: BaseException) -> str:
    """The message of a foreign error, fit for one line."""
    return (_COLOURS.sub("", str(error)).splitlines() or [type(error).__name__])[0]


def _under_its_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict without what training has put before all names: `module.` of DataParallel, `_orig_mod.` of
    torch.compile, the attribute of a Lightning module. Weights that are used twice are under both names, of
    which `safetensors.torch.save_model` keeps one.
    """
    own = network.state_dict(keep_vars=True)
    if not own.keys() & state.keys():
        before = _common(state).removesuffix(_common(own))
        state = {name.removeprefix(before): tensor for name, tensor in state.items()}
    given = {id(weight): state[name] for name, weight in own.items() if name in state}
    return {name: given[id(weight)] for name, weight in own.items() if id(weight) in given} | state


def _common(names: Iterable[str]) -> str:
    """What all names begin with, up to a dot."""
    common = os.path.commonprefix(list(names))  # noqa: RUF071 - it is cut at a dot
    return common[: common.rfind(".") + 1]


def _found(content: object) -> str:
    keys = f" of {', '.join(map(str, content))}"[:200] if isinstance(content, dict) else ""
    return type(content).__name__ + keys


def _reason(error: BaseException) -> str:
    """Why torch refused a file. Its first line advises to run the pickled code; the cause stands below it."""
    if "TorchScript" in str(error):
        return "it is a program of TorchScript, which a factory may return: torch.jit.load(...)"
    if code := re.search(
        r"unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)", str(error), re.IGNORECASE
    ):
        return f"it holds pickled code that calls {code[1] or code[2]}"
    if isinstance(error, pickle.UnpicklingError | KeyError):
        return "it is no archive of torch.save with tensors alone"
    return first_line(error)
