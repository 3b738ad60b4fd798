"""Asking for a relative error instead of a number of masks: where it stops, and that it may be believed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import linear_maps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mcrise_ray as mr
from mcrise_ray import errors
from mcrise_ray.plan import enough, looks, pilot_count, unit, unit_count, unit_size
from mcrise_ray.reduction import Conclude, Conclusion, Reduction, SumUnit
from mcrise_ray.saliency import Partial
from mcrise_ray.spec import ExplainSpec

SIZE = (12, 10)
IMAGE = np.random.default_rng(2).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
WEIGHTS = np.random.default_rng(1).normal(size=(3, *SIZE)) / 10


def linear(images: Tensor) -> np.ndarray:
    """A score that is linear in every pixel, and so in the coverages."""
    return 3 + (images.numpy() * WEIGHTS).sum(axis=(1, 2, 3))[:, None]


def curved(images: Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(3 * (3 - linear(images))))


def exact_maps(spec: ExplainSpec) -> np.ndarray:
    """The maps of `linear`: masking a pixel with a fill changes it by the weights times the difference."""
    image = IMAGE.transpose(2, 0, 1) / 255
    fills = np.array(spec.palette)[:, :, None, None]
    slopes = (WEIGHTS * (fills - image)).sum(axis=1)
    constant = 3 + (WEIGHTS * image).sum() + spec.p_mask / spec.K * slopes.sum()
    return linear_maps(spec, slopes, constant)


def test_the_only_look_at_a_number_of_masks_is_the_last() -> None:
    spec = ExplainSpec(masks=5000)
    assert list(looks(spec)) == [unit_count(spec)]
    assert not enough(spec, [0.0], 50_000)


@given(masks=st.integers(1, 10**12), estimator=st.sampled_from(["paper", "control-variate"]))
def test_looks_lie_further_and_further_apart(masks: int, estimator: str) -> None:
    spec = ExplainSpec(masks=masks, relative_error=0.1, estimator=estimator)
    found = list(looks(spec))
    assert found[-1] == unit_count(spec)
    assert len(found) <= 2 + 2 * max(0, np.log2(masks / 1024))
    assert unit_size(spec) <= 512
    ratios = np.array(found[1:]) / np.array(found[:-1])
    assert (ratios > 1).all()
    assert (ratios[:-1] >= 1.2).all()  # the root of two, in whole units
    for units in found:
        assert pilot_count(spec, units) <= units
        assert pilot_count(spec, units) * unit_size(spec) <= 16384
    if len(found) > 1:
        assert unit(spec, found[0] - 1).stop >= 1024


@pytest.mark.parametrize(("masks", "scored"), [(64, 1), (8000, 32), (16384, 32), (16385, 0), (10**8, 0)])
def test_scores_of_the_paper_are_kept_for_all_masks_or_none(masks: int, scored: int) -> None:
    spec = ExplainSpec(masks=masks, estimator="paper")
    assert pilot_count(spec, unit_count(spec)) == scored


@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
@pytest.mark.parametrize("settings", [{"masks": 100}, {"masks": 50_000}, {"relative_error": 0.1}])
def test_every_unit_is_scored_once_and_summed_once_since_the_last_fit(
    estimator: str, settings: dict[str, float]
) -> None:
    spec = ExplainSpec(estimator=estimator, **settings)
    reduction = Reduction(spec, (0,), np.ones(1), (4, 4))
    zero = Partial.zero(spec, 1, (4, 4))
    scored: list[int] = []
    summed: list[int] = []
    looked: list[int] = []
    while reduction.explanation is None:
        work = reduction.next_work()
        assert work is not None
        if isinstance(work, Conclude):
            if work.scores is not None:
                summed = list(range(len(work.scores)))
            looked += [len(summed)] if work.look else []
            assert work.last == (len(summed) == unit_count(spec)) or not work.look
            found = SimpleNamespace() if work.look and work.last else None
            reduction.take(work, Conclusion(found, None, zero))  # type: ignore[arg-type]
        else:
            scored.append(work.unit.index)
            summed += [work.unit.index] if isinstance(work, SumUnit) else []
            reduction.take(work, zero if isinstance(work, SumUnit) else np.zeros((len(work.unit), 1)))
    assert scored == summed == list(range(unit_count(spec)))
    assert looked == list(looks(spec))


NAN = float("nan")


@pytest.mark.parametrize(
    ("reached", "masks", "stop"),
    [
        ([0.1], 1024, True),
        ([0.1001], 1024, False),
        ([0.05, 0.2], 1024, False),
        ([float("inf")], 50_000, False),
        ([NAN], 1024, False),
        ([0.05, NAN], 16_384, True),
        ([0.2, NAN], 16_384, False),
    ],
)
def test_every_target_must_have_reached_it(reached: list[float], masks: int, stop: bool) -> None:
    assert enough(ExplainSpec(relative_error=0.1), reached, masks) is stop


@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
def test_stops_where_the_error_is_reached(estimator: str) -> None:
    seen: list[int] = []
    spec = ExplainSpec(relative_error=0.25, grid=(2, 2), estimator=estimator)
    result = mr.explain(curved, IMAGE, 0, spec, on_progress=seen.append)
    assert spec.masks == 100_000
    assert result.masks == sum(seen) < 20_000
    assert result.masks in [unit(spec, look - 1).stop for look in looks(spec)]
    assert 0 < result.relative_error[0] <= 0.25


def test_maps_are_those_of_as_many_masks_asked_for_outright() -> None:
    """Whatever was looked at on the way leaves no trace."""
    settings = {"grid": (2, 2), "estimator": "control-variate"}
    spec = ExplainSpec(relative_error=0.04, **settings)
    stopped = mr.explain(curved, IMAGE, 0, spec)
    assert stopped.masks > 1024
    outright = mr.explain(curved, IMAGE, 0, ExplainSpec(masks=stopped.masks, **settings))
    np.testing.assert_allclose(stopped.maps, outright.maps, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stopped.standard_error, outright.standard_error, rtol=1e-4)


def test_spends_no_more_masks_than_allowed() -> None:
    spec = ExplainSpec(relative_error=1e-4, masks=3000, grid=(2, 2))
    result = mr.explain(curved, IMAGE, 0, spec)
    assert result.masks == 3000
    assert result.relative_error[0] > 1e-4


def test_a_score_that_never_changes_is_left_after_what_tells_a_rare_event() -> None:
    spec = ExplainSpec(relative_error=0.01, grid=(2, 2))
    result = mr.explain(lambda images: np.full((len(images), 1), 0.7), IMAGE, 0, spec)
    assert result.masks == 16_384


@pytest.mark.parametrize("error", [0, -0.1, float("nan"), float("inf")])
def test_a_relative_error_that_nothing_reaches_is_refused(error: float) -> None:
    with pytest.raises(errors.SpecError, match="relative_error"):
        ExplainSpec(relative_error=error)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("estimator", "wanted"), [("paper", 0.3), ("control-variate", 0.02)])
@pytest.mark.parametrize("p_mask", [pytest.param(0.1, marks=pytest.mark.slow), 0.5])
def test_intervals_cover_the_exact_map_after_stopping(estimator: str, wanted: float, p_mask: float) -> None:
    covered, missed, used = [], [], set()
    for seed in range(15):
        spec = ExplainSpec(relative_error=wanted, grid=(4, 4), p_mask=p_mask, estimator=estimator, seed=seed)
        exact = exact_maps(spec)
        result = mr.explain(linear, IMAGE, 0, spec, dtype=torch.float64, batch_size=512)
        off = result.maps[0] - exact
        covered.append((np.abs(off) < 1.96 * result.standard_error[0]).mean())
        missed.append(np.sqrt((off**2).mean() / (exact**2).mean()) / result.relative_error[0])
        used.add(result.masks)
    assert min(used) > 1024  # it looked, and went on
    assert 0.93 < np.mean(covered) < 0.97
    assert 0.9 < np.sqrt(np.mean(np.square(missed))) < 1.1
