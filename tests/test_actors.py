"""How many actors a job has: what was asked for, what fits, and how a cluster that can grow is made to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from test_chaos import HERE, NAMESPACE, needs_namespaces
from typer.testing import CliRunner

from mcrise_ray import cli, cluster
from mcrise_ray.arguments import actor_count
from mcrise_ray.cli import app
from mcrise_ray.cluster import RayExecutor
from mcrise_ray.errors import SpecError
from mcrise_ray.jobs import _setup
from mcrise_ray.jobspec import ActorRange, JobSpec
from mcrise_ray.loading import ModelSpec


class Cluster:
    """Nodes that come and go, and a clock."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.clock = 0.0

    def add(self, labels: dict[str, str] | None = None, **resources: float) -> None:
        self.nodes.append({"Resources": resources, "Labels": labels or {}})


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    fake = Cluster()
    monkeypatch.setattr(cluster, "_alive_nodes", lambda: fake.nodes)
    monkeypatch.setattr(RayExecutor, "now", lambda self: fake.clock)
    return fake


def executor(actors: object, gpus: float = 0.0, may_grow: bool = True, **changes: object) -> RayExecutor:
    job = JobSpec(images=("a.png",), model=ModelSpec(model="m:f"), output="out", actors=actors, **changes)
    return RayExecutor(job, _setup(job, 1, None), None, gpus, may_grow)  # type: ignore[arg-type]


def later(nodes: Cluster, seconds: float = 3.0) -> None:
    nodes.clock += seconds


@pytest.mark.parametrize(
    ("each", "there", "fit"), [(0.2, 1.0, 5), (0.1, 1.0, 10), (0.05, 2.0, 40), (0.3, 1.0, 3), (2.0, 7.0, 3)]
)
def test_parts_of_a_gpu_fill_it(nodes: Cluster, each: float, there: float, fit: int) -> None:
    nodes.add(CPU=64, GPU=there)
    assert executor("auto", each).wanted() == fit


@pytest.mark.parametrize(
    ("model", "asked", "gpus"),
    [
        ({"model": "m:f"}, None, 1.0),
        ({"model": "m:f", "device": "cuda:1"}, None, 1.0),
        ({"model": "m:f", "device": "cpu"}, None, 0.0),
        ({"model": "https://host/v2/models/m"}, None, 0.0),
        ({"model": "m:f", "device": "cpu"}, 0.5, 0.5),
    ],
)
def test_actors_hold_a_gpu_where_their_model_is_for_one(
    model: dict[str, Any], asked: float | None, gpus: float
) -> None:
    job = JobSpec(images=("a.png",), model=ModelSpec(**model), output="out", gpus_per_actor=asked)
    assert cluster._gpus(job, 4.0) == gpus
    assert cluster._gpus(job, 0.0) == (asked or 0.0)


def test_a_number_is_asked_for_whatever_there_is(nodes: Cluster) -> None:
    asked = executor(5)
    assert asked.wanted() == 5
    nodes.add(CPU=64)
    later(nodes)
    assert asked.wanted() == 5


def test_auto_takes_what_fits_and_asks_for_one_where_nothing_does(nodes: Cluster) -> None:
    """One that waits is what makes a cluster that starts from zero grow at all."""
    asked = executor("auto", cpus_per_actor=2)
    assert asked.wanted() == 1
    nodes.add(CPU=5)
    assert asked.wanted() == 1, "it does not look at every turn"
    later(nodes)
    assert asked.wanted() == 2
    nodes.add(CPU=4)
    later(nodes, 1000)
    assert asked.wanted() == 4
    later(nodes, 1000)
    assert asked.wanted() == 4, "and never asks for more than fit"
    del nodes.nodes[0]
    later(nodes)
    assert asked.wanted() == 2


def test_a_range_makes_a_cluster_grow_by_doubling(nodes: Cluster) -> None:
    asked = executor(ActorRange(min=2, max=7), gpus=1.0)
    nodes.add(CPU=0)
    assert asked.wanted() == 2
    later(nodes, 1000)
    assert asked.wanted() == 2, "before the first has come no more are asked for"
    seen = []
    for _ in range(7):
        nodes.add(CPU=4, GPU=1)
        later(nodes)
        first = asked.wanted()
        later(nodes, 31)
        seen.append((first, asked.wanted()))
    assert seen == [(2, 2), (2, 4), (3, 6), (4, 7), (5, 7), (6, 7), (7, 7)]
    nodes.add(CPU=4, GPU=1)
    later(nodes)
    assert asked.wanted() == 7
    del nodes.nodes[1:]
    later(nodes)
    assert asked.wanted() == 2


def test_a_range_without_an_end_leaves_it_to_the_cluster(nodes: Cluster) -> None:
    asked = executor({"min": 3})
    nodes.add(CPU=8)
    assert asked.wanted() == 8
    later(nodes, 31)
    assert asked.wanted() == 16


def test_one_machine_of_our_own_never_grows(nodes: Cluster) -> None:
    asked = executor({"min": 1, "max": 8}, may_grow=False)
    nodes.add(CPU=2)
    assert asked.wanted() == 2
    later(nodes, 1000)
    assert asked.wanted() == 2


def test_only_nodes_with_the_label_count(nodes: Cluster) -> None:
    asked = executor("auto", label_selector={"mcrise": "gpu"})
    nodes.add(CPU=8, labels={"mcrise": "cpu"})
    nodes.add(CPU=3, labels={"mcrise": "gpu"})
    assert asked.wanted() == 3


def test_what_actors_that_wait_are_short_of(nodes: Cluster) -> None:
    nodes.add(CPU=8, labels={"mcrise": "cpu"})
    nodes.add(CPU=3, labels={"mcrise": "gpu"})
    assert executor(12).shortage() == "each asks for 1 CPU; the cluster has 11 CPU in all"
    for label, cores in (("gpu", 3), ("tpu", 0)):
        assert executor(12, label_selector={"mcrise": label}).shortage() == (
            f"each asks for 1 CPU on a node with mcrise={label}; "
            f"the nodes that have that label have {cores} CPU in all"
        )


def test_a_label_that_ray_does_not_know_is_told_with_the_option(nodes: Cluster) -> None:
    with pytest.raises(SpecError, match=r"^--label-selector: .*in\(a100"):
        executor("auto", label_selector={"ray.io/accelerator-type": "in(a100"})


@pytest.mark.parametrize(("text", "meaning"), [("auto", "auto"), ("3", 3), ("2-8", {"min": 2, "max": 8})])
def test_actors_on_the_command_line(text: str, meaning: object) -> None:
    assert actor_count(text) == meaning


@pytest.mark.parametrize("text", ["", "-1", "2-", "-8", "some", "2-x", "1.5"])
def test_actors_that_make_no_sense(text: str) -> None:
    with pytest.raises(SpecError, match=rf"^--actors: expected auto, a number, or a range .*found '{text}'$"):
        actor_count(text)


def test_an_audit_without_actors_is_another_command(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["audit", str(tmp_path), "--model", "m:f", "--actors", "0"])
    assert refused.exit_code == 2
    assert "expected 1 or more on Ray, found 0; mcrise explain" in refused.stderr


def test_labels_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[JobSpec] = []
    monkeypatch.setattr(cli, "_run_and_report", lambda job, *_: jobs.append(job))
    command = "audit folder --model torchvision:resnet18 --label-selector ray.io/accelerator-type=A100"
    for more in ("", " --label-selector zone=b"):
        assert CliRunner().invoke(cli.app, (command + more).split()).exit_code == 0
    assert jobs[0].label_selector == {"ray.io/accelerator-type": "A100"}
    assert jobs[1].label_selector == {"ray.io/accelerator-type": "A100", "zone": "b"}
    refused = CliRunner().invoke(cli.app, [*command.split(), "--label-selector", "gpu"])
    assert refused.exit_code == 2
    assert refused.output.startswith("error: --label-selector: expected KEY=VALUE such as ray.io/")


@pytest.mark.slow  # 40 s: three nodes, one after the other
@needs_namespaces
def test_a_cluster_without_workers_grows_under_a_job(tmp_path: Path) -> None:
    """On a real cluster; see `growing.py`."""
    with tempfile.TemporaryDirectory(prefix="mcr", dir="/tmp") as ray_folder:
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        script = f"ip link set lo up; exec {sys.executable} {HERE}/growing.py {tmp_path}"
        found = subprocess.run(
            [*NAMESPACE, "bash", "-c", script], env=environment, capture_output=True, text=True, check=False
        )
    assert found.returncode == 0, found.stderr[-2000:]
    # The third is asked for, and waits for a node that never comes.
    assert json.loads(found.stdout.splitlines()[-1]) == {"alive": [1, 2, 0], "asked": 3, "images": 8}
