"""Everything goes wrong in one audit on a real cluster of several nodes; see `chaos.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

RUNS = 20
GUIDED_RUNS = 4
HERE = Path(__file__).parent
NAMESPACE = ("unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc")

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and unshare, to keep Ray in"
)


def survive(seed: int, tmp_path: Path, how: str = "") -> dict[str, Any]:
    """One run in a namespace of its own; Ray's sockets need a short path."""
    return in_a_namespace(f"{HERE}/chaos.py {seed} {tmp_path}/{seed} {how}") or {
        "seed": seed,
        "same": False,
        "once": False,
        "faults": [],
    }


def in_a_namespace(script: str) -> dict[str, Any] | None:
    """What a script of Python prints as its last line; None where it ends without."""
    with tempfile.TemporaryDirectory(prefix="mcr", dir="/tmp") as ray_folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        command = f"ip link set lo up; exec {sys.executable} {script}"
        found = subprocess.run(
            [*NAMESPACE, "bash", "-c", command], env=environment, capture_output=True, text=True, check=False
        )
    lines = found.stdout.splitlines()
    if not lines:
        print(found.stderr[-2000:])
        return None
    report: dict[str, Any] = json.loads(lines[-1])
    return report


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize(("how", "runs"), [("", RUNS), ("guided", GUIDED_RUNS)], ids=["twenty", "guided"])
def test_audits_survive_everything_at_random_times(tmp_path: Path, how: str, runs: int) -> None:
    """Actor killed, node killed, actor stalled, host memory exhausted, driver killed, image corrupt."""
    reports = []
    for seed in range(runs):
        reports.append(survive(seed, tmp_path, how))
        print(json.dumps(reports[-1]), flush=True)
    survived = [report for report in reports if report["same"] and report["once"] and report["summary"]]
    print(f"survived {len(survived)} of {runs}")
    assert len(survived) == runs
    assert all(len(report["faults"]) == 5 for report in reports)
    assert all((report["guided"] > 0) == bool(how) for report in reports)


@pytest.mark.slow
@needs_namespaces
def test_queries_survive_the_loss_of_a_node(tmp_path: Path) -> None:
    """200 queries on two nodes with an actor each, one of them killed: the bytes of an undisturbed run."""
    report = in_a_namespace(f"{HERE}/chaos_reid.py {tmp_path}")
    print(json.dumps(report))
    assert report is not None
    assert report["same"]
    assert report["rows"] == 400
    assert len(report["killed_after_masks"]) == 1
    assert report["summary"]["replaced"] >= 1
    assert (report["summary"]["images"], report["summary"]["errors"]) == (200, 0)
