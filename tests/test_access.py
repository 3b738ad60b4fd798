"""The token of this user, and the machines that it may be sent to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mcrise_ray import cli, cluster
from mcrise_ray.access import ensure_token, find_token, is_loopback, token_for, token_path
from mcrise_ray.cli import app
from mcrise_ray.errors import ClusterError
from mcrise_ray.jobspec import ActorRange, JobSpec


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_token_is_made_for_this_user_alone(home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path, is_new = ensure_token()
    finally:
        os.umask(before)
    assert (path, is_new) == (home / ".ray" / "auth_token", True)
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    token = path.read_text()
    assert len(token) == 64
    assert find_token() == token
    assert ensure_token() == (path, False)
    assert path.read_text() == token


def test_ray_finds_the_same_token(home: Path) -> None:
    from ray._private.authentication import authentication_token_setup as of_ray

    assert of_ray._get_default_token_path() == token_path()


def test_a_token_that_others_could_read_is_narrowed(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = ensure_token()
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert find_token() == path.read_text()
    assert mode(path) == 0o600
    assert "others could read the token" in caplog.text
    assert path.read_text() not in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_left_alone(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = ensure_token()
    path.chmod(0o644)
    os.chown(path, 12345, 12345)
    assert find_token() == path.read_text()
    assert mode(path) == 0o644
    assert "belongs to another user" in caplog.text


def test_where_a_token_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    ensure_token()
    other = home / "other"
    other.write_text(" from a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert find_token() == "from a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " from the environment ")
    assert find_token() == "from the environment"


def test_a_token_that_cannot_be_read_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("\n")
    with pytest.raises(ClusterError, match=r"auth_token, found an empty file; remove it"):
        find_token()
    with pytest.raises(ClusterError, match=r"found an empty file"):
        ensure_token()
    (home / ".ray" / "auth_token").write_bytes(b"\xff")
    with pytest.raises(ClusterError, match=r"cannot read the token in .*UnicodeDecodeError"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    with pytest.raises(ClusterError, match=r"no such file; check RAY_AUTH_TOKEN_PATH"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/proc/none/token")
    with pytest.raises(ClusterError, match=r"cannot make a token in /proc/none/token"):
        ensure_token()


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:8265", True),
        ("http://127.9.9.9:8265", True),
        ("http://localhost", True),
        ("https://[::1]:8265/", True),
        ("[::1]:6379", True),
        ("ray://localhost:10001", True),
        ("10.0.0.1:8265", False),
        ("http://0.0.0.0:8265", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://user@10.0.0.1", False),
        ("http://127.0.0.1@10.0.0.1", False),
        ("[::ffff:10.0.0.1]:80", False),
        ("", False),
    ],
)
def test_which_addresses_are_of_this_machine(address: str, here: bool) -> None:
    assert is_loopback(address) is here


def test_other_machines_need_a_token_or_our_word(caplog: pytest.LogCaptureFixture) -> None:
    assert token_for("127.0.0.1:8265") is None
    with pytest.raises(ClusterError, match=r"expected a token for 10\.0\.0\.1:8265, .*--insecure"):
        token_for("10.0.0.1:8265")
    assert token_for("10.0.0.1:8265", insecure=True) is None
    ensure_token()
    caplog.clear()
    assert token_for("https://10.0.0.1:8265") == find_token()
    assert caplog.text == ""
    assert token_for("http://10.0.0.1:8265") == find_token()
    assert "in the clear" in caplog.text


# Ray on this machine alone.


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The mode of the token's file each time that Ray starts; None where there is no file."""
    modes: list[int | None] = []

    def start(**_: object) -> None:
        modes.append(mode(token_path()) if token_path().exists() else None)

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    return modes


@pytest.mark.parametrize("left_behind", [None, 0o644, 0o600])
def test_local_mode_starts_with_a_token_for_this_user_alone(
    home: Path, started: list[int | None], left_behind: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray itself leaves one that everyone may read, where the umask says so."""
    if left_behind is not None:
        ensure_token()[0].chmod(left_behind)
    before = os.umask(0o000)
    try:
        with cluster.local_ray(1):
            pass
    finally:
        os.umask(before)
    assert started == [0o600]
    assert ("others could read the token" in caplog.text) is (left_behind == 0o644)


def test_local_mode_makes_no_file_beside_a_token_of_the_environment(
    started: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with cluster.local_ray(1):
        pass
    assert started == [None]


def test_local_mode_does_not_start_with_a_useless_token(home: Path, started: list[int | None]) -> None:
    ensure_token()[0].write_text("")
    with pytest.raises(ClusterError, match=r"auth_token, found an empty file"), cluster.local_ray(1):
        pass
    assert started == []


# The command line.


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_never_shows_a_token(home: Path) -> None:
    made, again = mcrise("token"), mcrise("token")
    assert "made just now" in made.stdout
    assert "there already" in again.stdout
    token = (home / ".ray" / "auth_token").read_text()
    assert token not in made.output + again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metadata", "x"), "--metadata: expected KEY=VALUE, found 'x'"),
        (("--entrypoint-resource", "a=b"), "--entrypoint-resource: expected NAME=AMOUNT"),
        (("--address", "10.0.0.1:8265"), "expected a token for http://10.0.0.1:8265"),
        (("--address", "ray://x:1"), "expected the address of a dashboard"),
    ],
)
def test_submissions_that_cannot_be_are_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "job.yaml").write_text("images: x\nmodel: {model: m:f}\noutput: out\n")
    done = mcrise("submit", tmp_path / "job.yaml", *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_joining_another_machine_needs_a_token(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("images: x\nmodel: {model: m:f}\noutput: out\n")
    done = mcrise("run", tmp_path / "job.yaml", "--address", "10.0.0.1:6379")
    assert done.exit_code == 2
    assert "expected a token for 10.0.0.1:6379" in done.stderr


def test_an_audit_on_a_cluster_has_paths_that_its_machines_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actors work in folders of their own."""
    asked: list[tuple[JobSpec, str | None, bool]] = []

    def note(
        job: JobSpec, log: str, overwrite: bool, retry_errors: bool, address: str | None, insecure: bool
    ) -> None:
        asked.append((job, address, insecure))

    monkeypatch.setattr(cli, "_run_and_report", note)
    monkeypatch.chdir(tmp_path)
    given = ("audit", "images", "--model", "m:f", "--weights", "w.safetensors", "--output", "out")
    mcrise(*given, "--address", "10.0.0.1:6379", "--insecure", "--actors", "2-8")
    mcrise(*given)
    (there, address, insecure), (here, none, _) = asked
    assert (there.images, there.model.weights, there.output) == (
        (f"{tmp_path}/images",), f"{tmp_path}/w.safetensors", f"{tmp_path}/out",
    )  # fmt: skip
    assert (address, insecure, there.actors) == ("10.0.0.1:6379", True, ActorRange(min=2, max=8))
    assert (here.images, here.output, none, here.actors) == (("images",), "out", None, "auto")


def test_a_job_file_runs_here(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((20, 24, 3), 9, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "job.yaml").write_text(
        "images: [a.png]\noutput: out\nfigures: 0\nactors: 0\nexplain: {masks: 64}\n"
        "model: {model: 'blackboxes:small_network', preprocessing: {size: [20, 24]}}\n"
    )
    done = mcrise("run", tmp_path / "job.yaml")
    assert done.exit_code == 0, done.stderr
    assert "1 images explained, 0 errors, 1 maps, 64 masks" in done.stdout
    assert (tmp_path / "out" / "job.json").is_file()
