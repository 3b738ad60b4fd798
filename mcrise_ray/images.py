"""From files and folders to decoded RGB arrays."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from mcrise_ray.errors import ImageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageRef:
    """An image by name: what the driver knows of it.

    Attributes:
        image_id: unique within a job, the same every time the job is listed.
        uri: where its bytes are.
        label: index of its true class, where known.
    """

    image_id: str
    uri: str
    label: int | None = None


def list_folder(folder: str) -> Iterator[ImageRef]:
    """Image files below a folder, in sorted order; `image_id` is the path relative to the folder.

    Raises:
        ImageError: there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ImageError(f"expected a folder of images, found nothing of the kind at {folder}")
    for directory, subdirectories, files in os.walk(root):
        subdirectories.sort()
        for name in sorted(files):
            path = Path(directory, name)
            if path.suffix.lower() in SUFFIXES:
                yield ImageRef(path.relative_to(root).as_posix(), str(path))


def list_manifest(manifest: str) -> Iterator[ImageRef]:
    """Images named by a CSV file with the columns `uri` and, optionally, `label`.

    Relative URIs start at the manifest's folder; `image_id` is the URI as written.

    Raises:
        ImageError: there is no such file, or a row does not fit.
    """
    root = Path(manifest).parent
    try:
        with open(manifest, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                if not row.get("uri"):
                    raise ImageError(f"{manifest}, line {number}: expected a column uri, found {list(row)}")
                label = row.get("label")
                yield ImageRef(row["uri"], str(root / row["uri"]), int(label) if label else None)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read the manifest {manifest}: {error}") from error


def read_image(uri: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a file to RGB, with its EXIF orientation applied.

    Raises:
        ImageError: missing, unreadable, truncated, or no image.
    """
    try:
        with Image.open(uri) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except FileNotFoundError:
        raise ImageError(f"{uri}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{uri}: not an image, or of a kind that Pillow cannot read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{uri}: damaged image: {error}") from error
