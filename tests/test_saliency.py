"""The three methods against the paper's loops, and the laws that hold whatever the model."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import replica
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mcrise_ray as mr
from mcrise_ray import explanations, plan
from mcrise_ray.blend import Blender
from mcrise_ray.estimators import residual_unit
from mcrise_ray.explainer import Subject, run_unit
from mcrise_ray.explanations import explanation
from mcrise_ray.masks import Masks, coverage, draw
from mcrise_ray.plan import Unit, unit_count
from mcrise_ray.saliency import Maps, Partial, UnitSums
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import fit_scores

PALETTES = {1: "#204080", 5: "paper5", 8: "paper8"}
CASES = [
    ((13, 17), (4, 3)),
    ((16, 16), (8, 8)),
    ((11, 7), (3, 5)),
    ((5, 9), (1, 2)),
]


def weights(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(*size, 3))


def score(images: np.ndarray) -> np.ndarray:
    """A smooth, non-linear score in (0, 1) of images `(..., H, W, 3)`, in the dtype of the images."""
    size = images.shape[-3:-1]
    linear = (images * weights(size)).sum(axis=(-3, -2, -1)) / np.sqrt(size[0] * size[1])
    return 1 / (1 + np.exp(-linear))


def black_box(images: Tensor) -> np.ndarray:
    values = score(images.permute(0, 2, 3, 1).numpy())
    return np.stack([1 - values, values], axis=1)


def finalized(spec: ExplainSpec, image: np.ndarray, dtype: torch.dtype, batch_size: int = 7) -> Maps:
    subject = Subject(black_box, image, spec, dtype=dtype)
    total = Partial.zero(spec, 1, subject.size)
    for index in range(unit_count(spec)):
        total = total.combine(run_unit(subject, plan.unit(spec, index), [1], batch_size))
    return total.finalize(spec)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("p_mask", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("K", [1, 5, 8])
@pytest.mark.parametrize(("size", "grid"), CASES)
def test_mc_rise_is_algorithm_1(
    size: tuple[int, int], grid: tuple[int, int], K: int, p_mask: float, dtype: torch.dtype, tolerance: float
) -> None:
    spec = ExplainSpec(masks=5, grid=grid, p_mask=p_mask, colors=PALETTES[K], seed=3, estimator="paper")
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = finalized(spec, image, dtype)
    masks = draw(spec, 0, spec.masks)
    s_mc, s_raw, s_baseline = replica.algorithm_1(
        image / 255, score, np.array(spec.palette), masks.cells, masks.shifts(size), p_mask
    )
    np.testing.assert_allclose(ours.maps[0], s_mc, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.raw[0], s_raw, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.baseline[0], s_baseline, rtol=0, atol=tolerance)


@pytest.mark.parametrize("p_mask", [0.1, 0.3, 0.5, 0.7])
def test_rise_and_debiased_rise_are_equations_2_and_5(p_mask: float) -> None:
    size, grid = (13, 17), (4, 3)
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    specs = {
        method: ExplainSpec(method=method, masks=40, grid=grid, p_mask=p_mask, estimator="paper")
        for method in ("rise", "debiased-rise")
    }
    kept = 1 - coverage(specs["rise"], size, range(40))[:, 0]
    scores = score(image / 255 * kept[..., None])
    for method, equation in (("rise", replica.rise), ("debiased-rise", replica.debiased_rise)):
        ours = finalized(specs[method], image, torch.float64)
        np.testing.assert_allclose(ours.maps[0, 0], equation(kept, scores, 1 - p_mask), atol=1e-9)


def test_debiased_rise_is_minus_mc_rise_with_one_black_fill() -> None:
    image = np.random.default_rng(2).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    debiased = mr.explain(black_box, image, [1], ExplainSpec(method="debiased-rise", masks=200))
    black = mr.explain(black_box, image, [1], ExplainSpec(masks=200, colors="black"))
    np.testing.assert_array_equal(debiased.maps, -black.maps)
    np.testing.assert_array_equal(debiased.standard_error, black.standard_error)


@pytest.mark.parametrize("method", ["mc-rise", "debiased-rise"])
def test_what_is_rounded_to_float32_is_what_predictions_leave_and_never_a_score(method: str) -> None:
    """A class that the model is sure of: its scores differ in their sixth digit, where float32 ends."""
    size, spec = (24, 24), ExplainSpec(method=method, masks=600, grid=(4, 4))
    whole = Unit(0, 0, spec.masks)
    kept = 1 - coverage(spec, size, range(spec.masks)).sum(axis=1)
    scores = 0.99999 + 1e-6 * np.tanh(kept[:, :12].mean(axis=(1, 2)) - 0.5)[:, None]
    total = residual_unit(spec, size, whole, scores, fit_scores(spec, size, scores))
    exact, found = total.finalize(spec).maps, explanation(spec, [0], scores[0], total).maps
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-7 * np.abs(exact).max())


def test_sums_that_must_not_be_written_to_are_finalized_without_a_warning() -> None:
    """As they come out of Ray; warnings of this package are errors here."""
    spec = ExplainSpec(masks=4, grid=(2, 2), estimator="paper")
    sums = UnitSums(spec, 1, (8, 8))
    sums.accumulate(draw(spec, 0, 4), np.ones((4, 1)))
    total = sums.partial(4)
    expected = total.finalize(spec).maps
    for array in (total.scores, total.buckets, total.squares, total.means, total.slopes):
        array.flags.writeable = False
    np.testing.assert_array_equal(total.finalize(spec).maps, expected)


@pytest.mark.parametrize("method", ["mc-rise", "debiased-rise"])
@pytest.mark.parametrize("p_mask", [0.1, 0.3, 0.5, 0.7])
def test_zero_law(method: str, p_mask: float) -> None:
    """A constant classifier has no saliency: zero within the Monte-Carlo error that theory gives."""
    spec = ExplainSpec(method=method, masks=4000, grid=(4, 4), p_mask=p_mask, estimator="paper")
    image = np.zeros((16, 16, 3), np.uint8)
    result = mr.explain(lambda batch: torch.full((len(batch), 1), 0.7), image, [0], spec)
    q = p_mask / spec.K
    # Variance of m_k / q - m_0 / (1 - p) for independent cells, at its largest (a pixel in one cell).
    sigma = 0.7 * np.sqrt((1 / q + 1 / (1 - p_mask)) / spec.masks)
    assert np.abs(result.maps).max() < 4.5 * sigma
    assert np.abs(result.maps.mean()) < sigma
    biased = mr.explain(
        lambda batch: torch.full((len(batch), 1), 0.7),
        image,
        [0],
        ExplainSpec(method="rise", masks=4000, grid=(4, 4), p_mask=p_mask, estimator="paper"),
    )
    np.testing.assert_allclose(biased.maps.mean(), 0.7, atol=0.02)


def test_zero_law_exactly_over_all_masks_of_a_small_grid() -> None:
    """The expectation itself, by enumerating every mask of a 2 x 1 grid with its probability."""
    spec, size = ExplainSpec(grid=(2, 1), p_mask=0.3, colors="red,blue"), (4, 3)
    weight_of = np.array([0.7, 0.15, 0.15])
    raw, baseline, total = np.zeros((1, 2, *size)), np.zeros((1, *size)), 0.0
    for a, b in itertools.product(range(3), repeat=2):
        for sy, sx in itertools.product(range(2), range(3)):
            word = np.array([[(sy * 2**32 + 2**31) // 2, (sx * 2**32 + 2**31) // 3]], dtype=np.uint64)
            masks = Masks(np.array([[[a], [b]]], dtype=np.uint8), word)
            assert masks.shifts(size).tolist() == [[sy, sx]]
            sums = UnitSums(spec, 1, size)
            sums.accumulate(masks, np.ones((1, 1)))
            probability = weight_of[a] * weight_of[b] / 6
            maps = sums.partial(1).finalize(spec)
            raw += probability * maps.raw
            baseline += probability * maps.baseline
            total += probability
    np.testing.assert_allclose(total, 1, atol=1e-12)
    np.testing.assert_allclose(raw, 1, atol=1e-12)
    np.testing.assert_allclose(baseline, 1, atol=1e-12)


def test_maps_are_linear_in_the_scores(rng: np.random.Generator) -> None:
    spec, size = ExplainSpec(masks=50), (24, 20)
    masks = draw(spec, 0, 50)
    f, g = rng.random((50, 1)), rng.random((50, 1))

    def maps(scores: np.ndarray) -> np.ndarray:
        sums = UnitSums(spec, scores.shape[1], size)
        sums.accumulate(masks, scores)
        return sums.partial(50).finalize(spec).maps

    np.testing.assert_allclose(maps(2 * f - 3 * g), 2 * maps(f) - 3 * maps(g), atol=1e-12)
    together = maps(np.concatenate([f, g], axis=1))
    np.testing.assert_allclose(together, np.concatenate([maps(f), maps(g)]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_scores_of_any_size_are_found(dtype: torch.dtype, rng: np.random.Generator) -> None:
    spec, size = ExplainSpec(masks=50), (24, 20)
    masks, scores = draw(spec, 0, 50), rng.random((50, 1))

    def found(unit: float) -> Maps:
        sums = UnitSums(spec, 1, size)
        for values in (scores, 1e-3 * scores):
            sums.accumulate(masks, unit * values)
            sums.square(masks, unit * values)
        return sums.partial(100).finalize(spec, dtype)

    usual = found(1)
    for unit in (1e-28, 1e12, 1e28):
        other = found(unit)
        np.testing.assert_allclose(other.standard_error, unit * usual.standard_error, rtol=1e-4)
        np.testing.assert_allclose(other.relative_error, usual.relative_error, rtol=1e-4)


@given(cuts=st.lists(st.integers(1, 99), max_size=6, unique=True), batch=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_any_partition_gives_the_same_sums(cuts: list[int], batch: int) -> None:
    spec = ExplainSpec(masks=100, grid=(3, 3), estimator="paper")
    image = np.full((9, 12, 3), 90, np.uint8)
    subject = Subject(black_box, image, spec, dtype=torch.float64)
    whole = run_unit(subject, Unit(0, 0, 100), [0, 1], 100)
    total = Partial.zero(spec, 2, subject.size)
    for index, (a, b) in enumerate(itertools.pairwise([0, *sorted(cuts), 100])):
        total = total.combine(run_unit(subject, Unit(index, a, b), [0, 1], batch))
    assert total.masks == 100
    for name in ("scores", "buckets"):
        np.testing.assert_allclose(getattr(total, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total.squares, whole.squares, rtol=1e-5)


def test_explain_gives_the_same_bits_every_time() -> None:
    image = np.random.default_rng(2).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    spec = ExplainSpec(masks=300)
    first, second = (mr.explain(black_box, image, [0, 1], spec) for _ in range(2))
    np.testing.assert_array_equal(first.maps, second.maps)
    assert first.masks == 300


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
def test_standard_error_is_the_spread_between_seeds(estimator: str) -> None:
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    specs = [ExplainSpec(masks=600, grid=(4, 4), seed=seed, estimator=estimator) for seed in range(30)]
    results = [mr.explain(black_box, image, 1, spec) for spec in specs]
    spread = np.std([r.maps[0] for r in results], axis=0, ddof=1)
    predicted = np.sqrt(np.mean([r.standard_error[0] ** 2 for r in results], axis=0))
    ratio = np.sqrt((spread**2).mean() / (predicted**2).mean())
    assert 0.9 < ratio < 1.1


def test_standard_error_takes_two_masks() -> None:
    image = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    one, two = (mr.explain(black_box, image, 1, ExplainSpec(masks=masks)) for masks in (1, 2))
    assert np.isnan(one.standard_error).all()
    assert np.isnan(one.relative_error).all()
    assert np.isfinite(two.standard_error).all()
    assert np.isfinite(two.relative_error).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fills", [1, 2, 5])
def test_masked_images_are_those_of_the_coverages(
    rng: np.random.Generator, fills: int, channels_last: bool
) -> None:
    spec = ExplainSpec(masks=20, colors=",".join(["red", "blue", "#123456", "white", "black"][:fills]))
    image, palette = torch.from_numpy(rng.random((3, 15, 22))), torch.tensor(spec.palette).double()
    found = Blender(image, palette, spec.grid, channels_last=channels_last)(draw(spec, 0, 20))
    shares = torch.from_numpy(coverage(spec, (15, 22), range(20)))
    kept = 1 - shares.sum(dim=1, keepdim=True)
    wanted = kept * image + torch.einsum("nkyx,kc->ncyx", shares, palette)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blending_in_normalised_space_is_blending_in_rgb(
    rng: np.random.Generator, dtype: torch.dtype
) -> None:
    spec = ExplainSpec(masks=20, colors="paper8")
    image = torch.from_numpy(rng.random((3, 15, 22))).to(dtype)
    palette = torch.tensor(spec.palette, dtype=dtype)
    mean, std = torch.tensor([0.4, 0.5, 0.6], dtype=dtype), torch.tensor([0.2, 0.3, 0.25], dtype=dtype)
    masks = draw(spec, 0, 20)
    rgb = Blender(image, palette, spec.grid)(masks)
    normalised = Blender((image - mean.view(3, 1, 1)) / std.view(3, 1, 1), (palette - mean) / std, spec.grid)(
        masks
    )
    expected = (rgb - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(normalised, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_sums_of_a_hundred_million_masks_are_as_good_as_exact(rng: np.random.Generator) -> None:
    """Against exact arithmetic: float64 rounds once per addition, one per mask and then one per unit."""
    spec = ExplainSpec(masks=10**8, grid=(1, 1), colors="black")
    total = Partial.zero(spec, 1, (1, 1))
    unit_sums = rng.random(unit_count(spec)) * 4096
    for value in unit_sums:
        buckets = np.full((1, 1, 1, 1, 1, 1), value)
        none = np.zeros((1, 0, 1, 0))
        total = total.combine(
            Partial(4096, 4096.0, 4096.0, (1, 1), np.array([value]), buckets, none, np.zeros(1), none)
        )
    exact = Fraction(0)
    for value in unit_sums:
        exact += Fraction(float(value))
    error = abs(Fraction(float(total.buckets.item())) - exact)
    assert total.scores[0] == total.buckets.item()
    assert error <= exact * len(unit_sums) * Fraction(1, 2**53)
    assert float(error / exact) < 3e-12


def test_the_sums_of_a_unit_are_as_good_as_exact(rng: np.random.Generator) -> None:
    spec = ExplainSpec(masks=4096, grid=(1, 1), colors="black")
    masks, scores = draw(spec, 0, 4096), rng.random((4096, 1))
    sums = UnitSums(spec, 1, (1, 1))
    sums.accumulate(masks, scores)
    exact = sum(
        Fraction(float(score)) for score, cell in zip(scores[:, 0], masks.cells.ravel(), strict=True) if cell
    )
    found = Fraction(float(sums.partial(4096).buckets.item()))
    assert abs(found - exact) <= exact * 4097 * Fraction(1, 2**53)


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_added_in_the_order_of_the_masks_whatever_the_threads(threads: int) -> None:
    spec, size, before = (
        mr.ExplainSpec(masks=4096, grid=(2, 3), colors="#204080,#804020"),
        (4, 6),
        torch.get_num_threads(),
    )
    masks, rng = draw(spec, 0, 4096), np.random.default_rng(0)
    # Sums in another order differ: sizes are spread over twelve powers of ten.
    scores = rng.normal(size=(4096, 2)) * 10.0 ** rng.integers(-6, 7, size=(4096, 2))
    expected = np.zeros_like(UnitSums(spec, 2, size).partial(0).buckets)
    for cells, (sy, sx), values in zip(masks.cells, masks.shifts(size), scores, strict=True):
        for (y, x), state in np.ndenumerate(cells):
            if state:
                expected[:, y, sy, state - 1, x, sx] += values
    sums = UnitSums(spec, 2, size)
    torch.set_num_threads(threads)
    try:
        sums.accumulate(masks, scores)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(sums.partial(4096).buckets, expected)


@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
def test_maps_of_a_target_do_not_depend_on_those_finished_with_it(
    estimator: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its errors, where the scores of another one are too small for squares in float32."""
    spec, size = mr.ExplainSpec(masks=200, grid=(4, 5), colors=("red", "blue"), estimator=estimator), (30, 37)
    scores = rng.random((200, 5)) * [1, 1e-25, 0.1, 1, 1e-3]
    fit = fit_scores(spec, size, scores) if estimator == "control-variate" else None
    total = residual_unit(spec, size, Unit(0, 0, 200), scores, fit)
    monkeypatch.setattr(explanations, "_AT_ONCE", 3 * spec.K * size[0] * size[1])
    together = explanation(spec, range(5), scores[0], total)
    for place in range(5):
        one = slice(place, place + 1)
        alone = explanation(spec, [place], scores[0, one], total.of_targets(one))
        for name in ("maps", "raw", "baseline", "standard_error", "relative_error"):
            np.testing.assert_array_equal(getattr(together, name)[one], getattr(alone, name), err_msg=name)
