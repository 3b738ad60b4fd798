"""The preprocessing record: the same pixels as torchvision's, and maps back at the image's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mcrise_ray as mr
from mcrise_ray import preprocess
from mcrise_ray.errors import ImageError, SpecError


def ramp(height: int, width: int) -> np.ndarray:
    """Two maps that are linear in the position of a pixel's centre, as a share of height and of width."""
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    maps = np.stack([np.tile(rows[:, None], (1, width)), np.tile(columns, (height, 1))])
    return maps.astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(16, 40), st.integers(0, 30))
def test_crop_is_that_of_torchvision(height: int, width: int, size: int, margin: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    preset = torchvision.transforms._presets.ImageClassification(crop_size=size, resize_size=size + margin)
    expected = preset(Image.fromarray(image))
    record = mr.Preprocessing(size=(size, size), resize="crop", shorter_side=size + margin)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (record.mean, record.std))
    ours = (torch.from_numpy(record.prepare(image).copy()).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("size", [(32, 48), (96, 16)])
@pytest.mark.parametrize("image", [(31, 50), (200, 20), (1, 1)])
def test_prepared_image_has_the_size_of_the_input(size: tuple[int, int], image: tuple[int, int]) -> None:
    pixels = np.zeros((*image, 3), np.uint8)
    for record in (
        mr.Preprocessing(size=size),
        mr.Preprocessing(size=size, resize="crop", shorter_side=20),
        mr.Preprocessing(size=size, resize="crop", shorter_side=64),
    ):
        assert record.prepare(pixels).shape == (*size, 3)


def test_a_picture_is_prepared_as_its_pixels_are_and_what_is_no_picture_is_told(
    shapes_unchecked: None,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    model = mr.Preprocessing(size=(6, 6))
    np.testing.assert_array_equal(model.prepare(Image.fromarray(pixels)), model.prepare(pixels))  # type: ignore[arg-type]
    for image in (pixels / 255, pixels[..., 0], pixels.transpose(2, 0, 1)):
        with pytest.raises(ImageError, match=r"uint8 RGB array \(H, W, 3\), found"):
            model.prepare(image)


def test_a_crop_that_does_not_fit_keeps_the_proportions() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = 255
    tall = mr.Preprocessing(size=(40, 10), resize="crop", shorter_side=10).prepare(image)
    assert tall.shape == (40, 10, 3)
    assert tall[:, 0].max() < 30
    assert tall[:, -1].min() > 225


@pytest.mark.parametrize("size", [(3, 2000), (700, 41), (375, 500)])
def test_a_crop_out_of_too_large_an_image_is_the_same(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = mr.Preprocessing(size=(96, 64), resize="crop")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = preprocessing.prepare(image).astype(int)
    monkeypatch.setattr(preprocess, "_MOST_RESIZED", 0)
    assert np.abs(preprocessing.prepare(image) - whole).max() <= 1


def test_a_line_of_pixels_does_not_become_gigabytes() -> None:
    """Enlarged whole, it would have 256 x 256,000,000 pixels."""
    image = np.zeros((1, 1_000_000, 3), np.uint8)
    image[:, 500_000:] = 255
    prepared = mr.Preprocessing(resize="crop").prepare(image)
    assert prepared.shape == (224, 224, 3)
    assert prepared[:, 0].max() < 20
    assert prepared[:, -1].min() > 235


def test_maps_return_to_the_size_of_a_stretched_image() -> None:
    record = mr.Preprocessing(size=(40, 60))
    back = record.to_original(ramp(40, 60), (90, 75))
    assert back.dtype == np.float32
    inner = (slice(None), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(back[inner], ramp(90, 75)[inner], atol=1e-5)


def test_maps_of_a_crop_return_to_where_it_was_cut_and_are_nan_around_it() -> None:
    record = mr.Preprocessing(size=(32, 32), resize="crop", shorter_side=40)
    back = record.to_original(ramp(32, 32), (80, 120))  # resized to 40 x 60, cut out at (4, 14)
    rows, columns = ~np.isnan(back[0]).all(axis=1), ~np.isnan(back[0]).all(axis=0)
    np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(8, 72))
    np.testing.assert_array_equal(np.flatnonzero(columns), np.arange(28, 92))
    inner = back[:, 10:70, 30:90]
    np.testing.assert_allclose(inner, ramp(64, 64)[:, 2:-2, 2:-2], atol=1e-5)


def test_a_mark_on_the_image_is_found_at_its_place_again() -> None:
    image = np.zeros((90, 140, 3), np.uint8)
    image[30:36, 60:66] = 255
    record = mr.Preprocessing(size=(64, 64), resize="crop", shorter_side=72)
    maps = record.prepare(image)[..., 0][None].astype(np.float32)
    back = np.nan_to_num(record.to_original(maps, (90, 140)))[0]
    row, column = (np.average(np.indices(back.shape)[axis], weights=back) for axis in (0, 1))
    assert (row, column) == (pytest.approx(32.5, abs=0.3), pytest.approx(62.5, abs=0.3))


def test_input_range_folds_into_the_normalisation() -> None:
    record = mr.Preprocessing(input_range="0-255", mean=(127.5, 0, 51), std=(127.5, 255, 1))
    assert record.mean_of_rgb == pytest.approx((0.5, 0, 0.2))
    assert record.std_of_rgb == pytest.approx((0.5, 1, 1 / 255))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sise": (2, 2)}, "preprocessing: expected size, .*, found sise; did you mean size"),
        ({"size": (0, 2)}, "preprocessing: size: expected a height and a width of at least 1, found 0 x 2"),
        ({"std": (1, 1, 0)}, "preprocessing: std: expected standard deviations above 0"),
        ({"activation": "relu"}, "preprocessing: activation: .*'softmax', 'sigmoid' or 'none', found 'relu'"),
        ({"shorter_side": 0}, "preprocessing: shorter_side: expected at least 1, found 0"),
        ({"input_range": "0-1000"}, "preprocessing: input_range: .*found '0-1000'"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        mr.ModelSpec(model="torchvision:resnet18", preprocessing=fields)


def test_a_spec_keeps_its_fields_through_json() -> None:
    spec = mr.ModelSpec(model="m:f", preprocessing={"size": [96, 64], "mean": [0, 0, 0]})
    assert spec.preprocessing == {"size": (96, 64), "mean": (0, 0, 0)}
    assert mr.ModelSpec.model_validate_json(spec.model_dump_json()) == spec
