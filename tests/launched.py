"""Ray clusters for tests, started on this machine by the very commands of `cluster/launcher/onprem.yaml`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from mcrise_ray.access import ensure_token

ROOT = Path(__file__).parents[1]
_TEMPLATE = yaml.safe_load((ROOT / "cluster/launcher/onprem.yaml").read_text())


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        url: of its dashboard.
        address: of Ray itself.
        metrics: ports of its nodes' metrics.
        token: its own.
        temporary: where Ray keeps its files.
    """

    url: str
    address: str
    metrics: tuple[int, ...]
    token: str
    temporary: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def launched(home: Path, *, cpus_of_head: int, worker: bool = False, tls: bool = False) -> Iterator[Cluster]:
    """A head node, and a worker node with two cores if asked for; `HOME` and what else it needs is set."""
    gcs, dashboard, metrics = free_port(), free_port(), (free_port(), free_port())
    temporary = Path(tempfile.mkdtemp(prefix="mcrise-", dir="/tmp"))  # Ray's sockets need a short path
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_TMPDIR", str(temporary))
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # lets Ray keep a loopback address
        patch.setenv("RAY_HEAD_IP", "127.0.0.1")
        patch.setenv("RAY_USE_TLS", "1" if tls else "0")
        path, _ = ensure_token()
        shutil.copy(ROOT / "cluster/launcher/node-env.sh", home)
        if tls:
            subprocess.run([ROOT / "cluster/launcher/make-ca.sh", home / "mcrise-tls"], check=True)
        head = _command("head_start_ray_commands", gcs, metrics[0])
        head = re.sub(r"--autoscaling-config=\S+", f"--dashboard-port={dashboard}", head)
        head = head.replace("--num-cpus=0", f"--num-cpus={cpus_of_head}")
        nodes = [_start(head, temporary / "head.log")]
        try:
            url = f"http://127.0.0.1:{dashboard}"
            _wait_for(url, nodes[0], temporary / "head.log")
            if worker:
                joins = _command("worker_start_ray_commands", gcs, metrics[1]) + " --num-cpus=2"
                # Ray takes the loopback address for a sign that there is one node only.
                joins = f"export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1; {joins}"
                nodes.append(_start(joins, temporary / "worker.log"))
            ports = metrics if worker else metrics[:1]
            yield Cluster(url, f"127.0.0.1:{gcs}", ports, path.read_text(), temporary)
        finally:
            family = [child for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
            for process in [*family, *nodes]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            for node in nodes:
                node.wait()
            shutil.rmtree(temporary, ignore_errors=True)


def _command(name: str, gcs: int, metrics: int) -> str:
    """The template's command, with free ports, in the environment of the tests."""
    (command,) = [line for line in _TEMPLATE[name] if "ray start" in line]
    for old, new in (
        (". ~/mcrise-venv/bin/activate; ", ""),
        ("ray start", f"{sys.executable} -m ray.scripts.scripts start"),
        (":6379", f":{gcs}"),
        ("--port=6379", f"--port={gcs}"),
        ("--metrics-export-port=8080", f"--metrics-export-port={metrics}"),
    ):
        command = command.replace(old, new)
    if "--head" in command:
        command += f" --ray-client-server-port={free_port()}"
    return f"{command} --dashboard-agent-listen-port={free_port()} --node-ip-address=127.0.0.1 --block"


def _start(command: str, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "w") as file:
        return subprocess.Popen(["bash", "-c", command], stdout=file, stderr=file)


def _wait_for(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers, and refuses us, who say no token."""
    until = time.monotonic() + 60
    while True:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        with suppress(requests.ConnectionError):
            if requests.get(f"{url}/api/version", timeout=5).status_code == 401:
                return
        time.sleep(0.3)
