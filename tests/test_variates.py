"""The control-variate estimator: the expectation of equation 9 with less noise, whatever is predicted."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
from exact import enumerated, every_mask, explained, linear_maps, pixels
from torch import Tensor

import mcrise_ray as mr
from mcrise_ray import plan
from mcrise_ray.estimators import residual_unit
from mcrise_ray.explainer import Subject, perform, run_unit
from mcrise_ray.explanations import explanation
from mcrise_ray.masks import draw, method_weights
from mcrise_ray.reduction import ScoreUnit
from mcrise_ray.saliency import Partial, UnitSums, lattice, weight_moments
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.variates import FOLDS, Features, Fit, expectation, fit_scores, leverage, patches

SMALL = (4, 5)
IMAGE = np.random.default_rng(2).integers(0, 256, (*SMALL, 3), dtype=np.uint8)
METHODS = [("mc-rise", "red,blue"), ("debiased-rise", "black"), ("rise", "black")]


def spec_of(method: str, colors: str, **settings: object) -> ExplainSpec:
    return ExplainSpec(method=method, colors=colors, **{"grid": (2, 2), **settings})


def steep(images: Tensor) -> np.ndarray:
    """A probability that is often near 0 or 1."""
    weights = np.random.default_rng(1).normal(size=(3, *images.shape[2:]))
    weights -= weights.mean()
    seen = (images.double().numpy() * weights).sum(axis=(1, 2, 3)) / np.abs(weights).sum() ** 0.5
    return 1 / (1 + np.exp(-5 * seen))[:, None]


def of_masks(spec: ExplainSpec, size: tuple[int, int]) -> Callable[[object], np.ndarray]:
    """A score of masks that is steep, and not linear in anything."""
    weights = np.random.default_rng(1).normal(size=(spec.K, *size))
    return lambda masks: np.tanh(3 * (pixels(spec, size, masks) * weights).sum(axis=(1, 2, 3)) / 4)


@pytest.mark.parametrize("p_mask", [0.1, 0.5, 0.7])
@pytest.mark.parametrize(("method", "colors"), METHODS)
def test_closed_form_is_the_sum_over_every_mask(method: str, colors: str, p_mask: float) -> None:
    spec, grid = spec_of(method, colors, p_mask=p_mask), (2, 1)
    features = Features(spec, SMALL, grid)
    slopes = np.random.default_rng(3).normal(size=(1, 2, spec.K, 1))
    exact = enumerated(spec, SMALL, lambda masks: 0.3 + features(masks) @ slopes.ravel())
    nothing = Partial.zero(spec, 1, SMALL)
    closed = Partial(
        1, 1.0, 1.0, SMALL, nothing.scores, nothing.buckets, nothing.squares, np.array([0.3]), slopes
    ).finalize(spec)
    for name in ("maps", "raw", "baseline"):
        np.testing.assert_allclose(getattr(closed, name), getattr(exact, name), atol=1e-12)


def test_closed_form_of_pixels_is_ky_b_kx() -> None:
    spec = spec_of("mc-rise", "red,blue", p_mask=0.3)
    slopes = np.random.default_rng(3).normal(size=(spec.K, *SMALL))
    exact = enumerated(
        spec, SMALL, lambda masks: 2 + ((pixels(spec, SMALL, masks) - 0.15) * slopes).sum((1, 2, 3))
    )
    np.testing.assert_allclose(exact.maps[0], linear_maps(spec, slopes, 2.0), atol=1e-12)
    one_patch_per_pixel = slopes.transpose(1, 0, 2)[None]
    np.testing.assert_allclose(expectation(spec, SMALL, one_patch_per_pixel)[0], exact.maps[0], atol=1e-12)


@pytest.mark.parametrize("p_mask", [0.1, 0.5])
@pytest.mark.parametrize(("method", "colors"), METHODS)
def test_mean_square_of_the_weights_is_the_sum_over_every_mask(
    method: str, colors: str, p_mask: float
) -> None:
    spec = spec_of(method, colors, p_mask=p_mask)
    masks, chance = every_mask(spec, SMALL)
    filled = pixels(spec, SMALL, masks)
    kept = (1 - filled.sum(axis=1)) / (1 - p_mask)
    weights = filled * spec.K / p_mask - kept[:, None] if method != "rise" else kept[:, None]
    moments = np.einsum("n,nkyx->kyx", chance, weights**2)
    np.testing.assert_allclose(moments, np.broadcast_to(weight_moments(spec, SMALL), moments.shape))


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("method", "colors", "p_mask"), [("mc-rise", "red,blue", 0.1), ("rise", "black", 0.5)]
)
def test_unbiased_over_200_seeds(method: str, colors: str, p_mask: float) -> None:
    base = spec_of(method, colors, p_mask=p_mask, masks=200)
    score = of_masks(base, SMALL)
    exact = enumerated(base, SMALL, score)
    results = []
    for seed in range(200):
        spec = base.model_copy(update={"seed": seed})
        results.append(explained(spec, SMALL, lambda a, b, s=spec: score(draw(s, a, b))[:, None]))
    for name in ("maps", "raw", "baseline"):
        values = np.array([getattr(result, name)[0] for result in results], dtype=np.float64)
        z = (values.mean(axis=0) - getattr(exact, name)[0]) / values.std(axis=0, ddof=1) * np.sqrt(200)
        assert (z**2).mean() < 2.5
        assert np.abs(z).max() < 4.5
    error = np.array([(r.maps[0] - exact.maps[0]) ** 2 for r in results]).mean()
    predicted = np.array([r.standard_error[0] ** 2 for r in results]).mean()
    assert 0.75 < error / predicted < 1.3  # 200 seeds know a variance to within a tenth


@pytest.mark.parametrize("p_mask", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize(("method", "colors"), METHODS)
@pytest.mark.parametrize("masks", [2, 3, 64, 700])
def test_zero_law_holds_exactly(method: str, colors: str, p_mask: float, masks: int) -> None:
    """A constant score is its own mean: nothing is left to be noisy, and no tolerance is needed."""
    spec = spec_of(method, colors, p_mask=p_mask, masks=masks)
    result = mr.explain(lambda images: np.full((len(images), 1), 0.7), IMAGE, 0, spec)
    if method == "rise":
        assert (result.maps == np.float32(0.7)).all()
    else:
        assert not result.maps.any()
    assert (result.baseline == np.float32(0.7)).all()
    assert not result.standard_error.any()


def test_no_mask_is_predicted_by_a_fit_that_saw_it() -> None:
    spec = spec_of("mc-rise", "red,blue", masks=300)
    masks, score = draw(spec, 0, 300), of_masks(spec, SMALL)
    known = score(masks)[:, None]
    known = np.concatenate([known, known**3, 0.5 + 0.1 * known], axis=1)
    features = Features(spec, SMALL, patches(spec, SMALL, 300))(masks)
    rows = np.arange(300) % FOLDS
    fit = fit_scores(spec, SMALL, known)
    before = fit.predict(features, rows)
    assert fit.curved[:FOLDS].any()
    assert not fit.curved[:FOLDS].all()
    assert (fit.rows(0, 300) == rows).all()
    for n in (0, 7, 298):
        changed = known.copy()
        changed[n] += 5
        after = fit_scores(spec, SMALL, changed).predict(features, rows)
        same_fold = rows == rows[n]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(new[same_fold], old[same_fold])
            assert (new[~same_fold] != old[~same_fold]).any()


def test_estimator_and_fit_must_agree() -> None:
    scores, unit = np.ones((12, 1)), plan.Unit(0, 0, 12)
    paper, default = (spec_of("rise", "black", estimator=e) for e in ("paper", "control-variate"))
    with pytest.raises(ValueError, match="expected a fit for the estimator 'control-variate', found none"):
        residual_unit(default, SMALL, unit, scores, None)
    with pytest.raises(ValueError, match="expected no fit for the estimator 'paper', found one"):
        residual_unit(paper, SMALL, unit, scores, fit_scores(default, SMALL, scores))


def test_masks_after_the_pilot_are_predicted_by_all_of_it() -> None:
    fit = fit_scores(spec_of("rise", "black"), SMALL, np.arange(12.0)[:, None])
    assert fit.rows(10, 14).tolist() == [0, 1, FOLDS, FOLDS]


@pytest.mark.parametrize("masks", [300, 3000])
def test_order_of_the_work_changes_no_bit(monkeypatch: pytest.MonkeyPatch, masks: int) -> None:
    """Scores, fit, and sums as a cluster would do them: shuffled, twice, and through pickles."""
    monkeypatch.setattr(plan, "_PILOT", 1024)
    spec = spec_of("mc-rise", "red,blue", masks=masks, estimator="control-variate")
    oracle = mr.explain(steep, IMAGE, 0, spec)
    units = [plan.unit(spec, index) for index in range(plan.unit_count(spec))]
    count = plan.pilot_count(spec, len(units))
    assert (count < len(units)) == (masks > 1024)

    def subject() -> Subject:
        return Subject(steep, IMAGE, spec)

    shuffled = random.Random(1).sample(units[:count], count)
    asked = perform(subject(), [ScoreUnit(one) for one in [*shuffled, shuffled[0]]], [0], 64)
    scores = {work.unit.index: found for work, found in asked}  # type: ignore[union-attr]
    known = np.concatenate([scores[index] for index in range(count)])
    fit: Fit = pickle.loads(pickle.dumps(fit_scores(spec, SMALL, known)))
    total = residual_unit(spec, SMALL, plan.Unit(0, 0, len(known)), known, fit)
    parts = {}
    for one in random.Random(2).sample(units[count:], len(units) - count):
        parts[one.index] = pickle.loads(pickle.dumps(run_unit(subject(), one, [0], 64, fit)))
    for one in units[count:]:
        total = total.combine(parts[one.index])
    again = explanation(spec, [0], oracle.score, total)
    for name in ("maps", "raw", "baseline", "standard_error"):
        np.testing.assert_array_equal(getattr(again, name), getattr(oracle, name))
    assert again.masks == masks


def test_what_travels_does_not_grow_with_the_number_of_masks() -> None:
    few, many = (spec_of("mc-rise", "red,blue", masks=n) for n in (20_000, 10**9))
    for spec in (few, many):
        pilot = plan.pilot_count(spec, plan.unit_count(spec))
        assert plan.unit(spec, pilot - 1).stop <= 16_384
    rng = np.random.default_rng(0)
    fits = [fit_scores(few, SMALL, rng.random((n, 1))) for n in (1000, 8000)]
    assert len({len(pickle.dumps(fit)) for fit in fits}) == 1
    sizes = set()
    for stop in (100, 10**9):
        one = plan.Unit(0, stop - 100, stop)
        part = residual_unit(many, SMALL, one, rng.random((100, 1)), fits[0])
        sizes.add(len(pickle.dumps(part.combine(part))) // 64)
    assert len(sizes) == 1


NOISES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "rare": lambda rng, n: (rng.random(n) < 0.05) * 1.0,
    "heavy": lambda rng, n: np.exp(2 * rng.normal(size=n)),
    "probability": lambda rng, n: rng.beta(0.1, 0.2, size=n),
}


@pytest.mark.parametrize("p_mask", [0.1, 0.5])
@pytest.mark.parametrize("masks", [20, 80, 150, 800])
def test_predictions_never_cost_more_than_three_in_a_hundred(masks: int, p_mask: float) -> None:
    """Scores that have nothing to do with the masks are the worst case: every slope is noise."""
    spec = ExplainSpec(masks=masks, p_mask=p_mask, grid=(4, 4))
    features = Features(spec, (12, 12), patches(spec, (12, 12), masks))(draw(spec, 0, masks))
    rows = np.arange(masks) % FOLDS
    for name, noise in NOISES.items():
        rng, cost = np.random.default_rng(3), []
        for _ in range(800 // masks + 3):
            scores = np.stack([noise(rng, masks) for _ in range(8)], axis=1)
            fit = fit_scores(spec, (12, 12), scores)
            best, line = fit.predict(features, rows)
            left = ((scores - best) ** 2).sum(axis=0) + ((best - line) ** 2).sum(axis=0) / 4
            others = (scores.sum(axis=0) - np.stack([scores[rows == v].sum(axis=0) for v in rows])) / (
                masks - np.bincount(rows)[rows][:, None]
            )
            alone = ((scores - others) ** 2).sum(axis=0)
            cost.extend(left[alone > 0] / alone[alone > 0])
        assert np.mean(cost) < 1.03, name


@pytest.mark.parametrize(("p_mask", "masks"), [(1e-9, 1500), (1e-3, 65), (1 - 1e-9, 65)])
@pytest.mark.parametrize("estimator", ["control-variate", "importance"])
def test_roundings_predict_nothing(estimator: str, p_mask: float, masks: int) -> None:
    """Where hardly any cell is masked, or kept, features and scores differ by their last bits alone."""
    box = np.random.default_rng(0).normal(size=(3, 3, 16))

    def score(images: Tensor) -> np.ndarray:  # whose last bits tell the size of the batch, as networks' do
        seen = (images.double().numpy() * box).sum(axis=(1, 2, 3))
        return 1 / (1 + np.exp(-seen / 10))[:, None] * (1 + 3e-16 * len(images))

    image = np.random.default_rng(2).integers(0, 256, (3, 16, 3), dtype=np.uint8)
    settings = {"masks": masks, "p_mask": p_mask, "grid": (3, 3), "estimator": estimator}
    for seed in range(8):
        result = mr.explain(score, image, 0, ExplainSpec(method="rise", seed=seed, **settings))
        assert np.abs(result.maps).max() < 1.5


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e-20])
def test_curves_do_not_take_cells_that_were_never_masked_for_a_constant(size: float) -> None:
    for seed in range(10):
        spec = ExplainSpec(method="rise", masks=65, grid=(3, 3), p_mask=0.01, seed=seed)
        likely = of_masks(spec, (3, 16))
        scores = size * (likely(draw(spec, 0, 65)) + 1)[:, None] / 2
        maps = explained(spec, (3, 16), lambda start, stop, known=scores: known[start:stop]).maps
        assert np.abs(maps / size - 0.5).max() < 0.5


@pytest.mark.parametrize(("p_mask", "gain"), [(0.5, 3.0), (0.1, 15.0)])
def test_much_less_noise_than_equation_9(p_mask: float, gain: float) -> None:
    settings = {"masks": 2000, "p_mask": p_mask, "grid": (4, 4), "colors": "paper5"}
    image = np.random.default_rng(2).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    spread = []
    for estimator in ("paper", "control-variate"):
        result = mr.explain(steep, image, 0, ExplainSpec(estimator=estimator, **settings))
        spread.append((result.standard_error**2).mean())
    assert spread[0] / spread[1] > gain


def test_targets_do_not_disturb_each_other() -> None:
    spec = spec_of("mc-rise", "red,blue", masks=500)

    def box(images: Tensor) -> np.ndarray:
        score = steep(images)
        return np.concatenate([score, 3 - 7 * score, score**2], axis=1)

    together = mr.explain(box, IMAGE, [0, 1, 2], spec)
    for target in range(3):
        alone = mr.explain(box, IMAGE, target, spec)
        np.testing.assert_allclose(alone.maps[0], together.maps[target], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together.maps[1], -7 * together.maps[0], atol=0.05)


def test_many_targets_are_predicted_by_lines_alone() -> None:
    spec = spec_of("mc-rise", "red,blue", masks=500)
    score = of_masks(spec, SMALL)(draw(spec, 0, 500))[:, None]
    assert fit_scores(spec, SMALL, score.repeat(8, axis=1)).curved.any()
    fit = fit_scores(spec, SMALL, score.repeat(9, axis=1))
    assert not fit.curved.any()
    assert fit.slopes.any()


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
@pytest.mark.parametrize("p_mask", [0.1, 0.5])
def test_intervals_cover_the_exact_map(estimator: str, p_mask: float) -> None:
    """95 % intervals at N = 2000, for scores linear in the coverages of every pixel."""
    size, covered = (24, 20), []
    for seed in range(3):
        spec = ExplainSpec(masks=2000, p_mask=p_mask, seed=seed, estimator=estimator)
        slopes = np.random.default_rng(seed).normal(size=(spec.K, *size)) / 20

        def scores(start: int, stop: int, spec=spec, slopes=slopes) -> np.ndarray:
            filled = pixels(spec, size, draw(spec, start, stop)) - p_mask / spec.K
            return 1 + np.einsum("nkyx,kyx->n", filled, slopes)[:, None]

        result = explained(spec, size, scores)
        off = np.abs(result.maps[0] - linear_maps(spec, slopes, 1.0))
        covered.append((off < 1.96 * result.standard_error[0]).mean())
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("estimator", ["paper", "control-variate"])
@pytest.mark.parametrize("p_mask", [0.1, 0.5])
def test_intervals_cover_the_exact_map_of_every_mask(estimator: str, p_mask: float) -> None:
    """The same for scores that are steep, where all masks of a small grid can be listed."""
    base = ExplainSpec(masks=2000, p_mask=p_mask, grid=(2, 2), colors="red,blue", estimator=estimator)
    score = of_masks(base, SMALL)
    exact, covered = enumerated(base, SMALL, score).maps, []
    for seed in range(20):
        spec = base.model_copy(update={"seed": seed})
        result = explained(spec, SMALL, lambda a, b, s=spec: score(draw(s, a, b))[:, None])
        covered.append((np.abs(result.maps - exact) < 1.96 * result.standard_error).mean())
    assert 0.93 < np.mean(covered) < 0.97


def test_squares_are_summed_at_no_more_points_than_they_are_worth() -> None:
    many = [f"#0000{blue:02x}" for blue in range(64)]
    for colors, grid, points in (
        ("paper5", (8, 8), (17, 17)),
        (many, (8, 8), (8, 8)),
        ("black", (200, 2), (401, 5)),
    ):
        rows, columns = lattice(ExplainSpec(colors=colors, grid=grid), (600, 600))
        assert (len(rows), len(columns)) == points
        assert (rows[0], rows[-1], columns[0], columns[-1]) == (0, 599, 0, 599)
    assert [axis.tolist() for axis in lattice(ExplainSpec(), (3, 1))] == [[0, 1, 2], [0]]


def test_weights_of_a_mask_are_those_of_its_map() -> None:
    for method, colors in METHODS:
        spec = spec_of(method, colors, masks=1, estimator="paper")
        filled = pixels(spec, SMALL, draw(spec, 0, 1))
        shares = np.concatenate([1 - filled.sum(axis=1, keepdims=True), filled], axis=1)
        weights = np.einsum("syx,sm->myx", shares[0], method_weights(spec).numpy())
        result = mr.explain(lambda images: np.ones((len(images), 1)), IMAGE, 0, spec)
        sign = -1 if method == "debiased-rise" else 1
        np.testing.assert_allclose(sign * weights, result.maps[0], atol=1e-6)


@pytest.mark.parametrize(("method", "colors"), METHODS)
def test_leverage_is_what_one_mask_adds_to_the_maps(method: str, colors: str) -> None:
    spec, size = ExplainSpec(method=method, colors=colors, grid=(2, 3), p_mask=0.3), (4, 5)
    masks = draw(spec, 0, 20)
    alone = []
    for n in range(len(masks)):
        sums = UnitSums(spec, 1, size)
        sums.accumulate(masks[n : n + 1], np.ones((1, 1)))
        alone.append((sums.partial(1).finalize(spec).maps ** 2).mean() ** 0.5)
    found = leverage(spec, Features(spec, size, size)(masks), size)  # a patch for each pixel
    np.testing.assert_allclose(found, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "colors", "masks", "expected"),
    [
        ((8, 8), "paper5", 4000, (8, 8)),
        ((16, 16), "paper5", 4000, (8, 8)),
        ((8, 8), "paper5", 40, (4, 4)),
        ((1, 224), "paper5", 4000, (1, 80)),
        ((200, 1), "paper5", 4000, (80, 1)),
        ((2, 200), "black", 40, (1, 80)),
        ((8, 8), "black", 4000, (10, 10)),  # finer than cells, with one fill
        ((200, 1), "black", 4000, (224, 1)),  # but not than pixels
        ((8, 8), "black", 40, (8, 8)),
        ((8, 8), "red,blue", 4000, (8, 8)),
    ],
)
def test_features_are_as_many_as_a_fit_bears(
    grid: tuple[int, int], colors: str, masks: int, expected: tuple[int, int]
) -> None:
    assert patches(ExplainSpec(grid=grid, colors=colors), (224, 224), masks) == expected
