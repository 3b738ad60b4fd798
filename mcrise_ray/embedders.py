"""From a model string to a model that embeds images, as person re-identification needs it.

The strings are those of classifiers (see `mcrise_ray.models`), and `torchreid:NAME`. What the network returns
is the embedding, whatever its length; there is no activation.

Axes: B images of a batch; D dimensions of an embedding; H, W pixels of the model's input.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from mcrise_ray import zoo
from mcrise_ray.errors import ModelError, ScoreError, ServerError
from mcrise_ray.loading import Loaded, ModelSpec, first_line, optional, options_of, ready
from mcrise_ray.models import Loader, ModelFacts, load_network, resolved, wrapped
from mcrise_ray.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mcrise_ray.scores import BlackBox, InputSpace, ask, input_space
from mcrise_ray.servers import is_server

EMBEDDER_FORMS: Final = (
    "torchreid:NAME, timm:NAME, FILE.pt2, FILE.onnx, package.module:factory, "
    "or http(s)://HOST/v2/models/NAME, which return embeddings"
)

_TORCHREID: Final[dict[str, Any]] = {"size": (256, 128), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}

_AGREEMENT = 0.05  # between batches of one and of three, of the embedding's norm, as for classifiers
_CONSTANT = 1e-5  # of the embedding's norm: all that different images differ by where the input is not read


@dataclass(frozen=True)
class Embedder:
    """A model that embeds images, with what is known of its input and output.

    Attributes:
        black_box: takes RGB in [0, 1] at the size of `preprocessing`.
        preprocessing: how images get there.
        dimensions: D.
        device: where it runs.
        probe: embedding of a fixed image of noise, by which a stored gallery recognises the model.
    """

    black_box: BlackBox
    preprocessing: Preprocessing
    dimensions: int
    device: torch.device
    probe: Float64[np.ndarray, " D"]

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Embeddings of RGB images in [0, 1]."""
        return self.black_box(images)

    def input_space(self) -> InputSpace:
        """That of the black box, at the size of `preprocessing`."""
        return replace(input_space(self.black_box), size=self.preprocessing.size)

    def prepare(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """An image of any size at the model's input size."""
        return self.preprocessing.prepare(image)


def load_embedder(model: str | ModelSpec, **settings: Any) -> Embedder:
    """Build an embedding model from its string and check it; settings are the fields of `ModelSpec`.

    `torchreid:NAME` reads 256 x 128 pixels with the mean and standard deviation of ImageNet, as its models
    were trained, and needs `weights`. `timm:NAME` is asked without its classifier. Files, servers and
    factories tell as much about their input as for `load_model()`, and their output is taken as it is.

    Example:
        `load_embedder("torchreid:osnet_x1_0", weights="osnet_x1_0_market1501.pth")`

    Raises:
        ModelError: it cannot be built or loaded, or fails its check; the message names the setting.
        SpecError: a setting is unknown or out of range.
    """
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model=model, **settings)
    for name, given in (("--classes", spec.classes), ("--activation", spec.preprocessing.get("activation"))):
        if given is not None:
            raise ModelError(
                f"{name}: expected none, because embeddings are taken as they are, found {given}"
            )
    loaded = load_network(spec, _LOADERS, EMBEDDER_FORMS)
    preprocessing = resolved(loaded.preprocessing, {**spec.preprocessing, "activation": "none"})
    black_box = wrapped(loaded.network, preprocessing)
    probe = _check(black_box, preprocessing, spec)
    return Embedder(black_box, preprocessing, len(probe), loaded.device, probe)


def embedder_facts(spec: ModelSpec, embedder: Embedder) -> ModelFacts:
    """What to store of an embedder that was loaded from a spec."""
    device = "server" if is_server(spec.model) else str(embedder.device)
    probe = tuple(embedder.probe.tolist())
    return ModelFacts(spec.model, device, embedder.dimensions, embedder.preprocessing, probe)


def load_torchreid(spec: ModelSpec, device: torch.device) -> Loaded:
    """`torchreid:NAME` with its weights, which may come with the head of any number of identities."""
    name, _ = options_of(spec.model.removeprefix("torchreid:"), ())
    if spec.weights is None:
        raise ModelError(
            f"expected --weights for torchreid:{name}, found none; see the model zoo of torchreid for a file"
        )
    with warnings.catch_warnings():
        # It warns on import that its own evaluation, which is not used here, is not compiled.
        warnings.simplefilter("ignore")
        torchreid = optional("torchreid", "reid")

    def build(num_classes: int = 1) -> nn.Module:
        try:
            network: nn.Module = torchreid.models.build_model(
                name, num_classes=num_classes, pretrained=False, use_gpu=False
            )
        except KeyError as error:
            raise ModelError(f"torchreid has no such model: {error.args[0]}; check --model") from error
        except Exception as error:
            raise ModelError(f"torchreid cannot build {name}: {first_line(error)}; check --model") from error
        return network

    return Loaded(ready(zoo.with_weights(build, {}, spec), device), _TORCHREID, device)


def load_timm_features(spec: ModelSpec, device: torch.device) -> Loaded:
    """`timm:NAME` as for a classifier, then without its last layer."""
    loaded = zoo.load_timm(spec, device)
    network: Any = loaded.network
    network.reset_classifier(0)
    return Loaded(network, loaded.preprocessing, device)


_LOADERS: Final[Mapping[str, Loader]] = {"torchreid": load_torchreid, "timm": load_timm_features}


def _check(black_box: BlackBox, preprocessing: Preprocessing, spec: ModelSpec) -> Float64[np.ndarray, " D"]:
    """The embedding of noise by a model that tells three different images apart.

    Raises:
        ModelError: it does not; the message names the knob to turn.
    """
    height, width = preprocessing.size
    noise = np.random.default_rng(0).random((3, 3, height, width), np.float32)
    noise[1] = noise[1].mean(axis=(1, 2), keepdims=True)  # one colour
    noise[2] = np.linspace(0, 1, width, dtype=np.float32)  # black to white
    space = input_space(black_box)
    images = space.normalize(torch.from_numpy(noise).to(space.device))
    try:
        embeddings = ask(space.function, images.clone(), kind="embeddings")
        alone = ask(space.function, images[:1].clone(), kind="embeddings")
    except ServerError:
        raise
    except (ModelError, ScoreError) as error:
        raise ModelError(
            f"--model {spec.model} fails on noise of {height} x {width} pixels: {error}; "
            "check --size, --input-range and --weights"
        ) from error
    norm = float(np.linalg.norm(embeddings, axis=1).max())
    difference = float(np.linalg.norm(embeddings[0] - alone[0]))
    if difference > _AGREEMENT * norm:
        raise ModelError(
            f"--model {spec.model} gives one image another embedding alone than in a batch of three "
            f"({difference:.3g} apart); is it in training mode, or does it normalise over the batch"
        )
    apart = np.linalg.norm(embeddings - np.roll(embeddings, 1, axis=0), axis=1)
    if apart.max() <= _CONSTANT * norm:
        raise ModelError(
            f"expected different embeddings of different images from --model {spec.model}, found the same "
            "for noise, one colour and a gradient; check --weights and the normalisation"
        )
    probe: np.ndarray = alone[0]
    return probe
