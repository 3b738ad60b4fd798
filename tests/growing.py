"""A job on a cluster that has no worker node when it begins: `python growing.py FOLDER`.

To be run in a network and process namespace of its own. Nodes are added when actors wait for them, as an
autoscaler would; prints one line of JSON: how many actors there were each time that this changed.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from PIL import Image
from ray.cluster_utils import Cluster
from reporting import Silent

from mcrise_ray import cluster as ours
from mcrise_ray.cluster import RayExecutor
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.spec import ExplainSpec

NODES = 2  # that may come, each with room for one actor


class Counting(Silent):
    """Knows how many actors work, and how many have been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[int] = []
        self.asked = 0

    def actors_alive(self, actors: int) -> None:
        self.alive.append(actors)


class Watched(RayExecutor):
    def start(self, actor: int) -> None:
        counting.asked += 1
        super().start(actor)


counting = Counting()


def main(root: Path) -> None:
    (root / "images").mkdir()
    for name in "abcdefgh":
        Image.new("RGB", (24, 20), (9, 9, 9)).save(root / f"images/{name}.png")
    ours._GROW_AFTER, ours._LOOK_AT_CLUSTER_EVERY = 1.0, 0.2  # type: ignore[misc]
    ours.RayExecutor = Watched  # type: ignore[misc]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    job = JobSpec(
        images=(str(root / "images"),),
        model=ModelSpec(
            model="blackboxes:slow_means",
            args={"seconds": "0.25"},
            preprocessing={"size": (20, 24), "activation": "none"},
        ),
        output=str(root / "out"),
        targets=(0,),
        explain=ExplainSpec(masks=64 * 6, grid=(4, 4)),
        actors={"min": 1, "max": 3},  # type: ignore[arg-type]
        precision="float32",
        batch_size=64,
        figures=0,
    )
    with ThreadPoolExecutor(1) as pool:  # Ray starts nodes in the main thread alone
        summary = pool.submit(run_job, job, counting)
        for node in range(NODES):  # each comes only once an actor waits for it
            while counting.asked <= node and not summary.done():
                time.sleep(0.1)
            cluster.add_node(num_cpus=1)
        images = summary.result().images
    print(json.dumps({"alive": counting.alive, "asked": counting.asked, "images": images}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
