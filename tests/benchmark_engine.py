"""What the engine costs beside the model, on local Ray: `python tests/benchmark_engine.py [overhead|long]`.

`overhead`: 200 images, two actors, a model that sleeps; the time that actors were there over that of the bare
units, which are timed before and after. A unit is scored and summed (`run_unit`); the job sums its scores
beside the model, so the ratio may be below one, and the ratio to scoring alone is told too.
`long`: one image of 10^7 masks at 32 x 32, a trivial model, two actors; time, and memory on the way.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import blackboxes
import numpy as np
import psutil
import torch
from PIL import Image
from reporting import Silent

from mcrise_ray.explainer import Subject, perform, run_unit
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.plan import unit
from mcrise_ray.reduction import ScoreUnit
from mcrise_ray.results import read_results
from mcrise_ray.spec import ExplainSpec

ACTORS = 2


class Clock(Silent):
    """Seconds of all actors together, from each one's model built to the last image done; and the memory of
    driver and actors meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.began = self.looked = self.ended = self.changed = 0.0
        self.alive, self.until_change = 0, 0.0
        self.memory: list[list[int]] = []

    def actors_alive(self, actors: int) -> None:
        now = time.perf_counter()
        self.began = self.began or now
        if actors:
            self.until_change += self.alive * (now - self.changed)
            self.alive, self.changed = actors, now

    def image_done(self, masks: int) -> None:
        self.ended = time.perf_counter()

    @property
    def actor_seconds(self) -> float:
        return self.until_change + self.alive * (self.ended - self.changed)

    def masks_done(self, masks: int) -> None:
        super().masks_done(masks)
        if time.perf_counter() - self.looked > 10:
            self.looked = time.perf_counter()
            driver = psutil.Process()
            actors = [child for child in driver.children(recursive=True) if "ray::Worker" in child.name()]
            self.memory.append([process.memory_info().rss >> 20 for process in (driver, *actors)])


def job(root: Path, images: int, size: tuple[int, int], masks: int, seconds: float) -> JobSpec:
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for n in range(images):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{n:03d}.png")
    return JobSpec(
        images=(str(root / "images"),),
        model=ModelSpec(
            model="blackboxes:slow_means" if seconds else "blackboxes:channel_means",
            args={"seconds": str(seconds)} if seconds else {},
            preprocessing={"size": size, "activation": "none"},
        ),
        output=str(root / "out"),
        targets=(0,),
        explain=ExplainSpec(masks=masks, estimator="paper"),
        actors=ACTORS,
        batch_size=64 if seconds else 256,
        figures=0,
        precision="float32",
    )


def overhead(seconds: float, masks: int) -> None:
    images = 200
    before = bare_unit(seconds, masks)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        run_job(job(Path(folder), images, (32, 32), masks, seconds), clock)
        took = clock.actor_seconds
        rows = read_results(str(Path(folder) / "out"))
        inside = sum(row.seconds for row in rows) / (images * masks / 64)
    bare, scored = (before + bare_unit(seconds, masks)) / 2
    units = images * masks // 64
    print(
        f"units of {bare * 1e3:.1f} ms: {images} images, {masks // 64} units each, {ACTORS} actors: "
        f"{took:.1f} s of actors, {units * bare:.1f} s of bare units: ratio {took / units / bare:.3f} "
        f"({took / units / scored:.3f} to scoring alone, {scored * 1e3:.1f} ms a unit; "
        f"{inside * 1e3:.1f} ms a unit inside the actors)",
        flush=True,
    )


def bare_unit(seconds: float, masks: int) -> np.ndarray:
    """Mean seconds of one unit with nothing around it, summed and only scored, in as many processes as there
    are actors.
    """
    means = []
    for summed in (True, False):  # apart, because each would find the other's leavings in the caches
        with multiprocessing.get_context("spawn").Pool(ACTORS) as pool:
            times = pool.starmap(bare_units, [(seconds, masks, summed)] * ACTORS)
        means.append(np.mean(times))
    return np.array(means)


def bare_units(seconds: float, masks: int, summed: bool) -> list[float]:
    torch.set_num_threads(1)
    spec = ExplainSpec(masks=masks, estimator="paper")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    subject = Subject(blackboxes.slow_means(str(seconds)), image, spec)
    times = []
    for _ in range(100):
        began = time.perf_counter()
        if summed:
            run_unit(subject, unit(spec, 0), (0,), 64)
        else:
            deque(perform(subject, [ScoreUnit(unit(spec, 0))], (0,), 64))
        times.append(time.perf_counter() - began)
    return times[10:]


def long(masks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        run_job(job(Path(folder), 1, (32, 32), masks, 0.0), clock)
        took = clock.ended - clock.began
    print(f"{masks:,} masks at 32 x 32, {ACTORS} actors: {took:.0f} s, {masks / took:,.0f} masks/s")
    print("resident MiB of driver and actors, every 10 s:", *clock.memory)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    if "long" in sys.argv[1:]:
        long(10**7)
    else:
        overhead(0.048, 8 * 64)
        overhead(0.0033, 32 * 64)
