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
HERE = Path(__file__).parent
NAMESPACE = ("unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc")

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and unshare, to keep Ray in"
)


def survive(seed: int, tmp_path: Path) -> dict[str, Any]:
    """One run in a namespace of its own; Ray's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="mcr", dir="/tmp") as ray_folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        script = f"ip link set lo up; exec {sys.executable} {HERE}/chaos.py {seed} {tmp_path}/{seed}"
        found = subprocess.run(
            [*NAMESPACE, "bash", "-c", script], env=environment, capture_output=True, text=True, check=False
        )
    lines = found.stdout.splitlines()
    if not lines:
        return {"seed": seed, "same": False, "once": False, "faults": [], "error": found.stderr[-2000:]}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


@pytest.mark.slow
@needs_namespaces
def test_twenty_audits_survive_everything_at_random_times(tmp_path: Path) -> None:
    """Actor killed, node killed, actor stalled, host memory exhausted, driver killed, image corrupt."""
    reports = []
    for seed in range(RUNS):
        reports.append(survive(seed, tmp_path))
        print(json.dumps(reports[-1]), flush=True)
    survived = [report for report in reports if report["same"] and report["once"] and report["summary"]]
    print(f"survived {len(survived)} of {RUNS}")
    assert len(survived) == RUNS
    assert all(len(report["faults"]) == 5 for report in reports)
