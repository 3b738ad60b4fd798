"""From the bytes of a file to the RGB array that the model's users see.

That is what `Image.open(file).convert("RGB")` gives to torchvision, timm and transformers, except where it
would lose the picture: a camera's rotation is applied, and more than 8 bits are scaled instead of clipped.

| in the file | becomes |
| --- | --- |
| 1 bit, grey, palette, YCbCr, CMYK, YCCK, CIELAB | RGB by Pillow; colour profiles (ICC) are not applied |
| alpha, transparent palette | dropped: the colour stored under it shows, it is not composited |
| 16 bits per channel | the high byte of each value |
| float, 32-bit or signed integer, in [0, 255] | that value, rounded down; float in [0, 1] times 255 first |
| the same with other values, NaN included | refused: nothing says which value is white |
| EXIF orientation 1 to 8 | upright; unreadable EXIF counts as upright |
| animation, several pages | the first frame or page |

The content decides what a file is, never its name.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, UnidentifiedImageError
from pydantic import Field

from mcrise_ray.errors import ImageError
from mcrise_ray.spec import StrictModel

# EPS is left out because it runs Ghostscript, TGA because it has no signature: text can pass for it.
FORMATS: Final = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

MAX_PIXELS: Final = 89_478_485  # 256 MiB of RGB, where Pillow begins to warn

_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SIGNATURES: Final[dict[str, bytes | tuple[bytes, ...]]] = {
    "PNG": b"\x89PNG",
    "JPEG": b"\xff\xd8",
    "GIF": b"GIF8",
    "WEBP": b"RIFF",
    "TIFF": (b"II*\0", b"MM\0*"),
    "BMP": b"BM",
}

_BITS_PER_SAMPLE = 258  # a tag of TIFF

_pillow_lock = threading.RLock()


class DecodeOptions(StrictModel):
    """What is decoded and what is refused.

    Args:
        allow_truncated: decode files that end too early, or are damaged on the way, as far as they go; the
            rest is grey, black, or the palette's first colour.
        max_pixels: larger images are refused before their pixels are decoded.
    """

    allow_truncated: bool = False
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)


def decode(data: bytes, options: DecodeOptions | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a file to RGB as the table above says.

    Raises:
        ImageError: not an image, damaged, truncated, too large, or of a kind that has no stated conversion.
            The message does not name the file, which this function does not know.
    """
    if not data:
        raise ImageError("expected an image, found an empty file")
    options = DecodeOptions() if options is None else options
    with pillow_set_to(options), io.BytesIO(data) as file:
        try:
            with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
                return to_rgb(picture, options)
        except UnidentifiedImageError:
            raise ImageError(
                f"not an image that can be read: expected one of {', '.join(FORMATS)}, {_found(data)}"
            ) from None


def to_rgb(picture: Image.Image, options: DecodeOptions) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an opened picture; call it within `pillow_set_to(options)`.

    Raises:
        ImageError: see `decode`.
    """
    width, height = picture.size
    if width * height > options.max_pixels:
        raise ImageError(f"{_limit(options)}, found {width * height} ({width} x {height})")
    bits = _bits(picture)
    picture.load()
    # After loading: PNG may store EXIF behind the pixels, and Pillow has turned a TIFF upright by now.
    orientation = _orientation(picture)
    picture = _eight_bits(picture, bits).convert("RGB")
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return np.array(picture)


@contextmanager
def pillow_set_to(options: DecodeOptions) -> Iterator[None]:
    """Pillow with its process-wide limits as the options say, and silent; as it was before, afterwards.

    Whatever else Pillow raises becomes an `ImageError`. Its warnings are dropped because what they announce
    is either decoded as stated or refused, and because under `python -W error` they would fail a good image.
    """
    with _pillow_lock:
        before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = options.allow_truncated, options.max_pixels
        Image.init()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            # Raised on opening by more than twice the limit; `to_rgb` refuses what is less.
            found = next(iter(re.findall(r"\d+", str(error))), "more")
            raise ImageError(f"{_limit(options)}, found {found}") from None
        except Exception as error:  # a damaged file can meet any line of a decoder
            raise _damaged(error, options) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def _limit(options: DecodeOptions) -> str:
    return f"expected at most {options.max_pixels} pixels (--max-pixels)"


def _bits(picture: Image.Image) -> int:
    """Of each value of a picture that Pillow opens with 16: a TIFF may have filled fewer of them."""
    found = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return min(max(int(found[0]), 8), 16)


def _eight_bits(picture: Image.Image, bits: int) -> Image.Image:
    """A picture with at most 8 bits per channel; Pillow's own conversion clips values above 255."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        return Image.fromarray((np.asarray(picture) >> (bits - 8)).astype(np.uint8))
    if picture.mode not in {"I", "F"}:
        return picture
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # so that NaN is refused as well
        raise ImageError(
            f"expected {values.dtype} pixels in [0, 255] (or floats in [0, 1]), found {low:g} to {high:g}; "
            "save the file with 8 or 16 bits per channel"
        )
    if picture.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(values.astype(np.uint8))


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, OverflowError, struct.error):
        return 1  # EXIF is a TIFF of its own, and can be damaged in as many ways


def _damaged(error: Exception, options: DecodeOptions) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in reason.lower() and not options.allow_truncated:
        return ImageError(f"truncated image: {reason}; --allow-truncated decodes what is there")
    return ImageError(f"damaged image, or a kind that Pillow cannot decode: {reason}")


def _found(data: bytes) -> str:
    """What a file that is no image looks like, for the error message."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "found HTML (a saved error page?)"
    if start.startswith((b"%!ps", b"%pdf", b"<svg", b"<?xml")):
        return "found a vector document; render it to pixels first"
    for kind, signature in _SIGNATURES.items():
        if data.startswith(signature):
            return f"found a damaged {kind} header"
    if all(byte >= 32 or byte in b"\t\n\r" for byte in data[:512]) and start.isascii():
        return "found text"
    return f"found bytes that begin with {data[:8].hex(' ')}"
