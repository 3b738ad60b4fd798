"""Jobs end to end: in process and on Ray, good images and bad ones, read back as a user would."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import psutil
import pytest
import ray
import torch
import torchvision
from click.testing import Result
from PIL import Image
from reporting import Silent
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray import cluster, errors, jobs, render, worker
from mcrise_ray.cli import app
from mcrise_ray.cluster import RayExecutor
from mcrise_ray.explained import load_explained
from mcrise_ray.guide import Guide
from mcrise_ray.jobs import draw_figures, run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.rows import ErrorRow
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.store import Store
from mcrise_ray.tasks import Call

NETWORK = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})
SPEC = ExplainSpec(masks=300, grid=(4, 4))


PLAIN = {"precision": "float32", "batch_size": 64}  # bits are compared


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Actors import `blackboxes` from here; Ray's sockets need a short path.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["RAY_TMPDIR"] = f"/tmp/mcrise-test-{os.getpid()}"
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)
    with cluster.local_ray(cpus=8):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images and four bad ones."""
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "deep/b.jpg", "deep/er/c.bmp"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name)
    whole = (root / "deep/b.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not a picture")
    (root / "empty.png").write_bytes(b"")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "notes.txt").write_text("not listed")
    return root


def job(images: Path, output: Path, **changes: object) -> JobSpec:
    settings = {
        "model": NETWORK,
        "explain": SPEC,
        "actors": 0,
        "figures": 0,
        "targets": (0, 3),
        **PLAIN,
        **changes,
    }
    return JobSpec(images=(str(images),), output=str(output), **settings)


def maps(output: Path) -> dict[tuple[str, int], np.ndarray]:
    return {(row.image_id, row.target): row.map for row in mr.read_results(str(output))}


def test_a_job_needs_no_reporter_and_one_source_no_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**job(folder, tmp_path / "out").model_dump(), "images": str(folder)}
    assert mr.run_job(JobSpec(**values)).images == 3
    assert capsys.readouterr() == ("", "")


def test_few_images_are_counted_though_the_first_takes_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = jobs.ImageSource.__iter__

    def slowly(source: jobs.ImageSource) -> Iterator[jobs.ImageRef]:
        time.sleep(0.6)
        yield from listed(source)

    monkeypatch.setattr(jobs.ImageSource, "__iter__", slowly)
    images, count = jobs._count_if_short(jobs.ImageSource(str(folder)))
    assert count == len(list(images)) == 7


def test_every_image_ends_in_maps_or_errors(folder: Path, tmp_path: Path) -> None:
    reporter = Silent()
    summary = run_job(job(folder, tmp_path / "out"), reporter)
    results = mr.read_results(tmp_path / "out")
    assert (summary.images, summary.errors, summary.rows, summary.masks) == (3, 4, 6, 900)
    assert {row.image_id for row in results} == {"a.png", "deep/b.jpg", "deep/er/c.bmp"}
    assert {row.image_id: row.stage for row in results.errors} == dict.fromkeys(
        ["cut.jpg", "text.png", "empty.png", "gone.png"], "read"
    )
    messages = {row.image_id: row.error for row in results.errors}
    assert "truncated" in messages["cut.jpg"]
    assert "not an image" in messages["text.png"]
    assert "no such file" in messages["gone.png"]
    assert all(row.uri in row.error and "\n" not in row.error for row in results.errors)
    assert results.job["state"] == "done"
    assert results.job["counts"]["images"] == 3
    assert results.job["spec"]["explain"]["masks"] == 300
    assert reporter.masks == 900


def test_errors_are_tried_again_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_job(job(folder, output), Silent())
    before = maps(output)
    Image.new("RGB", (24, 20), "red").save(folder / "cut.jpg")
    assert run_job(job(folder, output), Silent()).errors == 4  # they are final, unless
    summary = run_job(job(folder, output), Silent(), retry_errors=True)
    assert (summary.images, summary.errors, summary.rows, summary.earlier) == (4, 3, 8, 3)
    results = mr.read_results(str(output))
    assert sorted(row.image_id for row in results.errors) == ["empty.png", "gone.png", "text.png"]
    after = maps(output)
    assert after.keys() - before.keys() == {("cut.jpg", 0), ("cut.jpg", 3)}
    assert all((after[key] == value).all() for key, value in before.items())
    assert results.job["counts"] | {"masks": 0} == asdict(jobs.Counts(images=4, errors=3, rows=8, earlier=3))


def test_errors_of_images_that_are_no_more_are_gone_once_they_are_tried_again(
    folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run_job(job(folder, output), Silent())
    for name in ("cut.jpg", "text.png", "empty.png", "gone.png"):
        (folder / name).unlink()
    assert run_job(job(folder, output), Silent(), retry_errors=True).errors == 0
    results = mr.read_results(str(output))
    assert (results.errors, results.job["state"], results.job["counts"]["errors"]) == ([], "done", 0)
    assert run_job(job(folder, output), Silent()).errors == 0


def test_a_job_whose_last_words_were_lost_is_done_in_the_end(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_job(job(folder, output), Silent())
    content = json.loads((output / "job.json").read_text())
    (output / "job.json").write_text(json.dumps({**content, "state": "running"}))
    assert run_job(job(folder, output), Silent()).earlier == 7
    assert mr.read_results(str(output)).job["state"] == "done"


def test_errors_stay_where_the_model_cannot_be_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run_job(job(folder, output), Silent())
    monkeypatch.setattr(jobs, "Worker", lambda setup: Broken())
    with pytest.raises(errors.ModelError, match="gone since"):
        run_job(job(folder, output), Silent(), retry_errors=True)
    assert len(mr.read_results(str(output)).errors) == 4


class Broken:
    def load(self, *_: object) -> None:
        raise errors.ModelError("gone since")


def test_rows_say_what_explain_says(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out", standard_error=True), Silent())
    model = mr.load_model(NETWORK)
    for row in mr.read_results(str(tmp_path / "out")):
        image = model.prepare(mr.read_image(row.uri))
        result = mr.explain(model, image, [row.target], SPEC)
        np.testing.assert_allclose(row.map, result.maps[0], atol=1e-6)
        np.testing.assert_allclose(row.baseline, result.baseline[0], atol=1e-6)
        np.testing.assert_allclose(row.standard_error, result.standard_error[0], atol=1e-6)
        np.testing.assert_allclose(row.score, result.score[0], atol=1e-6)
        assert row.relative_error == pytest.approx(result.relative_error[0], rel=1e-5)
        assert (row.height, row.width, row.masks, row.method) == (20, 24, 300, "mc-rise")
        assert (row.target_role, row.target_name, row.spec_hash) == ("asked", None, SPEC.hash)


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_actors_give_the_bits_of_one_process(
    local_ray: None, folder: Path, tmp_path: Path, actors: int
) -> None:
    """The partition law: one thread each, any number of actors."""
    run_job(job(folder, tmp_path / "alone"), Silent())
    run_job(job(folder, tmp_path / "ray", actors=actors), Silent())
    alone, together = maps(tmp_path / "alone"), maps(tmp_path / "ray")
    assert len(alone) == 6
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        np.testing.assert_array_equal(value, together[key])
    assert len(mr.read_results(str(tmp_path / "ray")).errors) == 4


def test_picked_masks_are_the_same_with_and_without_actors(
    local_ray: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partition law where every stage waits for the one before it; guides are stored once each."""
    stored: list[weakref.ref[Guide]] = []
    guided: list[Call] = []
    put, submit = ray.put, RayExecutor.submit

    def counted_put(guide: Guide) -> ray.ObjectRef:
        stored.append(weakref.ref(guide))
        return put(guide)

    def counted_submit(self: RayExecutor, actor: int, call: Call) -> None:
        if call.guide is not None:
            guided.append(call)
        submit(self, actor, call)

    monkeypatch.setattr(ray, "put", counted_put)
    monkeypatch.setattr(RayExecutor, "submit", counted_submit)
    monkeypatch.setattr("mcrise_ray.dispatch._SECONDS_PER_CALL", 0.0)
    settings = {"model": NETWORK.model_copy(update={"model": "blackboxes:steep_network"}), "targets": (0,)}
    found = []
    for actors, estimator in ((0, "importance"), (3, "importance"), (0, "control-variate")):
        spec = ExplainSpec(masks=1024, grid=(4, 4), estimator=estimator)
        output = tmp_path / f"{actors}-{estimator}"
        run_job(job(folder, output, explain=spec, actors=actors, **settings), Silent())
        found.append(maps(output))
    alone, three, other = found
    assert len(alone) == 3
    for key, value in alone.items():
        np.testing.assert_array_equal(value, three[key])
    assert any((value != other[key]).any() for key, value in alone.items())  # a guide was found worth it
    assert 0 < len(stored) == len({id(call.guide) for call in guided}) < len(guided) / 4
    guided.clear()
    gc.collect()
    assert all(guide() is None for guide in stored)


def test_a_polite_signal_stops_a_job_as_before_ray_had_started(local_ray: None) -> None:
    """A driver of its own: signals are for whole processes."""
    script = (
        "import os, signal\n"
        "from mcrise_ray.cluster import local_ray\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        "    with local_ray(1):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "stopped"), ended.stderr
    assert "SIGTERM" not in ended.stderr


def test_explain_gives_the_bits_of_actors(local_ray: None, folder: Path, tmp_path: Path) -> None:
    run_job(job(folder / "deep" / "er", tmp_path / "out", actors=2), Silent())
    model = mr.load_model(NETWORK)
    image = model.prepare(mr.read_image(str(folder / "deep/er/c.bmp")))
    result = mr.explain(model, image, (0, 3), SPEC)
    found = maps(tmp_path / "out")
    np.testing.assert_array_equal(result.maps, np.stack([found["c.bmp", 0], found["c.bmp", 3]]))


def test_actors_keep_the_memory_that_they_free(local_ray: None, folder: Path, tmp_path: Path) -> None:
    """Their calls run in a thread of their own, whose blocks of memory would go back to the kernel."""
    model = ModelSpec(model="blackboxes:sparing", preprocessing={"size": (20, 24)})
    alone = job(folder / "deep" / "er", tmp_path / "out", model=model, targets=(0,), actors=1)
    summary = run_job(alone, Silent())
    assert (summary.images, summary.errors) == (1, 0)


def test_a_resumed_job_builds_its_model_with_the_threads_of_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of ONNX Runtime are opened for as many."""
    built_with: list[int] = []

    def load(*given: object) -> object:
        built_with.append(torch.get_num_threads())
        return load_explained(*given)

    monkeypatch.setattr(worker, "load_explained", load)
    images = folder / "deep"
    try:
        torch.set_num_threads(2)
        run_job(job(images, tmp_path / "out"), Silent())
        torch.set_num_threads(1)
        Image.new("RGB", (30, 40)).save(images / "d.png")
        run_job(job(images, tmp_path / "out"), Silent())
    finally:
        torch.set_num_threads(1)
    assert built_with == [2, 2]


def test_a_model_that_cannot_be_built_stops_the_job_with_its_own_error(
    local_ray: None, folder: Path, tmp_path: Path
) -> None:
    broken = job(folder, tmp_path / "out", model=ModelSpec(model="blackboxes:broken"), actors=2)
    with pytest.raises(errors.ModelError, match="blackboxes:broken raised RuntimeError: no such checkpoint"):
        run_job(broken, Silent())


def test_an_actor_that_is_killed_costs_no_bits_and_is_told_of(
    local_ray: None, folder: Path, tmp_path: Path
) -> None:
    """A real process, killed while it holds calls: the only one, so that it has some."""
    killed: list[int] = []

    class Killing(Silent):
        def masks_done(self, masks: int) -> None:
            super().masks_done(masks)
            for process in psutil.Process().children(recursive=True) if not killed else []:
                if "ray::Worker" in process.name():
                    killed.append(process.pid)
                    process.kill()
                    break

    slow = ModelSpec(
        model="blackboxes:slow_means",
        args={"seconds": "0.02"},
        preprocessing={"size": (20, 24), "activation": "none"},
    )
    alone = ModelSpec(**{**slow.model_dump(), "args": {"seconds": "0"}})
    run_job(job(folder, tmp_path / "alone", model=alone, targets=(0, 2)), Silent())
    reporter = Killing()
    summary = run_job(job(folder, tmp_path / "ray", model=slow, targets=(0, 2), actors=1), reporter)
    alone_maps, together = maps(tmp_path / "alone"), maps(tmp_path / "ray")
    assert alone_maps.keys() == together.keys()
    for key, value in alone_maps.items():
        np.testing.assert_array_equal(value, together[key])
    assert (summary.images, summary.errors, summary.replaced) == (3, 4, 1)
    assert summary.retries in ({"actor died": 1}, {"actor died": 2})
    stored = json.loads((tmp_path / "ray/job.json").read_text())
    assert stored["faults"] == {"retries": summary.retries, "replaced": 1, "halved": 0}
    assert sum(note.startswith("actor died: ") for note in reporter.notes) == sum(summary.retries.values())


def test_local_ray_listens_on_loopback_only(local_ray: None) -> None:
    family = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in family
    }
    assert listening, "expected Ray to listen somewhere"
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_local_ray_asks_for_a_token(local_ray: None) -> None:
    from ray._raylet import AuthenticationMode, get_authentication_mode

    assert get_authentication_mode() == AuthenticationMode.TOKEN


def test_local_ray_leaves_the_environment_as_it_was(local_ray: None) -> None:
    assert ray.is_initialized()
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_duckdb_reads_the_maps(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"), Silent())
    rows = duckdb.sql(
        f"select image_id, target, colors, height, width, map from '{tmp_path}/out/maps/*.parquet'"
    ).fetchall()
    expected = maps(tmp_path / "out")
    assert len(rows) == 6
    for image_id, target, colors, height, width, values in rows:
        array = np.array(values, np.float32).reshape(len(colors), height, width)
        np.testing.assert_array_equal(array, expected[image_id, target])
    stages = duckdb.sql(f"select stage, count(*) from '{tmp_path}/out/errors/*.parquet' group by stage")
    assert stages.fetchall() == [("read", 4)]


def test_pandas_reads_the_maps(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"), Silent())
    frame = pd.read_parquet(tmp_path / "out" / "maps")
    expected = maps(tmp_path / "out")
    assert len(frame) == 6
    for row in frame.itertuples():
        array = row.map.reshape(len(row.colors), row.height, row.width)
        np.testing.assert_array_equal(array, expected[row.image_id, row.target])
    assert list(frame.columns) == [
        "image_id", "uri", "height", "width", "target", "target_name", "target_role", "score", "method",
        "colors", "masks", "relative_error", "map", "baseline", "standard_error", "seconds", "spec_hash",
    ]  # fmt: skip


def test_results_of_another_job_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"), Silent())
    other = job(folder, tmp_path / "out", explain=ExplainSpec(masks=301, grid=(4, 4)), targets=(0,))
    with pytest.raises(
        errors.StoreError,
        match=r"explain.masks: 300 there, 301 asked; targets: \[0, 3\] there, \[0\] asked.*another --output",
    ):
        run_job(other, Silent())


def test_a_finished_job_submitted_again_does_nothing(folder: Path, tmp_path: Path) -> None:
    first = run_job(job(folder, tmp_path / "out"), Silent())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    reporter = Silent()
    again = run_job(job(folder, tmp_path / "out", actors=0, figures=3), reporter)
    assert (again.images, again.errors, again.rows, again.masks) == (3, 4, 6, 0)
    assert (first.images, first.errors, first.rows) == (3, 4, 6)
    assert "all 7 images are done already" in reporter.notes[0]
    with pytest.raises(errors.SpecError, match="expected overwrite or retry_errors, found both"):
        run_job(job(folder, tmp_path / "out"), Silent(), overwrite=True, retry_errors=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == files


def test_random_weights_are_said_to_be(folder: Path, tmp_path: Path) -> None:
    untrained = ModelSpec(model="torchvision:squeezenet1_1?num_classes=4", preprocessing={"size": (32, 32)})
    reporter = Silent()
    run_job(job(folder / "deep/er", tmp_path, model=untrained, explain=ExplainSpec(masks=1)), reporter)
    assert sum("its weights are random" in note for note in reporter.notes) == 1


@pytest.mark.parametrize(("mean", "notes"), [((), 1), ((0.3, 0.3, 0.3), 0)])
def test_a_normalisation_that_nobody_gave_is_said(
    folder: Path, tmp_path: Path, mean: tuple[float, ...], notes: int
) -> None:
    torch.save(torchvision.models.squeezenet1_1(num_classes=4).state_dict(), tmp_path / "weights.pth")
    model = ModelSpec(
        model="torchvision:squeezenet1_1?num_classes=4",
        weights=str(tmp_path / "weights.pth"),
        preprocessing={"size": (32, 32), **({"mean": mean} if mean else {})},
    )
    reporter = Silent()
    run_job(job(folder / "deep/er", tmp_path, model=model, explain=ExplainSpec(masks=1)), reporter)
    assert sum("taken are mean [0.485, 0.456, 0.406] and std" in note for note in reporter.notes) == notes


def test_overwriting_waits_until_the_new_job_can_start(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"), Silent())
    (tmp_path / "out" / "mine.txt").write_text("not ours")
    broken = job(folder, tmp_path / "out", model=ModelSpec(model="blackboxes:broken"))
    with pytest.raises(errors.ModelError, match="no such checkpoint"):
        run_job(broken, Silent(), overwrite=True)
    assert len(maps(tmp_path / "out")) == 6
    run_job(job(folder / "deep", tmp_path / "out"), Silent(), overwrite=True)
    assert {image_id for image_id, _ in maps(tmp_path / "out")} == {"b.jpg", "er/c.bmp"}
    assert mr.read_results(str(tmp_path / "out")).errors == []
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.parametrize("again", [False, True])
def test_overwriting_removes_what_a_job_has_made_and_nothing_else(
    folder: Path, tmp_path: Path, again: bool
) -> None:
    out, spec = tmp_path / "out", job(folder, tmp_path / "out", figures=2)
    if again:
        run_job(spec, Silent())
        jobs.draw_figures(spec, Silent())
    mine = [
        out / name for name in ("figures/fig1.tex", "maps/part-0.parquet", "errors/README", "partial/x.txt")
    ]
    mine += [] if again else [out / "figures/fig1.png"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    old = [*out.rglob("part-*-*"), *out.glob("figures/*.png")] if again else []
    run_job(job(folder / "deep", out), Silent(), overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert not any(path.exists() for path in old)
    assert {image_id for image_id, _ in maps(out)} == {"b.jpg", "er/c.bmp"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_file_of_others_is_left_alone(folder: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "job.json").write_text('{"mine": true}')
    with pytest.raises(errors.StoreError, match=r"found a job.json in .* that no job of mcrise has written"):
        run_job(job(folder, tmp_path), Silent(), overwrite=overwrite)
    assert (tmp_path / "job.json").read_text() == '{"mine": true}'
    assert not (tmp_path / "maps").exists()


def test_the_demo_overwrites_no_job_of_yours(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"), Silent())
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "or with those of the demo, found a job with the model blackboxes:small_network" in done.stderr
    assert len(maps(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"model": NETWORK.model_copy(update={"args": {"api_key": "hunter2"}})},
        {"images": ("imagefolder:s3://AKIA:hunter2@bucket/x",)},
        {"output": "s3://AKIA:hunter2@bucket/out"},
    ],
)
def test_no_job_with_a_secret_is_run(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    spec = JobSpec(**{**job(folder, tmp_path / "out").model_dump(), **changes})
    with pytest.raises(errors.SpecError, match="expected no secrets") as refusal:
        run_job(spec, Silent())
    assert "hunter2" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_what_is_being_written_hides_from_who_reads_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "out"))
    store.write_errors(0, [ErrorRow("a", "a", "read", "gone")])
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(len(pd.read_parquet(tmp_path / "out" / "errors"))))
    store.write_errors(1, [ErrorRow("b", "b", "read", "gone")])
    assert seen == [1]
    assert len(pd.read_parquet(tmp_path / "out" / "errors")) == 2


def test_a_failing_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "out"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(errors.StoreError, match=r"cannot write job.json .*No space left on device"):
        store.write_job({"state": "running"})
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write_figure("a.png", b"")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/proc/nothing", "cannot write"),
        ("nosuch://bucket/x", "cannot open nosuch"),
        ("of-latin-1-\udcff", "cannot open of-latin-1"),
    ],
)
def test_an_impossible_output_is_named(folder: Path, tmp_path: Path, location: str, message: str) -> None:
    with pytest.raises(errors.StoreError, match=message + r".*check --output"):
        run_job(job(folder, tmp_path).model_copy(update={"output": location}), Silent())


@pytest.mark.parametrize("damaged", [slice(4, None), slice(4, 400)])  # all but a signature; the first pages
def test_a_damaged_file_among_results_is_named_and_can_be_made_anew(
    folder: Path, tmp_path: Path, damaged: slice
) -> None:
    spec = job(folder / "deep", tmp_path / "out", figures=1)
    run_job(spec, Silent())
    before = maps(tmp_path / "out")
    (part,) = (tmp_path / "out" / "maps").iterdir()
    content = np.frombuffer(part.read_bytes(), np.uint8).copy()
    content[damaged] = 255
    part.write_bytes(content)
    results = mr.read_results(str(tmp_path / "out"))
    named = f"cannot read results in .*{part.name}.*if it is damaged, delete it and run the same job again"
    with pytest.raises(errors.StoreError, match=named):
        list(results)
    with pytest.raises(errors.StoreError, match=named):
        draw_figures(spec, Silent())
    with pytest.raises(errors.StoreError, match=named):
        run_job(spec, Silent())
    part.unlink()
    run_job(spec, Silent())
    after = maps(tmp_path / "out")
    assert all((after[key] == value).all() for key, value in before.items())
    assert after.keys() == before.keys()


def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.StoreError, match=r"cannot read job\.json"):
        mr.read_results(str(tmp_path))


def test_labels_that_no_image_can_have_end_a_job_before_its_first(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.TargetError, match="expected a label for target 'truth'"):
        run_job(job(folder, tmp_path / "out", targets="predicted+truth"), Silent())
    assert not (tmp_path / "out").exists()


def test_labels_of_a_manifest_are_explained_beside_the_prediction(folder: Path, tmp_path: Path) -> None:
    model = mr.load_model(NETWORK)
    image = model.prepare(mr.read_image(str(folder / "a.png")))
    (predicted,) = mr.explain(model, image, spec=SPEC).targets
    truth = (predicted + 1) % 4
    (folder / "list.csv").write_text(f"uri,label\na.png,{truth}\ndeep/b.jpg,\n")
    summary = run_job(job(folder / "list.csv", tmp_path / "out", targets="predicted+truth"), Silent())
    rows = list(mr.read_results(str(tmp_path / "out")))
    assert (summary.images, summary.errors) == (1, 1)
    assert {row.target_role: row.target for row in rows} == {"predicted": predicted, "truth": truth}
    (error,) = mr.read_results(str(tmp_path / "out")).errors
    assert (error.image_id, error.stage) == ("deep/b.jpg", "explain")
    assert "expected a label" in error.error


def test_one_figure_per_image_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    spec = job(folder / "deep", tmp_path / "out", figures=5)
    run_job(spec, Silent())
    drawn = draw_figures(spec, Silent())
    assert len(set(drawn)) == 2
    for path in drawn:
        with Image.open(path) as figure:
            assert figure.width > 600


def test_figures_that_are_there_are_not_drawn_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(folder / "deep", tmp_path / "out", figures=1)
    run_job(spec, Silent())
    (first,) = draw_figures(spec, Silent())
    rendered: list[object] = []
    draw = render.draw
    monkeypatch.setattr(render, "draw", lambda *given: rendered.append(given) or draw(*given))
    assert draw_figures(spec, Silent()) == [first]
    assert rendered == []
    both = draw_figures(spec.model_copy(update={"figures": 5}), Silent())
    assert (both[0], len(both), len(rendered)) == (first, 2, 1)
    other = job(folder / "deep", tmp_path / "out", figures=5, targets=(0,))
    run_job(other, Silent(), overwrite=True)
    assert draw_figures(other, Silent()) == both
    assert len(rendered) == 3, "they went with the maps that they showed"


def test_an_image_that_can_no_longer_be_read_has_no_figure(folder: Path, tmp_path: Path) -> None:
    """And its job is done nevertheless."""
    spec = job(folder / "deep", tmp_path / "out", figures=5)
    run_job(spec, Silent())
    (folder / "deep" / "b.jpg").unlink()
    reporter = Silent()
    (drawn,) = draw_figures(spec, reporter)
    assert "b.jpg" not in drawn
    (note,) = reporter.notes
    assert re.match(r"no figure of b\.jpg: .*b\.jpg", note)


def test_drawing_tells_how_far_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job(folder / "deep", tmp_path / "out", figures=5)
    run_job(spec, Silent())
    monkeypatch.setattr(jobs, "_TELL_EVERY", 0.0)
    reporter = Silent()
    draw_figures(spec, reporter)
    assert reporter.notes == ["1 figures drawn, of 5 at most", "2 figures drawn, of 5 at most"]


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_can_draw_are_told_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_TELL_EVERY", 600.0)
    (tmp_path / "names.txt").write_text("止まれ\nb\nc\nd\n", encoding="utf-8")
    named = NETWORK.model_copy(update={"classes": str(tmp_path / "names.txt")})
    spec = job(folder / "deep", tmp_path / "out", figures=5, model=named)
    run_job(spec, Silent())
    reporter = Silent()
    assert len(draw_figures(spec, reporter)) == 2
    (note,) = reporter.notes
    assert re.match(r"names in 2 figures have characters that their font lacks.*font\.family", note)


def test_a_figure_of_many_targets_draws_the_first_and_says_so() -> None:
    """Names with every synonym stay above their picture, and an unknown error is no error of none."""
    name = "coho, cohoe, coho salmon, blue jack, silver salmon, Oncorhynchus kisutch"
    maps = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 2, 2)
    rows = [
        render.FigureRow(f"top{place}\n{name}", "mc-rise", ("#ff0000", "#000000"), maps, error)
        for place, error in enumerate([0.25, None, float("nan"), *[0.5] * 17])
    ]
    figure = render.draw(np.zeros((8, 8, 3), np.uint8), rows)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title().startswith("top")]
    assert titles[0] == "top0\ncoho, cohoe, coho salmon,\nblue jack, silver salmon, ..."
    assert len(titles) == render.MOST_LINES == 12
    assert figure.get_supxlabel() == "and 8 more targets, which are in maps/ alone"
    labels = [axis.get_ylabel().splitlines()[-1] for axis in figure.axes if axis.get_ylabel()]
    assert labels[:4] == ["relative error 0.25", *["relative error unknown"] * 2, "relative error 0.50"]
    assert render.draw(np.zeros((8, 8, 3), np.uint8), rows[:12]).get_supxlabel() == ""


def test_images_whose_masks_are_not_picked_though_that_is_asked_for_are_counted(
    folder: Path, tmp_path: Path
) -> None:
    """Logits are no probabilities; of 300 masks, nobody expects any to be picked."""
    logits = NETWORK.model_copy(update={"preprocessing": {"size": (20, 24), "activation": "none"}})
    for masks, estimator, count in ((1024, "importance", 2), (300, "importance", 0), (1024, "paper", 0)):
        explain = ExplainSpec(masks=masks, grid=(4, 4), estimator=estimator)
        spec = job(folder / "deep", tmp_path / f"{estimator}{masks}", model=logits, explain=explain)
        summary = run_job(spec, Silent())
        assert (summary.images, summary.unpicked) == (2, count)
        told = json.loads((tmp_path / f"{estimator}{masks}" / "job.json").read_text())
        assert told["counts"]["unpicked"] == count


# The ledger, without any worker.


@pytest.mark.parametrize(("content", "found"), [('{"state": "run', "Unterminated string"), ("5", "found 5")])
def test_a_damaged_job_json_is_told(folder: Path, tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_text(content)
    with pytest.raises(errors.StoreError, match=rf"expected a JSON object in job\.json of .*: {found}"):
        run_job(job(folder / "a.png", tmp_path / "out"), Silent())


# The command line.


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


COMMON = ("--model", "blackboxes:small_network", "--size", "20x24", "--masks", "64", "--figures", "0")


def test_explain_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    """The installed command itself, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = Path(sys.executable).with_name("mcrise")
    options = [*COMMON, "--target", "2", "--output", "out", "--figures", "1"]
    done = subprocess.run(
        [command, "explain", folder / "a.png", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 images explained, 0 errors, 1 maps, 64 masks" in done.stdout
    assert "figures: out/figures/" in done.stdout
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "done"


def test_an_image_of_the_same_name_in_another_folder_is_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for number, output in enumerate((tmp_path / "out", "../out"), start=1):
        here = tmp_path / str(number)
        here.mkdir()
        shutil.copy(folder / "a.png", here / "x.png")
        monkeypatch.chdir(here)
        ends.append(mcrise("explain", "x.png", *COMMON, "--target", "2", "--output", output))
    assert [end.exit_code for end in ends] == [0, 2], ends[1].output
    assert f"images: ['{tmp_path}/1/x.png'] there, ['{tmp_path}/2/x.png'] asked" in ends[1].output


def test_an_error_that_is_not_reached_is_told(folder: Path, tmp_path: Path) -> None:
    options = [*COMMON, "--target", "2", "--output", tmp_path / "out", "--relative-error"]
    done = CliRunner().invoke(app, ["explain", str(folder / "a.png"), *map(str, options), "0.0001"])
    assert done.exit_code == 0, done.output
    assert (
        "1 images have a larger relative error than 0.0001 after as many masks as they may have"
        in done.stdout
    )
    options[options.index(tmp_path / "out")] = tmp_path / "easy"
    done = CliRunner().invoke(app, ["explain", str(folder / "a.png"), *map(str, options), "1000"])
    assert "larger relative error" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overwrite", "--resume"), "expected --overwrite or --resume, found both"),
        (("--overwrite", "--retry-errors"), "expected --overwrite or --retry-errors, found both"),
        (("--target", "99"), "expected a target from 0 to 3"),
        (("--target", "top9"), "expected at most top4 (the model's classes), found top9"),
        (("--target", "owl"), "expected a class index or a class name, found 'owl'"),
        (("--p-mask", "0"), "p_mask: expected a probability"),
        (("--p-mask", "1"), "p_mask: expected a probability"),
        (("--masks", "0"), "masks: expected 1 to"),
        (("--grid", "8"), "--grid: expected two whole numbers"),
        (("--model", "blackboxes:broken"), "no such checkpoint"),
        (("--model", "blackboxes:nowhere"), "cannot import --model blackboxes:nowhere"),
        (("--model", "torchvision:resnet19"), "did you mean: resnet1"),
        (("--model", "resnet50"), "expected --model torchvision:NAME"),
        (("--weights", "none.safetensors"), "check --weights"),
        (("--mean", "1,2"), "--mean: expected three numbers"),
        (("--output", ""), "output: String should have at least 1 character"),
    ],
)
def test_bad_input_is_one_line_that_names_the_knob(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = mcrise("explain", folder / "a.png", *COMMON, "--output", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_bad_image_fails_alone_and_a_bad_target_before_any(folder: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    done = mcrise("explain", folder / "missing.png", folder / "a.png", *COMMON, *output)
    assert done.exit_code == 1
    assert "missing.png: no such file" in done.stderr
    assert "1 images explained, 1 errors" in done.stdout
    done = mcrise("explain", folder / "a.png", *COMMON, *output, "--target", "4", "--overwrite")
    assert done.exit_code == 2
    assert "expected a target from 0 to 3" in done.stderr
    assert len(mr.read_results(str(tmp_path / "out"))) == 1  # what was there stays
    done = mcrise("explain", folder / "missing.png", *COMMON, "--output", tmp_path / "none")
    assert "0 images explained, 1 errors" in done.stdout
    assert "results:" not in done.stdout
