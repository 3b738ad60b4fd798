"""What is measured against is what it claims to be, and the bench prints ratios."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray import bench
from mcrise_ray.baselines import rise_as_published, xaitk_mc_rise
from mcrise_ray.bench import (
    BenchSpec,
    Case,
    _rise_spec,
    cost,
    masks_of_variance,
    memory,
    prepare,
    variance,
)
from mcrise_ray.cli import app
from mcrise_ray.contenders import Apart, Contender
from mcrise_ray.jobs import Summary
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.masks import draw
from mcrise_ray.timing import Ratio

MODEL = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})
IMAGE = np.random.default_rng(0).integers(0, 256, (33, 40, 3), dtype=np.uint8)


class Pretends:
    """A process that explains in no time, and takes memory by its contender."""

    def __init__(self, contender: Contender) -> None:
        self._peak = PEAKS[contender.name, contender.spec.masks]

    def __enter__(self) -> Pretends:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def explain(self) -> None:
        pass

    def memory(self) -> int:
        return self._peak


PEAKS = {
    ("xaitk", 64): 3 * 2**30,
    ("xaitk", 128): 4 * 2**30,
    ("ours", 64): 2**20,
    ("rise", 480): 4 * 2**30,
    ("ours", 480): 5 * 2**20,
}


def black_box(images: Tensor) -> Tensor:
    return torch.stack([images[:, 0].mean((1, 2)), images[:, 1, 5, 6]], dim=1)


@pytest.fixture(scope="module")
def case() -> Case:
    spec = BenchSpec(
        model=MODEL, explain=mr.ExplainSpec(masks=64), precision="float32", batch_size=16, repeats=2, seeds=3
    )
    return prepare(spec)


@pytest.mark.parametrize("p_mask", [0.3, 0.5])
@pytest.mark.parametrize("grid", [(4, 4), (8, 5)])
def test_published_rise_gives_our_maps_of_the_same_masks(grid: tuple[int, int], p_mask: float) -> None:
    spec = mr.ExplainSpec(method="rise", masks=250, grid=grid, p_mask=p_mask, estimator="paper")
    image = torch.from_numpy(IMAGE).permute(2, 0, 1).float() / 255
    theirs = rise_as_published(black_box, image, draw(spec, 0, 250), p_mask)
    ours = mr.explain(black_box, IMAGE, [0, 1], spec)
    np.testing.assert_allclose(theirs, ours.maps[:, 0], rtol=0, atol=1e-5)


def test_xaitk_explains_the_same_thing() -> None:
    """Its masks and its scale are its own, but what stands out where is the same."""
    pytest.importorskip("xaitk_saliency", reason="needs the extra bench")
    spec = mr.ExplainSpec(masks=600, grid=(4, 4), colors="red,blue")
    theirs = xaitk_mc_rise(black_box, 2, IMAGE, spec)
    ours = mr.explain(black_box, IMAGE, [0, 1], spec).maps
    assert theirs.shape == (2, 2, 33, 40)
    for k in range(2):
        assert np.corrcoef(theirs[k, 1].ravel(), ours[1, k].ravel())[0, 1] > 0.6


def test_xaitk_errs_as_equation_9_does() -> None:
    """Where p_mask is 0.5, beside the scale of each map, which is its own."""
    pytest.importorskip("xaitk_saliency", reason="needs the extra bench")
    spec = mr.ExplainSpec(masks=100, grid=(4, 4), colors="red,blue", estimator="paper")
    truth = mr.explain(black_box, IMAGE, [1], spec.model_copy(update={"masks": 20_000})).maps[0].ravel()
    seeds = [spec.model_copy(update={"seed": seed}) for seed in range(60)]
    theirs = [xaitk_mc_rise(black_box, 2, IMAGE, seeded)[:, 1].ravel() for seeded in seeds]
    ours = [mr.explain(black_box, IMAGE, [1], seeded).maps[0].ravel() for seeded in seeds]
    assert _relative_variance(theirs, truth) == pytest.approx(_relative_variance(ours, truth), rel=0.15)


def _relative_variance(maps: list[np.ndarray], truth: np.ndarray) -> float:
    """Of maps that are scaled to fit the truth best."""
    scaled = [one * (one @ truth) / (one @ one) for one in maps]
    return float(np.mean([((one - truth) ** 2).sum() for one in scaled]) / (truth**2).sum())


def test_without_xaitk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "xaitk_saliency.impls.gen_image_classifier_blackbox_sal.mc_rise"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(mr.MCRiseError, match=r'pip install "mcrise-ray\[bench\]"'):
        xaitk_mc_rise(black_box, 2, IMAGE, mr.ExplainSpec(masks=10))


def test_the_bench_prints_ratios_and_writes_them(tmp_path: Path) -> None:
    output = tmp_path / "ratios.json"
    arguments = (
        "bench --model blackboxes:small_network --size 20x24 -n 64 --precision float32 --batch-size 16"
    )
    parts = "--only overhead --only fills --only targets --repeats 2 --price-per-hour 2"
    result = CliRunner().invoke(app, [*arguments.split(), *parts.split(), "-o", str(output)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("blackboxes:small_network, 64 masks: float32, batches of 16")
    number = r"\d+\.\d{3}"
    for name in ("explain / bare forward", "K = 5 / K = 1", "K = 64 / K = 1", "L = 4 / L = 1"):
        pattern = rf"{name} +{number}  \({number} to {number}\) +{number} s / {number} s"
        assert any(re.fullmatch(pattern, line) for line in lines), name
    assert any(
        re.fullmatch(r"  .* masks/s, .* s an image of 8000 masks, which .* at 2 an hour", x) for x in lines
    )
    assert "  of 64 masks none are picked; --masks 8000 measures that too" in lines
    written = json.loads(output.read_text())
    assert written["ratios"][0]["name"] == "explain / bare forward"
    assert written["execution"]["batch_size"] == 16
    assert BenchSpec(**written["bench"]).explain.masks == 64


def test_a_file_that_cannot_be_written_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "prepare", lambda asked: pytest.fail("loaded"))
    arguments = "bench --model blackboxes:small_network --size 20x24 -n 64 --precision float32"
    nowhere = str(tmp_path / "none" / "ratios.json")
    result = CliRunner().invoke(app, [*arguments.split(), "--batch-size", "16", "-o", nowhere])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: cannot write {nowhere}: No such file or directory; check --output\n"


def test_the_bench_of_another_estimator(tmp_path: Path) -> None:
    output = tmp_path / "ratios.json"
    arguments = "bench --model blackboxes:small_network --size 20x24 -n 64 --precision float32"
    more = "--batch-size 16 --only overhead --only rise --repeats 1 --estimator control-variate"
    result = CliRunner().invoke(app, [*arguments.split(), *more.split(), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "none are picked" not in result.output
    assert json.loads(output.read_text())["bench"]["explain"]["estimator"] == "control-variate"
    refused = CliRunner().invoke(app, ["bench", "--estimator", "fast"])
    assert refused.output.startswith("error: estimator: Input should be 'importance', 'control-variate' or")


def test_rise_is_asked_as_the_bench_is() -> None:
    spec = mr.ExplainSpec(masks=100, grid=(4, 5), p_mask=0.3, seed=7, estimator="paper", colors=("#123456",))
    asked = mr.ExplainSpec(method="rise", masks=100, grid=(4, 5), p_mask=0.3, seed=7, estimator="paper")
    assert _rise_spec(spec) == asked


def test_a_wrong_part_is_one_line() -> None:
    result = CliRunner().invoke(app, ["bench", "--only", "speed"])
    assert result.exit_code == 2
    assert "parts.0: Input should be 'overhead'" in result.output


def test_rise_is_measured_at_equal_n_and_at_equal_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Apart", Pretends)
    scaled = {"paper": 4.0, "importance": 1.0}
    monkeypatch.setattr(bench, "variance", lambda case, spec: scaled[spec.estimator] / spec.masks**2)
    case = replace(case, bench=case.bench.model_copy(update={"explain": mr.ExplainSpec(masks=480)}))
    timed = []

    def noted(name: str, published: Any, ours: Any, *rest: Any) -> Ratio:
        timed.append((name, ours.args[0].masks))
        return alternate(name, published, ours, *rest)

    alternate = bench.alternate
    monkeypatch.setattr(bench, "alternate", noted)
    equal_n, equal_error, *kept = bench.rise(case)
    names = [ratio.name for ratio in (equal_n, equal_error, *kept)]
    assert timed == list(zip(names, [480, 240, 480, 240], strict=True))
    assert names[2:] == [f"RISE with our malloc / ours, equal {what}" for what in ("N", "error")]
    assert equal_n.remark == "memory beyond the model's: 4.00 GiB / 0.005 GiB"
    assert equal_error.name == "RISE as published / ours, equal error"
    assert equal_error.remark == "N = 480 / 240; standard errors 0.00417 / 0.00417"


def test_xaitk_says_where_memory_ends(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Apart", Pretends)
    equal_n, equal_error = bench.xaitk(case)
    # A GiB more for each 64 masks more.
    assert "exceeds 24 GiB at N = 1,408" in equal_n.remark
    assert equal_error.name == "MC-RISE of xaitk / ours, equal error"
    assert re.fullmatch(r"N = 64 / \d+; standard errors [\d.]+ / [\d.]+", equal_error.remark)


def test_the_error_of_xaitk_is_not_told_where_its_weights_are_its_own(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "Apart", Pretends)
    explain = mr.ExplainSpec(masks=64, p_mask=0.3)
    (ratio,) = bench.xaitk(replace(case, bench=case.bench.model_copy(update={"explain": explain})))
    assert ratio.name == "MC-RISE of xaitk / ours, equal N"


@pytest.mark.parametrize(("goal", "masks"), [(1e-3, 1000), (0.9e-3, 1000), (2e-3, 500), (3e-3, 333), (1, 62)])
def test_masks_of_a_variance_are_interpolated(
    case: Case, monkeypatch: pytest.MonkeyPatch, goal: float, masks: int
) -> None:
    monkeypatch.setattr(bench, "variance", lambda case, spec: 1 / spec.masks)
    assert masks_of_variance(case, mr.ExplainSpec(masks=1000), goal) == masks


def test_variances_are_those_of_standard_errors(case: Case) -> None:
    """Of the maps, over seeds, within what 30 seeds tell."""
    spec = mr.ExplainSpec(method="mc-rise", masks=200, grid=(3, 3), estimator="paper")
    maps = [mr.explain(case.tuned, case.image, case.target, _seeded(spec, seed)).maps for seed in range(30)]
    assert variance(case, spec) == pytest.approx(float(np.var(maps, axis=0, ddof=1).mean()), rel=0.2)


def _seeded(spec: mr.ExplainSpec, seed: int) -> mr.ExplainSpec:
    return spec.model_copy(update={"seed": seed})


def test_actors_are_measured_through_jobs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[JobSpec] = []

    def finished(job: JobSpec, *, overwrite: bool) -> Summary:
        jobs.append(job)
        assert len(list(Path(job.images[0]).glob("*.png"))) == 4
        return Summary(4, 0, 4, 256, 6.0 / job.actors, 0)

    monkeypatch.setattr(bench, "run_job", finished)
    (ratio,) = bench.actors(case)
    assert [job.actors for job in jobs] == [1, 2, 2, 1]
    assert {job.precision for job in jobs} == {case.execution.precision.steps}
    assert (ratio.ratio, ratio.first, ratio.second) == (2.0, 6.0, 3.0)


def test_memory_is_measured_in_a_process_of_its_own(case: Case) -> None:
    """All masks and masked images of published RISE: N x 4 x H x W numbers of four bytes."""
    spec = mr.ExplainSpec(method="rise", masks=10_000, estimator="paper")
    theirs = memory(case, spec, "rise")
    assert theirs > 10_000 * 4 * 20 * 24 * 4
    assert memory(case, spec, "ours") < theirs / 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much a process took")
def test_others_explain_where_nothing_of_ours_was_set(case: Case) -> None:
    """What they free goes back to the kernel, unless they are to keep it as ours does."""
    spec = mr.ExplainSpec(method="rise", masks=20_000, estimator="paper")
    assert _given_back(case.contender("rise", spec)) > 20_000 * 3 * 20 * 24 * 4 / 2
    kept = _given_back(replace(case.contender("rise", spec), keeps_freed=True))
    assert kept < 20_000 * 3 * 20 * 24 * 4 / 10


def _given_back(contender: Contender) -> int:
    """Bytes of the most that it took."""
    with Apart(contender) as theirs:
        theirs.explain()
        process = psutil.Process(theirs._process.pid)
        assert process.pid != os.getpid()
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        return peak - process.memory_info().rss


def test_a_measurement_that_fails_says_why(case: Case, tmp_path: Path) -> None:
    def of(**model: Any) -> Case:
        spec = ModelSpec(preprocessing={"size": case.image.shape[:2]}, **model)
        return replace(case, bench=case.bench.model_copy(update={"model": spec}))

    (tmp_path / "flag").touch()
    dying = of(model="blackboxes:dies_once", args={"flag": str(tmp_path / "flag")})
    dying = replace(dying, execution=dying.execution.model_copy(update={"batch_size": 64}))
    with pytest.raises(mr.MCRiseError, match="the process of ours ended with exit code 1: lower --masks"):
        memory(dying, case.spec, "ours")
    with pytest.raises(mr.MCRiseError, match="broken raised RuntimeError: no such checkpoint"):
        memory(of(model="blackboxes:broken"), case.spec, "ours")


def test_ratios_are_medians_of_pairs_in_either_order() -> None:
    ratio = Ratio.of("A / B", [(2.0, 1.0), (9.0, 2.0), (4.0, 4.0), (8.0, 1.0), (6.0, 2.0)])
    assert (ratio.low, ratio.high, ratio.first, ratio.second) == (1.0, 8.0, 6.0, 2.0)
    assert ratio.ratio == pytest.approx((2.0 * 6.25) ** 0.5)  # of 2, 1, 3 and of 4.5, 8


def test_what_an_image_costs() -> None:
    assert cost(100, None) == "100.0 masks/s, 80.0 s an image of 8000 masks"
    assert cost(100, 3.6) == "100.0 masks/s, 80.0 s an image of 8000 masks, which costs 0.08 at 3.6 an hour"
