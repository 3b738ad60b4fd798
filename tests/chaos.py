"""One audit on a cluster of several nodes, with everything going wrong: `python chaos.py SEED FOLDER`.

`python chaos.py SEED FOLDER guided` gives images enough masks that a guide picks them (`mcrise_ray.guide`).
To be run in a network and process namespace of its own. Prints one line of JSON: what was done, whether the
result is the undisturbed one, and how many of its maps came of a guide.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from PIL import Image
from ray.cluster_utils import Cluster
from reporting import Silent

import mcrise_ray as mr
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.spec import ExplainSpec

HERE = Path(__file__).parent
IMAGES = {False: 40, True: 24}  # of an audit without guides, and with
UNITS = {False: 12, True: 24}
HOG_GIB = 6.0
QUICK_TO_NOTICE_DEATH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
QUICK_TO_RUN_OUT = {"RAY_memory_monitor_refresh_ms": "100"}


def is_guided(root: Path) -> bool:
    return (root / "guided").exists()


def job(
    root: Path, output: str, actors: int, seconds: float, estimator: Literal["importance", "control-variate"]
) -> JobSpec:
    guided = is_guided(root)
    return JobSpec(
        images=(str(root / "images"),),
        model=ModelSpec(
            model=f"blackboxes:slow_{'steep' if guided else 'means'}",
            args={"seconds": str(seconds), "flag": str(root / "hog"), "gib": str(HOG_GIB)},
            preprocessing={"size": (20, 24), "activation": "softmax" if guided else "none"},
        ),
        output=str(root / output),
        targets=(0, 2),
        explain=ExplainSpec(masks=64 * UNITS[guided], grid=(4, 4), estimator=estimator),
        actors=actors,
        figures=0,
        batch_size=64,
        precision="float32",
        deadline=4.0,
    )


def same_but_the_delay(root: Path) -> None:
    """The undisturbed run: in this process, in order; and another one, in which nothing is picked."""
    run_job(job(root, "undisturbed", 0, 0.0, "importance"), Silent())
    run_job(job(root, "unguided", 0, 0.0, "control-variate"), Silent())


def content(output: Path) -> tuple[dict[tuple[str, int], bytes], Counter[str]]:
    results = mr.read_results(str(output))
    rows = [((row.image_id, row.target), row.map.tobytes() + row.baseline.tobytes()) for row in results]
    times = Counter(image_id for (image_id, _), _ in rows)
    return dict(rows), times + Counter({row.image_id: 2 for row in results.errors})


def make_images(root: Path, count: int) -> None:
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"images/{n:03d}.png")


def start_driver(root: Path, address: str) -> subprocess.Popen[bytes]:
    with open(root / "driver.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "drive", str(root), address], stdout=log, stderr=log
        )


def drive(root: Path, address: str) -> None:
    """What the driver does: the audit, writing how many masks are done where the chaos can see it."""
    from mcrise_ray import recorder

    recorder._COMMIT_EVERY = recorder._SAVE_EVERY = recorder._SAVE_AFTER = recorder._PROGRESS_EVERY = 0.5  # type: ignore[misc]

    class Telling(Silent):
        def masks_done(self, masks: int) -> None:
            super().masks_done(masks)
            (root / "masks").write_text(str(self.masks))

        def note(self, text: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    summary = run_job(job(root, "out", 3, 0.05, "importance"), Telling(), address=address)
    (root / "summary.json").write_text(json.dumps(vars(summary)))


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ray::Worker" in command and process.info["status"] not in {"zombie", "stopped"}:
            found.append(process)
    return found


def run(seed: int, root: Path, guided: bool) -> dict[str, Any]:
    rng = random.Random(seed)
    images = IMAGES[guided]
    make_images(root, images)
    if guided:
        (root / "guided").touch()
    corrupt = root / f"images/{rng.randrange(images):03d}.png"
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    same_but_the_delay(root)
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (HOG_GIB - 2) * 2**30) / memory.total
    os.environ.update(QUICK_TO_NOTICE_DEATH)
    os.environ.update(QUICK_TO_RUN_OUT | {"RAY_memory_usage_threshold": f"{threshold:.3f}"})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    faults = ["kill actor", "kill node", "stall actor", "host memory", "kill driver"]
    rng.shuffle(faults)
    total = images * UNITS[guided] * 64
    when = sorted(rng.uniform(0.05, 0.85) for _ in faults)
    done: list[str] = []
    before, driver = 0, start_driver(root, cluster.address)
    began = time.monotonic()
    while driver.poll() is None and time.monotonic() - began < 300:
        time.sleep(0.05)
        masks = before + int((root / "masks").read_text() or 0) if (root / "masks").exists() else 0
        if len(done) < len(faults) and masks > when[len(done)] * total:
            fault = faults[len(done)]
            if fault == "kill driver":
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                before, driver = masks, start_driver(root, cluster.address)
                (root / "masks").write_text("0")
            elif fault == "kill node":
                cluster.remove_node(nodes.pop(rng.randrange(len(nodes))), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=2))
            elif fault == "host memory":
                (root / "hog").touch()
            else:
                victims = actors()
                if not victims:
                    continue
                rng.choice(victims).send_signal(signal.SIGKILL if fault == "kill actor" else signal.SIGSTOP)
            done.append(fault)
    took = time.monotonic() - began
    hung = driver.poll() is None
    driver.kill()
    maps, times = content(root / "out")
    (undisturbed, _), (unguided, _) = content(root / "undisturbed"), content(root / "unguided")
    summary = json.loads((root / "summary.json").read_text()) if (root / "summary.json").exists() else None
    cluster.shutdown()
    return {
        "seed": seed,
        "faults": done,
        "same": maps == undisturbed and len(maps) == 2 * (images - 1),
        "once": len(times) == images and set(times.values()) == {2},
        "hung": hung,
        "guided": sum(maps[key] != unguided[key] for key in maps),
        "seconds": round(took, 1),
        "summary": summary,
    }


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(Path(sys.argv[2]), sys.argv[3])
    else:
        print(json.dumps(run(int(sys.argv[1]), Path(sys.argv[2]), "guided" in sys.argv[3:])))
