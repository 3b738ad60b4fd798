"""What a job will do is counted as the job itself counts it; `mcrise job` as a user meets it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from reporting import Silent
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray import forecast, scores
from mcrise_ray.cli import app
from mcrise_ray.errors import ImageError, StoreError, TargetError
from mcrise_ray.forecast import Plan, Probe, output_bytes, plan_job, probe_job, seconds_needed
from mcrise_ray.jobfiles import load_job
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import Model
from mcrise_ray.plan import unit_count
from mcrise_ray.precision import Execution, Precision
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tuning import Settled

NETWORK = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_text("not a picture")
    for name in ("b.png", "c.png"):
        Image.fromarray(np.full((30, 40, 3), 7, np.uint8)).save(root / name)
    return root


def job(images: Path, output: Path, **changes: object) -> JobSpec:
    settings = {"model": NETWORK, "explain": ExplainSpec(masks=300), "actors": 0, "figures": 0, **changes}
    return JobSpec(images=(str(images),), output=str(output), **settings)


def test_the_plan_is_what_the_job_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.png").unlink()
    plain = {"batch_size": 48, "precision": "float32"}
    spec = job(folder, tmp_path / "out", targets=(0, "top2"), standard_error=True, **plain)
    plan = plan_job(spec)
    calls: list[int] = []

    def counted(ask: Callable[..., object]) -> Callable[..., object]:
        def asked(function: object, images: Sized) -> object:
            calls.append(len(images))
            return ask(function, images)

        return asked

    monkeypatch.setattr("mcrise_ray.explainer.ask", counted(scores.ask))
    monkeypatch.setattr("mcrise_ray.pipeline.launch", counted(scores.launch))
    summary = run_job(spec, Silent())
    results = mr.read_results(str(tmp_path / "out"))
    assert (plan.units, plan.masks) == (2 * unit_count(spec.explain), summary.masks)
    assert plan.model_calls == len(calls)
    assert len(results) <= plan.rows == 6
    probe = Probe("cpu", (20, 24), 100.0, 1.0, Execution(batch_size=48, threads=1))
    stored = sum(row.map.nbytes + row.baseline.nbytes + row.standard_error.nbytes for row in results)
    assert output_bytes(spec, plan, probe) == stored * plan.rows / len(results)
    assert seconds_needed(plan, probe, 2) == pytest.approx(1 + 600 / 200)
    embedded = replace(plan, gallery=998)
    assert seconds_needed(embedded, probe, 2) == pytest.approx(1 + (600 + 2 + 998) / 200)


def test_a_long_listing_is_cut_short_and_says_so(folder: Path, tmp_path: Path) -> None:
    plan = plan_job(job(folder, tmp_path), seconds=0)
    assert (plan.images, plan.complete) == (1, False)


def test_targets_of_a_manifest_are_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("uri,target\nb.png,1|2\nc.png,0\n")
    plan = plan_job(job(folder / "list.csv", tmp_path, targets="predicted+manifest"))
    assert plan == Plan(images=2, complete=True, units=10, masks=600, model_calls=12, rows=5)


def test_images_that_their_listing_says_cannot_be_explained_are_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("uri,label\nb.png,1\nc.png,\n,1\n")
    assert plan_job(job(folder / "list.csv", tmp_path)).useless == 1
    spec = job(folder / "list.csv", tmp_path, targets="truth")
    plan = plan_job(spec)
    assert (plan.images, plan.useless, plan.units, plan.masks, plan.rows) == (3, 2, 5, 300, 1)
    assert plan.model_calls == 1 + 5
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done = mcrise("job", "check", tmp_path / "job.yaml", "--no-probe")
    assert done.stdout.splitlines()[0] == "images       3, 2 of which cannot be explained"


def test_a_sum_with_an_index_asks_for_labels_too(folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("uri,label\nb.png,1\nc.png,\n")
    plan = plan_job(job(folder / "list.csv", tmp_path, targets="3+truth"))
    assert (plan.images, plan.useless, plan.rows) == (2, 1, 2)


def test_what_is_done_already_is_not_left_to_do(folder: Path, tmp_path: Path) -> None:
    spec = job(folder, tmp_path / "out")
    run_job(spec, Silent())
    half_written = tmp_path / "out/maps/part-000009-0123abcd.parquet.tmp-1"
    half_written.touch()  # by the job, which may be running
    Image.fromarray(np.full((30, 40, 3), 9, np.uint8)).save(folder / "d.png")
    plan = plan_job(spec)
    assert (plan.images, plan.done, plan.left, plan.masks, plan.rows) == (4, 3, 1, 300, 1)
    assert half_written.exists()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    done = mcrise("job", "check", tmp_path / "job.yaml", "--no-probe")
    assert done.stdout.splitlines()[0] == "images       4, 3 of which are done"
    (folder / "d.png").unlink()
    done = mcrise("job", "check", tmp_path / "job.yaml")
    assert "model calls" not in done.stdout, "nothing is left to try"
    other = spec.model_copy(update={"explain": ExplainSpec(masks=301)})
    with pytest.raises(StoreError, match=r"explain.masks: 300 there, 301 asked"):
        plan_job(other)
    assert plan_job(other, overwrite=True).masks == 3 * 301


def test_labels_that_no_image_can_have_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"expected a label for target 'truth', found none in .*images"):
        plan_job(job(folder, tmp_path, targets="truth"))


def test_the_probe_passes_over_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    probe = probe_job(job(folder, tmp_path), seconds=0.05)
    assert (probe.device, probe.size) == ("cpu", (20, 24))
    assert probe.masks_per_second > 0
    assert probe_job(job(folder, tmp_path, original_size=True), seconds=0.05).size == (30, 40)


def test_nothing_to_probe_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"cannot read any of the first images: .*not an image"):
        probe_job(job(folder / "a.png", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"expected images, found none in .*empty"):
        plan_job(job(tmp_path / "empty", tmp_path))


# The command line.


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_init_writes_a_file_once(tmp_path: Path) -> None:
    done = mcrise("job", "init", tmp_path / "job.yaml")
    assert done.exit_code == 0
    assert f"mcrise job check {tmp_path}/job.yaml" in done.stdout
    assert load_job(tmp_path / "job.yaml").explain == ExplainSpec()
    comments = " ".join(line.strip("# ") for line in (tmp_path / "job.yaml").read_text().splitlines())
    assert 'with far less noise: `"control-variate"` takes what' in comments  # a colon that ends no name
    again = mcrise("job", "init", tmp_path / "job.yaml")
    assert again.exit_code == 2
    assert "error: expected a new file" in again.stderr
    assert "expected a name such as job.yaml" in mcrise("job", "init", tmp_path / "job.json").stderr
    assert "cannot write" in mcrise("job", "init", tmp_path / "none" / "job.yaml").stderr


def test_help_tells_defaults_that_no_option_has() -> None:
    """In square brackets, rich would take them for markup."""
    for command, default in [
        ("explain", "(default: 8000, or 100000)"),
        ("explain", "(default: paper5)"),
        ("reid", "(default: OUTPUT/gallery)"),
        ("bench", "(default: all but xaitk)"),
        ("status", "default: http://127.0.0.1:8265)"),
    ]:
        assert default in re.sub(r"[\s│]+", " ", mcrise(command, "--help").stdout)


def test_check_prints_the_plan_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    values = job(folder, tmp_path / "out", actors=4).model_dump(mode="json")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    done = mcrise("job", "check", tmp_path / "job.yaml")
    assert done.exit_code == 0, done.stderr
    lines = {line[:13].strip(): line[13:] for line in done.stdout.splitlines()}
    assert list(lines) == [
        "images", "units", "masks", "rows", "output", "model calls", "bytes", "precision", "time",
    ]  # fmt: skip
    assert (lines["images"], lines["units"], lines["masks"], lines["rows"]) == (
        "3", "15", "900", "at most 3",
    )  # fmt: skip
    assert lines["model calls"] == "18 with batches of 64"
    assert lines["bytes"] == "at most 34.6 kB before compression, maps of 20 x 24"
    assert lines["precision"] == "float32"
    assert "with 4 actors like the one here" in lines["time"]
    assert not (tmp_path / "out").exists()


def test_check_of_a_job_that_asks_for_an_error_gives_limits(folder: Path, tmp_path: Path) -> None:
    spec = ExplainSpec(relative_error=0.5, masks=2000)
    values = job(folder, tmp_path / "out", explain=spec, actors={"min": 2, "max": 4}).model_dump(mode="json")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    done = mcrise("job", "check", tmp_path / "job.yaml")
    assert done.exit_code == 0, done.stderr
    lines = [(line[:13].strip(), line[13:]) for line in done.stdout.splitlines()]
    said = dict(lines)
    assert said["masks"] == "at most 6,000"
    for name in ("units", "model calls", "time"):
        assert said[name].startswith("at most "), name
    times = [text for name, text in lines if name == "time"]
    assert [re.search(r"with (\d+) actor", text)[1] for text in times] == ["1", "2", "4"]  # type: ignore[index]


def test_the_probe_asks_the_model_as_the_job_would(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same trials: plain float32 may be several times slower than what the job settles for."""
    asked: list[dict[str, object]] = []

    def settled(model: Model, *_: object, **settings: object) -> Settled:
        asked.append({name: value for name, value in settings.items() if name != "scored"})
        return Settled(Execution(batch_size=32, threads=1, precision=Precision(bfloat16=True)), model)

    monkeypatch.setattr(forecast, "settle", settled)
    probe = probe_job(job(folder, tmp_path, actors=4), masks=9000, seconds=0.05)
    assert asked == [{"precision": "auto", "batch_size": "auto", "masks": 2250}]
    assert (probe.execution.batch_size, probe.execution.precision.bfloat16) == (32, True)


def test_check_without_a_probe_needs_no_model(folder: Path, tmp_path: Path) -> None:
    values = job(folder, tmp_path / "out", model=ModelSpec(model="blackboxes:broken")).model_dump(mode="json")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    done = mcrise("job", "check", tmp_path / "job.yaml", "--no-probe")
    assert done.exit_code == 0
    assert "units        15" in done.stdout
    refused = mcrise("job", "check", tmp_path / "job.yaml")
    assert refused.exit_code == 2
    assert "no such checkpoint" in refused.stderr


def test_check_names_the_right_key(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("images: x\nmodel: {model: m:f}\noutput: out\nmasks: 3\n")
    done = mcrise("job", "check", tmp_path / "job.yaml")
    assert done.exit_code == 2
    assert done.stderr.strip().endswith("job.yaml: unknown key masks; did you mean explain.masks")
