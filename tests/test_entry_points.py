"""The scripts and example jobs in `jobs/`."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import people
import pytest
from PIL import Image

import mcrise_ray as mr
from mcrise_ray import driver
from mcrise_ray.driver import run_here
from mcrise_ray.identity import Retrieval
from mcrise_ray.jobfiles import load_job
from mcrise_ray.jobs import Summary
from mcrise_ray.jobspec import ActorRange
from mcrise_ray.submission import JOB_VARIABLE

JOBS = Path(__file__).parents[1] / "jobs"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the driver of a job, on no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["gtsrb", "imagenet"])
def test_example_jobs_load_and_work_anywhere(name: str) -> None:
    job = load_job(JOBS / f"{name}.yaml")
    assert job.targets == ("predicted", "truth")
    for place in (*job.images, job.output):
        assert "/mnt/mcrise/" in place or "s3://BUCKET/" in place, "nothing relative to this repository"
    assert job.actors == ActorRange(min=1, max=8), "clusters start from zero"


def test_the_demo_job_needs_nothing_but_this_repository() -> None:
    job = load_job(JOBS / "demo.yaml")
    refs = list(mr.ImageSource(job.images))
    model = mr.load_model(job.model)
    assert len(refs) == 12
    assert len(model.class_names) == model.classes == 43
    assert job.output.startswith("/tmp/")


def test_the_reid_job_loads_and_works_anywhere() -> None:
    job = load_job(JOBS / "market1501.yaml")
    assert job.reid is not None
    assert (job.kind, job.reid.matches, job.explain.p_mask) == ("reid", ("correct", "wrong"), 0.1)
    for place in (*job.images, *job.reid.gallery, job.reid.gallery_store, job.model.weights, job.output):
        assert place is not None
        assert place.startswith("/mnt/mcrise/"), "nothing relative to this repository"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_the_traffic_sign_job_fits_its_model() -> None:
    job = load_job(JOBS / "gtsrb.yaml")
    spec = job.model.model_copy(update={"weights": str(SHARED / "models/gtsrb_resnet18.safetensors")})
    model = mr.load_model(spec)
    images = mr.ImageSource(job.images[0].replace("/mnt/mcrise/gtsrb", str(SHARED / "data/gtsrb")))
    right = 0
    for _, image in zip(range(20), images, strict=False):
        result = mr.explain(model, model.prepare(mr.read_image(image.uri)), spec=mr.ExplainSpec(masks=1))
        right += result.targets == (image.label,)
    assert right >= 19


JOB = (
    "images: [a.png]\noutput: out\nfigures: 0\nactors: 0\nexplain: {masks: 64}\n"
    "model: {model: 'blackboxes:small_network', preprocessing: {size: [20, 24]}}\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.fromarray(np.full((20, 24, 3), 9, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def test_the_script_runs_a_job(file: Path) -> None:
    path = f"{JOBS.parent}{os.pathsep}{Path(__file__).parent}"
    outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, JOBS / "explain_dataset.py", file],
        env={**outside, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 images explained, 0 errors, 1 maps, 64 masks" in done.stdout


def test_the_script_says_how_it_is_called() -> None:
    done = subprocess.run(
        [sys.executable, JOBS / "explain_dataset.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "usage: python explain_dataset.py JOB_FILE [--retry-errors]"


@pytest.mark.parametrize(("name", "job"), [("explain_dataset", "gtsrb"), ("explain_reid", "market1501")])
def test_the_scripts_try_errors_again(name: str, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(driver, "run_here", lambda file, retry_errors: asked.append((file, retry_errors)))
    main, file = runpy.run_path(str(JOBS / f"{name}.py"))["main"], str(JOBS / f"{job}.yaml")
    for arguments in ([file], [file, "--retry-errors"], ["--retry-errors", file]):
        main(arguments)
    assert asked == [(file, False), (file, True), (file, True)]


def reid_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = f"{JOBS.parent}{os.pathsep}{Path(__file__).parent}"
    outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, JOBS / "explain_reid.py", *arguments],
        env={**outside, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reid_script_runs_a_job(tmp_path: Path) -> None:
    job = people.job(people.make(tmp_path, people=1), tmp_path / "out", reid={"matches": "top1"})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    done = reid_script(tmp_path / "job.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 images explained, 0 errors, 1 maps, 256 masks" in done.stdout


def test_the_reid_script_is_for_reid_jobs(file: Path) -> None:
    done = reid_script(file)
    assert done.returncode == 1
    assert f"{file}: expected a job of kind reid, found explain; see explain_dataset.py" in done.stderr
    assert reid_script().stderr.strip() == "usage: python explain_reid.py JOB_FILE [--retry-errors]"
    assert "error: " in reid_script("nowhere.yaml").stderr


def test_a_job_takes_up_its_own_results_and_no_others(
    here: None, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(str(file)) == 0
    assert run_here(str(file)) == 0
    file.write_text(JOB.replace("64", "65"))
    assert run_here(str(file)) == 2
    assert (
        "error: expected an output without results or with those of the same job" in capsys.readouterr().out
    )
    assert mr.read_results(str(file.parent / "out")).job["spec"]["explain"]["masks"] == 64


def test_a_submitted_job_comes_from_the_environment(
    here: None, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(load_job(file).model_dump(mode="json")))
    assert run_here() == 0
    assert len(mr.read_results(str(file.parent / "out"))) == 1
    monkeypatch.setenv(JOB_VARIABLE, "{")
    assert run_here() == 2
    monkeypatch.delenv(JOB_VARIABLE)
    assert run_here() == 2
    assert capsys.readouterr().out.count("error: expected a job in the environment variable MCRISE_JOB") == 2


def test_a_submitted_job_draws_its_figures(
    here: None, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(JOB.replace("figures: 0", "figures: 5"))
    assert run_here(str(file)) == 0
    assert len(list((file.parent / "out/figures").glob("*a.png*"))) == 1
    assert "1 figures, the first" in capsys.readouterr().out


def test_a_submitted_job_says_what_was_put_right(
    here: None, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    died = {"actor died": 2}
    done = Summary(1, 0, 1, 64, 1.0, retries=died, replaced=1, halved=3, retrieval=Retrieval(4, 0.5, 0.25))
    monkeypatch.setattr(driver, "run_job", lambda *_, **__: done)
    monkeypatch.setattr(driver, "draw_figures", lambda *_: [])
    assert run_here(str(file)) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "re-identified: recall@1 50.0%, mAP 25.0% of 4 queries of known people",
        "survived: 1 actors replaced; calls repeated: 2 x actor died",
        "3 calls ran with half their batch: the last bits of their maps may differ",
    ]


def test_the_driver_tries_errors_again(file: Path) -> None:
    image = file.parent / "again" / "late.png"
    image.parent.mkdir()
    image.write_bytes(b"no image yet")
    values = load_job(file).model_dump(mode="json") | {"images": [str(image)], "actors": 0}

    def errors_after(*arguments: str) -> int:
        command = [sys.executable, "-m", "mcrise_ray.driver", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        environment[JOB_VARIABLE] = json.dumps(values)
        subprocess.run(command, check=True, env=environment, timeout=120)
        return len(mr.read_results(values["output"]).errors)

    assert errors_after() == 1
    Image.new("RGB", (30, 30)).save(image)
    assert errors_after() == 1
    assert errors_after("--retry-errors") == 0


@pytest.mark.parametrize("dropped", [False, True], ids=["raised", "dropped"])
def test_a_stop_ends_with_a_word_on_how_to_go_on(
    here: None, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dropped: bool
) -> None:
    def stopped(*_: object, **__: object) -> None:
        if dropped:  # what is raised as a weak reference calls back comes to nobody
            weakref.finalize(set(), os.kill, os.getpid(), signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("was not stopped")

    monkeypatch.setattr(driver, "run_job", stopped)
    assert run_here(str(file)) == 130
    assert "stopped; submit the same job again to resume" in capsys.readouterr().out


def test_a_cluster_that_is_not_there_is_one_line(
    here: None, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert run_here(str(file)) == 2
    assert "error: cannot join the cluster at 127.0.0.1:1: Connection refused" in capsys.readouterr().out
