"""Models for tests, importable by actors as `blackboxes:NAME`."""

from __future__ import annotations

import time

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


def broken() -> nn.Module:
    raise RuntimeError("no such checkpoint")


def nan() -> object:
    return lambda images: images.mean(dim=(2, 3)) * float("nan")


def number() -> int:
    return 7


def slow() -> object:
    def scores(images: Tensor) -> Tensor:
        time.sleep(0.05)
        return images.mean(dim=(2, 3))

    return scores
