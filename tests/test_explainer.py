"""`explain()` as a user calls it: black boxes of every kind, targets, and what bad input is told."""

from __future__ import annotations

import pickle
import re
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcrise_ray as mr
from mcrise_ray import errors, plan

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
SPEC = mr.ExplainSpec(masks=128)


def channel_means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * 3


def test_result_has_the_shapes_it_promises() -> None:
    result = mr.explain(channel_means, IMAGE, targets=[2, 0], spec=SPEC)
    assert result.maps.shape == (2, 5, 16, 24)
    assert result.raw.shape == (2, 5, 16, 24)
    assert result.baseline.shape == (2, 16, 24)
    assert result.standard_error.shape == (2, 5, 16, 24)
    assert result.relative_error.shape == (2,)
    assert result.maps.dtype == result.baseline.dtype == np.float32
    np.testing.assert_allclose(result.score, IMAGE.mean(axis=(0, 1))[[2, 0]] / 255, atol=1e-6)
    np.testing.assert_allclose(result.maps, result.raw - result.baseline[:, None], atol=1e-5)
    assert (result.targets, result.masks, result.spec) == ((2, 0), 128, SPEC)
    one = mr.explain(channel_means, IMAGE, 1, mr.ExplainSpec(method="rise", masks=64))
    assert one.maps.shape == (1, 1, 16, 24)


def test_predicted_class_is_the_default_target() -> None:
    assert mr.explain(channel_means, np.full_like(IMAGE, (1, 9, 2)), spec=SPEC).targets == (1,)


def test_red_fill_raises_the_score_of_red_and_black_lowers_it() -> None:
    result = mr.explain(channel_means, np.full_like(IMAGE, 128), 0, mr.ExplainSpec(masks=4000))
    by_colour = dict(
        zip(("red", "green", "blue", "white", "black"), result.maps[0].mean((1, 2)), strict=True)
    )
    assert by_colour["red"] > 0
    assert by_colour["white"] > 0
    assert by_colour["green"] < 0
    assert by_colour["blue"] < 0
    assert by_colour["black"] < 0


def test_a_classifier_gives_what_the_same_function_of_rgb_gives() -> None:
    classifier = mr.Classifier(Means(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    ours = mr.explain(classifier, IMAGE, [0, 1, 2], SPEC)
    foreign = mr.explain(classifier.forward, IMAGE, [0, 1, 2], SPEC)
    np.testing.assert_allclose(ours.maps, foreign.maps, atol=1e-5)
    np.testing.assert_allclose(ours.score, foreign.score, atol=1e-6)


@pytest.mark.parametrize("kind", [list, np.asarray])
def test_a_black_box_may_return_lists_and_arrays(kind: type) -> None:
    result = mr.explain(lambda images: kind(channel_means(images).tolist()), IMAGE, 0, SPEC)
    np.testing.assert_allclose(result.maps, mr.explain(channel_means, IMAGE, 0, SPEC).maps, atol=1e-6)


def test_a_black_box_may_return_what_must_not_be_written_to() -> None:
    def frozen(images: Tensor) -> np.ndarray:
        scores = channel_means(images).numpy().copy()
        scores.flags.writeable = False
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mr.explain(frozen, IMAGE, 0, SPEC)
    np.testing.assert_array_equal(result.maps, mr.explain(channel_means, IMAGE, 0, SPEC).maps)


def test_a_black_box_may_write_to_its_batch() -> None:
    def in_place(images: Tensor) -> Tensor:
        images -= 0.3
        images.clamp_(min=0)
        return channel_means(images)

    ours = mr.explain(in_place, IMAGE, 0, SPEC)
    np.testing.assert_array_equal(
        ours.maps, mr.explain(lambda i: channel_means((i - 0.3).clamp(min=0)), IMAGE, 0, SPEC).maps
    )


def test_scores_may_be_a_view_of_the_batch() -> None:
    by_view = mr.explain(lambda images: images[:, :, 3, 5], IMAGE, 0, SPEC, batch_size=16)
    by_copy = mr.explain(lambda images: images[:, :, 3, 5].clone(), IMAGE, 0, SPEC, batch_size=16)
    np.testing.assert_array_equal(by_view.maps, by_copy.maps)


def test_batch_size_changes_nothing_for_a_model_that_is_exact() -> None:
    results = [mr.explain(lambda i: i[:, :, 3, 5], IMAGE, 0, SPEC, batch_size=b) for b in (1, 33, 1000)]
    np.testing.assert_array_equal(results[0].maps, results[1].maps)
    np.testing.assert_array_equal(results[0].maps, results[2].maps)


@pytest.mark.parametrize("estimator", ["paper", "control-variate", "importance"])
def test_memory_does_not_grow_with_N(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flat law, past the masks whose scores are fitted, which are bounded, and at the largest units."""
    monkeypatch.setattr(plan, "_PILOT", 1024)
    monkeypatch.setattr(plan, "_LARGEST", 128)

    def held(masks: int) -> int:
        """Bytes, after the last masks."""
        spec, seen = mr.ExplainSpec(method="rise", masks=masks, grid=(2, 2), estimator=estimator), [0]
        tracemalloc.start()
        mr.explain(
            lambda images: images.mean(dim=(2, 3)),
            IMAGE,
            0,
            spec,
            batch_size=128,
            on_progress=lambda _: seen.append(tracemalloc.get_traced_memory()[0]),
        )
        tracemalloc.stop()
        return seen[-1]

    few, more = 4096, 16384
    held(more)  # what is made once and kept
    assert held(more) - held(few) < 4 * (more - few)  # a score alone takes eight bytes


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.mean(dim=(2, 3))).float()


@pytest.mark.parametrize("estimator", ["paper", "importance"])
def test_mixed_precision_around_is_that_of_the_model_alone(estimator: str) -> None:
    spec, dense = mr.ExplainSpec(masks=1088, colors="red", estimator=estimator), mr.Classifier(Dense())
    with torch.autocast("cpu", torch.bfloat16):
        around = mr.explain(dense, IMAGE, 0, spec)
    dense.network.forward = torch.autocast("cpu", torch.bfloat16)(dense.network.forward)
    inside = mr.explain(dense, IMAGE, 0, spec)
    np.testing.assert_array_equal(around.maps, inside.maps)
    np.testing.assert_array_equal(around.relative_error, inside.relative_error)


@pytest.mark.parametrize("estimator", ["paper", "importance"])
def test_the_default_device_changes_nothing(estimator: str) -> None:
    spec, image = mr.ExplainSpec(masks=1088, colors="red", estimator=estimator), IMAGE[:11, :19]
    with torch.device("meta"):  # stands for a GPU; before anything of this size is kept for later
        other = mr.explain(channel_means, image, 0, spec)
    usual = mr.explain(channel_means, image, 0, spec)
    np.testing.assert_array_equal(usual.maps, other.maps)
    np.testing.assert_array_equal(usual.standard_error, other.standard_error)


def test_progress_counts_every_mask() -> None:
    seen: list[int] = []
    mr.explain(channel_means, IMAGE, 0, mr.ExplainSpec(masks=200), on_progress=seen.append)
    assert sum(seen) == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_mask": 0}, "p_mask: expected a probability .* at least 1e-9 away from 0 and from 1, found 0.0"),
        ({"p_mask": 1}, "p_mask: expected a probability .* at least 1e-9 away from 0 and from 1, found 1.0"),
        ({"p_mask": float("nan")}, "p_mask"),
        ({"masks": 0}, "masks: expected 1 to .* found 0"),
        ({"masks": 1.5}, "masks: .*integer.*found 1.5"),
        ({"grid": (0, 8)}, "grid: expected at least 1 x 1"),
        ({"colors": "mauve"}, "colors: expected one of paper5.*found 'mauve'"),
        ({"colors": ["red", "#ff0000"]}, "colors: expected distinct fills"),
        ({"colors": []}, "colors: expected 1 to 255 fills"),
        ({"colors": None}, "colors: expected names of palettes or colours, .* in quotes, found None"),
        ({"method": ["rise"]}, r"method: .*found \['rise'\]"),
        ({"method": "rise", "colors": "paper5"}, "rise masks with black alone"),
        ({"method": "lime"}, "method: .*found 'lime'"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"mask": 3}, "mask: .*not permitted"),
    ],
)
def test_bad_settings_name_the_knob(change: dict, message: str) -> None:
    with pytest.raises(errors.SpecError, match=message) as caught:
        mr.ExplainSpec(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("box", "error", "message"),
    [
        (lambda i: i.mean(dim=(1, 2, 3)), errors.ScoreError, r"shape \(1, classes\).*found \(1,\)"),
        (lambda i: i.mean(dim=(2, 3))[:0], errors.ScoreError, r"found \(0, 3\)"),
        (lambda i: i.mean(dim=(2, 3))[:, :0], errors.ScoreError, r"found \(1, 0\)"),
        (lambda i: i.mean(dim=(2, 3)) * float("nan"), errors.ScoreError, "expected finite scores.*1 of 1"),
        (
            lambda i: i @ torch.ones(3, 3),
            errors.ModelError,
            r"RuntimeError on a batch of shape \(1, 3, 16, 24\)",
        ),
        (
            lambda i: {"scores": channel_means(i)},
            errors.ScoreError,
            "expected scores as one tensor.*found dict",
        ),
        (lambda i: None, errors.ScoreError, "expected scores as one tensor.*found NoneType"),
        (lambda i: (channel_means(i), 1), errors.ScoreError, "expected scores as one tensor.*found tuple"),
        (lambda i: np.array([["a"]]), errors.ScoreError, "expected scores as one tensor.*found ndarray"),
    ],
)
def test_bad_black_boxes_are_named(box: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mr.explain(box, IMAGE, 0, SPEC)


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), 1, [np.int32(1)], np.array([1])])
def test_a_target_may_be_any_kind_of_number(one: object) -> None:
    assert mr.explain(channel_means, IMAGE, one, SPEC).targets == (1,)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["predicted", ["stop"], 1.0, [[0, 1]]])
def test_what_is_no_index_of_a_class_is_told(targets: object, shapes_unchecked: None) -> None:
    with pytest.raises(errors.TargetError, match=r"as indices of classes, found .*class_index"):
        mr.explain(channel_means, IMAGE, targets, SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.Dropout(0.2)])
def test_a_network_in_training_mode_is_refused(layer: nn.Module) -> None:
    network = nn.Sequential(layer, Means())
    for box in (network, mr.Classifier(network), mr.similarity(network, np.ones(3), np.ones((1, 3)), d0=1.0)):
        with pytest.raises(errors.ModelError, match=r"evaluation mode, found its \w+ '.*0' .*\.eval\(\)"):
            mr.explain(box, IMAGE, 0, SPEC)
    network.eval()
    assert mr.explain(mr.Classifier(network), IMAGE, 0, SPEC).masks == 128


def test_no_targets_are_refused() -> None:
    with pytest.raises(errors.TargetError, match="expected at least one target, found none"):
        mr.explain(channel_means, IMAGE, [], SPEC)


@pytest.mark.parametrize("target", [3, -1])
def test_a_target_out_of_range_is_named(target: int) -> None:
    with pytest.raises(errors.TargetError, match=f"from 0 to 2 .*found {target}"):
        mr.explain(channel_means, IMAGE, target, SPEC)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
)
def test_a_bad_image_is_named(image: np.ndarray, shapes_unchecked: None) -> None:
    shape = re.escape(str(image.shape))
    with pytest.raises(errors.ImageError, match=rf"uint8 RGB array.*found {image.dtype} of shape {shape}"):
        mr.explain(channel_means, image, 0, SPEC)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size: int) -> None:
    with pytest.raises(errors.SpecError, match=f"^batch_size: expected at least 1, found {batch_size}$"):
        mr.explain(channel_means, IMAGE, 0, SPEC, batch_size=batch_size)


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type)])
def test_errors_survive_pickling(kind: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(kind("p_mask: expected this, found that")))
    assert type(copy) is kind
    assert str(copy) == "p_mask: expected this, found that"


def test_a_seed_may_be_any_that_numpy_draws() -> None:
    for seed in np.random.SeedSequence(0).generate_state(8, np.uint64):
        assert mr.ExplainSpec(seed=seed).seed == int(seed)


def test_equal_specs_share_a_hash_and_others_do_not() -> None:
    assert (
        mr.ExplainSpec(colors="paper5").hash
        == mr.ExplainSpec(colors=["red", "green", "blue", "white", "black"]).hash
    )
    specs = [mr.ExplainSpec(), mr.ExplainSpec(masks=7), mr.ExplainSpec(seed=1), mr.ExplainSpec(p_mask=0.1)]
    assert len({spec.hash for spec in specs}) == 4
    one = mr.ExplainSpec()
    assert one.hash != one.model_copy(update={"seed": 1}).hash == specs[2].hash
