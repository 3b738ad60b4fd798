"""Jobs on a cluster that asks for a token: submitted, followed, stopped, taken up again; who is refused."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray.cli import app
from mcrise_ray.errors import ClusterError, SpecError
from mcrise_ray.jobfiles import load_job
from mcrise_ray.jobs import JobSpec, run_job
from mcrise_ray.loading import ModelSpec
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.submission import find_job, list_jobs, read_progress, submission_id, submit_job


class Silent:
    """A reporter that says nothing."""

    def start(self, images: int | None, masks_per_image: int) -> None: ...

    def masks_done(self, masks: int) -> None: ...

    def image_done(self, failed: bool) -> None: ...

    def note(self, text: str) -> None: ...


ROOT = Path(__file__).parents[1]
LAUNCHER = yaml.safe_load((ROOT / "cluster/launcher/onprem.yaml").read_text())
NETWORK = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})
SLOW = ModelSpec(model="blackboxes:slow", preprocessing={"size": (20, 24)})


@dataclass(frozen=True)
class RunningCluster:
    url: str
    token: str
    home: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A head node started by the launcher's own command, with a token, on this machine alone."""
    home = tmp_path_factory.mktemp("home")
    tmp = Path(f"/tmp/mcrise-sub-{os.getpid()}")  # Ray's sockets need a short path
    tmp.mkdir(exist_ok=True)
    dashboard = free_port()
    (command,) = [line for line in LAUNCHER["head_start_ray_commands"] if "ray start" in line]
    command = command.replace(". ~/mcrise-venv/bin/activate;", "").replace("--num-cpus=0", "--num-cpus=2")
    command = command.replace("--port=6379", f"--port={free_port()} --dashboard-port={dashboard}")
    command = command.replace("--metrics-export-port=8080", f"--metrics-export-port={free_port()}")
    command = re.sub(r"--autoscaling-config=\S+", "--node-ip-address=127.0.0.1 --block", command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_TMPDIR", str(tmp))
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        assert mcrise("token").exit_code == 0
        (home / "node-env.sh").write_text((ROOT / "cluster/launcher/node-env.sh").read_text())
        with open(tmp / "head.log", "w") as log:
            head = subprocess.Popen(
                [
                    "bash",
                    "-c",
                    command.replace("ray start", f"{sys.executable} -m ray.scripts.scripts start"),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{dashboard}"
        try:
            until = time.monotonic() + 60
            while not answers(url):
                assert head.poll() is None, (tmp / "head.log").read_text()
                assert time.monotonic() < until, (tmp / "head.log").read_text()
                time.sleep(0.3)
            yield RunningCluster(url, (home / ".ray/auth_token").read_text(), home)
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/api/version", timeout=5).status_code == 401
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
    (root / "bad.png").write_text("not a picture")
    return root


def job(images: Path, output: Path, **changes: object) -> JobSpec:
    settings = {"model": NETWORK, "explain": ExplainSpec(masks=300, grid=(4, 4)), "figures": 0, **changes}
    return JobSpec(images=(str(images),), output=str(output), **{"actors": 1, "targets": (0, 2), **settings})


def maps(output: Path) -> dict[tuple[str, int], np.ndarray]:
    return {(row.image_id, row.target): row.map for row in mr.read_results(str(output))}


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


# Who may come in.


def post(cluster: RunningCluster, token: str | None) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.post(
        f"{cluster.url}/api/jobs/", json={"entrypoint": "touch /tmp/owned"}, headers=headers, timeout=10
    )


def test_submission_without_a_token_or_with_a_wrong_one_is_refused(cluster: RunningCluster) -> None:
    assert post(cluster, None).status_code == 401
    assert post(cluster, "0" * 64).status_code == 403
    assert list_jobs(cluster.url) == []


def test_our_client_says_what_was_wrong(
    cluster: RunningCluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterError, match=r"expects another token .*\(403\)") as wrong:
        submit_job(job(folder, tmp_path), cluster.url)
    assert "0000" not in str(wrong.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"expects a token, found none \(401\)"):
        submit_job(job(folder, tmp_path), cluster.url)


def test_only_this_machine_can_reach_it(cluster: RunningCluster) -> None:
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == int(cluster.url.rpartition(":")[2]):
                listening.add(address.split(":")[0])
    assert listening == {"0100007F"}, "the dashboard listens on 127.0.0.1"


# Jobs.


def test_a_job_from_submission_to_results(
    cluster: RunningCluster, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    spec = job(folder, tmp_path / "out")
    submitted = submit_job(spec, cluster.url, metadata={"team": "signs"})
    assert submitted.id == submission_id(spec)
    assert submit_job(spec, cluster.url).id == submitted.id, "while it runs it is the same job"
    lines = "".join(submitted.follow())
    done = submitted.wait(60)
    assert (done.state, done.has_ended) == ("SUCCEEDED", True), lines
    assert "3 images explained, 1 errors, 6 maps, 900 masks" in lines
    assert submit_job(spec, cluster.url).id == submitted.id, "and after it has succeeded"
    run_job(job(folder, tmp_path / "here", actors=0), Silent())
    here, there = maps(tmp_path / "here"), maps(tmp_path / "out")
    assert len(there) == 6
    assert here.keys() == there.keys()
    for key, value in here.items():
        np.testing.assert_array_equal(value, there[key])
    assert len(submitted.results().errors) == 1
    stored = json.dumps(submitted.results().job) + submitted.logs() + repr(submitted.status())
    known = requests.get(
        f"{cluster.url}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}, timeout=10
    ).text
    assert submitted.id in known
    shown = capfd.readouterr()
    for text in (stored, known, shown.out, shown.err):
        assert cluster.token not in text


@pytest.mark.slow  # 25 s: two drivers, one after the other
def test_a_stopped_job_is_taken_up_by_the_next_submission(
    cluster: RunningCluster, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    spec = job(folder, tmp_path / "out", model=SLOW, explain=ExplainSpec(masks=2000, grid=(4, 4)))
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    address = ("--address", cluster.url)
    began = mcrise("submit", file, *address)
    assert began.exit_code == 0, began.stderr
    until = time.monotonic() + 60
    while "model blackboxes:slow" not in find_job(file, cluster.url).logs():
        assert time.monotonic() < until
        time.sleep(0.5)
    with pytest.raises(ClusterError, match=rf"for this job alone, found {submission_id(spec)} writing to it"):
        submit_job(spec.model_copy(update={"batch_size": 32}), cluster.url)
    stopped = mcrise("stop", file, *address)
    assert stopped.exit_code == 0, stopped.stderr
    assert "STOPPED" in stopped.stdout
    log = mcrise("logs", file, *address).stdout
    assert "submit the same job again" in log, log
    assert mr.read_results(str(tmp_path / "out")).job["state"] != "done"
    again = mcrise("submit", file, *address, "--follow")
    assert again.exit_code == 0, again.stdout + again.stderr
    assert f"{submission_id(spec)}-2" in again.stdout
    assert len(maps(tmp_path / "out")) == 6
    assert mr.read_results(str(tmp_path / "out")).job["state"] == "done"
    listed = mcrise("list", *address).stdout
    assert re.search(rf"{submission_id(spec)} +STOPPED", listed)
    assert re.search(rf"{submission_id(spec)}-2 +SUCCEEDED", listed)


@pytest.mark.slow  # 20 s
def test_files_travel_along_and_failures_are_told(
    cluster: RunningCluster, folder: Path, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    (sent / "images").mkdir(parents=True)
    (sent / "images" / "a.png").write_bytes((folder / "a.png").read_bytes())
    values = job(folder, tmp_path / "out").model_dump(mode="json")
    (sent / "job.json").write_text(json.dumps({**values, "images": ["images"]}))
    done = submit_job(sent / "job.json", cluster.url, working_dir=sent)
    (sent / "images" / "a.png").unlink()  # what is read there is the copy
    assert done.wait(60).state == "SUCCEEDED", done.logs()
    assert {row.uri for row in done.results()} == {"images/a.png"}
    broken = submit_job(
        job(folder, tmp_path / "other", model=ModelSpec(model="blackboxes:broken")), cluster.url
    )
    assert broken.wait(60).state == "FAILED"
    assert "error: --model blackboxes:broken raised RuntimeError: no such checkpoint" in broken.logs()


def test_progress_is_read_from_the_output(cluster: RunningCluster, tmp_path: Path) -> None:
    assert read_progress(str(tmp_path)) is None
    (tmp_path / "progress.json").write_text(
        '{"state": "running", "images_done": 3, "images_total": null, "errors": 1, "masks_done": 900, '
        '"masks_per_second": 30.5, "seconds_left": null, "relative_error": 0.25, "updated": 1e9}'
    )
    progress = read_progress(str(tmp_path))
    assert progress is not None
    assert (progress.images_done, progress.images_total, progress.relative_error) == (3, None, 0.25)
    (tmp_path / "progress.json").write_text('{"state": "run')
    assert read_progress(str(tmp_path)) is None


def test_an_unknown_job_is_named(cluster: RunningCluster, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"mcrise-none"):
        find_job("mcrise-none", cluster.url).status()
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job(folder, tmp_path).model_dump(mode="json")))
    with pytest.raises(ClusterError, match=rf"expected a submission of .*{submission_id(load_job(file))}"):
        find_job(file, cluster.url)


# Without a cluster.


def test_the_id_is_of_the_work_and_its_output(tmp_path: Path) -> None:
    first = job(tmp_path, tmp_path / "out")
    same = first.model_copy(update={"actors": 7, "gpus_per_actor": 0.5, "figures": 3})
    assert submission_id(first) == submission_id(same)
    for change in ({"output": "/other"}, {"batch_size": 3}, {"explain": ExplainSpec(seed=1)}):
        assert submission_id(first) != submission_id(first.model_copy(update=change))


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "ftp://host", "http://"])
def test_addresses_that_are_no_job_servers(tmp_path: Path, address: str) -> None:
    with pytest.raises(ClusterError, match="expected the address of a dashboard"):
        submit_job(job(tmp_path, tmp_path / "out"), address)


def test_nothing_at_an_address_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot reach it: ConnectionError; is there a tunnel"):
        submit_job(job(tmp_path, tmp_path / "out"), f"127.0.0.1:{free_port()}")


def test_other_machines_need_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ClusterError, match=r"expected a token for http://ray\.invalid:8265.*--insecure"):
        submit_job(job(tmp_path, tmp_path / "out"), "ray.invalid:8265")
    with pytest.raises(ClusterError, match="cannot reach it"):
        submit_job(job(tmp_path, tmp_path / "out"), "ray.invalid:8265", insecure=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metadata": {"api_token": "x"}}, r"metadata: expected no secrets, .*found api_token"),
        ({"working_dir": "/nowhere"}, r"expected a folder as working directory, found none at /nowhere"),
    ],
)
def test_submissions_that_make_no_sense(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        submit_job(job(tmp_path, tmp_path / "out"), "127.0.0.1:1", **arguments)


def test_an_output_that_would_vanish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"output: expected a URL or a folder that the cluster shares"):
        submit_job(job(tmp_path, tmp_path / "out"), "127.0.0.1:1", working_dir=tmp_path)


def test_secrets_do_not_leave(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"output: expected no secrets"):
        submit_job(job(tmp_path, Path("x")).model_copy(update={"output": "s3://k:v@b/x"}), "127.0.0.1:1")
