"""Precision and batch size are chosen by trial, kept where they do no harm, and applied alike everywhere."""

from __future__ import annotations

import pickle
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mcrise_ray as mr
from mcrise_ray import batching, memory, precision, sessions, timing, tuning
from mcrise_ray.batching import candidates, fastest
from mcrise_ray.errors import SpecError
from mcrise_ray.explainer import Subject
from mcrise_ray.masks import draw
from mcrise_ray.memory import free_memory, keep_freed
from mcrise_ray.models import Model
from mcrise_ray.plan import unit_size
from mcrise_ray.precision import Adapted, Execution, Precision, apply
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.scores import Classifier, ask
from mcrise_ray.timing import speed_ratio
from mcrise_ray.tuning import deviation, settle

SPEC = mr.ExplainSpec(masks=2000, grid=(4, 4))
SIZE = (24, 24)
IMAGE = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


class Scripted(nn.Module):
    """A network that is slower, or drifts, as the test says.

    Args:
        slow_unless: what makes it fast: `bfloat16`, `channels_last`, or `compiled` (not it itself).
        drift: what autocast in bfloat16 does to its logits.
    """

    def __init__(self, slow_unless: str | None = None, drift: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            nn.init.normal_(self.head.weight, std=5)
        self.slow_unless, self.drift = slow_unless, drift

    def forward(self, images: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        last = images.is_contiguous(memory_format=torch.channels_last)
        fast = {"bfloat16": autocast, "channels_last": last, "compiled": False, None: True}[self.slow_unless]
        time.sleep(0.0 if fast else 0.02)
        logits = self.head(self.conv(images).relu().mean(dim=(2, 3)))
        drift = self.drift if autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16 else 0.0
        return logits + drift * torch.arange(5) * images[:, 0].mean((1, 2))[:, None]


def model_of(network: nn.Module) -> Model:
    preprocessing = Preprocessing(size=SIZE)
    black_box = Classifier(network.eval(), preprocessing.mean, preprocessing.std)
    return Model(black_box, preprocessing, 5, (), torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling and converting take seconds: tests that are about it ask for `compiler`."""

    def refuse(*args, **kwargs) -> None:
        raise RuntimeError("no compiler here\nno, really")

    if "compiler" not in request.fixturenames:
        monkeypatch.setattr(torch, "compile", refuse)
        monkeypatch.setattr(precision, "converted", refuse)


@pytest.fixture
def compiler() -> None:
    """The real torch.compile."""


def masked(model: Model, count: int) -> Tensor:
    return Subject(model, IMAGE, SPEC).blend(draw(SPEC, 0, count)).clone()


def scores(model: Model, images: Tensor) -> np.ndarray:
    return ask(model.input_space().function, images)


def test_what_is_faster_and_as_good_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def pass_time(seconds: float = 0.001) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=pass_time))
    monkeypatch.setattr(sys.modules[__name__], "time", SimpleNamespace(sleep=pass_time))
    settled = settle(model_of(Scripted("bfloat16")), SPEC, IMAGE, batch_size=8)
    chosen = settled.execution.precision
    assert chosen.bfloat16
    assert not chosen.compiled
    assert chosen.speedup == pytest.approx(21)  # 20 ms of sleep, and 1 ms of the clock itself
    assert 0 < chosen.difference < tuning.TOLERANCE
    assert "times as fast as float32" in str(chosen)
    assert any(re.match(r"bfloat16: .* kept$", note) for note in chosen.notes)


def test_scores_that_drift_keep_float32() -> None:
    model = model_of(Scripted("bfloat16", drift=1.0))
    images = masked(model, 8)
    before = scores(model, images)
    settled = settle(model, SPEC, IMAGE, batch_size=8)
    chosen = settled.execution.precision
    assert not chosen.bfloat16
    assert any("bfloat16" in note and "beyond 3%" in note and "not kept" in note for note in chosen.notes)
    np.testing.assert_allclose(scores(settled.model, images), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("drift", "kept"), [(0.0, "bfloat16"), (1.0, "float16")])
def test_a_gpu_may_need_the_digits_of_float16(
    monkeypatch: pytest.MonkeyPatch, drift: float, kept: str
) -> None:
    """Untested on a GPU: here a CPU is said to be as fast in it."""
    monkeypatch.setattr(tuning, "_FAST_IN_FLOAT16", {"cpu"})
    monkeypatch.setattr(tuning, "speed_ratio", lambda base, trial, repeats: 2.0)
    settled = settle(model_of(Scripted(drift=drift)), SPEC, IMAGE, batch_size=8)
    assert str(settled.execution.precision).startswith(f"channels_last+{kept} (4 times as fast")
    assert any(note.startswith("float16: ") for note in settled.execution.precision.notes) == (drift > 0)


def test_a_cpu_does_not_try_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "speed_ratio", lambda base, trial, repeats: 2.0)
    settled = settle(model_of(Scripted(drift=1.0)), SPEC, IMAGE, batch_size=8)
    assert not any(note.startswith("float16") for note in settled.execution.precision.notes)


def test_float16_that_overflows_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_FAST_IN_FLOAT16", {"cpu"})
    monkeypatch.setattr(tuning, "speed_ratio", lambda base, trial, repeats: 2.0)
    network = Scripted(drift=1.0)
    with torch.no_grad():
        network.head.bias[:] = 1e5  # of all classes, which softmax does not see
    settled = settle(model_of(network), SPEC, IMAGE, batch_size=8)
    assert not settled.execution.precision.float16
    assert any(
        re.match("float16: fails, ScoreError: expected finite scores", note)
        for note in settled.execution.precision.notes
    )


def test_what_is_not_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "speed_ratio", lambda base, trial, repeats: 1.04)
    settled = settle(model_of(Scripted()), SPEC, IMAGE, batch_size=8)
    assert settled.execution.precision.is_float32
    assert sum("1.04 times as fast, not kept" in note for note in settled.execution.precision.notes) == 2


def test_channels_last_is_tried_on_a_copy_and_then_blended_so() -> None:
    model = model_of(Scripted("channels_last"))
    before = scores(model, masked(model, 8))
    settled = settle(model, SPEC, IMAGE, batch_size=8)
    assert settled.execution.precision.channels_last
    images = Subject(settled.model, IMAGE, SPEC).blend(draw(SPEC, 0, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(scores(settled.model, images), before, rtol=0, atol=1e-2)
    assert scores(model, masked(model, 8)).tolist() == before.tolist()


def test_no_compiler_is_a_note() -> None:
    settled = settle(model_of(Scripted()), SPEC, IMAGE, batch_size=8)
    assert "compiled: fails, RuntimeError: no compiler here" in settled.execution.precision.notes
    assert not settled.execution.precision.compiled


def test_only_whole_batches_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Fast(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.conv, self.head = network.conv, network.head

        def forward(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            return self.head(self.conv(images).relu().mean(dim=(2, 3)))

    monkeypatch.setattr(torch, "compile", lambda network, **options: Fast(network))
    settled = settle(model_of(Scripted("compiled")), SPEC, IMAGE, batch_size=10)
    assert settled.execution.precision.compiled
    whole = scores(settled.model, masked(settled.model, 10))
    part = scores(settled.model, masked(settled.model, 7))
    np.testing.assert_allclose(part, whole[:7], rtol=0, atol=1e-6)
    assert set(asked) == {10}


def test_onnxruntime_is_kept_instead_of_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch.compile is tried on top of what torch does, not of that."""
    compiled: list[nn.Module] = []

    def compiles(network: nn.Module, **options: object) -> nn.Module:
        compiled.append(network)
        return network

    def runs(network: nn.Module, size: tuple[int, int], batch_size: int) -> nn.Module:
        assert (size, batch_size) == (SIZE, 8)
        return nn.Sequential(network.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.head)

    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(precision, "converted", runs)
    monkeypatch.setattr(
        tuning, "speed_ratio", lambda base, trial, repeats: 0.9 if compiled else 1.5
    )  # all that is tried before is faster
    model = model_of(Scripted())
    before = scores(model, masked(model, 8))
    settled = settle(model, SPEC, IMAGE, batch_size=8)
    chosen = settled.execution.precision
    assert [step for step in precision.STEPS if getattr(chosen, step)] == ["onnxruntime"]
    assert chosen.speedup == pytest.approx(1.5**3)
    assert str(chosen).startswith("onnxruntime (3.4 times as fast as float32")
    assert [isinstance(network, Scripted) for network in compiled] == [True]
    np.testing.assert_allclose(scores(settled.model, masked(settled.model, 8)), before, rtol=0, atol=1e-6)


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "find_spec", lambda name: None if name == "onnxscript" else object())
    notes = settle(model_of(Scripted()), SPEC, IMAGE, batch_size=8).execution.precision.notes
    assert 'onnxruntime: not tried, but often faster: pip install "mcrise-ray[onnx]"' in notes


def test_onnxruntime_runs_a_network_alone() -> None:
    with pytest.raises(SpecError, match="expected onnxruntime alone"):
        Precision(onnxruntime=True, channels_last=True)
    with pytest.raises(SpecError, match="expected bfloat16 or float16, found both"):
        Precision(bfloat16=True, float16=True)


def test_little_work_is_not_compiled_and_less_not_tried() -> None:
    some = settle(model_of(Scripted()), SPEC, IMAGE, batch_size=8, masks=2000).execution.precision
    for step in ("onnxruntime", "compiled"):
        assert any(re.fullmatch(rf"{step}: not tried, for \d+ s of work", note) for note in some.notes)
    few = settle(model_of(Scripted("bfloat16")), SPEC, IMAGE, masks=100).execution
    assert few.precision.notes == ("float32: 100 masks are not worth trials",)
    assert few.batch_size == 64


@pytest.mark.parametrize(
    "steps", [("channels_last",), ("bfloat16",), ("channels_last", "bfloat16"), ("channels_last", "float16")]
)
def test_what_was_found_before_is_taken_untried(steps: tuple[str, ...]) -> None:
    """And gives the bits of the run that found it."""
    name = "+".join(steps)
    found = Precision(**dict.fromkeys(steps, True), speedup=2.0, difference=0.01)
    assert str(found).startswith(f"{name} (2 times as fast"), "what is printed can be said again"
    model = model_of(Scripted())
    images = masked(model, 8)
    settled = settle(model, SPEC, IMAGE, precision=name, batch_size=8)
    assert str(settled.execution.precision) == name
    assert settled.execution.precision.speedup is None, "nothing was measured"
    again = apply(model_of(Scripted()), Execution(batch_size=8, threads=1, precision=found))
    np.testing.assert_array_equal(scores(settled.model, images), scores(again, images))


def test_what_was_found_before_belongs_to_its_batch_size() -> None:
    with pytest.raises(SpecError, match=r"expected a number as batch_size beside bfloat16.*found auto"):
        settle(model_of(Scripted()), SPEC, IMAGE, precision="bfloat16")


def test_float32_is_always_there() -> None:
    settled = settle(model_of(Scripted("bfloat16")), SPEC, IMAGE, precision="float32", batch_size=8)
    assert settled.execution.precision == Precision(notes=("float32: as asked",))
    assert str(settled.execution) == f"float32, batches of 8, threads {torch.get_num_threads()}"


@pytest.mark.parametrize("given", [4, 64, 5000])
def test_no_trial_asks_for_more_than_the_batch_that_is_given_or_a_unit(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be all that the memory, or the network, can take; and no larger one is ever asked for."""
    asked: list[int] = []
    monkeypatch.setattr(
        tuning, "ask", lambda function, images: (asked.append(len(images)), ask(function, images))[1]
    )
    settled = settle(model_of(Scripted()), SPEC, IMAGE, batch_size=given)
    assert settled.execution.batch_size == min(given, unit_size(SPEC))
    assert max(asked) <= settled.execution.batch_size


def test_a_network_that_takes_few_images_at_once_is_asked_for_few() -> None:
    class Few(Scripted):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 9:
                raise RuntimeError("input tensor must fit into 32-bit index math")
            return super().forward(images)

    execution = settle(model_of(Few()), SPEC, IMAGE).execution
    assert execution.batch_size == 8
    assert any(re.search("16 images at once fail: .* index math", note) for note in execution.precision.notes)


class Afraid(Scripted):
    """A network that raises, or returns NaN, where the middle of an image is dark."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises = raises

    def forward(self, images: Tensor) -> Tensor:
        dark = images.flatten(1).median(dim=1).values < -1.5
        if self.raises and dark.any():
            raise IndexError("nothing found")
        return torch.where(dark[:, None], torch.nan, super().forward(images))


@pytest.mark.parametrize("raises", [True, False])
def test_an_image_that_the_model_fails_on_is_not_what_the_model_is_tried_on(raises: bool) -> None:
    """One image of a job: its error is its own, and the others are explained."""
    black = np.zeros((*SIZE, 3), np.uint8)
    found, expected = (settle(model_of(Afraid(raises)), SPEC, image, batch_size=8) for image in (black, None))
    kinds = [[note.partition(":")[0] for note in one.execution.precision.notes] for one in (found, expected)]
    assert kinds[0] == kinds[1] != []


def test_a_foreign_black_box_is_not_ours_to_change() -> None:
    model = replace(model_of(Scripted()), black_box=lambda images: images.mean((2, 3)))
    settled = settle(model, SPEC, batch_size="auto")
    assert settled.model is model
    assert settled.execution.precision.is_float32
    assert "no torch module of ours" in settled.execution.precision.notes[0]
    assert 64 % settled.execution.batch_size == 0


def test_an_execution_survives_json_and_pickle() -> None:
    execution = settle(model_of(Scripted("bfloat16")), SPEC, IMAGE, batch_size=8).execution
    assert Execution.model_validate_json(execution.model_dump_json()) == execution
    assert pickle.loads(pickle.dumps(execution)) == execution


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_workers_get_the_same_bits_as_the_one_that_settled(channels_last: bool, bfloat16: bool) -> None:
    execution = Execution(
        batch_size=8, threads=1, precision=Precision(channels_last=channels_last, bfloat16=bfloat16)
    )
    maps = []
    for _ in range(2):
        model = apply(model_of(Scripted()), execution)
        result = mr.explain(model, IMAGE, [0, 3], mr.ExplainSpec(masks=100), batch_size=8)
        maps.append(result.maps)
    np.testing.assert_array_equal(maps[0], maps[1])


class StandardizedConv(nn.Conv2d):
    """Computes with its weights in float32 before they are used, as those of NFNets do."""

    def forward(self, images: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(images, weight, self.bias)


class ManyLayers(nn.Module):
    """One of each kind whose weights matter in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        hooked = nn.utils.weight_norm(nn.Conv2d(8, 8, 3))
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), StandardizedConv(8, 8, 3), hooked
        )  # fmt: skip
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.codes = nn.Embedding(8, 8)
        self.decode = nn.Linear(8, 8)
        self.decode.weight = self.codes.weight
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        features = self.attention(self.body(images).flatten(2).mT).mean(dim=1)
        return self.head(self.decode(features) + self.codes(features.argmax(dim=1)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("can_be_copied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_cast_once_give_the_bits_of_those_cast_in_every_call(
    dtype: torch.dtype, can_be_copied: bool
) -> None:
    network, images = ManyLayers(), torch.rand(4, 3, 16, 16)
    if can_be_copied:
        with torch.no_grad():
            network(images)  # then the weight that the hook has computed has no history
    halves = {"bfloat16": dtype == torch.bfloat16, "float16": dtype == torch.float16}
    asked = Adapted(network, Precision(**halves), 4)
    expected = dtype if can_be_copied else torch.float32
    assert asked.network.body[0].weight.dtype == asked.network.head.weight.dtype == expected
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}, "of others as they were"
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        expected = network(images)
    with torch.inference_mode():
        assert torch.equal(asked(images), expected)


def test_a_plan_that_this_machine_cannot_follow_is_an_error() -> None:
    execution = Execution(batch_size=8, threads=1, precision=Precision(compiled=True))
    with pytest.raises(mr.MCRiseError, match="no compiler here; use machines of one kind, or --precision"):
        apply(model_of(Scripted()), execution)
    foreign = replace(model_of(Scripted()), black_box=lambda images: images.mean((2, 3)))
    with pytest.raises(mr.MCRiseError, match="it is no torch module; use machines"):
        apply(foreign, execution)


def test_a_network_that_divides_by_the_spread_of_an_image_is_asked_as_the_plan_says() -> None:
    class Standardized(Scripted):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images / images.std(dim=(1, 2, 3), keepdim=True))

    for name in ("channels_last", "bfloat16"):
        execution = Execution(batch_size=8, threads=1, precision=Precision.named(name))
        model = apply(model_of(Standardized()), execution)
        assert np.isfinite(scores(model, masked(model, 8))).all()


def test_applying_float32_changes_nothing_but_the_threads() -> None:
    model = model_of(Scripted())
    assert apply(model, Execution(batch_size=8, threads=1)) is model


@pytest.mark.usefixtures("compiler")
def test_a_converted_model_gives_the_scores_of_float32_and_the_same_bits_to_every_worker() -> None:
    execution = Execution(batch_size=8, threads=1, precision=Precision.named("onnxruntime"))
    parts = ((0, 8), (16, 21), (3, 4))
    plain = model_of(plainly(Scripted()))
    expected = scores(plain, masked(plain, 24))
    found = []
    for _ in range(2):
        model = apply(model_of(plainly(Scripted())), execution)
        images = masked(model, 24)
        found.append([scores(model, images[a:b]) for a, b in parts])
    for (a, b), first, second in zip(parts, *found, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, expected[a:b], rtol=0, atol=1e-6)


def plainly(network: Scripted) -> nn.Module:
    """The same layers, without the script."""
    return nn.Sequential(network.conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.head)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_is_compiled_once_and_gives_the_same_bits_to_every_worker() -> None:
    from torch._dynamo.utils import counters

    execution = Execution(batch_size=8, threads=1, precision=Precision(channels_last=True, compiled=True))
    parts = ((0, 8), (8, 16), (16, 21), (16, 24), (3, 4))
    plain = model_of(plainly(Scripted()))
    expected = scores(plain, masked(plain, 24))
    found = []
    for _ in range(2):
        model = apply(model_of(plainly(Scripted())), execution)
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        images = Subject(model, IMAGE, SPEC).blend(draw(SPEC, 0, 24))
        found.append([scores(model, images[a:b]) for a, b in parts])
        assert counters["stats"]["unique_graphs"] == compiled
    for (a, b), first, second in zip(parts, *found, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, expected[a:b], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("compiler")
def test_a_network_that_looks_at_its_batch_is_not_compiled() -> None:
    """It would be for each of the first numbers seen, and round as the order of its batches has it."""

    class Looks(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            scale = 2.0 if images.mean().item() > 0.1 else 1.0
            return scale * images.mean((2, 3))

    execution = Execution(batch_size=8, threads=1, precision=Precision(compiled=True))
    with pytest.raises(
        mr.errors.ModelError, match=r"data-dependent.*; use machines of one kind, or --precision"
    ):
        apply(model_of(Looks()), execution)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_has_its_weights_and_normalisation_folded_in() -> None:
    """Frozen weights are constants: whole batches do not see what becomes of the network's. Networks of
    others that this process compiles keep theirs.
    """

    def normalised() -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten())
        return layers.eval()

    mine, other, images = normalised(), normalised(), torch.rand(8, 3, 6, 6)
    frozen, theirs = Adapted(mine, Precision(compiled=True), batch_size=8), torch.compile(other)
    with torch.inference_mode():
        expected = mine(images)
        torch.testing.assert_close(frozen(images), expected)
        theirs(images)
        for network in (mine, other):
            network.get_parameter("1.weight").zero_()
            network.get_parameter("1.bias").fill_(5.0)
        torch.testing.assert_close(frozen(images), expected)
        assert (theirs(images) == 5).all()


def test_deviation_is_of_the_spread() -> None:
    reference = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert deviation(reference, reference) == (0.0, 0.0)
    assert deviation(reference + 0.1, reference) == pytest.approx((0.2, 0.1))
    assert deviation(np.full((2, 2), 0.6), np.full((2, 2), 0.5))[0] == np.inf


@pytest.mark.parametrize("masks", [1, 10, 63, 500, 4000, 8000, 10_000, 10**6])
def test_batches_fill_units(masks: int) -> None:
    from mcrise_ray.plan import unit_size

    spec = mr.ExplainSpec(masks=masks)
    sizes = candidates(spec)
    assert sizes == sorted(set(sizes))
    assert all(min(unit_size(spec), masks) % size == 0 for size in sizes)
    assert sizes[-1] <= 1024


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_a_machine_that_grows_slower_favours_neither(clock: list[float], repeats: int) -> None:
    price = 1.0

    def run() -> None:
        nonlocal price
        clock[0] += price
        price *= 1.02

    found = timing.alternate("itself", run, run, repeats)
    assert found.ratio == pytest.approx(1, abs=1e-3)
    assert (found.low, found.high) == pytest.approx((1 / 1.02, 1.02))


def priced(seconds: dict[int, float], clock: list[float], asked: list[int]):
    def ask(size: int) -> None:
        asked.append(size)
        if size not in seconds:
            raise MemoryError(f"{size} images")
        clock[0] += seconds[size]

    return ask


def test_the_fastest_batch_is_chosen_and_the_search_stops(clock: list[float]) -> None:
    asked: list[int] = []
    ask = priced({8: 0.02, 16: 0.02, 32: 0.03, 64: 0.09, 128: 0.3, 256: 1.0}, clock, asked)
    size, why = fastest(ask, [8, 16, 32, 64, 128, 256], torch.device("cpu"), 0.5)
    assert (size, why) == (32, "128 images at once are no faster")
    assert 256 not in asked


def test_a_batch_that_does_not_fit_ends_the_search(clock: list[float]) -> None:
    size, why = fastest(priced({8: 0.02, 16: 0.02}, clock, []), [8, 16, 32], torch.device("cpu"), 0.5)
    assert (size, why) == (16, "32 images do not fit into memory")


def test_the_memory_bound_ends_the_search(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    peak = iter([100, 180, 260, 420, 740])
    monkeypatch.setattr(batching, "peak_memory", lambda device: next(peak) * 2**20)
    monkeypatch.setattr(batching, "free_memory", lambda device: 1000 * 2**20)
    ask = priced(dict.fromkeys((8, 16, 32, 64), 0.01), clock, [])
    size, why = fastest(ask, [8, 16, 32, 64], torch.device("cpu"), 0.5)
    assert (size, why) == (32, "64 images might take 0.6 GiB, more than 0.5 GiB")


def test_free_memory_minds_the_limit_of_a_container(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    unlimited = free_memory(torch.device("cpu"))
    assert unlimited > 2**20
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(torch.device("cpu")) == 2000


def test_freed_memory_is_kept() -> None:
    if not keep_freed():
        pytest.skip("glibc alone can")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**24).sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 100


def test_a_peak_is_seen_and_forgotten() -> None:
    """In a process of its own: one that keeps what it frees has its peak behind it."""
    code = """
import numpy as np
from mcrise_ray.memory import forget_peak, peak_memory
forget_peak()
before = peak_memory()
np.ones(2**25).sum()
seen = peak_memory() - before
forget_peak()
print(seen, peak_memory() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seen, left = map(int, out.split())
    assert 2**27 < seen < 2**29
    assert left < 2**27


def test_a_hopeless_trial_is_cut_short(clock: list[float]) -> None:
    asked: list[int] = []
    ask = priced({1: 0.1, 2: 0.2}, clock, asked)
    assert speed_ratio(lambda: ask(1), lambda: ask(2), 5) == pytest.approx(0.5)
    assert asked == [1, 2, 1, 2]


def test_the_numbers_of_an_execution_are_checked() -> None:
    with pytest.raises(mr.MCRiseError, match="batch_size: Input should be greater than or equal to 1"):
        Execution(batch_size=0, threads=1)
    assert precision.Precision().is_float32


@pytest.mark.parametrize(("threads", "at_most", "at_once"), [(2, 512, 16), (12, 512, 24), (12, 20, 20)])
def test_trials_have_work_for_every_thread(
    threads: int, at_most: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    trials = tuning._Trials(model_of(Scripted()), SPEC, IMAGE, None, lambda model, image: model, at_most)
    assert trials._at_once == at_once
