"""A small traffic-sign classifier with its images, so that every feature can be tried without a download.

Weights, class names and images are made by `jobs/train_demo_model.py`.
"""

from pathlib import Path
from typing import Final

from torch import Tensor, nn

SIZE: Final = (64, 64)
MEAN: Final = (0.5, 0.5, 0.5)
STD: Final = (0.25, 0.25, 0.25)

_HERE: Final = Path(__file__).parent
WEIGHTS: Final = _HERE / "signs.safetensors"
CLASSES: Final = _HERE / "classes.txt"
MANIFEST: Final = _HERE / "images" / "manifest.csv"

NUM_CLASSES: Final = 43
_WIDTHS: Final = (32, 64, 128)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016, basic block)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = (
            nn.Identity()
            if channels_in == channels_out and stride == 1
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def sign_classifier(num_classes: int = NUM_CLASSES) -> nn.Module:
    """Build the network, untrained: normalised RGB `(B, 3, 64, 64)` to logits `(B, num_classes)`."""
    stem, middle, top = _WIDTHS
    return nn.Sequential(
        nn.Conv2d(3, stem, 5, 2, 2, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        _Residual(stem, stem, 1),
        _Residual(stem, middle, 2),
        _Residual(middle, top, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(top, num_classes),
    )
