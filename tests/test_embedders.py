"""Embedding models by the strings of classifiers: what they read, their self-check, torchreid."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import networks
import numpy as np
import pytest
import torch
from torch import nn

import mcrise_ray as mr
from mcrise_ray.embedders import load_embedder
from mcrise_ray.errors import ModelError
from mcrise_ray.scores import BlackBox

SMALL = {"size": (16, 24)}


def noise(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(1))


def test_a_factory_is_taken_as_it_is_after_normalisation() -> None:
    embedder = load_embedder("networks:tiny", args={"classes": 7}, preprocessing=SMALL)
    images = noise((16, 24))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mr.Preprocessing().mean, mr.Preprocessing().std))
    torch.testing.assert_close(embedder(images), networks.tiny(7).eval()((images - mean) / std))
    assert (embedder.dimensions, embedder.preprocessing.activation) == (7, "none")
    assert embedder.probe.shape == (7,)
    assert embedder.prepare(np.zeros((40, 30, 3), np.uint8)).shape == (16, 24, 3)
    again = load_embedder("networks:tiny", args={"classes": 7}, preprocessing=SMALL)
    np.testing.assert_array_equal(embedder.probe, again.probe)


def test_a_network_may_write_to_its_batch() -> None:
    assert load_embedder("networks:in_place", preprocessing=SMALL).dimensions == 3


def test_exported_programs_and_onnx_are_embedders_too(tmp_path: Path) -> None:
    network = networks.tiny(6).eval()
    images = noise((32, 16), 2)
    exported = tmp_path / "tiny.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: batch},)), exported)
    embedder = load_embedder(str(exported), device="cpu")
    torch.testing.assert_close(embedder(images), network(images))
    assert embedder.preprocessing.size == (32, 16)


def test_timm_gives_its_features_and_not_its_classes() -> None:
    timm = pytest.importorskip("timm")
    embedder = load_embedder("timm:test_resnet?num_classes=5", preprocessing={"size": (64, 32)})
    features = timm.create_model("test_resnet", num_classes=0).num_features
    assert embedder.dimensions == features != 5


def collapsed() -> nn.Module:
    return networks.Returns(lambda images: torch.ones(len(images), 8))


def zeros() -> nn.Module:
    return networks.Returns(lambda images: torch.zeros(len(images), 8))


def maps() -> BlackBox:
    return lambda images: images


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("test_embedders:collapsed", "expected different embeddings of different images.*check --weights"),
        ("test_embedders:zeros", "expected different embeddings of different images"),
        ("test_embedders:maps", r"expected embeddings of shape \(3, dimensions\).* found \(3, 3, 16, 24\)"),
        ("networks:nans", r"expected finite embeddings, found NaN or infinity for 3 of 3 images"),
        ("networks:over_the_batch", r"another embedding alone than in a batch of three \(.* apart\)"),
        ("networks:fixed_size", "fails on noise of 16 x 24 pixels.*check --size"),
        (
            "torchvision:resnet18",
            "expected --model torchreid:NAME, .* which return embeddings, found 'torchv",
        ),
        ("hf:google/vit", "expected --model torchreid:NAME"),
        ("resnet18", "expected --model torchreid:NAME, .*, found 'resnet18'"),
    ],
)
def test_self_check_names_the_knob(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_embedder(model, preprocessing=SMALL)
    assert "\n" not in str(caught.value)


def test_what_only_classifiers_have_is_refused() -> None:
    with pytest.raises(ModelError, match=r"--activation: expected none, .* found softmax"):
        load_embedder("networks:tiny", preprocessing={**SMALL, "activation": "softmax"})
    with pytest.raises(ModelError, match=r"--classes: expected none, .* found names.txt"):
        load_embedder("networks:tiny", classes="names.txt", preprocessing=SMALL)
    with pytest.raises(
        ModelError, match=r"expected --model torchvision:NAME, .* found 'torchreid:osnet_x1_0'"
    ):
        mr.load_model("torchreid:osnet_x1_0")


def test_torchreid_without_its_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchreid", None)
    with pytest.raises(ModelError, match=r"cannot import torchreid: .*pip install \"mcrise-ray\[reid\]\""):
        load_embedder("torchreid:osnet_x0_25", weights="any.pth")
    with pytest.raises(ModelError, match="expected --weights for torchreid:osnet_x0_25, found none"):
        load_embedder("torchreid:osnet_x0_25")


@pytest.fixture
def torchreid() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchreid", exc_type=ImportError)


def test_torchreid_with_the_head_of_its_weights(torchreid: ModuleType, tmp_path: Path) -> None:
    network = torchreid.models.build_model("osnet_x0_25", num_classes=9, pretrained=False, use_gpu=False)
    path = tmp_path / "osnet.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    embedder = load_embedder("torchreid:osnet_x0_25", weights=str(path))
    assert embedder.dimensions == 512
    assert embedder.preprocessing == mr.Preprocessing(size=(256, 128), activation="none")
    images = noise((256, 128), 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mr.Preprocessing().mean, mr.Preprocessing().std))
    torch.testing.assert_close(embedder(images), network.eval()((images - mean) / std))
    with pytest.raises(ModelError, match="torchreid has no such model: Unknown model: osnet_x9"):
        load_embedder("torchreid:osnet_x9", weights=str(path))
    with pytest.raises(ModelError, match=r"--weights .* do not fit --model torchreid:osnet_x0_5"):
        load_embedder("torchreid:osnet_x0_5", weights=str(path))


def test_torchreid_runs_no_pickled_code(torchreid: ModuleType, tmp_path: Path) -> None:
    path, trace = tmp_path / "osnet.pth", tmp_path / "trace"
    torch.save({"conv1": Trap(str(trace))}, path)
    with pytest.raises(ModelError, match=r"cannot read weights from .* pickled code"):
        load_embedder("torchreid:osnet_x0_25", weights=str(path))
    assert not trace.exists()


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)
