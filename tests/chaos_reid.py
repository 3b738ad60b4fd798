"""200 queries on a cluster of two nodes, one of which is killed: `python chaos_reid.py FOLDER`.

To be run in a network and process namespace of its own. Prints one line of JSON: what was done, and whether
the result is the undisturbed one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import people
from chaos import QUICK_TO_NOTICE_DEATH
from ray.cluster_utils import Cluster
from reporting import Silent

import mcrise_ray as mr
from mcrise_ray.jobs import run_job

QUERIES = 200
UNITS = 4


class Telling(Silent):
    """Knows how many masks are done."""

    def note(self, text: str) -> None:
        super().note(text)
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def job(root: Path, output: str, actors: int, seconds: float) -> mr.JobSpec:
    args = {"seconds": str(seconds)}
    explain = {"masks": 64 * UNITS}
    return people.job(root, root / output, actors=actors, args=args, explain=explain, batch_size=64)


def run(root: Path) -> dict[str, Any]:
    people.make(root, people=QUERIES, shots=3)
    run_job(job(root, "undisturbed", 0, 0.0), Silent())
    os.environ.update(QUICK_TO_NOTICE_DEATH)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    reporter = Telling()
    killed: list[int] = []

    def kill() -> None:
        while reporter.masks < QUERIES * UNITS * 64 // 3:
            time.sleep(0.05)
        killed.append(reporter.masks)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    summary = run_job(job(root, "out", 2, 0.05), reporter, address=cluster.address)
    took = time.monotonic() - began
    killer.join()
    cluster.shutdown()
    undisturbed, found = people.content(root / "undisturbed"), people.content(root / "out")
    return {
        "rows": len(found),
        "same": found == undisturbed,
        "killed_after_masks": killed,
        "seconds": round(took, 1),
        "summary": {name: value for name, value in vars(summary).items() if name != "retrieval"},
        "recall_at_1": summary.retrieval and summary.retrieval.recall_at_1,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
