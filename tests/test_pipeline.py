"""The pipeline asks in the order of the plain loop, reads one batch later, and changes no bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import mcrise_ray as mr
from mcrise_ray import pipeline
from mcrise_ray.blend import Blender
from mcrise_ray.explainer import Subject, perform, run_unit
from mcrise_ray.masks import Masks, draw
from mcrise_ray.plan import Unit
from mcrise_ray.reduction import SumUnit
from mcrise_ray.saliency import Partial, UnitSums
from mcrise_ray.scores import Answer, ask, launch

SPEC = mr.ExplainSpec(masks=150, grid=(4, 4), colors="red,blue", estimator="paper")
UNITS = [Unit(0, 0, 64), Unit(1, 64, 128), Unit(2, 128, 150)]
IMAGE = np.random.default_rng(0).integers(0, 256, (18, 21, 3), dtype=np.uint8)


def black_box(images: Tensor) -> Tensor:
    return torch.stack([images.mean((1, 2, 3)), images[:, 0, 3, 4], images.amax((1, 2, 3))], dim=1)


def plain(subject: Subject, unit: Unit, batch_size: int) -> Partial:
    """The loop without a pipeline."""
    sums, scores = UnitSums(SPEC, 2, subject.size), []
    for start in range(unit.start, unit.stop, batch_size):
        masks = draw(SPEC, start, min(start + batch_size, unit.stop))
        scores.append(ask(subject.function, subject.blend(masks))[:, [0, 2]])
    masks = draw(SPEC, unit.start, unit.stop)
    sums.accumulate(masks, np.concatenate(scores))
    sums.square(masks, np.concatenate(scores))
    return sums.partial(len(unit))


def run_units(subject: Subject, units: list[Unit], targets: list[int], batch_size: int) -> Iterator[Partial]:
    for _, partial in perform(subject, [SumUnit(unit, None) for unit in units], targets, batch_size):
        assert isinstance(partial, Partial)
        yield partial


@pytest.mark.parametrize("batch_size", [1, 16, 50, 64, 1000])
def test_the_pipeline_changes_no_bit(batch_size: int) -> None:
    subject = Subject(black_box, IMAGE, SPEC)
    together = list(run_units(subject, UNITS, [0, 2], batch_size))
    assert len(together) == len(UNITS)
    for unit, partial in zip(UNITS, together, strict=True):
        for other in (plain(subject, unit, batch_size), run_unit(subject, unit, [0, 2], batch_size)):
            assert partial.masks == other.masks == len(unit)
            np.testing.assert_array_equal(partial.buckets, other.buckets)
            np.testing.assert_array_equal(partial.scores, other.scores)
            np.testing.assert_array_equal(partial.squares, other.squares)


def test_a_batch_is_launched_before_the_one_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across units too: a GPU would otherwise wait while a unit's sums are upsampled."""
    events: list[str] = []

    class Slow(Answer):
        def read(self) -> np.ndarray:
            events.append("read")
            return super().read()

    def recorded(function, images: Tensor) -> Answer:
        events.append("launch")
        return Slow(launch(function, images).scores)

    monkeypatch.setattr(pipeline, "launch", recorded)
    subject = Subject(black_box, IMAGE, SPEC)
    for _ in run_units(subject, UNITS[:2], [0], 32):
        events.append("partial")
    expected = "launch launch read launch read partial launch read read partial"
    assert events == expected.split()


def test_what_the_model_does_not_have_is_told() -> None:
    with pytest.raises(mr.MCRiseError, match="expected a target from 0 to 2"):
        list(run_units(Subject(black_box, IMAGE, SPEC), UNITS, [0, 3], 16))


def test_no_units_ask_nothing() -> None:
    assert list(run_units(Subject(black_box, IMAGE, SPEC), [], [0], 16)) == []


def test_an_answer_that_is_a_view_of_the_batch_survives_the_next_batch() -> None:
    subject = Subject(lambda images: images[:, :, 5, 5], IMAGE, SPEC)
    partial = run_unit(subject, UNITS[0], [0, 1, 2], 16)
    copied = Subject(lambda images: images[:, :, 5, 5].clone(), IMAGE, SPEC)
    np.testing.assert_array_equal(partial.buckets, run_unit(copied, UNITS[0], [0, 1, 2], 16).buckets)


@pytest.mark.parametrize("size", [(18, 21), (96, 96), (224, 160)])
def test_channels_last_batches_have_the_same_values(rng: np.random.Generator, size: tuple[int, int]) -> None:
    spec = mr.ExplainSpec(masks=70)
    image, palette = torch.from_numpy(rng.random((3, *size))), torch.tensor(spec.palette).double()
    masks = draw(spec, 0, 70)
    first = Blender(image, palette, spec.grid)(masks)
    last = Blender(image, palette, spec.grid, channels_last=True)(masks)
    assert first.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(last, first, rtol=0, atol=1e-14)


def test_a_blender_takes_batches_of_any_size_in_any_order() -> None:
    spec = mr.ExplainSpec(masks=70)
    blender = Blender(torch.rand(3, 30, 40), torch.tensor(spec.palette), spec.grid, channels_last=True)

    def shifted(masks: Masks, start: int, stop: int) -> Masks:
        return Masks(masks.cells[start:stop], masks.shift_words[start:stop])

    masks = draw(spec, 0, 70)
    whole = blender(masks).clone()
    for start, stop in ((0, 1), (3, 70), (69, 70), (10, 30)):
        torch.testing.assert_close(blender(shifted(masks, start, stop)), whole[start:stop], rtol=0, atol=0)
