"""Jobs that are interrupted, run twice, or run out of disk: nothing is lost, nothing is there twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import blackboxes
import numpy as np
import pyarrow.fs
import pyarrow.parquet
import pytest
from PIL import Image
from reporting import Silent
from safetensors.torch import save_file

import mcrise_ray as mr
from mcrise_ray import jobs, lease, recorder
from mcrise_ray.checkpoints import Checkpoints
from mcrise_ray.engine import Event
from mcrise_ray.errors import ModelError, StoreError
from mcrise_ray.explainer import Subject, perform
from mcrise_ray.jobs import Summary, run_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.lease import Lease
from mcrise_ray.loading import ModelSpec
from mcrise_ray.progressfile import read_progress
from mcrise_ray.reduction import Conclude, Conclusion, Reduction
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.store import Store
from mcrise_ray.tasks import Inspection, Saved, Target
from mcrise_ray.worker import InProcess, Worker

NAMES = ("a.png", "b.png", "c.png", "d.png")
SPECS = {  # ten units each
    "paper": ExplainSpec(masks=640, grid=(4, 4), estimator="paper"),
    "paper, as sums": ExplainSpec(masks=640, grid=(4, 4), estimator="paper", relative_error=1e-9),
    "control-variate": ExplainSpec(masks=640, grid=(4, 4)),
}
SPEC = SPECS["control-variate"]


PLAIN = {"precision": "float32", "batch_size": 64}  # bits are compared


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name)
    (root / "e.png").write_text("not a picture")
    return root


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit and save at every opportunity."""
    for name in ("_COMMIT_EVERY", "_SAVE_EVERY", "_SAVE_AFTER", "_PROGRESS_EVERY"):
        monkeypatch.setattr(recorder, name, 0.0)
    monkeypatch.setattr("mcrise_ray.dispatch._SECONDS_PER_CALL", 0.0)


def job(images: Path, output: Path, **changes: Any) -> JobSpec:
    model = ModelSpec(model="blackboxes:small_network", preprocessing={"size": (20, 24)})
    settings = {
        "model": model,
        "explain": SPEC,
        "actors": 0,
        "figures": 0,
        "targets": (0, 3),
        **PLAIN,
        **changes,
    }
    return JobSpec(images=(str(images),), output=str(output), **settings)


def content(output: Path) -> dict[tuple[str, int], bytes]:
    """Every map, once; the test fails where one is there twice."""
    rows = [((row.image_id, row.target), row.map.tobytes()) for row in mr.read_results(str(output))]
    assert max(Counter(key for key, _ in rows).values(), default=0) <= 1
    return dict(rows)


def states(output: Path) -> list[str]:
    """Of the job, as those who ask for it and those who resume it read them."""
    return [json.loads((output / name).read_text())["state"] for name in ("progress.json", "job.json")]


class Interrupting(Silent):
    """Raises after some masks, as Ctrl-C does."""

    def __init__(self, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.after, self.error = after, error

    def masks_done(self, masks: int) -> None:
        super().masks_done(masks)
        if self.masks >= self.after:
            raise self.error


def run(spec: JobSpec, reporter: Silent | None = None) -> Summary:
    return run_job(spec, reporter or Silent())


@pytest.fixture
def undisturbed(folder: Path, tmp_path: Path) -> dict[tuple[str, int], bytes]:
    run(job(folder, tmp_path / "undisturbed"))
    maps = content(tmp_path / "undisturbed")
    assert len(maps) == 8
    return maps


@pytest.mark.parametrize("estimator", SPECS)
@pytest.mark.parametrize("after", [64, 320, 640, 960, 2000, 2559])
def test_an_interrupted_job_goes_on_where_it_was(
    folder: Path, tmp_path: Path, after: int, estimator: str
) -> None:
    run(job(folder, tmp_path / "undisturbed", explain=SPECS[estimator]))
    undisturbed = content(tmp_path / "undisturbed")
    spec = job(folder, tmp_path / "out", explain=SPECS[estimator])
    with pytest.raises(KeyboardInterrupt):
        run(spec, Interrupting(after))
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "stopped"
    reporter = Silent()
    summary = run(spec, reporter)
    assert content(tmp_path / "out") == undisturbed
    assert [row.image_id for row in mr.read_results(str(tmp_path / "out")).errors] == ["e.png"]
    first = -(-after // 64) * 64
    assert reporter.masks == 4 * 640 - first  # not one unit is done twice
    if kept := first % 640:
        told = f"{kept} masks that earlier runs scored of unfinished images are taken up"
        assert [note for note in reporter.notes if "taken up" in note] == [told]
    assert (summary.images, summary.errors, summary.rows) == (4, 1, 8)
    assert list((tmp_path / "out/partial").iterdir()) == []
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "done"


def test_a_job_interrupted_again_and_again_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    spec = job(folder, tmp_path / "out")
    interruptions = 0
    while True:
        try:
            run(spec, Interrupting(200))
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 4 * 640 // 256
    assert content(tmp_path / "out") == undisturbed


def test_a_signal_that_comes_while_a_stage_is_passed_leaves_no_half_of_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide of the next stage was saved with the scores of this one: the image ended in an error row."""
    model = ModelSpec(model="blackboxes:steep_network", preprocessing={"size": (20, 24)})
    spec = ExplainSpec(masks=2048, grid=(4, 4), estimator="importance")
    whole = job(folder, tmp_path / "whole", explain=spec, model=model)
    run(whole)
    guided: list[bool] = []

    def halfway(self: Reduction, work: Conclude, result: Conclusion) -> None:
        self._guide = result.guide
        guided.append(self._guide is not None)
        raise KeyboardInterrupt

    stopped = job(folder, tmp_path / "out", explain=spec, model=model)
    with monkeypatch.context() as patch:
        patch.setattr(Reduction, "_pass_stage", halfway)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    assert guided == [True]
    run(stopped)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_bug_in_the_driver_is_recorded_and_does_not_cost_what_was_done(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    spec = job(folder, tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        run(spec, Interrupting(1000, ZeroDivisionError))
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "failed"
    run(spec)
    assert content(tmp_path / "out") == undisturbed


DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_resume
from mcrise_ray import recorder
for name in ("_COMMIT_EVERY", "_SAVE_EVERY", "_SAVE_AFTER", "_PROGRESS_EVERY"):
    setattr(recorder, name, 0.0)

class Dying(test_resume.Silent):
    def masks_done(self, masks):
        super().masks_done(masks)
        if self.masks > 900 and list(Path(sys.argv[3]).glob("maps/*.parquet")):  # a thread writes them
            os.kill(os.getpid(), signal.SIGKILL)

test_resume.run(test_resume.job(Path(sys.argv[2]), Path(sys.argv[3])), Dying())
"""


def test_a_killed_driver_leaves_an_output_that_can_be_gone_on_with(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    arguments = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(folder), str(tmp_path / "out")]
    killed = subprocess.run(arguments, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "running"
    (tmp_path / "out/maps").mkdir(exist_ok=True)
    (tmp_path / "out/maps/part-000000-ffffffff.parquet.tmp-1").write_bytes(b"PAR1 half")
    summary = run(job(folder, tmp_path / "out"))
    assert summary.earlier >= 1
    assert content(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


def test_a_full_disk_stops_the_job_with_nothing_half_written_and_it_goes_on_later(
    folder: Path,
    tmp_path: Path,
    undisturbed: dict[tuple[str, int], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = job(folder, tmp_path / "out")
    replace = os.replace
    written: list[str] = []

    def full(source: str, target: str) -> None:
        if written and "maps" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        written.extend([str(target)] if "maps" in str(target) else [])
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match=r"cannot write maps/part-.*No space left.*same job again"):
            run(spec)
    assert len(written) == 1
    assert states(tmp_path / "out") == ["failed", "failed"]
    assert not list((tmp_path / "out").rglob("*.tmp-*"))
    for file in (tmp_path / "out/maps").iterdir():
        pyarrow.parquet.read_table(file)
    run(spec)
    assert content(tmp_path / "out") == undisturbed


def test_a_disk_that_is_full_at_the_very_end_has_failed_the_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: str, target: str) -> None:
        if "maps" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    class Ending(Silent):
        def job_ended(self, state: str, facts: dict[str, Any]) -> None:
            self.notes.append(f"{state}: {facts['error']}")

    reporter = Ending()
    monkeypatch.setattr(recorder, "_COMMIT_EVERY", 1e9)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"cannot write maps/part-.*No space left"):
        run(job(folder, tmp_path / "out"), reporter)
    assert states(tmp_path / "out") == ["failed", "failed"]
    assert reporter.notes[-1].startswith("failed: cannot write maps/part-")


@pytest.mark.parametrize("damage", ["cut", "a byte"])
def test_sums_that_cannot_be_read_are_summed_anew(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes], damage: str
) -> None:
    spec = job(folder, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(spec, Interrupting(320))
    (file,) = (tmp_path / "out/partial").iterdir()
    kept = bytearray(file.read_bytes())
    if damage == "a byte":  # how its last member is compressed
        kept[kept.rindex(b"PK\x01\x02") + 10] = 77
    file.write_bytes(kept[:1000] if damage == "cut" else kept)
    reporter = Silent()
    run(spec, reporter)
    assert reporter.masks == 4 * 640
    assert "a.png starts anew: its saved sums are of another version, or damaged" in reporter.notes
    assert content(tmp_path / "out") == undisturbed


def test_sums_of_another_version_are_summed_anew(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages may have ended elsewhere: masks that it picked would be taken for others."""
    spec = job(folder, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("mcrise_ray.checkpoints._VERSION", 1)
        with pytest.raises(KeyboardInterrupt):
            run(spec, Interrupting(320))
    assert len(list((tmp_path / "out/partial").iterdir())) == 1
    reporter = Silent()
    run(spec, reporter)
    assert reporter.masks == 4 * 640
    assert content(tmp_path / "out") == undisturbed


def train_more(weights: Path) -> None:
    """The file holds another model from here on."""
    state = {name: 1.1 * value for name, value in blackboxes.small_network().state_dict().items()}
    save_file(state, weights)


def job_with_weights(folder: Path, output: Path, weights: Path) -> JobSpec:
    save_file(blackboxes.small_network().state_dict(), weights)
    spec = job(folder, output)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"weights": str(weights)})})


def test_results_of_a_model_that_has_changed_are_not_gone_on_with(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    """Some maps would be those of one model, some those of another, and one the sum of both."""
    weights = tmp_path / "best.safetensors"
    spec = job_with_weights(folder, tmp_path / "out", weights)
    with pytest.raises(KeyboardInterrupt):
        run(spec, Interrupting(1000))
    train_more(weights)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/*")}
    with pytest.raises(StoreError, match=r"^expected the model that made the results in --output, found one"):
        run(spec)
    assert {path: path.read_bytes() for path in before} == before
    save_file(blackboxes.small_network().state_dict(), weights)
    assert run(spec).earlier == 1
    assert content(tmp_path / "out") == undisturbed
    train_more(weights)
    run_job(spec, Silent(), overwrite=True)
    assert content(tmp_path / "out") != undisturbed


def test_results_from_before_models_were_recognised_are_gone_on_with(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    spec = job(folder, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run(spec, Interrupting(1000))
    told = json.loads((tmp_path / "out/job.json").read_text())
    del told["model"]["probe"]
    (tmp_path / "out/job.json").write_text(json.dumps(told))
    assert run(spec).earlier == 1
    assert content(tmp_path / "out") == undisturbed


def test_a_model_that_changes_under_its_job_stops_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    """An actor that comes later, or on another machine, finds other weights in the file."""
    weights = tmp_path / "best.safetensors"

    class Later(InProcess):
        def wanted(self) -> int:
            return 2

        def start(self, actor: int) -> None:
            super().start(actor)
            self._waiting.rotate()

        def wait(self, seconds: float) -> list[Event]:
            if self._waiting[0] == (0, None):
                train_more(weights)
                self.worker = Worker(self.worker._setup)
            return super().wait(seconds)

    spec = job_with_weights(folder, tmp_path / "out", weights)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "InProcess", Later)
        with pytest.raises(ModelError, match=r"^expected the same model in every actor, found one whose ans"):
            run(spec)
    assert states(tmp_path / "out") == ["failed", "failed"]
    save_file(blackboxes.small_network().state_dict(), weights)
    run(spec)
    assert content(tmp_path / "out") == undisturbed


def test_finished_images_are_committed_while_others_are_in_work(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Looking(Silent):
        def masks_done(self, masks: int) -> None:
            super().masks_done(masks)
            if self.masks == 3 * 640 + 320:
                until = time.monotonic() + 20
                while len(mr.read_results(str(tmp_path / "out"))) < 4 and time.monotonic() < until:
                    time.sleep(0.01)
                seen.append(len(mr.read_results(str(tmp_path / "out"))))
                seen.append(json.loads((tmp_path / "out/progress.json").read_text())["images_done"])

    run(job(folder, tmp_path / "out"), Looking())
    assert seen[0] >= 4
    assert seen[1] >= 2


# One writer.


def test_a_second_driver_is_refused_while_the_first_lives(folder: Path, tmp_path: Path) -> None:
    spec = job(folder, tmp_path / "out")
    refused: list[str] = []

    class Second(Silent):
        def masks_done(self, masks: int) -> None:
            with pytest.raises(StoreError, match=rf"another job .*process {os.getpid()} on .*another --out"):
                run(spec)
            refused.append("yes")

    run(spec, Second())
    assert refused
    assert len(content(tmp_path / "out")) == 8
    assert run(spec).earlier == 5


class FakeObjectStore(Store):
    """A local folder that pretends to be no file system."""

    def local_path(self, name: str) -> None:
        return None


def test_on_an_object_store_a_claim_lapses_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(lease.time, "time", lambda: now[0])
    store = FakeObjectStore(str(tmp_path))
    first = Lease(store)
    now[0] += 100
    with pytest.raises(StoreError, match=r"wait for it, or 20 s if it is dead"):
        Lease(store)
    first.renew()
    now[0] += 100
    with pytest.raises(StoreError, match="another job is writing"):
        Lease(store)
    now[0] += 30
    second = Lease(store)
    with pytest.raises(StoreError, match=r"lost .* to another job"):
        first.renew()
    second.renew()
    second.release()
    Lease(store).release()


def test_a_driver_that_has_lost_its_output_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """It was asleep for long enough that another has taken over, who writes the same rows."""
    now = [1000.0]
    monkeypatch.setattr(lease.time, "time", lambda: now[0])
    monkeypatch.setattr(jobs, "Store", FakeObjectStore)
    monkeypatch.setattr(recorder, "_COMMIT_EVERY", 1e9)
    others: list[Lease] = []
    there: list[set[str]] = []
    out = tmp_path / "out"

    class Asleep(Silent):
        def image_done(self, masks: int) -> None:
            if not others:
                now[0] += 1000
                others.append(Lease(FakeObjectStore(str(out))))
                there.append({str(path) for path in out.rglob("*") if path.is_file()})

    with pytest.raises(StoreError, match=r"lost .* to another job"):
        run(job(folder, out), Asleep())
    assert {str(path) for path in out.rglob("*") if path.is_file()} == there[0]
    assert FakeObjectStore(str(out)).read_json("lock.json")["owner"] == others[0]._owner["owner"]
    others[0].release()


def test_an_output_that_is_removed_under_its_job_stops_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[tuple[str, int], bytes]
) -> None:
    """It would end as done otherwise, without the maps that had been there."""
    now = [1000.0]
    monkeypatch.setattr(lease.time, "time", lambda: now[0])
    out = tmp_path / "out"

    class Removing(Silent):
        def image_done(self, masks: int) -> None:
            if out.exists():
                shutil.rmtree(out)
                now[0] += 30

    with pytest.raises(
        StoreError, match=r"^expected lock.json in .* while this job writes there, found none"
    ):
        run(job(folder, out), Removing())
    assert not (out / "job.json").exists()
    (out / "maps").mkdir(parents=True, exist_ok=True)
    shutil.copy(next((tmp_path / "undisturbed/maps").iterdir()), out / "maps")  # as a late write would
    with pytest.raises(StoreError, match=r"^expected a job.json beside the results in .*, found none"):
        run(job(folder, out))
    shutil.rmtree(out)
    run(job(folder, out))
    assert content(out) == undisturbed


def test_a_claim_is_renewed_where_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10_000.0]
    monkeypatch.setattr(lease.time, "time", lambda: now[0])
    store = FakeObjectStore(str(tmp_path))
    first = Lease(store)
    now[0] -= 3600
    first.renew()
    assert store.read_json("lock.json")["renewed"] == now[0]
    first.release()


def test_other_files_beside_the_results_do_no_harm(folder: Path, tmp_path: Path) -> None:
    run(job(folder, tmp_path / "out"))
    for name in ("maps", "errors"):
        (tmp_path / "out" / name).mkdir(exist_ok=True)
        (tmp_path / "out" / name / ".DS_Store").write_bytes(b"Bud1")
        (tmp_path / "out" / name / "part-0.parquet").write_bytes(b"PAR1")
    assert run(job(folder, tmp_path / "out")).earlier == 5
    results = mr.read_results(str(tmp_path / "out"))
    assert (len(results), len(results.errors)) == (8, 1)


def test_on_an_object_store_a_claim_is_kept_while_the_loop_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RENEW_EVERY", 0.01)
    store = FakeObjectStore(str(tmp_path))
    written = threading.Semaphore(0)
    write = store.write_json

    def counted(name: str, content: Any) -> None:
        write(name, content)
        written.release()

    monkeypatch.setattr(store, "write_json", counted)
    busy = Lease(store)
    for _ in range(4):  # the claim itself, and three renewals that nobody here asks for
        assert written.acquire(timeout=30)
    busy.release()
    assert store.read_json("lock.json") is None


def test_an_interrupted_job_goes_on_on_an_object_store(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, int], bytes], s3_server: str
) -> None:
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://results/?{s3_server}")
    filesystem.create_dir("results")
    spec = job(folder, tmp_path).model_copy(update={"output": f"s3://results/out?{s3_server}"})
    with pytest.raises(KeyboardInterrupt):
        run(spec, Interrupting(1000))
    stopped = read_progress(spec.output)
    assert stopped is not None
    assert (stopped.state, stopped.images_done, stopped.actors) == ("stopped", 1, 0)
    reporter = Silent()
    summary = run(spec, reporter)
    assert (summary.images, summary.errors, summary.earlier) == (4, 1, 1)
    assert reporter.masks == 4 * 640 - 1024
    done = read_progress(spec.output)
    assert done is not None
    assert (done.state, done.images_done, done.errors, done.seconds_left) == ("done", 4, 1, 0.0)
    rows = mr.read_results(spec.output)
    assert {(row.image_id, row.target): row.map.tobytes() for row in rows} == undisturbed
    assert len(rows) == 8


# Checkpoints.


@pytest.mark.parametrize("masks", [640, 20000])
def test_an_image_goes_on_from_what_is_kept_to_the_bit(
    tmp_path: Path, rng: np.random.Generator, masks: int
) -> None:
    """Saved after every step, and read back: scores, fit and sums."""
    spec = ExplainSpec(masks=masks, grid=(4, 4))
    targets = (Target(2, "käse", "truth", 0.25), Target(1, None, "top2", 1 / 3))
    inspection = Inspection(targets, (20, 24), 0.5, (9, 9))
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    subject = Subject(blackboxes.ChannelMeans(), image, spec)
    score = np.array([target.score for target in targets])
    there = Checkpoints(Store(str(tmp_path)))
    assert there.take("a/b.png") is None
    reduction = Reduction(spec, (2, 1), score, (20, 24))
    straight = Reduction(spec, (2, 1), score, (20, 24))
    steps = 0
    while (work := reduction.next_work()) is not None:
        other = straight.next_work()
        assert other is not None
        straight.take(*next(perform(subject, [other], (2, 1), 64)))
        reduction.take(*next(perform(subject, [work], (2, 1), 64)))
        if reduction.explanation is None and steps % 5 == 0:
            there.write("a/b.png", Saved(inspection, reduction.state(), 12.5))
            found = Checkpoints(Store(str(tmp_path))).take("a/b.png")
            assert found is not None
            assert (found.inspection, found.seconds) == (inspection, 12.5)
            reduction = Reduction(spec, (2, 1), score, (20, 24), found.state)
        steps += 1
    assert steps >= 11
    assert reduction.explanation is not None
    assert straight.explanation is not None
    np.testing.assert_array_equal(reduction.explanation.maps, straight.explanation.maps)
    np.testing.assert_array_equal(reduction.explanation.standard_error, straight.explanation.standard_error)
    there.delete("a/b.png")
    assert Checkpoints(Store(str(tmp_path))).take("a/b.png") is None


@pytest.mark.parametrize("estimator", ["paper", "control-variate", "importance"])
def test_sums_do_not_depend_on_which_of_their_scores_were_saved_or_sent(
    rng: np.random.Generator, estimator: Literal["paper", "control-variate", "importance"]
) -> None:
    """An array of columns, of which a part is saved, is pickled as one of rows: other last bits."""
    spec = ExplainSpec(masks=2048, grid=(4, 4), estimator=estimator)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    model = mr.load_model("blackboxes:steep_network", preprocessing={"size": (20, 24)})
    subject = Subject(model, image, spec)
    reduction = Reduction(spec, (0, 1, 2), subject.scores()[:3], subject.size)
    looked_at: set[str] = set()
    while reduction.explanation is None:
        for work, result in perform(subject, reduction.works(), (0, 1, 2), 64):
            reduction.take(work, result)
        state = reduction.state()
        for part in (*state.scores, state.total, state.fit, state.guide):
            for name, value in (
                {"scores": part} if isinstance(part, np.ndarray) else getattr(part, "__dict__", {})
            ).items():
                if isinstance(value, np.ndarray):
                    assert value.flags.c_contiguous, name
                    looked_at.add(name)
    assert "scores" in looked_at
    assert ("weights" in looked_at) == (estimator == "importance")
