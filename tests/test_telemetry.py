"""What a job counts is what Prometheus reads, under the names that the dashboard shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from launched import launched

from mcrise_ray import telemetry
from mcrise_ray.progress import Reporter
from mcrise_ray.telemetry import MeteredReporter

DRIVER = """
import sys, time
from mcrise_ray.driver import join_cluster
join_cluster(sys.argv[1])
from mcrise_ray.telemetry import MeteredReporter
from test_telemetry import Recorded
reporter = MeteredReporter(Recorded())
reporter.masks_done(64)
reporter.masks_done(36)
for failed in (False, False, True):
    reporter.image_done(failed)
reporter.unit_retried("node died")
reporter.actors_alive(3)
reporter.relative_error(0.25)
time.sleep(60)
"""


class Recorded:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def start(self, images: int | None, masks_per_image: int, done: int = 0) -> None:
        self.told.append(("start", images, masks_per_image, done))

    def masks_done(self, masks: int) -> None:
        self.told.append(("masks_done", masks))

    def image_done(self, failed: bool) -> None:
        self.told.append(("image_done", failed))

    def note(self, text: str) -> None:
        self.told.append(("note", text))

    def outlook(self) -> dict[str, object]:
        return {"images_total": len(self.told), "seconds_left": None}


def test_everything_is_passed_on() -> None:
    inner = Recorded()
    reporter = MeteredReporter(inner)
    assert isinstance(reporter, Reporter)
    reporter.start(3, 100, 1)
    reporter.masks_done(0)
    reporter.masks_done(5)
    reporter.image_done(True)
    reporter.note("text")
    reporter.unit_retried("node died")
    assert inner.told == [
        ("start", 3, 100, 1),
        ("masks_done", 0),
        ("masks_done", 5),
        ("image_done", True),
        ("note", "text"),
    ]


def test_the_dashboard_knows_these_names() -> None:
    board = (Path(__file__).parents[1] / "cluster/grafana-dashboard.json").read_text()
    shown = set(re.findall(r"ray_(mcrise_\w+?)(?:_total)?\b", board))
    assert shown == set(telemetry.NAMES)


@pytest.mark.slow  # 25 s: Ray exports every ten seconds
def test_prometheus_reads_what_was_counted(tmp_path: Path) -> None:
    with launched(tmp_path, cpus_of_head=1) as cluster:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address], env={**os.environ})
        try:
            found: dict[str, float] = {}
            until = time.monotonic() + 60
            while len(found) < 6 and time.monotonic() < until:
                time.sleep(2)
                with suppress(requests.ConnectionError):  # the node's agent takes a while
                    found = scraped(cluster.metrics[0])
        finally:
            driver.kill()
            driver.wait()
    assert found == {
        "ray_mcrise_masks_total": 100,
        'ray_mcrise_images_total outcome="done"': 2,
        'ray_mcrise_images_total outcome="failed"': 1,
        'ray_mcrise_retries_total reason="node died"': 1,
        "ray_mcrise_actors": 3,
        "ray_mcrise_relative_error": 0.25,
    }


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
