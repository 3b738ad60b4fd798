"""Makes the bundled demo: renders traffic signs in street scenes, trains the classifier, writes the images.

    python jobs/train_demo_model.py --gtsrb /path/to/root --output mcrise_ray/demo

Axes: images are `(row, column, RGB)` float32 in [0, 1] while rendered, `(B, RGB, row, column)` while trained.
Every image is a function of (seed, stream, index), and the streams of training, test and demo never meet.
"""

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from demo_signs import CLASSES, VARIANTS, plate
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate
from torchvision.datasets import GTSRB

from mcrise_ray.demo import MEAN, SIZE, STD, sign_classifier

TRAIN, TEST, DEMO = range(3)
DEMO_PIXELS: Final = 224
GREY_SIGNS: Final = ("end of",)


@dataclass(frozen=True)
class Shot:
    """One demo image: what it shows, which draw of its scene, and how far its colours are bleached."""

    label: str
    draw: int
    bleach: float = 0.0


CLEAR: Final = (
    Shot("stop", 1),
    Shot("yield", 10),
    Shot("priority road", 4),
    Shot("speed limit 30", 10),
    Shot("no entry", 3),
    Shot("keep right", 10),
    Shot("roundabout", 7),
    Shot("danger", 10),
    Shot("road work", 2),
    Shot("no overtaking", 5),
)
DOUBTFUL: Final = (
    Shot("priority road", 25, 0.94),
    Shot("no overtaking", 1, 0.92),
)


# Rendering.


def _noise(rng: np.random.Generator, pixels: int, cells: int) -> np.ndarray:
    """Smooth noise in about [0, 1], `(pixels, pixels, 1)`."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC))[..., None]


def _mix(low: tuple[float, ...], high: tuple[float, ...], share: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = np.asarray(low, np.float32) * (1 - share) + np.asarray(high, np.float32) * share
    return mixed


def _sky(rng: np.random.Generator, pixels: int) -> np.ndarray:
    height = np.linspace(0, 1, pixels, dtype=np.float32)[:, None, None]
    clear = _mix((0.36, 0.55, 0.82), (0.78, 0.86, 0.94), height)
    clouds = np.clip(1.6 * _noise(rng, pixels, 5) - rng.uniform(0.2, 1.2), 0, 1)
    return clear * (1 - clouds) + clouds * np.float32(rng.uniform(0.7, 0.95))


def _foliage(rng: np.random.Generator, pixels: int) -> np.ndarray:
    leaves = sum(_noise(rng, pixels, cells) / 2**i for i, cells in enumerate((6, 14, 30, 60))) / 1.9
    bright = np.clip(2.4 * leaves - 0.8, 0, 1)
    return _mix((0.05, 0.08, 0.03), (rng.uniform(0.3, 0.6), rng.uniform(0.45, 0.65), 0.25), bright)


def _wall(rng: np.random.Generator, pixels: int) -> np.ndarray:
    stone = tuple(rng.uniform(0.25, 0.75) + rng.normal(0, 0.03, 3))
    wall = np.float32(1) * _mix(stone, (0.3, 0.3, 0.32), 0.4 * _noise(rng, pixels, 40))
    for _ in range(rng.integers(0, 5)):
        top, left = rng.integers(0, pixels, 2)
        down, across = rng.integers(pixels // 10, pixels // 2, 2)
        wall[top : top + down, left : left + across] *= np.float32(rng.uniform(0.4, 1.3))
    return wall


def _background(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Sky, trees or a wall above, trees or a wall below a ragged horizon, and the sign's post."""
    above = (_sky, _sky, _foliage, _wall)[rng.integers(4)](rng, pixels)
    below = (_foliage, _foliage, _wall)[rng.integers(3)](rng, pixels)
    rows = np.linspace(0, 1, pixels, dtype=np.float32)[:, None, None]
    horizon = rng.uniform(0.1, 1.1) + 0.25 * (_noise(rng, pixels, 9) - 0.5)
    scene = np.where(rows < horizon, above, below).astype(np.float32)
    middle, half = int(pixels * rng.uniform(0.46, 0.54)), max(2, pixels // 44)
    across = np.linspace(0.35, 0.75, 2 * half, dtype=np.float32)
    scene[pixels // 2 :, middle - half : middle + half] = across[None, :, None]
    return scene


def _perspective(corners: np.ndarray, side: int) -> list[float]:
    """Coefficients of PIL's PERSPECTIVE transform, which maps output to input."""
    source = [(0, 0), (side, 0), (side, side), (0, side)]
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows), np.array(values))]


def _placed(sign: Image.Image, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """The sign as the camera sees it, RGBA `(pixels, pixels, 4)`."""
    half = pixels * rng.uniform(0.3, 0.47)
    angle = np.deg2rad(rng.normal(0, 5))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.array([rng.uniform(0.8, 1.0), rng.uniform(0.92, 1.0)])
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * squeeze + rng.normal(0, 0.035, (4, 2))
    corners = half * corners @ turn.T + pixels * rng.uniform(0.47, 0.53, 2)
    coefficients = _perspective(corners, sign.width)
    seen = sign.transform(
        (pixels, pixels), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(seen, np.float32) / 255


def _weathered(colour: np.ndarray, rng: np.random.Generator, bleach: float) -> np.ndarray:
    """Bleach towards the brightest channel, as sun and overexposure do; then dirt and uneven light."""
    pixels = len(colour)
    colour = colour + np.float32(bleach) * (colour.max(-1, keepdims=True) - colour)
    slope = np.linspace(rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0), pixels, dtype=np.float32)
    light = slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None]
    dirt = 1 - rng.uniform(0, 0.25) * _noise(rng, pixels, 12)
    if rng.random() < 0.25:
        dirt = dirt * np.where(
            _noise(rng, pixels, 4) > 0.62, np.float32(rng.uniform(0.4, 0.8)), np.float32(1)
        )
    return colour * light * dirt


def _occluded(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A branch or a pole across a corner of the view."""
    pixels = len(scene)
    rows, columns = np.mgrid[0:pixels, 0:pixels] / pixels
    reach = rng.uniform(0.1, 0.35)
    corner = np.hypot(rows - rng.integers(2), columns - rng.integers(2))[..., None]
    ragged = corner < reach * (1 + 1.5 * (_noise(rng, pixels, 14) - 0.5))
    return np.where(ragged, _foliage(rng, pixels), scene).astype(np.float32)


def _photographed(scene: np.ndarray, rng: np.random.Generator, quality: float) -> np.ndarray:
    """Exposure, colour cast, haze, blur and sensor noise; `quality` 1 is a good day, 0 a bad one."""
    bad = 1 - quality
    cast = 1 + rng.normal(0, 0.03 + 0.04 * bad, 3)
    exposure = np.exp(rng.normal(-0.25 * bad, 0.08 + 0.45 * bad))
    contrast, haze = rng.uniform(1 - 0.6 * bad, 1), rng.uniform(0.3, 0.7)
    scene = np.clip(((scene - haze) * contrast + haze) * exposure * cast, 0, 1)
    picture = Image.fromarray((255 * scene).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.25, 0.6 + 3 * bad) * len(scene) / 128))
    small = np.asarray(picture.reduce(2), np.float32) / 255
    return np.clip(small + rng.normal(0, rng.uniform(0.005, 0.012 + 0.04 * bad), small.shape), 0, 1)


def render(key: tuple[int, ...], label: int, pixels: int, quality: float, bleach: float) -> np.ndarray:
    """Render one sign in a scene as uint8 `(pixels, pixels, 3)`, a pure function of its arguments."""
    rng = np.random.default_rng(key)
    work = 2 * pixels
    scene = _background(rng, work)
    sign = _placed(plate(label, int(rng.integers(VARIANTS)), int(1.25 * work)), rng, work)
    cover = sign[..., 3:]
    scene = scene * (1 - cover) + _weathered(sign[..., :3], rng, bleach) * cover
    if rng.random() < 0.2 * (1 - quality):
        scene = _occluded(scene, rng)
    return (255 * _photographed(scene, rng, quality) + 0.5).astype(np.uint8)


def render_many(seed: int, stream: int, count: int) -> tuple[Tensor, Tensor]:
    """Render `count` varied scenes: uint8 `(count, 3, 64, 64)` and their labels."""
    choose = np.random.default_rng((seed, stream))
    labels = choose.integers(len(CLASSES), size=count)
    qualities, bleaches = choose.random(count), 0.4 * choose.random(count) ** 2
    images = [
        render((seed, stream, i), int(label), SIZE[0], quality, bleach)
        for i, (label, quality, bleach) in enumerate(zip(labels, qualities, bleaches, strict=True))
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(labels)


def render_shot(seed: int, shot: Shot) -> Image.Image:
    """Render one demo image."""
    label = CLASSES.index(shot.label)
    pixels = render((seed, DEMO, label, shot.draw), label, DEMO_PIXELS, 0.9, shot.bleach)
    return Image.fromarray(pixels)


def write_images(folder: Path, seed: int) -> None:
    """Write the demo images and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("uri", "label"))
        for shot in (*CLEAR, *DOUBTFUL):
            name = shot.label.replace(" ", "_") + ("_bleached" if shot.bleach else "") + ".jpg"
            render_shot(seed, shot).save(folder / name, quality=95, subsampling=0)
            rows.writerow((name, CLASSES.index(shot.label)))


# Training.


def load_gtsrb(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Real crops, resized whole to 64 x 64: uint8 `(count, 3, 64, 64)` and their labels."""
    images, labels = [], []
    for image, label in GTSRB(str(root), split=split, download=False):
        images.append(np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR)))
        labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def normalised(images: Tensor) -> Tensor:
    """RGB in [0, 1] to the network's input."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def _moved(images: Tensor) -> Tensor:
    """Small shifts, zooms and rotations; never a reflection, which would turn left into right."""
    count = len(images)
    angle, zoom = 0.08 * torch.randn(count), 1 + 0.12 * (2 * torch.rand(count) - 1)
    shift = 0.08 * torch.randn(count, 2)
    rows = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift[:, 0]], 1)
    columns = torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift[:, 1]], 1)
    grid = affine_grid(torch.stack([rows, columns], 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _lit(images: Tensor) -> Tensor:
    """Vary light and contrast and, barely, each channel: hue must stay evidence."""
    count = len(images)
    gain = torch.exp(0.25 * torch.randn(count, 1, 1, 1) + 0.03 * torch.randn(count, 3, 1, 1))
    offset = 0.08 * torch.randn(count, 1, 1, 1)
    return (images * gain + offset).clamp(0, 1)


def _splashed(images: Tensor, share: float) -> Tensor:
    """Cover random cells of a `share` of the images by saturated colours, as saliency masks will.

    A large share would teach the network to overlook wrong colours, which the demo is there to show.
    """
    count, _, height, width = images.shape
    p_mask = torch.rand(count, 1, 1, 1) * 0.3 * (torch.rand(count, 1, 1, 1) < share)
    masked = (torch.rand(count, 1, 8, 8) < p_mask).float()
    colour = (torch.rand(count, 3, 8, 8) < 0.5).float()
    kept, fill = (
        interpolate(z, (height, width), mode="bilinear", align_corners=False)
        for z in (1 - masked, masked * colour)
    )
    return images * kept + fill


def _counterfeited(images: Tensor, targets: Tensor, fakes: Tensor) -> tuple[Tensor, Tensor]:
    """Swap the channels of the `fakes` and ask for no class in particular.

    Without them luminance alone tells the classes apart, and the network would be free to ignore colour.
    """
    swapped = images.clone()
    swapped[fakes] = images[fakes][:, [[2, 0, 1], [1, 2, 0], [2, 1, 0]][int(torch.randint(3, ()))]]
    targets[fakes] = 1 / targets.shape[1]
    return swapped, targets


def _batches(
    images: Tensor, labels: Tensor, synthetic: Tensor, batch: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    chromatic = torch.tensor([not name.startswith(GREY_SIGNS) for name in CLASSES])
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        targets = nn.functional.one_hot(labels[chosen], len(CLASSES)).float()
        fakes = synthetic[chosen] & chromatic[labels[chosen]] & (torch.rand(batch) < 0.25)
        x, targets = _counterfeited(images[chosen].float() / 255, targets, fakes)
        yield normalised(_splashed(_lit(_moved(x)), 0.08)), targets


def train(images: Tensor, labels: Tensor, synthetic: Tensor, steps: int, batch: int = 96) -> nn.Module:
    """Train the classifier from scratch for `steps` batches."""
    network = sign_classifier().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), 4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.15)
    start = time.monotonic()
    for step, (x, targets) in enumerate(_batches(images, labels, synthetic, batch, steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        loss = cross_entropy(logits.float(), targets, label_smoothing=0.03)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"step {step} of {steps}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label."""
    hits = [
        (network(normalised(x.float() / 255)).argmax(1) == y).sum()
        for x, y in zip(torch.split(images, 256), torch.split(labels, 256), strict=True)
    ]
    return float(torch.stack(hits).sum() / len(labels))


def main() -> None:
    """Render, train, measure and write the bundled files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("mcrise_ray/demo"), help="folder of the bundled files"
    )
    parser.add_argument("--gtsrb", type=Path, help="root of torchvision's GTSRB, to train on real crops too")
    parser.add_argument("--images-only", action="store_true", help="keep the weights, write the images anew")
    parser.add_argument("--renders", type=int, default=12000, help="synthetic images to train on")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    write_images(arguments.output / "images", arguments.seed)
    if arguments.images_only:
        return

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    images, labels = render_many(arguments.seed, TRAIN, arguments.renders)
    synthetic = torch.ones(len(labels), dtype=torch.bool)
    if arguments.gtsrb:
        real, real_labels = load_gtsrb(arguments.gtsrb, "train")
        images, labels = torch.cat([images, real]), torch.cat([labels, real_labels])
        synthetic = torch.cat([synthetic, torch.zeros(len(real), dtype=torch.bool)])
    network = train(images, labels, synthetic, arguments.steps)
    weights = arguments.output / "signs.safetensors"
    halves = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    weights.write_bytes(save({k: v.contiguous() for k, v in halves.items()}))

    network.load_state_dict(load_file(weights))
    print(f"held-out renders: {accuracy(network, *render_many(arguments.seed, TEST, 2000)):.4f}")
    if arguments.gtsrb:
        print(f"GTSRB test split: {accuracy(network, *load_gtsrb(arguments.gtsrb, 'test')):.4f}")


if __name__ == "__main__":
    main()
