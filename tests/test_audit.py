"""The audit of a real classifier on a cluster, as its users do it: submitted, watched, stopped, taken up."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from launched import Cluster, launched

import mcrise_ray as mr
from mcrise_ray.progressfile import read_progress

SHARED = Path(__file__).parents[2] / "shared"
IMAGES, MASKS = 100, 256

pytestmark = [
    pytest.mark.slow,  # 16 min on two busy cores
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared"),
]


def write_job(folder: Path) -> Path:
    """Every nineteenth test image of GTSRB, so that most classes are among them."""
    root = SHARED / "data/gtsrb/gtsrb"
    with open(root / "GT-final_test.csv") as file:
        truth = {row["Filename"]: row["ClassId"] for row in csv.DictReader(file, delimiter=";")}
    images = sorted((root / "GTSRB/Final_Test/Images").glob("*.ppm"))[::19][:IMAGES]
    assert len(images) == IMAGES
    with open(folder / "images.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "label"])
        rows.writerows((image, truth[image.name]) for image in images)
    job = yaml.safe_load((Path(__file__).parents[1] / "jobs/gtsrb.yaml").read_text())
    job["model"]["weights"] = str(SHARED / "models/gtsrb_resnet18.safetensors")
    job |= {"images": "images.csv", "output": "there", "batch_size": 64, "actors": 2, "figures": 0}
    job["precision"] = "channels_last"  # as a trial finds it; the bits are compared
    job["explain"]["masks"] = MASKS
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    (folder / "here.yaml").write_text(yaml.safe_dump({**job, "output": "here"}))
    return folder / "job.yaml"


def mcrise(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command itself, timed: `pytest -s` shows it."""
    began = time.monotonic()
    command = [sys.executable, "-c", "from mcrise_ray.cli import app; app()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"\n$ mcrise {arguments[0]}: {time.monotonic() - began:.1f} s, exit code {done.returncode}")
    print("\n".join(done.stdout.splitlines()[-8:]))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def content(output: Path) -> dict[tuple[str, int], bytes]:
    rows = list(mr.read_results(str(output)))
    return {(row.image_id, row.target): row.map.tobytes() + row.baseline.tobytes() for row in rows}


def submit_and_stop_half_way(file: Path, cluster: Cluster) -> None:
    address, output = ("--address", cluster.url), str(file.parent / "there")
    mcrise("submit", file, *address)
    follow = subprocess.Popen(
        [sys.executable, "-c", "from mcrise_ray.cli import app; app()", "logs", file, "--follow", *address],
        stdout=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while (progress := read_progress(output)) is None or progress.images_done < IMAGES / 2:
        assert time.monotonic() - began < 600, "the job does not get on"
        time.sleep(1)
    print(f"\nhalf of it: {time.monotonic() - began:.1f} s after the submission")
    assert "RUNNING" in mcrise("status", file, *address).stdout
    assert "STOPPED" in mcrise("stop", file, *address).stdout
    said, _ = follow.communicate(timeout=60)
    assert "stopped; submit the same job again to resume" in said
    assert mr.read_results(output).job["state"] == "stopped"


def test_an_audit_stopped_half_way_is_taken_up_and_is_the_local_one(tmp_path: Path) -> None:
    file = write_job(tmp_path)
    mcrise("job", "check", file)
    (tmp_path / "home").mkdir()
    began = time.monotonic()
    with launched(tmp_path / "home", cpus_of_head=2) as cluster:
        print(f"\ncluster up: {time.monotonic() - began:.1f} s")
        submit_and_stop_half_way(file, cluster)
        half = len(content(tmp_path / "there"))
        assert 0 < half < IMAGES * 2
        done = mcrise("submit", file, "--follow", "--address", cluster.url)
        assert f"{IMAGES} images explained, 0 errors" in done.stdout
        assert "SUCCEEDED" in mcrise("status", file, "--address", cluster.url).stdout
        mcrise("list", "--address", cluster.url)
    results = mr.read_results(str(tmp_path / "there"))
    times = Counter((row.image_id, row.target) for row in results)
    assert set(times.values()) == {1}
    assert len({image_id for image_id, _ in times}) == IMAGES
    assert results.errors == []
    roles = [row.target_role for row in results]
    print(json.dumps({"rows": len(roles), "rows at half": half, **Counter(roles)}))
    mcrise("run", tmp_path / "here.yaml")
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert here.keys() == there.keys()
    assert [key for key, value in here.items() if there[key] != value] == []
