"""What a job counts is what Prometheus reads, under the names that the dashboard shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from launched import launched
from PIL import Image

from mcrise_ray import telemetry
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.progress import Quiet, Reporter
from mcrise_ray.progressfile import read_progress
from mcrise_ray.results import read_results
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.telemetry import MeteredReporter

DRIVER = """
import json, sys, time
from pathlib import Path
from mcrise_ray.driver import join_cluster
join_cluster(sys.argv[1])
from mcrise_ray.telemetry import MeteredReporter
from test_telemetry import Recorded, job_with_a_fault
from mcrise_ray.jobs import run_job
recorded = Recorded()
run_job(job_with_a_fault(Path(sys.argv[2])), MeteredReporter(recorded))
(Path(sys.argv[2]) / "told.json").write_text(json.dumps(recorded.told))
time.sleep(60)
"""


class Recorded(Quiet):
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def masks_done(self, masks: int) -> None:
        self.told.append(("masks_done", masks))

    def image_done(self, masks: int) -> None:
        self.told.append(("image_done", masks))

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        self.told.append(("image_failed", image_id, stage, message))

    def retried(self, reason: str, text: str) -> None:
        self.told.append(("retried", reason, text))

    def actors_alive(self, actors: int) -> None:
        self.told.append(("actors_alive", actors))

    def relative_error(self, error: float) -> None:
        self.told.append(("relative_error", error))

    def note(self, text: str) -> None:
        self.told.append(("note", text))

    def masks_kept(self, masks: int) -> None:
        self.told.append(("masks_kept", masks))

    def job_ended(self, state: str, facts: dict[str, Any]) -> None:
        self.told.append(("job_ended", state, facts))


def test_everything_is_passed_on() -> None:
    inner = Recorded()
    reporter = MeteredReporter(inner)
    assert isinstance(reporter, Reporter)
    reporter.start(3, 100, 1)
    reporter.masks_done(0)
    reporter.masks_done(5)
    reporter.masks_kept(7)
    reporter.image_done(100)
    reporter.image_failed("a.png", "read", "damaged")
    reporter.retried("node died", "it is gone")
    reporter.actors_alive(2)
    reporter.relative_error(0.5)
    reporter.note("text")
    reporter.job_ended("done", {"images": 3})
    assert inner.told == [
        ("masks_done", 0),
        ("masks_done", 5),
        ("masks_kept", 7),
        ("image_done", 100),
        ("image_failed", "a.png", "read", "damaged"),
        ("retried", "node died", "it is gone"),
        ("actors_alive", 2),
        ("relative_error", 0.5),
        ("note", "text"),
        ("job_ended", "done", {"images": 3}),
    ]
    assert reporter.outlook() == inner.outlook()


def job_with_a_fault(root: Path) -> JobSpec:
    """Two images and one that is none, and an actor that dies once under a unit."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / "images" / name)
    (root / "images" / "bad.png").write_text("not a picture")
    (root / "flag").touch()
    return JobSpec(
        images=(str(root / "images"),),
        model=ModelSpec(
            model="blackboxes:dies_once",
            args={"flag": str(root / "flag")},
            preprocessing={"size": (20, 24), "activation": "none"},
        ),
        output=str(root / "out"),
        targets=(0, 2),
        explain=ExplainSpec(masks=320, grid=(4, 4)),
        precision="float32",
        batch_size=64,
        actors=1,
        figures=0,
    )


def test_the_dashboard_knows_these_names() -> None:
    board = (Path(__file__).parents[1] / "cluster/grafana-dashboard.json").read_text()
    shown = set(re.findall(r"ray_(mcrise_\w+?)(?:_total)?\b", board))
    assert shown == set(telemetry.NAMES)


@pytest.mark.slow  # 25 s: Ray exports every ten seconds
def test_prometheus_reads_what_became_of_a_job(tmp_path: Path) -> None:
    with launched(tmp_path, cpus_of_head=1) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address, tmp_path / "job"], env={**os.environ}
        )
        try:
            found: dict[str, float] = {}
            until = time.monotonic() + 60
            while found.get(MASKS, 0) < 640 or found.get("ray_mcrise_actors") != 0:
                assert time.monotonic() < until, found
                time.sleep(1)
                with suppress(requests.ConnectionError):  # the node's agent takes a while
                    found = scraped(cluster.metrics[0])
        finally:
            driver.kill()
            driver.wait()
    told = json.loads((tmp_path / "job/told.json").read_text())
    worst = [
        max(row.relative_error for row in read_results(str(tmp_path / "job/out")) if row.image_id == name)
        for name in ("a.png", "b.png")
    ]
    assert found == {
        MASKS: 640,
        'ray_mcrise_images_total outcome="done"': 2,
        'ray_mcrise_images_total outcome="failed"': 1,
        'ray_mcrise_retries_total reason="actor died"': 1,
        "ray_mcrise_actors": 0,
        "ray_mcrise_relative_error": pytest.approx(np.median(worst), rel=1e-5),
    }
    assert [actors for name, *actors in told if name == "actors_alive"] == [[1], [0], [1], [0]]
    progress = read_progress(str(tmp_path / "job/out"))
    assert progress is not None
    assert (progress.retries, progress.actors, progress.errors) == (1, 0, 1)
    assert progress.relative_error == pytest.approx(np.median(worst), rel=1e-5)


MASKS = "ray_mcrise_masks_total"


def scraped(port: int) -> dict[str, float]:
    """Our metrics, with the labels that are ours; without a token, which the endpoint does not ask for."""
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(ray_mcrise_\w+)\{(.*)\} (\S+)", line)
        if match:
            assert 'SessionName="' in match[2], "the dashboard filters by it"
            labels = re.findall(r'(?:outcome|reason)="[^"]*"', match[2])
            found[" ".join([match[1], *labels])] = float(match[3])
    return found
