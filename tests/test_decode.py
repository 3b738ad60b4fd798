"""Every odd or bad file becomes what its line in `corpus.CASES` says: these pixels, or this error."""

from __future__ import annotations

import random
import struct
import threading
import warnings

import numpy as np
import pytest
from corpus import CASES, Case, Decoded, Refused, encoded, noise, quarters, with_orientation
from PIL import Image, ImageFile

from mcrise_ray.decode import DecodeOptions, decode
from mcrise_ray.errors import ImageError, SpecError


def corners(pixels: np.ndarray) -> np.ndarray:
    return pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)


def assert_decoded(pixels: np.ndarray, expected: Decoded) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*expected.size, 3)
    np.testing.assert_allclose(corners(pixels), expected.corners, atol=expected.within)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.name))
def test_corpus(case: Case, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]) -> None:
    data = case.make()
    recwarn.clear()
    if isinstance(case.expected, Decoded):
        assert_decoded(decode(data), case.expected)
    else:
        with pytest.raises(ImageError, match=case.expected.match) as error:
            decode(data)
        assert "\n" not in str(error.value)
        if case.expected.truncated is not None:
            assert_decoded(decode(data, DecodeOptions(allow_truncated=True)), case.expected.truncated)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 90


def test_decoded_corpus_agrees_with_what_users_of_pillow_see() -> None:
    for picture in (quarters(), noise(), quarters().convert("L"), quarters().convert("RGBA")):
        np.testing.assert_array_equal(decode(encoded(picture, "PNG")), np.asarray(picture.convert("RGB")))


def test_pillow_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as much training code does
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    filters = list(warnings.filters)
    truncated = encoded(noise(), "PNG")[:-900]
    assert decode(encoded(quarters(), "PNG")).shape == (32, 48, 3)
    with pytest.raises(ImageError, match="truncated image"):
        decode(truncated)
    decode(truncated, DecodeOptions(allow_truncated=True))
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (True, 7)
    assert list(warnings.filters) == filters


def test_threads_with_different_options_do_not_meet() -> None:
    truncated = encoded(noise(), "PNG")[:-900]
    refused, decoded = [], []

    def strict() -> None:
        for _ in range(50):
            with pytest.raises(ImageError, match="truncated image"):
                decode(truncated)
            refused.append(1)

    def lenient() -> None:
        for _ in range(50):
            decoded.append(decode(truncated, DecodeOptions(allow_truncated=True)))

    threads = [threading.Thread(target=target) for target in (strict, lenient) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), len(decoded)) == (100, 100)


def test_warnings_as_errors_fail_no_image() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in CASES:
            if isinstance(case.expected, Decoded):
                decode(case.make())


@pytest.mark.parametrize(("limit", "fits"), [(32 * 48, True), (32 * 48 - 1, False), (100, False)])
def test_the_limit_of_pixels_is_a_knob(limit: int, fits: bool) -> None:
    options = DecodeOptions(max_pixels=limit)
    if fits:
        assert decode(encoded(quarters(), "PNG"), options).shape == (32, 48, 3)
        return
    with pytest.raises(ImageError, match=rf"expected at most {limit} pixels \(--max-pixels\), found 1536"):
        decode(encoded(quarters(), "PNG"), options)


def test_options_are_checked() -> None:
    with pytest.raises(SpecError, match=r"max_pixels.*greater than or equal to 1, found 0"):
        DecodeOptions(max_pixels=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damage_anywhere_is_an_image_or_an_image_error(kind: str) -> None:
    whole = with_orientation(kind, 6) if kind in {"JPEG", "PNG", "TIFF", "WEBP"} else encoded(noise(), kind)
    chance = random.Random(0)
    messages = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        for options in (
            DecodeOptions(max_pixels=10**6),
            DecodeOptions(max_pixels=10**6, allow_truncated=True),
        ):
            try:
                assert decode(bytes(data), options).dtype == np.uint8
            except ImageError as error:
                messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_every_refusal_has_its_line() -> None:
    """For a report: `pytest -s -k every_refusal` prints the table."""
    for case in CASES:
        print(f"| {case.name!r} | {case.expected} |")
        assert isinstance(case.expected, Decoded | Refused)


def tiff_of_12_bits(values: list[int], width: int) -> bytes:
    """Grey, uncompressed, two values in three bytes: as microscopes write it and Pillow does not."""
    packed = bytearray()
    for a, b in zip(values[::2], values[1::2], strict=True):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    height, tags = len(values) // width, []
    for tag, value in (
        (256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height),
        (279, len(packed)),
    ):  # fmt: skip
        tags.append(struct.pack("<HHII", tag, 4, 1, value))
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + bytes(packed) + directory


def test_twelve_bits_are_brought_to_eight() -> None:
    values = [0, 4095, 2048, 1024]
    found = decode(tiff_of_12_bits(values, 2))
    np.testing.assert_array_equal(found[..., 0].ravel(), [value >> 4 for value in values])
