"""Models for tests, importable by actors as `blackboxes:NAME`."""

from __future__ import annotations

import os
import resource
import signal
import time
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn


class ChannelMeans(nn.Module):
    """Three classes: how red, green and blue an image is."""

    def forward(self, images: Tensor) -> Tensor:
        return 4 * images.mean(dim=(2, 3))


def channel_means() -> nn.Module:
    return ChannelMeans()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    )


class Steep(nn.Module):
    """A network whose probabilities are often near 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = 30 * self.network(images)
        return logits


def steep_network() -> nn.Module:
    return Steep()


def talking_network() -> nn.Module:
    print("loading")
    return small_network()


def broken() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def nan() -> object:
    return lambda images: images.mean(dim=(2, 3)) * float("nan")


def number() -> int:
    return 7


class Hungry(nn.Module):
    """Asks slowly: `seconds` for 64 images; holds `gib` of memory once the file `flag` is there.

    Args:
        network: what is asked; channel means by default.
    """

    def __init__(self, seconds: float, flag: str, gib: float, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or ChannelMeans()
        self.seconds, self.flag, self.gib = seconds, flag, gib

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds * len(images) / 64)
        if self.flag:
            with suppress(FileNotFoundError):
                os.unlink(self.flag)  # one process wins
                held = np.ones(int(self.gib * 2**27))
                time.sleep(30 + 0 * held[0])
        answer: Tensor = self.network(images)
        return answer


def slow_means(seconds: str, flag: str = "", gib: str = "0") -> nn.Module:
    return Hungry(float(seconds), flag, float(gib))


def slow_steep(seconds: str, flag: str = "", gib: str = "0") -> nn.Module:
    return Hungry(float(seconds), flag, float(gib), Steep())


class Halves(nn.Module):
    """Embeddings of six numbers, from the colours of an image's upper and lower half.

    Their last bits tell the size of the batch, as those of real networks do. An image that is all blue embeds
    to NaN. Once there is a file called `flag` with the size of a batch behind it, such a batch ends its
    process; one process wins.
    """

    def __init__(self, seconds: float, flag: str) -> None:
        super().__init__()
        self.seconds, self.flag = seconds, flag

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds * len(images) / 64)
        if self.flag:
            with suppress(FileNotFoundError):
                os.unlink(f"{self.flag}{len(images)}")
                os.kill(os.getpid(), signal.SIGKILL)
        means = images.mean(dim=(2, 3))
        middle = images.shape[2] // 2
        halves = [images[:, :, :middle].mean(dim=(2, 3)), images[:, :, middle:].mean(dim=(2, 3))]
        embeddings = torch.cat(halves, dim=1).square() + 1 + 2e-7 * len(images)
        blue = (means == torch.tensor([0.0, 0.0, 1.0])).all(dim=1)
        return embeddings + torch.where(blue, torch.nan, 0.0)[:, None]


def halves(seconds: str = "0", flag: str = "") -> nn.Module:
    return Halves(float(seconds), flag)


class DiesOnce(nn.Module):
    """Channel means, until the file `flag` is there to be removed: then its process ends."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 64:  # masked images, not the ones that a model is tried with
            with suppress(FileNotFoundError):
                os.unlink(self.flag)
                os._exit(1)
        return 4 * images.mean(dim=(2, 3))


def dies_once(flag: str) -> nn.Module:
    return DiesOnce(flag)


class Sparing(nn.Module):
    """Channel means, with a large block of memory, for which new pages must not come in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.new_pages: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25)
        self.new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        if len(self.new_pages) > 6 and min(self.new_pages) > 1000:
            raise RuntimeError(f"new pages in every call: {self.new_pages}")
        return 4 * images.mean(dim=(2, 3))


def sparing() -> nn.Module:
    return Sparing()
