"""Jobs on a cluster that asks for a token: submitted, followed, stopped, taken up again; who is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import requests
import yaml
from click.testing import Result
from launched import Cluster, free_port, launched
from PIL import Image
from reporting import Silent
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray import submission
from mcrise_ray.cli import app
from mcrise_ray.driver import join_cluster
from mcrise_ray.errors import ClusterError, SpecError
from mcrise_ray.jobfiles import load_job
from mcrise_ray.jobs import run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.progressfile import Progress, read_progress
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.submission import (
    JobStatus,
    SubmittedJob,
    _sent,
    find_job,
    list_jobs,
    submission_id,
    submit_job,
)

NETWORK = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})
SLOW = ModelSpec(model="blackboxes:slow_means", args={"seconds": "0.05"}, preprocessing={"size": (20, 24)})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with launched(tmp_path_factory.mktemp("home"), cpus_of_head=2) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
    (root / "bad.png").write_text("not a picture")
    return root


def job(images: Path, output: Path, **changes: object) -> JobSpec:
    settings = {"model": NETWORK, "explain": ExplainSpec(masks=300, grid=(4, 4)), "figures": 0}
    plain = {"precision": "float32", "batch_size": 64}  # bits are compared
    asked = {"actors": 1, "targets": (0, 2), **plain, **settings, **changes}
    return JobSpec(images=(str(images),), output=str(output), **asked)


def maps(output: Path) -> dict[tuple[str, int], np.ndarray]:
    return {(row.image_id, row.target): row.map for row in mr.read_results(str(output))}


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


# Who may come in.


def post(cluster: Cluster, token: str | None) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.post(
        f"{cluster.url}/api/jobs/", json={"entrypoint": "touch /tmp/owned"}, headers=headers, timeout=10
    )


def test_submission_without_a_token_or_with_a_wrong_one_is_refused(cluster: Cluster) -> None:
    assert post(cluster, None).status_code == 401
    assert post(cluster, "0" * 64).status_code == 403
    assert list_jobs(cluster.url) == []


def test_our_client_says_what_was_wrong(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterError, match=r"expects another token .*\(403\)") as wrong:
        submit_job(job(folder, tmp_path), cluster.url)
    assert "0000" not in str(wrong.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"expects a token, found none \(401\)"):
        submit_job(job(folder, tmp_path), cluster.url)


def test_only_this_machine_can_reach_it(cluster: Cluster) -> None:
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == int(cluster.url.rpartition(":")[2]):
                listening.add(address.split(":")[0])
    assert listening == {"0100007F"}, "the dashboard listens on 127.0.0.1"


@pytest.mark.slow  # 30 s: Ray tries for a while
def test_joining_with_a_wrong_token_is_refused(cluster: Cluster) -> None:
    join = "import sys; from mcrise_ray.driver import join_cluster; join_cluster(sys.argv[1])"
    refused = subprocess.run(
        [sys.executable, "-c", join, cluster.address],
        env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("mcrise_ray.errors.ClusterError: cannot join the cluster")
    assert "it lets nobody in without its token" in last


# Jobs.


def test_a_job_from_submission_to_results(
    cluster: Cluster, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    spec = job(folder, tmp_path / "out")
    submitted = submit_job(spec, cluster.url, metadata={"team": "signs"})
    assert submitted.id == submission_id(spec)
    again = submit_job(spec, cluster.url)
    assert again.id == submitted.id, "while it runs it is the same job"
    assert (submitted.is_new, again.is_new) == (True, False)
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
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    spec = job(folder, tmp_path / "out", model=SLOW, explain=ExplainSpec(masks=8000, grid=(4, 4)))
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    address = ("--address", cluster.url)
    began = mcrise("submit", file, *address)
    assert began.exit_code == 0, began.stderr
    until = time.monotonic() + 60
    while "model blackboxes:slow_means" not in find_job(file, cluster.url).logs():
        assert time.monotonic() < until
        time.sleep(0.5)
    with pytest.raises(ClusterError, match=rf"for this job alone, found {submission_id(spec)} writing to it"):
        submit_job(spec.model_copy(update={"batch_size": 32}), cluster.url)
    follow = subprocess.Popen(
        [sys.executable, "-c", "from mcrise_ray.cli import app; app()", "logs", file, "--follow", *address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follow.stdout is not None
    while "model blackboxes:slow_means" not in follow.stdout.readline():
        assert follow.poll() is None
    follow.send_signal(signal.SIGINT)
    _, said = follow.communicate(timeout=30)
    assert (follow.returncode, said.strip()) == (
        130,
        f"the job goes on; see: mcrise status {submission_id(spec)}, or stop it",
    )
    while (progress := read_progress(spec.output)) is None or progress.masks_done < 2000:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert "masks/s" in mcrise("status", file, *address).stdout
    stopped = mcrise("stop", file, *address)
    assert stopped.exit_code == 0, stopped.stderr
    assert "STOPPED" in stopped.stdout
    log = mcrise("logs", file, *address).stdout
    assert "submit the same job again" in log, log
    assert mr.read_results(spec.output).job["state"] == "stopped"
    again = mcrise("submit", file, *address, "--follow")
    assert again.exit_code == 1, "an image has an error row" + again.stdout + again.stderr
    assert f"{submission_id(spec)}-2" in again.stdout
    scored = re.search(r"3 images explained, 1 errors, 6 maps, (\d+) masks", again.stdout)
    assert scored, again.stdout
    assert int(scored[1]) <= 3 * 8000 - 2000, "it goes on from the sums that were saved"
    assert mr.read_results(spec.output).job["state"] == "done"
    quick = SLOW.model_copy(update={"args": {"seconds": "0"}})
    run_job(spec.model_copy(update={"model": quick, "actors": 0, "output": str(tmp_path / "once")}), Silent())
    once, twice = maps(tmp_path / "once"), maps(tmp_path / "out")
    assert len(once) == 6
    assert once.keys() == twice.keys()
    for key, value in once.items():
        np.testing.assert_array_equal(value, twice[key])
    listed = mcrise("list", *address).stdout
    assert re.search(rf"{submission_id(spec)} +STOPPED", listed)
    assert re.search(rf"{submission_id(spec)}-2 +SUCCEEDED", listed)


@pytest.mark.slow  # 20 s
def test_files_travel_along_and_failures_are_told(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
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
    state, reason = mcrise("status", broken.id, "--address", cluster.url).stdout.splitlines()[1:3]
    assert state.endswith("FAILED: Job entrypoint command failed with exit code 2"), "not the whole log"
    assert reason == f"reason     mcrise logs {broken.id}"


def test_progress_is_read_from_the_output(tmp_path: Path) -> None:
    assert read_progress(str(tmp_path)) is None
    (tmp_path / "progress.json").write_text(
        '{"state": "running", "images_done": 3, "images_total": null, "errors": 1, "masks_done": 900, '
        '"masks_per_second": 30.5, "seconds_left": null, "relative_error": 0.25, '
        '"updated": "2026-11-23T16:00:00+0000"}'
    )
    progress = read_progress(str(tmp_path))
    assert progress is not None
    assert (progress.images_done, progress.images_total, progress.relative_error) == (3, None, 0.25)
    whole = (tmp_path / "progress.json").read_text()
    for damaged in ('{"state": "run', whole.replace("2026-11-23", "yesterday")):
        (tmp_path / "progress.json").write_text(damaged)
        assert read_progress(str(tmp_path)) is None


def test_an_unknown_job_is_named(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"mcrise-none"):
        find_job("mcrise-none", cluster.url).status()
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job(folder, tmp_path).model_dump(mode="json")))
    with pytest.raises(ClusterError, match=rf"expected a submission of .*{submission_id(load_job(file))}"):
        find_job(file, cluster.url)


def test_a_misspelt_file_is_not_taken_for_an_id() -> None:
    with pytest.raises(SpecError, match=r"^jobs/jub\.yaml: cannot read it: No such file or directory$"):
        find_job("jobs/jub.yaml")


def test_status_shows_progress(cluster: Cluster, folder: Path, tmp_path: Path) -> None:
    spec = job(folder, tmp_path / "out", model=ModelSpec(model="blackboxes:broken"))
    submitted = submit_job(spec, cluster.url)
    before = mcrise("status", submitted.id, "--address", cluster.url)
    assert before.exit_code == 0, before.stderr
    assert "progress   none of its own yet" in before.stdout
    (tmp_path / "out").mkdir()

    def shown_of(job: str) -> str:
        updated = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        (tmp_path / "out" / "progress.json").write_text(
            '{"state": "running", "images_done": 3, "images_total": 10, "errors": 1, "masks_done": 1900, '
            '"masks_per_second": 30.5, "seconds_left": 75, "relative_error": 0.25, '
            f'"embedded": 4096, "updated": "{updated}", "job": "{job}"}}'
        )
        return mcrise("status", submitted.id, "--address", cluster.url).stdout

    assert "progress   none of its own yet" in shown_of(spec.model_copy(update={"batch_size": 32}).hash)
    shown = shown_of(spec.hash)
    assert "images     3 of 10, 1 errors" in shown
    assert "embedded   4,096 of queries and gallery, by this run" in shown
    assert "masks      1,900 by this run, 30 masks/s" in shown
    assert "error      0.250 of a map is noise" in shown
    submitted.stop()


@pytest.mark.parametrize(("state", "is_shown"), [("PENDING", False), ("RUNNING", False), ("FAILED", True)])
def test_what_the_attempt_before_has_said_is_not_told_of_the_next(
    tmp_path: Path, state: str, is_shown: bool
) -> None:
    now = time.time()  # once: between two looks at the clock, a busy machine may take a second

    def told(seconds_later: float) -> Progress | None:
        details = SimpleNamespace(
            submission_id="job-2",
            status=SimpleNamespace(value=state),
            message=None,
            metadata={"mcrise_output": str(tmp_path), "mcrise_hash": "abc"},
            start_time=int(1000 * (now - seconds_later)),
            end_time=None,
        )
        server = SimpleNamespace(get_job_info=lambda name: details)
        return SubmittedJob(server, "http://here", "job-2", str(tmp_path)).status().progress

    said = {"state": "running", "images_done": 3, "images_total": 10, "errors": 1, "masks_done": 1900}
    said |= {"masks_per_second": 30.5, "seconds_left": 75, "job": "abc"}
    said["updated"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now))
    (tmp_path / "progress.json").write_text(json.dumps(said))
    assert (told(-30) is not None) == is_shown
    assert told(30) is not None
    assert told(0) is not None, "its clock tells whole seconds"


def only_loopback() -> bool:
    return all(name == "lo" for name, state in psutil.net_if_stats().items() if state.isup)


@pytest.mark.slow  # 40 s: two nodes
@pytest.mark.skipif(not only_loopback(), reason="two nodes meet on 127.0.0.1 only in `unshare --net`")
def test_with_tls_and_a_worker_node_as_the_template_starts_them(
    folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home-tls")
    with launched(home, cpus_of_head=0, worker=True, tls=True) as cluster:
        host, _, port = cluster.address.partition(":")
        context = ssl.create_default_context(cafile=home / "mcrise-tls/ca.crt")
        context.load_cert_chain(home / "mcrise-tls/node.crt", home / "mcrise-tls/node.key")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            assert secure.version() in {"TLSv1.2", "TLSv1.3"}
        done = submit_job(job(folder, tmp_path / "out"), cluster.url)
        assert done.wait(90).state == "SUCCEEDED", done.logs()
    assert len(maps(tmp_path / "out")) == 6


# Without a cluster.


def test_asking_for_a_status_does_not_load_torch() -> None:
    check = "import sys, mcrise_ray.submission, ray.job_submission; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_id_is_of_the_work_and_its_output(tmp_path: Path) -> None:
    first = job(tmp_path, tmp_path / "out")
    same = first.model_copy(update={"actors": 7, "gpus_per_actor": 0.5, "figures": 3})
    assert submission_id(first) == submission_id(same)
    for change in ({"output": "/other"}, {"batch_size": 3}, {"explain": ExplainSpec(seed=1)}):
        assert submission_id(first) != submission_id(first.model_copy(update=change))


class FakeServer:
    """Ray's job server as far as ids go; `failures` are raised by the next submissions."""

    def __init__(self, *failures: str, ends: str = "RUNNING", taken: str | None = None) -> None:
        self.failures, self.ends, self.taken = list(failures), ends, taken
        self.jobs: dict[str, str] = {}
        self.requests: list[dict] = []

    def submit_job(self, **request: object) -> None:
        self.requests.append(request)
        if self.taken:
            self.jobs[self.taken] = "RUNNING"
        if self.failures:
            raise RuntimeError(self.failures.pop(0))
        assert request["submission_id"] not in self.jobs, "Ray's ids are unique"
        self.jobs[str(request["submission_id"])] = self.ends

    def list_jobs(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(value=state), metadata=None)
            for name, state in [("other", "RUNNING"), *self.jobs.items()]
        ]


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer(*getattr(request, "param", ()))
    monkeypatch.setattr(submission, "connect", lambda address, insecure: (fake, "http://here"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return fake


@pytest.mark.parametrize(
    ("state", "again", "names"),
    [
        ("PENDING", False, ["", "", ""]),
        ("RUNNING", True, ["", "", ""]),
        ("SUCCEEDED", False, ["", "", ""]),
        ("SUCCEEDED", True, ["", "-2", "-3"]),
        ("STOPPED", False, ["", "-2", "-3"]),
        ("FAILED", False, ["", "-2", "-3"]),
    ],
)
def test_which_submissions_are_one_job(
    server: FakeServer, tmp_path: Path, state: str, again: bool, names: list[str]
) -> None:
    server.ends = state
    spec = job(tmp_path, tmp_path / "out")
    found = [submit_job(spec, again=again).id for _ in names]
    assert found == [submission_id(spec) + name for name in names]
    assert len(server.jobs) == len(set(names))


def test_trying_errors_again_is_asked_of_the_driver(server: FakeServer, tmp_path: Path) -> None:
    server.ends = "SUCCEEDED"
    spec = job(tmp_path, tmp_path / "out")
    assert [submit_job(spec, retry_errors=retry).id for retry in (False, False, True)] == [
        submission_id(spec),
        submission_id(spec),
        f"{submission_id(spec)}-2",
    ]
    assert [request["entrypoint"] for request in server.requests] == [
        "python -m mcrise_ray.driver",
        "python -m mcrise_ray.driver --retry-errors",
    ]


@pytest.mark.parametrize(
    ("state", "errors", "code"),
    [("SUCCEEDED", 0, 0), ("SUCCEEDED", 2, 1), ("SUCCEEDED", None, 0), ("FAILED", 2, 2), ("STOPPED", 2, 130)],
)
def test_following_a_job_ends_with_the_code_that_it_would_have_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, errors: int | None, code: int
) -> None:
    progress = None if errors is None else Progress("done", 3, 5, errors, 900, 30.0, 0.0, "")
    ended = JobStatus("job", state, "", "out", progress, None, None)
    submitted = SimpleNamespace(
        id="job", output="out", is_new=True, follow=lambda: iter(["a line\n"]), wait=lambda: ended
    )
    monkeypatch.setattr(submission, "submit_job", lambda *_, **__: submitted)
    done = mcrise("submit", tmp_path / "job.yaml", "--follow")
    assert (done.exit_code, done.stdout) == (code, "job writes to out\na line\n")


def test_two_who_submit_at_once_share_the_job(server: FakeServer, tmp_path: Path) -> None:
    spec = job(tmp_path, tmp_path / "out")
    server.failures, server.taken = ["id already exists"], submission_id(spec)
    assert submit_job(spec).id == submission_id(spec)
    assert len(server.requests) == 1


@pytest.mark.parametrize("server", [["No available agent to submit job"] * 3], indirect=True)
def test_a_cluster_that_has_only_just_started_is_waited_for(server: FakeServer, tmp_path: Path) -> None:
    submit_job(job(tmp_path, tmp_path / "out"))
    assert len(server.requests) == 4


@pytest.mark.parametrize("server", [["out of luck"]], indirect=True)
def test_other_refusals_are_told(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"^http://here: out of luck$"):
        submit_job(job(tmp_path, tmp_path / "out"))


class Tunnel(FakeServer):
    """A job server behind a tunnel that breaks."""

    def __init__(self, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers, self.asked = list(answers), 0

    def get_job_info(self, name: str) -> SimpleNamespace:
        self.asked += 1
        answer = self.answers.pop(0)
        if answer == "broken":
            raise ConnectionError("connection refused")
        return SimpleNamespace(
            submission_id=name,
            status=SimpleNamespace(value=answer),
            message=None,
            metadata=None,
            start_time=None,
            end_time=None,
        )


def test_waiting_outlasts_a_tunnel_that_breaks_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tunnel = Tunnel(["RUNNING", *["broken"] * 5, "RUNNING", *["broken"] * 5, "SUCCEEDED"])
    assert SubmittedJob(tunnel, "http://here", "job", "").wait().state == "SUCCEEDED"
    gone = Tunnel(["RUNNING", *["broken"] * 9])
    with pytest.raises(ClusterError, match=r"^http://here: connection refused$"):
        SubmittedJob(gone, "http://here", "job", "").wait()
    assert gone.asked == 7


def test_stopping_a_job_that_waits_says_when_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a driver that asks for more than there is: Ray can tell a job to stop only once it has begun."""
    stopped: list[str] = []
    monkeypatch.setattr(Tunnel, "stop_job", lambda server, name: stopped.append(name), raising=False)
    for state, told in (
        ("PENDING", r"^job has not begun, .* stopped as soon as it begins"),
        ("RUNNING", "to end within"),
    ):
        with pytest.raises(ClusterError, match=told):
            SubmittedJob(Tunnel([state] * 3), "http://here", "job", "").stop(timeout=-1)
    assert stopped == ["job", "job"]


def test_what_a_submission_asks_for(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    spec = job(tmp_path / "sent" / "images", tmp_path / "out")
    submit_job(
        spec,
        working_dir=tmp_path / "sent",
        uv=["timm"],
        metadata={"team": "signs"},
        entrypoint_num_cpus=0.5,
        entrypoint_resources={"disk": 1},
    )
    (request,) = server.requests
    environment = request["runtime_env"]
    assert (environment["working_dir"], environment["uv"]) == (str(tmp_path / "sent"), ["timm"])
    assert "pip" not in environment
    assert json.loads(environment["env_vars"]["MCRISE_JOB"])["images"] == ["images"]
    assert environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60", "Ray kills after 3 s otherwise"
    assert request["metadata"] == {
        "team": "signs",
        "mcrise_output": str(tmp_path / "out"),
        "mcrise_job": submission_id(spec),
        "mcrise_hash": spec.model_copy(update={"images": ("images",)}).hash,  # as the driver reads it
    }
    assert (request["entrypoint_num_cpus"], request["entrypoint_resources"]) == (0.5, {"disk": 1})
    assert request["entrypoint"] == "python -m mcrise_ray.driver"


def test_a_job_too_long_for_the_environment_is_refused(server: FakeServer, tmp_path: Path) -> None:
    spec = job(tmp_path, tmp_path / "out")
    many = spec.model_copy(update={"images": tuple(f"/data/{n:04d}.png" for n in range(9000))})
    with pytest.raises(SpecError, match=r"at most 100,000 bytes.*manifest"):
        submit_job(many)
    assert server.requests == []


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "ftp://host", "http://"])
def test_addresses_that_are_no_job_servers(tmp_path: Path, address: str) -> None:
    with pytest.raises(ClusterError, match="expected the address of a dashboard"):
        submit_job(job(tmp_path, tmp_path / "out"), address)


def test_nothing_at_an_address_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot reach it: ConnectionError; is there a tunnel"):
        submit_job(job(tmp_path, tmp_path / "out"), f"127.0.0.1:{free_port()}")


def test_the_dashboard_is_told_from_ray_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """At which it would try to join for ever."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as dashboard:
        Thread(target=dashboard.handle_request, daemon=True).start()
        address = f"127.0.0.1:{dashboard.server_port}"
        with pytest.raises(ClusterError, match=rf"^expected a Ray at {address}, found a web server; .* 6379"):
            join_cluster(address)


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


def test_paths_that_travel_are_relative_to_the_folder_that_holds_them(tmp_path: Path) -> None:
    root = tmp_path / "sent"
    root.mkdir()
    images = (
        f"{root}/images",
        str(root),
        f"imagefolder:{root}/train",
        f"torchvision:GTSRB?root={root}&split=test",
        f"{root}-other/a.png",
        "s3://bucket/a.png",
    )
    model = ModelSpec(model=f"hf:{root}/vit", classes=f"{root}/classes.txt", weights="/shared/w.safetensors")
    spec = job(tmp_path, tmp_path / "out", model=model).model_copy(update={"images": images})
    sent = _sent(spec, root)
    assert sent["images"] == [
        "images",
        ".",
        "imagefolder:train",
        "torchvision:GTSRB?root=.&split=test",
        f"{root}-other/a.png",
        "s3://bucket/a.png",
    ]
    assert sent["model"]["model"] == "hf:vit"
    assert sent["model"]["classes"] == "classes.txt"
    assert sent["model"]["weights"] == "/shared/w.safetensors"
    assert sent["output"] == str(tmp_path / "out")
    assert _sent(spec, None) == spec.model_dump(mode="json")
    gallery = {"gallery": (f"{root}/gallery", "s3://b/g"), "matches": "named", "pairs": f"{root}/pairs.csv"}
    plain = {**spec.model_dump(), "kind": "reid", "model": {"model": "m:f"}, "targets": "predicted"}
    people = JobSpec(**{**plain, "reid": gallery})
    assert _sent(people, root)["reid"] == {
        **people.model_dump(mode="json")["reid"],
        "gallery": ["gallery", "s3://b/g"],
        "pairs": "pairs.csv",
    }
    with pytest.raises(SpecError, match=r"reid.gallery_store: expected a URL or a folder that the cluster"):
        _sent(JobSpec(**{**plain, "reid": {**gallery, "gallery_store": f"{root}/store"}}), root)
    JobSpec(**sent)


def test_an_output_that_would_vanish_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"output: expected a URL or a folder that the cluster shares"):
        submit_job(job(tmp_path, tmp_path / "out"), "127.0.0.1:1", working_dir=tmp_path)


def test_secrets_do_not_leave(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"output: expected no secrets"):
        submit_job(job(tmp_path, Path("x")).model_copy(update={"output": "s3://k:v@b/x"}), "127.0.0.1:1")
