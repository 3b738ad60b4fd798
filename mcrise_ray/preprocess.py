"""From an image of any size to the model's input, and from maps of the input back to the image.

Axes: h0, w0 pixels of the original image; H, W pixels of the model's input; M maps.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import field_validator

from mcrise_ray.scores import Activation, check_image
from mcrise_ray.spec import StrictModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NO_NORMALISATION = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

Triple = tuple[float, float, float]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


_MOST_RESIZED = 2**26  # pixels, 256 MiB


class Preprocessing(StrictModel):
    """How an image becomes the model's input, and the model's output a score.

    Args:
        size: (H, W) of the model's input.
        resize: `"stretch"` brings the whole image to `size`; `"crop"` brings its shorter side to
            `shorter_side` and cuts `size` out of the centre, as torchvision and timm evaluate.
        shorter_side: for `"crop"`; an image is enlarged further where the crop would not fit.
        interpolation: of the resize, with antialiasing.
        mean, std: of the normalisation, per channel, in the units of `input_range`.
        input_range: what black and white are to the network before normalisation, 0 and 1 or 0 and 255.
        activation: turns the network's output into scores.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["stretch", "crop"] = "stretch"
    shorter_side: int = 256
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    input_range: Literal["0-1", "0-255"] = "0-1"
    activation: Activation = "softmax"

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError(f"expected a height and a width of at least 1, found {size[0]} x {size[1]}")
        return size

    @field_validator("shorter_side")
    @classmethod
    def _check_shorter_side(cls, side: int) -> int:
        if side < 1:
            raise ValueError(f"expected at least 1, found {side}")
        return side

    @field_validator("std")
    @classmethod
    def _check_std(cls, std: Triple) -> Triple:
        if min(std) <= 0:
            raise ValueError(f"expected standard deviations above 0, found {std}")
        return std

    @classmethod
    def part(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Some fields, checked and in their own types; the others are left to the model.

        Raises:
            SpecError: a value is out of range.
            ValueError: there is no such field.
        """
        unknown = [name for name in fields if name not in cls.model_fields]
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ValueError(f"expected {', '.join(cls.model_fields)}, found {', '.join(unknown)}{hint}")
        return cls(**fields).model_dump(include=set(fields))

    @property
    def mean_of_rgb(self) -> Triple:
        """`mean` for RGB in [0, 1], whatever the input range."""
        return _divided(self.mean, self._white)

    @property
    def std_of_rgb(self) -> Triple:
        """`std` for RGB in [0, 1], whatever the input range."""
        return _divided(self.std, self._white)

    @property
    def _white(self) -> float:
        return 255.0 if self.input_range == "0-255" else 1.0

    def prepare(self, image: UInt8[np.ndarray, "h0 w0 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """The image at the model's input size, still RGB bytes: masks are applied to this.

        Raises:
            ImageError: it is no uint8 RGB array.
        """
        image = check_image(image)
        picture = Image.fromarray(image)
        (height, width), (tall, wide) = self.size, self._resized(image.shape[:2])
        top, left = self._corner((tall, wide))
        resampling = _RESAMPLING[self.interpolation]
        if tall * wide > _MOST_RESIZED:
            # A line of pixels would become gigabytes for a crop of its middle. With a box Pillow rounds
            # otherwise here and there, so this is not for all images.
            y, x = picture.height / tall, picture.width / wide
            box = (left * x, top * y, (left + width) * x, (top + height) * y)
            return np.asarray(picture.resize((width, height), resampling, box))
        picture = picture.resize((wide, tall), resampling)
        return np.asarray(picture.crop((left, top, left + width, top + height)))

    def to_original(
        self, maps: Float32[np.ndarray, "M H W"], image_size: tuple[int, int]
    ) -> Float32[np.ndarray, "M h0 w0"]:
        """Maps at the size of the image they explain, bilinearly.

        What a centre crop cut off is NaN: the model never saw it, so it has no saliency, not zero saliency.

        Args:
            maps: of an image that went through `prepare()`.
            image_size: (h0, w0) of that image.
        """
        resized, corner = self._resized(image_size), self._corner(self._resized(image_size))
        for axis in (0, 1):
            maps = _sampled(maps, axis + 1, image_size[axis], resized[axis], corner[axis])
        return maps

    def _resized(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """(height, width) to which the whole image is brought, rounded as torchvision's Resize does."""
        if self.resize == "stretch":
            return self.size
        shorter = min(image_size)
        need = max(
            self.shorter_side, *(-(-shorter * s // n) for s, n in zip(self.size, image_size, strict=True))
        )
        height, width = (max(s, need * n // shorter) for s, n in zip(self.size, image_size, strict=True))
        return height, width

    def _corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """(top, left) of the centre crop, rounded as torchvision's CenterCrop does."""
        return round((resized[0] - self.size[0]) / 2), round((resized[1] - self.size[1]) / 2)


def _divided(values: Triple, by: float) -> Triple:
    return values[0] / by, values[1] / by, values[2] / by


def _sampled(maps: np.ndarray, axis: int, pixels: int, resized: int, corner: int) -> np.ndarray:
    """Maps along one axis at the centres of the original's pixels; NaN outside of the crop."""
    length = maps.shape[axis]
    at = (np.arange(pixels) + 0.5) * (resized / pixels) - corner
    inside = (at >= 0) & (at <= length)
    position = np.clip(at - 0.5, 0, length - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, length - 1)
    shape = [1, 1, 1]
    shape[axis] = pixels
    share = np.where(inside, position - below, np.nan).astype(np.float32).reshape(shape)
    sampled: np.ndarray = maps.take(below, axis) * (1 - share) + maps.take(above, axis) * share
    return sampled
