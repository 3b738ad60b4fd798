"""From a model string, as users write it, to a black box with its preprocessing and class names.

A model is asked a few images as soon as it is built, so that a wrong size, a missing softmax or a
network in training mode is an error at once, and not a folder of wrong maps.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from mcrise_ray import programs, zoo
from mcrise_ray.errors import ModelError, ScoreError, ServerError, TargetError
from mcrise_ray.loading import FORMS, Loaded, ModelSpec, read_class_names
from mcrise_ray.preprocess import NO_NORMALISATION, Preprocessing, Triple
from mcrise_ray.scores import BlackBox, Classifier, InputSpace, ask, input_space
from mcrise_ray.servers import ServerModel, ServerUrl, is_server

Loader = Callable[[ModelSpec, torch.device], Loaded]

_CLASSIFIERS: Final[Mapping[str, Loader]] = {
    "torchvision": zoo.load_torchvision,
    "timm": zoo.load_timm,
    "hf": zoo.load_huggingface,
}
_LIBRARIES: Final = frozenset({"torchvision", "timm", "hf", "torchreid"})  # never modules of a factory

_SLACK = 1e-3  # of a probability, and of a sum of probabilities
_AGREEMENT = 0.05  # between batches of one and of two, of the largest score: int8 networks come near it
_SAME_MODEL = 1e-2  # of a probe's norm: what devices and precisions differ by, and far less than two models
_PROBED = 16  # outputs that are kept of those for noise


@dataclass(frozen=True)
class ModelFacts:
    """What is stored of a model with its results.

    Attributes:
        model: the model string.
        device: where it runs; `server` where that is not here.
        classes: how many scores it returns; of a model that embeds, the dimensions.
        preprocessing: complete: the model's own with what was said otherwise.
        probe: what it makes of a fixed image of noise, by which it is recognised.
    """

    model: str
    device: str
    classes: int
    preprocessing: Preprocessing
    probe: tuple[float, ...]

    def is_model_of(self, probe: Sequence[float]) -> bool:
        """Whether a probe that was stored comes from this model."""
        theirs, ours = np.array(probe), np.array(self.probe)
        if len(theirs) != len(ours):
            return False
        return bool(np.linalg.norm(theirs - ours) <= _SAME_MODEL * np.linalg.norm(ours))

    def check_is_model_of(self, other: ModelFacts) -> None:
        """Raise `ModelError` where another actor of the job has another model."""
        if not self.is_model_of(other.probe):
            raise ModelError(
                "expected the same model in every actor, found one whose answers to noise are others: have "
                "its weights been changed meanwhile, or do machines hold different files?"
            )


@dataclass(frozen=True)
class Model:
    """A black box with what is known of its input and output; call it as `explain()` does.

    Attributes:
        black_box: takes RGB in [0, 1] at the size of `preprocessing`.
        preprocessing: how images get there.
        classes: C, how many scores it returns.
        class_names: in index order; empty where nobody told.
        device: where it runs; for a server, where its batches are made.
        probe: first outputs for a fixed image of noise, by which results recognise their model.
    """

    black_box: BlackBox
    preprocessing: Preprocessing
    classes: int
    class_names: tuple[str, ...]
    device: torch.device
    probe: tuple[float, ...] = ()

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Scores of RGB images in [0, 1]."""
        return self.black_box(images)

    def input_space(self) -> InputSpace:
        """That of the black box, at the size of `preprocessing`."""
        return replace(input_space(self.black_box), size=self.preprocessing.size)

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """An image of any size at the model's input size."""
        return self.preprocessing.prepare(image)

    def class_name(self, target: int) -> str | None:
        """The name of a class, if known."""
        return self.class_names[target] if target < len(self.class_names) else None

    def class_index(self, target: int | str) -> int:
        """The index of a class given by index or by name.

        Raises:
            TargetError: no class has that name, or more than one.
        """
        if isinstance(target, int):
            return target
        found = [index for index, name in enumerate(self.class_names) if name == target]
        if len(found) > 1:
            raise TargetError(f"expected one class of that name, found {target!r} as {found}; give the index")
        if found:
            return found[0]
        near = difflib.get_close_matches(target, self.class_names)
        hint = f"; did you mean {', '.join(near)}" if near else ""
        known = (
            f"{len(self.class_names)} class names" if self.class_names else "no class names (see --classes)"
        )
        raise TargetError(
            f"expected a class index or a class name, found {target!r}; the model has {known}{hint}"
        )


def load_model(model: str | ModelSpec, **settings: Any) -> Model:
    """Build a model from its string and check it; the further settings are the fields of `ModelSpec`.

    Files and servers tell little about themselves. Unless said otherwise they read RGB in [0, 1] without
    normalisation, at the size that their input has (224 x 224 where it is free), and return logits: the
    activation is softmax. A factory's plain callable returns scores: its activation is none.

    Example:
        `load_model("torchvision:resnet18?num_classes=43", weights="gtsrb.safetensors",
        preprocessing={"size": (96, 96)})`

    Raises:
        ModelError: it cannot be built or loaded, or fails its check; the message names the setting.
        SpecError: a setting is unknown or out of range.
    """
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model=model, **settings)
    loaded = load_network(spec, _CLASSIFIERS, FORMS)
    preprocessing = resolved(loaded.preprocessing, spec.preprocessing)
    black_box = wrapped(loaded.network, preprocessing)
    outputs = _check(black_box, preprocessing, loaded, spec)
    classes = len(outputs)
    names = read_class_names(spec.classes) if spec.classes else loaded.class_names
    if names and len(names) != classes:
        raise ModelError(
            f"expected {classes} class names, as many as the model has classes, found {len(names)} in "
            f"{spec.classes or spec.model}; check --classes and ?num_classes="
        )
    return Model(black_box, preprocessing, classes, names, loaded.device, tuple(outputs[:_PROBED].tolist()))


def facts(spec: ModelSpec, model: Model) -> ModelFacts:
    """What to store of a model that was loaded from a spec."""
    device = "server" if is_server(spec.model) else str(model.device)
    return ModelFacts(spec.model, device, model.classes, model.preprocessing, model.probe)


def load_network(spec: ModelSpec, named: Mapping[str, Loader], forms: str) -> Loaded:
    """The network of a model string, before anything is known of its output.

    Args:
        spec: which model.
        named: loaders of `PREFIX:NAME`.
        forms: of model strings, for the message.

    Raises:
        ModelError: it cannot be built or loaded.
    """
    load = _loader_of(spec.model, named, forms)
    if spec.args and load is not zoo.load_factory:
        raise ModelError(
            f"--model-arg: expected none, because --model {spec.model} is no package.module:factory, "
            f"found {', '.join(spec.args)}"
        )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)  # weights that are drawn are the same in every actor
        return load(spec, _device(spec.device))


def resolved(own: dict[str, Any], asked: dict[str, Any]) -> Preprocessing:
    """The model's own preprocessing with what was asked instead."""
    if "input_range" in asked and not {"mean", "std"} & asked.keys():
        own = {**own, **NO_NORMALISATION}
    fields = {**own, **asked}
    if fields.get("resize") == "crop" and "size" in fields and "shorter_side" not in asked:
        # The margin that the model was evaluated with, or else the usual one, at this size.
        margin = own["shorter_side"] / min(own["size"]) if "shorter_side" in own else 256 / 224
        fields["shorter_side"] = round(min(fields["size"]) * margin)
    return Preprocessing(**fields)


def wrapped(network: BlackBox, preprocessing: Preprocessing) -> BlackBox:
    """The network with its normalisation and activation, or as it is where it needs neither."""
    mean, std = preprocessing.mean_of_rgb, preprocessing.std_of_rgb
    if isinstance(network, programs.ExportedProgram):
        mean, std = _chained((mean, std), (network.mean, network.std))
    as_it_is = (mean, std, preprocessing.activation) == ((0, 0, 0), (1, 1, 1), "none")
    if as_it_is and not isinstance(network, nn.Module):
        return network
    return Classifier(network, mean, std, preprocessing.activation)


def _chained(first: tuple[Triple, Triple], then: tuple[Triple, Triple]) -> tuple[Triple, Triple]:
    """Mean and standard deviation of two normalisations, one after the other."""
    channels = list(zip(*first, *then, strict=True))
    means = [mean + std * next_mean for mean, std, next_mean, _ in channels]
    stds = [std * next_std for _, std, _, next_std in channels]
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def _device(asked: str | None) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ModelError(f"expected --device cuda, cuda:1 or cpu, found {asked!r}") from None
    if device.type not in {"cpu", "cuda"}:
        raise ModelError(f"expected --device cuda, cuda:1 or cpu, found {asked!r}")
    return device


def _loader_of(model: str, named: Mapping[str, Loader], forms: str) -> Loader:
    path = model.partition("?")[0]
    prefix, separator, rest = path.partition(":")
    if is_server(model):
        return _load_server
    if separator and rest and prefix in named:
        return named[prefix]
    if path.endswith(".pt2"):
        return programs.load_exported
    if path.endswith(".onnx"):
        return programs.load_onnx
    factory = rest.isidentifier() and all(part.isidentifier() for part in prefix.split("."))
    if factory and prefix not in _LIBRARIES:
        return zoo.load_factory
    raise ModelError(f"expected --model {forms}, found {model!r}")


def _load_server(spec: ModelSpec, device: torch.device) -> Loaded:
    server = ServerModel(ServerUrl.parse(spec.model))
    return Loaded(server, server.layout.preprocessing(), torch.device("cpu"))


def _check(
    black_box: BlackBox, preprocessing: Preprocessing, loaded: Loaded, spec: ModelSpec
) -> Float64[np.ndarray, " C"]:
    """The outputs for noise of a model that answers as it should to noise and black to white.

    Raises:
        ModelError: it does not; the message names the knob to turn.
    """
    height, width = preprocessing.size
    noise = np.random.default_rng(0).random((2, 3, height, width), np.float32)
    noise[1] = np.linspace(0, 1, width, dtype=np.float32)  # noise again would have the same statistics
    space = input_space(black_box)
    images = space.normalize(torch.from_numpy(noise).to(space.device))
    # Before the activation: a softmax makes anything look like probabilities.
    function = black_box.outputs if isinstance(black_box, Classifier) else space.function
    try:
        raw = ask(function, images.clone())
        alone = ask(function, images[:1].clone())
    except ServerError:
        raise
    except (ModelError, ScoreError) as error:
        raise ModelError(
            f"--model {spec.model} fails on noise of {height} x {width} pixels: {error}; "
            f"check {_suspects(loaded.network, function, images[:1])}"
        ) from error
    difference, largest = float(np.abs(raw[:1] - alone).max()), max(1.0, float(np.abs(raw).max()))
    if difference > _AGREEMENT * largest:
        raise ModelError(
            f"--model {spec.model} gives one image other scores alone than in a batch of two (difference "
            f"{difference:.3g}); is it in training mode, or does it normalise over the batch"
        )
    _check_activation(raw, preprocessing, loaded, spec)
    outputs: np.ndarray = alone[0]
    return outputs


def _suspects(network: BlackBox, function: BlackBox, image: Float[Tensor, "1 3 H W"]) -> str:
    """What may be wrong where a model fails on several images."""
    with suppress(ModelError, ScoreError):
        ask(function, image.clone())
        return "that it takes batches, because one image alone is no problem: a factory may ask one by one"
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    others = {str(weight.dtype) for weight in weights if weight.is_floating_point()} - {"torch.float32"}
    if others:
        return f"that it takes images of float32, with weights of {', '.join(sorted(others))}: call .float()"
    return "--size, --input-range and --weights"


def _check_activation(
    raw: Float64[np.ndarray, "B C"], preprocessing: Preprocessing, loaded: Loaded, spec: ModelSpec
) -> None:
    """Raise `ModelError` where the activation does not go with the network's output."""
    activation = preprocessing.activation
    low, high = float(raw.min()), float(raw.max())
    probable = low >= -_SLACK and high <= 1 + _SLACK
    if activation == "softmax" and raw.shape[1] == 1:
        raise ModelError(
            f"--model {spec.model} returns a single score, of which a softmax is always 1; "
            "say --activation sigmoid, or none"
        )
    if activation == "softmax" and probable and np.allclose(raw.sum(axis=1), 1, atol=_SLACK):
        raise ModelError(
            f"--model {spec.model} returns probabilities that sum to 1 already, and a second softmax would "
            "flatten them; say --activation none"
        )
    told = "activation" in loaded.preprocessing or "activation" in spec.preprocessing
    if probable and not told:
        raise ModelError(
            f"--model {spec.model} returns scores from {low:.3g} to {high:.3g}, which may be probabilities "
            "or logits; say --activation none, softmax or sigmoid"
        )
    if activation == "none" and not probable and "activation" not in spec.preprocessing:
        raise ModelError(
            f"expected scores in [0, 1] from --model {spec.model}, found {low:.3g} to {high:.3g}: logits? "
            "say --activation softmax or sigmoid, or --activation none to explain them as they are"
        )
