"""Networks that are built by name: torchvision, timm, Hugging Face, and the user's own factory."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from torch import nn

from mcrise_ray.errors import MCRiseError, ModelError
from mcrise_ray.loading import (
    Loaded,
    ModelSpec,
    class_count,
    did_you_mean,
    first_line,
    load_state,
    optional,
    options_of,
    read_weights,
    ready,
    whole_number,
)
from mcrise_ray.preprocess import NO_NORMALISATION, Preprocessing
from mcrise_ray.scores import Classifier

_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


_TRANSFORMED = {"googlenet", "inception_v3"}  # by `transform_input`, which is no part of their weights


_KIND_OF_DEFAULT: dict[type, Any] = {bool: bool, int: int | float, float: float}

_PROCESSED = {"size", "resize", "shorter_side", "mean", "std", "interpolation"}
_PROCESSED_ALIKE = 0.05  # of inputs whose spread is about 1; roundings to bytes are a tenth of it


def load_torchvision(spec: ModelSpec, device: torch.device) -> Loaded:
    """`torchvision:NAME[?weights=W][?num_classes=N]`, with what the weights' metadata tells."""
    import torchvision

    name, options = options_of(spec.model.removeprefix("torchvision:"), ("weights", "num_classes"))
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = did_you_mean(name, known, "see torchvision.models.list_models()")
        raise ModelError(f"torchvision has no classification model {name!r}; did you mean: {near}")
    if "weights" in options:
        if spec.weights or "num_classes" in options:
            raise ModelError(
                f"expected ?weights= alone, because {options['weights']} settles classes and weights; "
                "leave out --weights and ?num_classes="
            )
        return _torchvision_pretrained(name, options["weights"], device)
    if name in _TRANSFORMED and spec.weights and not {"mean", "std"} <= spec.preprocessing.keys():
        raise ModelError(
            f"{name}: expected --mean and --std beside --weights, because a file does not say which it was "
            "trained with: torchvision's own 0.5,0.5,0.5 and 0.5,0.5,0.5, others mostly ImageNet's"
        )
    arguments = {key: whole_number(key, value) for key, value in options.items()}
    network = with_weights(lambda **given: torchvision.models.get_model(name, **given), arguments, spec)
    return Loaded(ready(network, device), {"activation": "softmax"}, device)


def load_timm(spec: ModelSpec, device: torch.device) -> Loaded:
    """`timm:NAME[?num_classes=N][?pretrained=true]`, with the preprocessing that timm evaluates it with."""
    timm = optional("timm", "timm")
    name, options = options_of(spec.model.removeprefix("timm:"), ("num_classes", "pretrained"))
    pretrained = options.pop("pretrained", "false")
    if pretrained not in {"true", "false"}:
        raise ModelError(f"expected ?pretrained=true or ?pretrained=false, found {pretrained!r}")
    if pretrained == "true" and options and spec.weights is None:
        raise ModelError(
            "expected ?pretrained=true alone, because a last layer for other classes would be random, found "
            f"?num_classes={options['num_classes']} beside it; leave that out, or give --weights"
        )
    if ":" not in name and not timm.is_model(name):
        near = did_you_mean(name, timm.list_models(), "see timm.list_models()")
        raise ModelError(f"timm has no model {name!r}; did you mean: {near}")
    arguments = {key: whole_number(key, value) for key, value in options.items()}

    def build(**given: Any) -> nn.Module:
        try:
            network: nn.Module = timm.create_model(name, pretrained=pretrained == "true", **given)
        except Exception as error:
            raise ModelError(f"timm cannot build {name}: {first_line(error)}; check --model") from error
        return network

    network = with_weights(build, arguments, spec)
    config = timm.data.resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ModelError(f"expected a model of RGB images, found {channels} input channels in timm:{name}")
    fields = {
        "size": (height, width),
        **_timm_resize(name, config, spec),
        "interpolation": config["interpolation"],
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "activation": "softmax",
    }
    names = _timm_class_names(timm, network) if pretrained == "true" and not options else ()
    return Loaded(ready(network, device), fields, device, names)


def load_huggingface(spec: ModelSpec, device: torch.device) -> Loaded:
    """`hf:PATH_OR_ID`: a classifier of transformers, with its image processor; none of its code is run."""
    transformers = optional("transformers", "transformers")
    name, _ = options_of(spec.model.removeprefix("hf:"), ())
    if spec.weights:
        raise ModelError(f"--weights: expected none, because hf:{name} has its own; name a folder instead")
    if name.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(name)):
        raise ModelError(f"expected a folder of a transformers model, found none at {name}; check --model")
    name = os.path.expanduser(name)
    transformers.utils.logging.disable_progress_bar()
    try:
        network, loading = transformers.AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(
            f"cannot load an image classifier from hf:{name}: {first_line(error)}; "
            "expected a local folder or a model id"
        ) from error
    if drawn := sorted(dict(network.named_parameters()).keys() & loading["missing_keys"]):
        raise ModelError(
            f"expected all weights of an image classifier in hf:{name}, found no {', '.join(drawn)[:200]}, "
            "which would be random; name a model that was trained as a classifier"
        )
    labels = network.config.id2label
    multi_label = network.config.problem_type == "multi_label_classification"
    processing = _processor_fields(transformers, name, spec)
    _check_processor(transformers, name, processing, spec)
    fields = {"activation": "sigmoid" if multi_label else "softmax", **processing}
    names = tuple(str(labels[index]) for index in sorted(labels))
    # In float32, which the precision is judged by, whatever its weights are stored in.
    return Loaded(ready(network.float(), device), fields, device, names)


def load_factory(spec: ModelSpec, device: torch.device) -> Loaded:
    """`package.module:factory`: whatever the user's own function returns.

    An `nn.Module` reads normalised images and returns logits, unless it is a `Classifier`, which says itself
    what it reads and returns. Any other callable is a black box: RGB in [0, 1] to scores.
    """
    path, _, attribute = spec.model.partition(":")
    if os.getcwd() not in sys.path:
        # As `python -m` does: a model beside the user is found without installing it.
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(path), attribute)
    except Exception as error:  # of whatever stands in a module of the user
        raise ModelError(
            f"cannot import --model {spec.model}: {type(error).__name__}: {first_line(error)}; "
            "expected package.module:factory, importable from here"
        ) from error
    try:
        built = factory(**_arguments(factory, spec))
    except MCRiseError:
        raise
    except Exception as error:
        raise ModelError(
            f"--model {spec.model} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(built):
        raise ModelError(
            f"expected an nn.Module or a callable from --model {spec.model}, found {type(built).__name__}"
        )
    fields: dict[str, Any] = {"activation": "softmax"}
    if isinstance(built, Classifier):
        fields = {"mean": built.mean, "std": built.std, "activation": built.activation}
        built = built.network
    elif not isinstance(built, nn.Module):
        fields = {**NO_NORMALISATION, "activation": "none"}
    if not isinstance(built, nn.Module):
        if spec.weights is not None:
            raise ModelError(
                f"--weights: expected an nn.Module from --model {spec.model}, found {type(built).__name__}"
            )
        return Loaded(built, fields, torch.device("cpu"))
    if spec.weights is not None:
        load_state(built, read_weights(spec.weights, built), spec)
    return Loaded(ready(built, device), fields, device)


def _arguments(factory: Any, spec: ModelSpec) -> dict[str, Any]:
    """A factory's arguments, text of them as its annotations say, or else the kinds of its defaults.

    A command line knows text alone, and a factory that says `width: int` would get "64". Numbers of a job
    file are what they are.
    """
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters
    except Exception:  # noqa: BLE001 - builtins tell none, and annotations may be for type checkers alone
        return spec.args
    return {
        name: _read(name, value, parameters[name]) if isinstance(value, str) and name in parameters else value
        for name, value in spec.args.items()
    }


def _read(name: str, text: str, parameter: inspect.Parameter) -> Any:
    annotated = parameter.annotation is not inspect.Parameter.empty
    kind = parameter.annotation if annotated else _KIND_OF_DEFAULT.get(type(parameter.default), str)
    try:
        reader: TypeAdapter[Any] = TypeAdapter(kind)
    except PydanticUserError:  # a class that nothing is known of
        return text
    for read in (reader.validate_python, reader.validate_json):
        with suppress(ValidationError):
            return read(text)
    if annotated:
        raise ModelError(
            f"--model-arg {name}: expected {inspect.formatannotation(kind)}, as the factory says, "
            f"found {text!r}; lists and null are written as in JSON"
        )
    return text


def _torchvision_pretrained(name: str, asked: str, device: torch.device) -> Loaded:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name)[asked]
        network = torchvision.models.get_model(name, weights=weights)
    except KeyError:
        have = " or ".join(torchvision.models.get_model_weights(name).__members__)
        raise ModelError(f"expected ?weights= to be {have} for {name}, found {asked!r}") from None
    except OSError as error:
        raise ModelError(f"cannot download weights of {name}: {error}; use --weights FILE") from error
    except Exception as error:  # of a file that a download has left in pieces, or that is another's
        raise ModelError(
            f"cannot read weights of {name} in {torch.hub.get_dir()}/checkpoints: {first_line(error)}; "
            "remove the file there, or use --weights FILE"
        ) from error
    preset = weights.transforms()
    fields = {
        "size": (preset.crop_size[0], preset.crop_size[0]),
        "resize": "crop",
        "shorter_side": preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "activation": "softmax",
    }
    return Loaded(ready(network, device), fields, device, tuple(weights.meta["categories"]))


def with_weights(build: Any, arguments: dict[str, int], spec: ModelSpec) -> nn.Module:
    """A network from its builder, with the file of weights where there is one."""
    network: nn.Module = build(**arguments)
    if spec.weights is None:
        return network
    state = read_weights(spec.weights, network)
    if not arguments and (classes := class_count(network, state)):
        network = build(**classes)
    load_state(network, state, spec)
    return network


def _timm_resize(name: str, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Timm's crop_pct and crop_mode as ours."""
    height, width = config["input_size"][1:]
    if config["crop_mode"] == "center":
        return {"resize": "crop", "shorter_side": math.floor(min(height, width) / config["crop_pct"])}
    if config["crop_mode"] == "squash" and config["crop_pct"] == 1:
        return {"resize": "stretch"}
    if "resize" in spec.preprocessing:
        return {}
    raise ModelError(
        f"timm evaluates {name} with crop mode {config['crop_mode']} at {config['crop_pct']}, which is "
        "neither a centre crop nor the whole image; choose with --resize crop or --resize stretch"
    )


def _timm_class_names(timm: Any, network: nn.Module) -> tuple[str, ...]:
    """Names of the ImageNet classes that a pretrained network tells apart, where timm knows which."""
    subset = timm.data.infer_imagenet_subset(network)
    return tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else ()


def _processor_fields(transformers: Any, name: str, spec: ModelSpec) -> dict[str, Any]:
    """What an image processor says, in our terms."""
    try:
        loaded = transformers.AutoImageProcessor.from_pretrained(name)
        processor = loaded.to_dict()
    except (OSError, ValueError) as error:
        if {"size", "mean", "std"} <= spec.preprocessing.keys():
            return {}
        raise ModelError(
            f"cannot load an image processor from hf:{name}: {first_line(error)}; "
            "say --size, --mean and --std instead"
        ) from error
    if processor.get("do_flip_channel_order"):
        raise ModelError(
            f"expected a network that reads RGB, found hf:{name}, which reads BGR; use a factory whose "
            "network flips the channels: images[:, [2, 1, 0]]"
        )
    fields = _processor_size(processor, name, spec)
    if "interpolation" not in spec.preprocessing and processor.get("do_resize", True):
        filter_ = int(processor.get("resample", 2))
        if filter_ not in _PIL_FILTERS:
            raise ModelError(
                f"expected nearest, lanczos, bilinear or bicubic in hf:{name}, found PIL's filter {filter_}; "
                "choose with --interpolation"
            )
        fields["interpolation"] = _PIL_FILTERS[filter_]
    # v = scale * rgb - offset, then (v - mean) / std, with rgb in [0, 1]
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    scale, offset = 255 * factor, float(processor.get("rescale_offset") or 0)
    # What is None there is left out of the dictionary.
    normalises = processor.get("do_normalize", getattr(loaded, "do_normalize", True))
    normalises = normalises and processor.get("image_mean") is not None
    mean = processor["image_mean"] if normalises else (0.0, 0.0, 0.0)
    std = processor["image_std"] if normalises else (1.0, 1.0, 1.0)
    fields["mean"] = tuple((value + offset) / scale for value in mean)
    # An EfficientNet's divides by it twice where `include_top` says so.
    times = 2 if normalises and processor.get("include_top") else 1
    fields["std"] = tuple(value**times / scale for value in std)
    return fields


def _check_processor(transformers: Any, name: str, fields: dict[str, Any], spec: ModelSpec) -> None:
    """Compare what comes of an image with what the processor makes of it: there are many, each with its ways.

    Raises:
        ModelError: they differ by more than roundings, and nothing was said by which they may.
    """
    if not fields or _PROCESSED & spec.preprocessing.keys():
        return
    y, x = np.mgrid[0:480, 0:640]
    image = np.stack([x * 255 / 640, y * 255 / 480, (x + y) * 255 / 1120], axis=2).astype(np.uint8)
    record = Preprocessing(**fields)
    mean, std = (np.array(values)[:, None, None] for values in (record.mean, record.std))
    ours = (record.prepare(image).transpose(2, 0, 1) / 255 - mean) / std
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    try:
        theirs = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0]
    except Exception as error:
        raise ModelError(
            f"cannot ask the image processor of hf:{name}: {first_line(error)}; say --size, --mean and --std"
        ) from error
    # One that keeps proportions has more at the sides.
    top, left = ((there - here) // 2 for there, here in zip(theirs.shape[1:], ours.shape[1:], strict=True))
    theirs = theirs[:, max(top, 0) :, max(left, 0) :][:, : ours.shape[1], : ours.shape[2]]
    apart = float(np.sqrt(((ours - theirs) ** 2).mean())) if ours.shape == theirs.shape else math.inf
    if not apart <= _PROCESSED_ALIKE:
        raise ModelError(
            f"expected to prepare images as hf:{name} does, found inputs that differ by {apart:.2g} from "
            f"those of {type(processor).__name__}; say --size, --resize, --mean and --std, or use a factory"
        )


def _processor_size(processor: dict[str, Any], name: str, spec: ModelSpec) -> dict[str, Any]:
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    if not processor.get("do_center_crop"):
        crop = {}
    shorter = size.get("shortest_edge")
    if crop and shorter:
        if "Levit" in processor.get("image_processor_type", ""):
            shorter = int(256 / 224 * shorter)
        elif "PoolFormer" in processor.get("image_processor_type", ""):
            shorter = int(shorter / processor["crop_pct"])
        return {"size": _sides(crop), "resize": "crop", "shorter_side": shorter}
    if "height" in size and not crop:
        return {"size": _sides(size), "resize": "stretch"}
    if shorter and "crop_pct" in processor and shorter < 384:
        # ConvNeXt's processor: its `size` is that of the crop, and from 384 on the whole image is stretched.
        return {
            "size": (shorter, shorter),
            "resize": "crop",
            "shorter_side": int(shorter / processor["crop_pct"]),
        }
    if shorter and "crop_pct" in processor:
        return {"size": (shorter, shorter), "resize": "stretch"}
    if shorter:
        # The processor keeps the image's proportions; a job needs one size, so the centre is cut out.
        return {"size": (shorter, shorter), "resize": "crop", "shorter_side": shorter}
    if "size" in spec.preprocessing:
        return {}
    raise ModelError(
        f"hf:{name} resizes to {size or 'nothing'}, crops to {crop or 'nothing'}; choose with --size"
    )


def _sides(size: dict[str, int]) -> Sequence[int]:
    return size["height"], size["width"]
