"""How a foreign model wants its batches, as its metadata tells: layout, number type, batch size, image size.

Axes: B images of a batch; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mcrise_ray.errors import ModelError
from mcrise_ray.preprocess import NO_NORMALISATION

# By the names that ONNX Runtime and the KServe v2 protocol give them.
_NUMBERS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "FP32": np.float32,
    "FP16": np.float16,
    "FP64": np.float64,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class Layout:
    """The input of a model that is not a torch module.

    Attributes:
        dtype: of its numbers.
        channels_last: `(B, H, W, 3)` instead of `(B, 3, H, W)`.
        size: (H, W), where fixed.
        batch: how many images it takes at once, where fixed.
    """

    dtype: np.dtype
    channels_last: bool = False
    size: tuple[int, int] | None = None
    batch: int | None = None

    @classmethod
    def of(cls, shape: Sequence[Any], number: str, where: str) -> Layout:
        """The layout for a shape, whose free dimensions are anything but whole numbers above 0.

        Args:
            shape: four dimensions.
            number: the type's name in ONNX Runtime or in the KServe v2 protocol.
            where: for the message, such as `input 'image' of model.onnx`.

        Raises:
            ModelError: no RGB image has this shape or type.
        """
        if number not in _NUMBERS:
            known = ", ".join(name for name in _NUMBERS if name.isupper() == number.isupper())
            raise ModelError(f"expected numbers of type {known} for {where}, found {number}")
        sizes = [n if isinstance(n, int) and n > 0 else None for n in shape]
        # Of two dimensions that could hold the channels, a fixed 3 decides, and NCHW is the rule.
        channels_last = len(sizes) == 4 and sizes[3] == 3 and sizes[1] != 3
        if len(sizes) != 4 or (not channels_last and sizes[1] not in {3, None}):
            raise ModelError(f"expected shape (B, 3, H, W) or (B, H, W, 3) for {where}, found {list(shape)}")
        height, width = sizes[1:3] if channels_last else sizes[2:4]
        size = (height, width) if height is not None and width is not None else None
        return cls(np.dtype(_NUMBERS[number]), channels_last, size, sizes[0])

    def preprocessing(self) -> dict[str, Any]:
        """What follows for `Preprocessing`: no normalisation, the fixed size, bytes as 0 to 255."""
        fields: dict[str, Any] = dict(NO_NORMALISATION)
        if self.size is not None:
            fields["size"] = self.size
        if self.dtype == np.uint8:
            fields["input_range"] = "0-255"
        return fields

    def pack(self, images: Float[Tensor, "B 3 H W"]) -> np.ndarray:
        """A batch as the model wants it, padded to a fixed batch size with copies of the last image."""
        array = images.detach().cpu().numpy()
        if self.batch is not None and len(array) < self.batch:
            array = np.concatenate([array, np.repeat(array[-1:], self.batch - len(array), axis=0)])
        if self.channels_last:
            array = array.transpose(0, 2, 3, 1)
        if self.dtype == np.uint8:
            array = np.clip(np.rint(array), 0, 255)
        return np.ascontiguousarray(array, self.dtype)


def in_parts(
    function: Callable[[Tensor], Tensor], images: Float[Tensor, "B 3 H W"], *, least: int, most: int | None
) -> Tensor:
    """Scores of a batch, asked for in parts of at most `most` images and at least `least`.

    A part that is too short is padded with copies of its last image, whose scores are dropped.
    """
    parts = []
    for part in torch.split(images, most or len(images)):
        short = least - len(part)
        asked = torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short > 0 else part
        parts.append(function(asked)[: len(part)])
    return torch.cat(parts)
