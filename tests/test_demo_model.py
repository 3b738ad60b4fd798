"""The bundled demo is complete, small and behaves as its manifest promises."""

import csv
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mcrise_ray import demo

JOBS = Path(__file__).parents[1] / "jobs"
BYTES_OF_WEIGHTS = 1_500_000
BYTES_OF_AN_IMAGE = 80_000


@pytest.fixture(scope="module")
def classes() -> list[str]:
    return demo.CLASSES.read_text().splitlines()


@pytest.fixture(scope="module")
def network(classes: list[str]) -> nn.Module:
    network = demo.sign_classifier(len(classes))
    network.load_state_dict(load_file(demo.WEIGHTS), strict=True)
    return network.eval()


@pytest.fixture(scope="module")
def rows() -> list[tuple[Path, int]]:
    with demo.MANIFEST.open(newline="") as file:
        return [(demo.MANIFEST.parent / row["uri"], int(row["label"])) for row in csv.DictReader(file)]


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(JOBS))
    return importlib.import_module("train_demo_model")


def picture(path: Path, resampling: Image.Resampling = Image.Resampling.BILINEAR) -> Tensor:
    image = Image.open(path).convert("RGB").resize(demo.SIZE[::-1], resampling)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@torch.inference_mode()
def probabilities(network: nn.Module, pictures: list[Tensor]) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (demo.MEAN, demo.STD))
    scores: Tensor = network((torch.stack(pictures) - mean) / std)
    return scores.softmax(1)


def test_bundled_files_are_small(rows: list[tuple[Path, int]]) -> None:
    assert demo.WEIGHTS.stat().st_size <= BYTES_OF_WEIGHTS
    assert all(path.stat().st_size <= BYTES_OF_AN_IMAGE for path, _ in rows)


def test_classes_are_distinct_and_match_the_outputs(classes: list[str], network: nn.Module) -> None:
    assert len(set(classes)) == len(classes) == demo.NUM_CLASSES
    assert probabilities(network, [torch.zeros(3, *demo.SIZE)]).shape == (1, len(classes))


def test_manifest_lists_the_images_of_its_folder(rows: list[tuple[Path, int]], classes: list[str]) -> None:
    assert len(rows) >= 10
    assert {path for path, _ in rows} == set(demo.MANIFEST.parent.glob("*.jpg"))
    assert all(0 <= label < len(classes) for _, label in rows)


@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_two_images_are_mistaken_and_the_others_are_clear(
    network: nn.Module, rows: list[tuple[Path, int]], resampling: Image.Resampling
) -> None:
    labels = torch.tensor([label for _, label in rows])
    scores = probabilities(network, [picture(path, resampling) for path, _ in rows])
    truth = scores.gather(1, labels[:, None])[:, 0]
    mistaken = scores.argmax(1) != labels
    assert [path.stem for (path, _), wrong in zip(rows, mistaken, strict=True) if wrong] == [
        path.stem for path, _ in rows if path.stem.endswith("_bleached")
    ]
    assert mistaken.sum() == 2
    assert bool((truth[~mistaken] > 0.7).all())
    assert bool(((truth[mistaken] > 0.05) & (truth[mistaken] < 0.45)).all())


def test_the_network_needs_colour(
    network: nn.Module, rows: list[tuple[Path, int]], classes: list[str]
) -> None:
    stop = classes.index("stop")
    picture_of_stop = picture(next(path for path, label in rows if label == stop))
    red, blue = probabilities(network, [picture_of_stop, picture_of_stop.flip(0)])[:, stop]
    assert blue < 0.5 * red


def test_rendering_is_a_function_of_the_seed(maker: ModuleType) -> None:
    first, again = (np.asarray(maker.render_shot(3, maker.Shot("stop", 0))) for _ in range(2))
    other = np.asarray(maker.render_shot(4, maker.Shot("stop", 0)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bundled_images_are_the_rendered_ones(maker: ModuleType, rows: list[tuple[Path, int]]) -> None:
    path, _ = rows[0]
    bundled = np.asarray(Image.open(path), np.float32)
    rendered = np.asarray(maker.render_shot(0, maker.CLEAR[0]), np.float32)
    assert np.abs(bundled - rendered).mean() < 6  # JPEG and the antialiasing of other Pillow versions
