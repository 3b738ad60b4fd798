"""ReID jobs end to end: embedded, matched and explained, in process and on Ray, through faults and stops."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import people
import pytest
import yaml
from click.testing import Result
from people import content, job, one_colour, person, save
from reporting import Silent
from typer.testing import CliRunner

import mcrise_ray as mr
from mcrise_ray import cluster, embed, forecast, jobs, recorder, reidjob
from mcrise_ray.cli import app
from mcrise_ray.embedding import EmbeddingLedger
from mcrise_ray.engine import Event
from mcrise_ray.errors import ImageError, SpecError, StoreError
from mcrise_ray.faults import Fault, FaultKind
from mcrise_ray.gallery import GalleryStore
from mcrise_ray.jobs import Summary, draw_figures, run_job
from mcrise_ray.progressfile import read_progress
from mcrise_ray.rows import MatchRow
from mcrise_ray.tasks import Call, EmbedTask, Reply
from mcrise_ray.worker import InProcess, Worker

# Five images each, wherever the images are: no name ends a chunk before.
CHUNKS = (("_LEAST", 2), ("_USUAL", 2**32), ("_MOST", 5))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, blocks and calls, and everything committed at every opportunity."""
    for name, many in CHUNKS:
        monkeypatch.setattr(embed, name, many)
    monkeypatch.setattr(reidjob, "_QUERIES", 3)
    for name in ("_COMMIT_EVERY", "_SAVE_EVERY", "_SAVE_AFTER", "_PROGRESS_EVERY"):
        monkeypatch.setattr(recorder, name, 0.0)
    monkeypatch.setattr("mcrise_ray.dispatch._SECONDS_PER_CALL", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.make(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, many in CHUNKS:
            patch.setattr(embed, name, many)
        output = tmp_path_factory.mktemp("undisturbed") / "out"
        run(job(folder, output))
    rows = content(output)
    assert len(rows) == 8
    return rows


def run(spec: mr.JobSpec, reporter: Silent | None = None) -> Summary:
    return run_job(spec, reporter or Silent())


def embeddings(output: Path) -> dict[str, bytes]:
    """The stored embeddings of gallery and queries, by file."""
    files = [*output.glob("gallery/rows/*"), *output.glob("queries/rows/*")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def errors(output: Path) -> dict[str, tuple[str, str]]:
    rows = mr.read_results(str(output)).errors
    assert len({row.image_id for row in rows}) == len(rows)
    return {row.image_id: (row.stage, row.error) for row in rows}


def test_rows_say_what_explain_says(folder: Path, tmp_path: Path) -> None:
    spec = job(folder, tmp_path / "out", standard_error=True)
    summary = run(spec)
    assert (summary.images, summary.errors, summary.rows, summary.masks) == (4, 0, 8, 4 * 256)
    embedder = mr.load_embedder(spec.model)
    names = sorted(path.name for path in (folder / "gallery").iterdir())
    crops = [embedder.prepare(mr.read_image(str(folder / "gallery" / name))) for name in names]
    gallery = mr.embeddings_of(embedder, np.stack(crops))
    for row in mr.read_results(str(tmp_path / "out")):
        assert isinstance(row, MatchRow)
        query = embedder.prepare(mr.read_image(row.uri))
        f = mr.embeddings_of(embedder, query[None])[0]
        far = np.linalg.norm(gallery - f, axis=1)
        who = np.array([(int(name[:4]), int(name[6])) for name in names])
        may = ~((who[:, 0] == row.pid) & (who[:, 1] == 1))
        right = who[:, 0] == row.pid
        wanted = may & (right if row.target_role == "correct" else ~right)
        best = int(np.argmin(np.where(wanted, far, np.inf)))
        assert (row.match_id, row.match_uri) == (names[best], str(folder / "gallery" / names[best]))
        assert (row.match_pid, row.match_camid, row.camid) == (*who[best], 1)
        assert row.rank == 1 + np.count_nonzero(far[may] < far[best])
        assert row.d0 == row.distance == pytest.approx(far[best], rel=1e-3)
        assert row.score == np.exp(-1)
        assert (row.target, row.target_name) == (int(row.target_role == "wrong"), row.match_id)
        box = mr.similarity(embedder, f, gallery[[best]])
        result = mr.explain(box, query, [0], spec.explain, batch_size=8)
        np.testing.assert_allclose(row.map, result.maps[0], atol=1e-4)
        np.testing.assert_allclose(row.standard_error, result.standard_error[0], atol=1e-4)
        assert row.relative_error == pytest.approx(result.relative_error[0], rel=1e-2)


def test_retrieval_is_that_of_a_plain_evaluation(folder: Path, tmp_path: Path) -> None:
    summary = run(job(folder, tmp_path / "out", explain={"masks": 16}))
    embedder = mr.load_embedder(job(folder, "x").model)

    def embedded(side: str) -> tuple[list[str], np.ndarray]:
        names = sorted(path.name for path in (folder / side).iterdir())
        crops = [embedder.prepare(mr.read_image(str(folder / side / name))) for name in names]
        return names, mr.embeddings_of(embedder, np.stack(crops))

    (names, gallery), (asked, queries) = embedded("gallery"), embedded("query")
    precisions, first = [], []
    for name, f in zip(asked, queries, strict=True):
        may = [place for place, other in enumerate(names) if other[:7] != name[:7]]
        order = sorted(may, key=lambda place: np.linalg.norm(gallery[place] - f))
        right = [names[place][:4] == name[:4] for place in order]
        hits = np.flatnonzero(right) + 1
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / hits))
        first.append(right[0])
    assert summary.retrieval is not None
    assert summary.retrieval.queries == 4
    assert summary.retrieval.recall_at_1 == np.mean(first)
    assert summary.retrieval.mean_average_precision == pytest.approx(np.mean(precisions))
    stored = json.loads((tmp_path / "out/job.json").read_text())
    assert stored["retrieval"] == vars(summary.retrieval)
    assert (stored["model"]["dimensions"], stored["state"]) == (6, "done")
    again = run(job(folder, tmp_path / "out", explain={"masks": 16}))
    assert (again.retrieval, again.masks, again.earlier) == (summary.retrieval, 0, 4)


# Matches.


def test_matches_by_rank_with_another_distance_and_scale(folder: Path, tmp_path: Path) -> None:
    reid = {"matches": "top2", "distance": "cosine", "d0": 0.5}
    run(job(folder, tmp_path / "out", reid=reid))
    rows = list(mr.read_results(str(tmp_path / "out")))
    assert [row.target_role for row in rows] == ["match", "top2"] * 4
    assert [row.rank for row in rows] == [1, 2] * 4
    for row in rows:
        assert row.d0 == 0.5
        assert row.score == np.exp(-row.distance / 0.5)
        assert 0 < row.distance < 0.1


def test_named_matches(folder: Path, tmp_path: Path) -> None:
    crop = "0003_c1s1_000003_00.png"
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        f"query,match\n0001_c1s1_000001_00.png,{crop}\n"
        f"{folder}/query/0002_c1s1_000001_00.png,{folder}/gallery/{crop}\n"
        "0003_c1s1_000001_00.png,nowhere.png\n"
    )
    summary = run(job(folder, tmp_path / "out", reid={"matches": "named", "pairs": str(pairs)}))
    rows = {row.pid: row for row in mr.read_results(str(tmp_path / "out"))}
    assert {pid: (row.match_id, row.target_role) for pid, row in rows.items()} == {
        1: (crop, "named"),
        2: (crop, "named"),
    }
    assert summary.errors == 2
    found = errors(tmp_path / "out")
    assert {stage for stage, _ in found.values()} == {"match"}
    assert "found 'nowhere.png'; check --pairs" in found["0003_c1s1_000001_00.png"][1]
    assert "found none for this query; check --pairs" in found["0004_c1s1_000001_00.png"][1]


def test_pairs_may_name_a_query_in_any_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its `image_id` and by its URI, absolute or not, also one query in all of them."""
    monkeypatch.chdir(folder)
    query, crops = "0001_c1s1_000001_00.png", [f"000{n}_c1s1_000003_00.png" for n in (2, 3, 4)]
    names = (query, f"query/{query}", f"{folder}/query/{query}")
    pairs = tmp_path / "pairs.csv"
    lines = [f"{name},{crop}" for name, crop in zip(names, crops, strict=True)]
    pairs.write_text("\n".join(["query,match", *lines, lines[0], ""]))
    named = {"matches": "named", "pairs": str(pairs)}
    assert run(job(folder, tmp_path / "out", images=("query",), reid=named)).images == 1
    assert sorted(row.match_id for row in mr.read_results(str(tmp_path / "out"))) == crops


def test_names_that_are_no_utf8(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "people"
    shutil.copytree(folder, root)
    for side in ("query", "gallery"):
        shutil.copyfile(root / "query/0001_c1s1_000001_00.png", root / side / os.fsdecode(b"caf\xe9.png"))
    pairs = tmp_path / "pairs.csv"
    one, other = "0001_c1s1_000001_00.png", "0001_c2s1_000001_00.png"
    pairs.write_bytes(b"query,match\ncaf\xe9.png,%b\n%b,caf\xe9.png\n" % (other.encode(), one.encode()))
    named = {"matches": "named", "pairs": str(pairs), "d0": 1}
    assert run(job(root, tmp_path / "out", reid=named)).images == 2
    found = {row.image_id: row.match_id for row in mr.read_results(str(tmp_path / "out"))}
    assert found == {"caf\\xe9.png": other, one: "caf\\xe9.png"}


@pytest.fixture
def mixed(folder: Path, tmp_path: Path) -> Path:
    """The same with bad images on both sides."""
    root = tmp_path / "mixed"
    shutil.copytree(folder, root)
    (root / "query/0001_c1s1_broken.png").write_bytes(b"no image")
    save(root / "query/0005_c1s1_blue.png", one_colour((0, 0, 255)))
    save(root / "query/0006_c1s1_alone.png", person(6))
    save(root / "query/0002_c1s1_twin.png", person(2, 11))
    save(root / "gallery/0002_c2s1_twin.png", person(2, 11))
    (root / "gallery/0001_c1s1_000001_00.png").unlink(missing_ok=True)
    (root / "gallery/0001_c1s1_000001_00.png").write_bytes(b"not an image either")  # of a query's name
    save(root / "gallery/0009_c1s1_blue.png", one_colour((0, 0, 255)))
    return root


def test_every_query_ends_in_maps_or_errors_and_no_gallery_image_is_dropped(
    mixed: Path, tmp_path: Path
) -> None:
    summary = run(job(mixed, tmp_path / "out"))
    assert (summary.images, summary.errors, summary.rows) == (4, 6, 8)
    found = errors(tmp_path / "out")
    assert {name: stage for name, (stage, _) in found.items()} == {
        "0001_c1s1_broken.png": "read",
        "0005_c1s1_blue.png": "embed",
        "0006_c1s1_alone.png": "match",
        "0002_c1s1_twin.png": "explain",
        "gallery:0001_c1s1_000001_00.png": "gallery",
        "gallery:0009_c1s1_blue.png": "gallery",
    }
    assert "expected the same person on another camera" in found["0006_c1s1_alone.png"][1]
    assert "0002_c2s1_twin.png at distance" in found["0002_c1s1_twin.png"][1]
    assert "expected finite embeddings" in found["gallery:0009_c1s1_blue.png"][1]
    assert {row.pid for row in mr.read_results(str(tmp_path / "out"))} == {1, 2, 3, 4}
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "done"


def test_bad_images_on_either_side_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(StoreError, match=r"expected gallery images that can be embedded, found none: .*bad"):
        run(job(folder, tmp_path / "a", reid={"gallery": (str(tmp_path / "bad.png"),)}))
    summary = run(job(folder, tmp_path / "b", images=(str(tmp_path / "bad.png"),)))
    assert (summary.images, summary.errors) == (0, 1)
    with pytest.raises(ImageError, match="nowhere"):
        run(job(folder, tmp_path / "c", reid={"gallery": ("nowhere",)}))
    (tmp_path / "empty").mkdir()
    without = job(folder, tmp_path / "d", reid={"gallery": (str(tmp_path / "empty"),)})
    for action in (run, forecast.plan_job):
        with pytest.raises(
            ImageError, match=r"expected gallery images, found none in .*empty; check --gallery"
        ):
            action(without)
    assert not (tmp_path / "d/queries").exists(), "nothing is embedded in vain"


def test_a_query_that_is_in_the_gallery_does_not_match_itself(folder: Path, tmp_path: Path) -> None:
    images = str(folder / "gallery" / "0001_c2s1_000001_00.png")
    run(job(folder, tmp_path / "out", images=(images,), reid={"matches": "top1"}))
    (row,) = mr.read_results(str(tmp_path / "out"))
    assert row.match_uri != row.uri
    assert row.distance > 0.01
    assert row.rank == 1


# The gallery.


class Counting(InProcess):
    """In this process, counting chunks, with a fault in place of the reply where a script says so."""

    embedded = 0
    done = 0
    faults: dict[int, Fault] = {}  # noqa: RUF012 - set by tests

    def submit(self, actor: int, call: Call) -> None:
        super().submit(actor, call)
        Counting.embedded += isinstance(call.tasks[0], EmbedTask)

    def wait(self, seconds: float) -> list[Event]:
        (event,) = super().wait(seconds) or [None]
        if event is None or event.call is None:
            return [] if event is None else [event]
        Counting.done += 1
        fault = Counting.faults.pop(Counting.done, None)
        return [event if fault is None else Event(event.actor, event.call, fault)]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(jobs, "InProcess", Counting)
    Counting.embedded = Counting.done = 0
    Counting.faults = {}
    return Counting


def test_a_gallery_is_embedded_once_for_several_jobs(
    folder: Path, tmp_path: Path, counting: type[Counting]
) -> None:
    store = str(tmp_path / "store")
    run(job(folder, tmp_path / "a", reid={"gallery_store": store}))
    first = counting.embedded
    assert not (tmp_path / "a/gallery").exists()
    counting.embedded = 0
    run(job(folder, tmp_path / "b", reid={"gallery_store": store}))
    of_queries, of_gallery = (
        len(list((tmp_path / rows).iterdir())) for rows in ("b/queries/rows", "store/rows")
    )
    assert (counting.embedded, first) == (of_queries, of_queries + of_gallery)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    other = job(folder, tmp_path / "c", reid={"gallery_store": store})
    model = other.model.model_copy(update={"preprocessing": {"size": (20, 8), "input_range": "0-1"}})
    with pytest.raises(StoreError, match=r"expected a gallery embedded with size \[20, 8\], found \[16, 8\]"):
        run(other.model_copy(update={"model": model}))


def test_a_gallery_is_the_same_wherever_a_job_is_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one job has listed by relative paths means the same to another, which knows own images."""
    store, crops = str(tmp_path / "store"), folder / "gallery"
    for name, start in (("a", folder), ("b", crops)):
        monkeypatch.chdir(start)
        here = os.path.relpath(crops)
        spec = job(folder, tmp_path / name, images=(here,), reid={"gallery": (here,), "gallery_store": store})
        assert run(spec).errors == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert {Path(row.match_uri).parent for row in mr.read_results(str(tmp_path / "b"))} == {crops}


def test_overwriting_embeds_anew(folder: Path, tmp_path: Path) -> None:
    run(job(folder, tmp_path / "out"))
    model = job(folder, "x").model.model_copy(
        update={"preprocessing": {"size": (20, 8), "input_range": "0-1"}}
    )
    changed = job(folder, tmp_path / "out").model_copy(update={"model": model})
    with pytest.raises(StoreError, match="a job with other settings"):
        run(changed)
    assert run_job(changed, Silent(), overwrite=True).rows == 8


def test_overwriting_keeps_results_where_the_gallery_is_of_another_model(
    folder: Path, tmp_path: Path
) -> None:
    """They stay if a job cannot even start; a gallery in the output itself is overwritten with the rest."""
    out, store = tmp_path / "out", tmp_path / "store"
    model = job(folder, "x").model.model_copy(
        update={"preprocessing": {"size": (20, 8), "input_range": "0-1"}}
    )
    for place in (store, out / "gallery"):
        first = job(folder, out, reid={"gallery_store": str(place)})
        run_job(first, Silent(), overwrite=True)
        before, changed = content(out), first.model_copy(update={"model": model})
        if place == store:
            with pytest.raises(StoreError, match=r"expected a gallery embedded with size \[20, 8\], found"):
                run_job(changed, Silent(), overwrite=True)
            assert content(out) == before
            assert run(first).earlier == 4
        else:
            assert run_job(changed, Silent(), overwrite=True).rows == 8


def test_overwriting_spares_images_whose_folder_has_the_name_of_embeddings(
    folder: Path, tmp_path: Path
) -> None:
    """As with `mcrise reid queries --gallery gallery --output . --overwrite`."""
    shutil.copytree(folder / "query", tmp_path / "queries")
    shutil.copytree(folder / "gallery", tmp_path / "gallery")
    images = [*tmp_path.rglob("*.png")]
    spec = job(tmp_path, tmp_path, images=(str(tmp_path / "queries"),))
    for _ in range(2):
        assert run_job(spec, Silent(), overwrite=True).rows == 8
        assert [*tmp_path.rglob("*.png")] == images


def test_progress_tells_how_many_are_embedded(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    tick = recorder.Recorder.tick

    def watched(self: recorder.Recorder) -> None:
        tick(self)
        if (progress := read_progress(str(tmp_path / "out"))) is not None:
            seen.append((progress.embedded, progress.masks_done))

    monkeypatch.setattr(recorder.Recorder, "tick", watched)
    run(job(mixed, tmp_path / "out"))
    everything = len([*mixed.rglob("*.png")])
    assert seen == sorted(seen)
    assert any(0 < embedded < everything for embedded, _ in seen)
    assert {embedded for embedded, masks in seen if masks} == {everything}


# Faults.


@pytest.mark.parametrize(
    ("kind", "number"), [(FaultKind.LOST, 1), (FaultKind.DIED, 3), (FaultKind.DIED, 14), (FaultKind.LOST, 20)]
)
def test_faults_cost_no_bits(
    folder: Path,
    tmp_path: Path,
    undisturbed: dict[tuple[str, str], Any],
    counting: type[Counting],
    kind: FaultKind,
    number: int,
) -> None:
    counting.faults = {number: Fault(kind, "scripted"), number + 1: Fault(kind, "scripted again")}
    summary = run(job(folder, tmp_path / "out"))
    assert counting.faults == {}
    assert summary.retries == {kind.value: 2}
    assert content(tmp_path / "out") == undisturbed


def test_an_image_that_ends_every_actor_costs_no_other_its_row(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other: the chunk is given up, then each of its images is a task of its own."""
    from mcrise_ray import worker

    save(mixed / "gallery/0007_c1s1_green.png", one_colour((0, 255, 0)))
    whole = worker.Worker.do

    def do(self: worker.Worker, call: Call) -> Reply:
        """As an actor that dies at the sight of the image, as far as an executor can tell."""
        for task in call.tasks:
            if isinstance(task, EmbedTask) and any("green" in ref.uri for ref in task.refs):
                return Reply((), Fault(FaultKind.DIED, "killed by an image"))
        return whole(self, call)

    monkeypatch.setattr(worker.Worker, "do", do)
    summary = run(job(mixed, tmp_path / "out", max_retries=2))
    assert summary.rows == 8
    found = errors(tmp_path / "out")["gallery:0007_c1s1_green.png"]
    assert found[0] == "gallery"
    assert "actor died, after 2 retries: killed by an image" in found[1]
    assert len(errors(tmp_path / "out")) == 7
    assert summary.retries == {"actor died": 4}


def test_out_of_memory_halves_the_batch(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, str], Any], counting: type[Counting]
) -> None:
    counting.faults = {1: Fault(FaultKind.DEVICE_MEMORY, "scripted")}
    summary = run(job(folder, tmp_path / "out"))
    assert summary.halved == 1
    rows = content(tmp_path / "out")
    assert rows.keys() == undisturbed.keys()
    maps = [np.frombuffer(dict(values)["map"], np.float32) for values in rows.values()]
    theirs = [np.frombuffer(dict(values)["map"], np.float32) for values in undisturbed.values()]
    np.testing.assert_allclose(maps, theirs, atol=1e-4)


# Stops.


class Stopping(Silent):
    """Raises after so many masks, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def masks_done(self, masks: int) -> None:
        super().masks_done(masks)
        if self.masks >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_stop_while_embedding_loses_no_chunk_and_no_bits(
    folder: Path,
    tmp_path: Path,
    undisturbed: dict[tuple[str, str], Any],
    counting: type[Counting],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    taken = EmbeddingLedger._take
    seen: list[str] = []

    def take(self: EmbeddingLedger, task: EmbedTask, found: Any) -> None:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(task.chunk)
        taken(self, task, found)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingLedger, "_take", take)
        with pytest.raises(KeyboardInterrupt):
            run(job(folder, tmp_path / "out"))
    assert json.loads((tmp_path / "out/job.json").read_text())["state"] == "stopped"
    there = embeddings(tmp_path / "out")
    assert len(there) <= after
    counting.embedded = 0
    run(job(folder, tmp_path / "out"))
    assert counting.embedded == len(embeddings(tmp_path / "out")) - len(there)
    assert there.items() <= embeddings(tmp_path / "out").items()
    assert content(tmp_path / "out") == undisturbed


def test_a_stop_between_embedding_and_explaining(
    folder: Path,
    tmp_path: Path,
    undisturbed: dict[tuple[str, str], Any],
    counting: type[Counting],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reidjob.ReidJob, "_explain", stop)
        with pytest.raises(KeyboardInterrupt):
            run(job(folder, tmp_path / "out"))
    counting.embedded = 0
    run(job(folder, tmp_path / "out"))
    assert counting.embedded == 0
    assert content(tmp_path / "out") == undisturbed


def test_a_killed_driver_leaves_no_copy_of_the_gallery(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not clean up: there is nothing to clean up while it explains."""
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen: list[list[Path]] = []

    class Looking(Silent):
        def masks_done(self, masks: int) -> None:
            seen.append([*temporary.glob("mcrise-*")])

    assert run(job(folder, tmp_path / "out"), Looking()).images == 4
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("after", [64, 256, 320, 900])
def test_a_stop_while_explaining(
    mixed: Path, tmp_path: Path, undisturbed: dict[tuple[str, str], Any], counting: type[Counting], after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(mixed, tmp_path / "out"), Stopping(after))
    counting.embedded = 0
    reporter = Silent()
    summary = run(job(mixed, tmp_path / "out"), reporter)
    assert counting.embedded == 0
    assert reporter.masks == 4 * 256 - -(-after // 64) * 64  # not one unit is done twice
    assert (summary.images, summary.errors, summary.rows) == (4, 6, 8)
    assert len(errors(tmp_path / "out")) == 6
    run(job(mixed, tmp_path / "whole"))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_is_left_of_a_job_may_be_its_end(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All queries are committed, errors of the gallery and the retrieval are not."""
    run(job(mixed, tmp_path / "out"))
    expected = json.loads((tmp_path / "out/job.json").read_text())
    for path in (tmp_path / "out/errors").iterdir():
        table = pd.read_parquet(path)
        table[table.stage != "gallery"].to_parquet(path)
    written = {**expected, "state": "running"}
    del written["retrieval"]
    (tmp_path / "out/job.json").write_text(json.dumps(written))
    summary = run(job(mixed, tmp_path / "out"))
    assert (summary.images, summary.errors, summary.masks) == (4, 6, 0)
    stored = json.loads((tmp_path / "out/job.json").read_text())
    assert (stored["state"], stored["retrieval"]) == ("done", expected["retrieval"])
    assert len(errors(tmp_path / "out")) == 6


def test_errors_are_tried_again_on_either_side(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(job(mixed, out))
    before, kept = content(out), embeddings(out)
    save(mixed / "query/0001_c1s1_broken.png", person(1, 3))
    save(mixed / "gallery/0001_c1s1_000001_00.png", person(1, 20))
    assert run(job(mixed, out)).errors == 6  # they are final, unless
    asked: list[str] = []
    monkeypatch.setattr(Worker, "do", recording(Worker.do, asked))
    (out / "errors/notes.csv").write_text("somebody's own")
    summary = run_job(job(mixed, out), Silent(), retry_errors=True)
    assert (out / "errors/notes.csv").exists()
    assert (summary.images, summary.errors, summary.earlier) == (5, 4, 4)
    # Nothing else is embedded again.
    assert sorted(asked) == [
        "0001_c1s1_000001_00.png", "0001_c1s1_broken.png", "0005_c1s1_blue.png", "0009_c1s1_blue.png",
    ]  # fmt: skip
    assert errors(out).keys() == {
        "0005_c1s1_blue.png", "0006_c1s1_alone.png", "0002_c1s1_twin.png", "gallery:0009_c1s1_blue.png",
    }  # fmt: skip
    after = content(out)
    assert after.keys() - before.keys() == {("0001_c1s1_broken.png", role) for role in ("correct", "wrong")}
    assert all(after[key] == value for key, value in before.items())
    gallery = pd.concat(pd.read_parquet(path) for path in (out / "gallery/rows").iterdir())
    assert sorted(gallery.image_id) == sorted(
        path.name for path in (mixed / "gallery").iterdir() if "blue" not in path.name
    )
    assert kept.items() <= embeddings(out).items(), "files with rows never change"


def test_a_gallery_alone_is_tried_again(mixed: Path, tmp_path: Path) -> None:
    """All queries are done, also in a job that finds the gallery there."""
    store = str(tmp_path / "store")
    for name in ("0001_c1s1_broken", "0005_c1s1_blue", "0006_c1s1_alone", "0002_c1s1_twin"):
        (mixed / f"query/{name}.png").unlink()
    one, other = (job(mixed, tmp_path / name, reid={"gallery_store": store}) for name in ("a", "b"))
    assert run(one).errors == 2
    save(mixed / "gallery/0001_c1s1_000001_00.png", person(1, 20))
    assert run_job(other, Silent(), retry_errors=True).errors == 1
    summary = run_job(one, Silent(), retry_errors=True)
    assert (summary.images, summary.errors, summary.masks) == (4, 1, 0)
    assert errors(tmp_path / "a").keys() == {"gallery:0009_c1s1_blue.png"}


@pytest.mark.parametrize("side", ["queries", "gallery"])
def test_a_stop_while_errors_are_tried_again_loses_no_image(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """It has been mended, but for its error: it counts as embedded, and the same command goes on."""
    out = tmp_path / "out"
    run(job(mixed, out))
    save(mixed / "query/0001_c1s1_broken.png", person(1, 3))
    save(mixed / "gallery/0001_c1s1_000001_00.png", person(1, 20))

    def stopping(store: GalleryStore, *_: Any) -> None:
        if store.location.endswith(side):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GalleryStore, "_write_errors", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_job(job(mixed, out), Silent(), retry_errors=True)
    assert json.loads((out / "job.json").read_text())["retry_errors"] is True
    summary = run(job(mixed, out))
    assert (summary.images, summary.errors) == (5, 4)
    assert errors(out).keys().isdisjoint({"0001_c1s1_broken.png", "gallery:0001_c1s1_000001_00.png"})
    assert len(content(out)) == 10
    assert "retry_errors" not in json.loads((out / "job.json").read_text())


def test_sums_of_another_match_are_not_gone_on_with(
    folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, str], Any]
) -> None:
    """The nearest right image of a query cannot be read at first, and can when the job goes on."""
    (root := tmp_path / "people").mkdir()
    shutil.copytree(folder, root, dirs_exist_ok=True)
    row = dict(undisturbed["0001_c1s1_000001_00.png", "correct"])
    best = root / "gallery" / row["match_id"]
    whole, out = best.read_bytes(), tmp_path / "out"
    best.write_bytes(b"no image")
    with pytest.raises(KeyboardInterrupt):
        run(job(root, out), Stopping(64))
    assert len([*(out / "partial").iterdir()]) == 1
    best.write_bytes(whole)
    run_job(job(root, out), Silent(), retry_errors=True)
    found = content(out)
    assert found.keys() == undisturbed.keys()
    for key, values in found.items():
        here, there = dict(values), dict(undisturbed[key])
        assert here["match_id"] == here["target_name"] == there["match_id"], key
        for name in ("distance", "score", "relative_error"):  # it was embedded in a batch of its own
            assert here[name] == pytest.approx(there[name], rel=1e-4), key
        maps = (np.frombuffer(row["map"], np.float32) for row in (here, there))
        np.testing.assert_allclose(*maps, atol=1e-4)


def test_a_gallery_that_has_changed_is_told(folder: Path, tmp_path: Path) -> None:
    """Whether all queries are done or some are left; what is done keeps its matches."""
    root, out = tmp_path / "people", tmp_path / "out"
    shutil.copytree(folder, root)
    spec = job(root, out, reid={"matches": "top1"})
    with pytest.raises(KeyboardInterrupt):
        run(spec, Stopping(600))
    before = content(out)
    assert 0 < len(before) < 4

    def told(expected: str, **how: bool) -> None:
        reporter = Silent()
        run_job(spec, reporter, **how)
        assert [note for note in reporter.notes if "gallery lists other images" in note] == (
            [f"the gallery lists other images than before ({expected}): queries done before keep the matches "
             "that they had; --overwrite explains all anew"] if expected else []
        )  # fmt: skip

    save(root / "gallery/0001_c2s1_000009_00.png", person(1, 1))
    told("25 now, 24 then")
    assert before.items() <= content(out).items()
    told("")
    (root / "gallery/0001_c2s1_000009_00.png").unlink()
    told("24 now, 25 then")
    (root / "gallery/0001_c3s1_000002_00.png").rename(root / "gallery/0001_c3s1_000009_00.png")
    save(root / "gallery/0002_c3s1_000009_00.png", person(2, 1))
    told("25 now, 25 then")
    assert before.items() <= content(out).items()
    told("", overwrite=True)
    told("")


def test_queries_may_be_the_gallery(folder: Path, tmp_path: Path) -> None:
    """One listing on both sides, embedded at the same time."""
    crops = str(folder / "gallery")
    summary = run(job(folder, tmp_path / "out", images=(crops,), reid={"gallery": (crops,)}))
    assert (summary.images, summary.errors) == (24, 0)


def recording(do: Callable[[Worker, Call], Reply], asked: list[str]) -> Callable[[Worker, Call], Reply]:
    """`Worker.do` that writes down which images are embedded."""

    def done(worker: Worker, call: Call) -> Reply:
        for task in call.tasks:
            if isinstance(task, EmbedTask):
                asked.extend(ref.image_id for ref in task.refs)
        return do(worker, call)

    return done


# Reading.


def test_other_tools_read_the_rows(folder: Path, tmp_path: Path) -> None:
    run(job(folder, tmp_path / "out"))
    expected = content(tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out" / "maps")
    assert list(frame.columns)[-9:] == [
        *("match_id", "match_uri", "distance", "d0", "rank", "pid", "camid", "match_pid", "match_camid")
    ]
    assert frame["pid"].dtype.kind == "i"
    sql = f"select image_id, target_role, match_id, rank, map from '{tmp_path}/out/maps/*.parquet'"
    rows = duckdb.sql(sql).fetchall()
    assert len(rows) == len(frame) == 8
    for image_id, role, match_id, rank, values in rows:
        row = dict(expected[image_id, role])
        assert (row["match_id"], row["rank"]) == (match_id, rank)
        assert np.array(values, np.float32).tobytes() == row["map"]


def test_one_figure_per_query_with_a_line_for_each_match(folder: Path, tmp_path: Path) -> None:
    from mcrise_ray import render

    spec = job(folder, tmp_path / "out", figures=2)
    run(spec)
    seen: list[Any] = []
    draw = render.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "draw", lambda image, rows: seen.append((image, rows)) or draw(image, rows))
        drawn = draw_figures(spec, Silent())
    assert len(drawn) == len(seen) == 2
    image, lines = seen[0]
    embedder = mr.load_embedder(spec.model)
    first, second = list(mr.read_results(str(tmp_path / "out")))[:2]
    np.testing.assert_array_equal(image, embedder.prepare(mr.read_image(first.uri)))
    for line, row in zip(lines, (first, second), strict=True):
        title, picture = line.match
        assert title.splitlines()[:2] == [row.target_role, row.match_id]
        assert f"rank {row.rank}" in title
        np.testing.assert_array_equal(picture, embedder.prepare(mr.read_image(row.match_uri)))


# Settings.


def test_p_mask_is_the_papers_where_nothing_is_said(folder: Path) -> None:
    assert job(folder, "out").explain.p_mask == 0.1
    assert job(folder, "out", explain={"p_mask": 0.5}).explain.p_mask == 0.5
    plain = {**job(folder, "out").model_dump(), "explain": mr.ExplainSpec(masks=9)}
    assert mr.JobSpec(**plain).explain == mr.ExplainSpec(masks=9, p_mask=0.1)
    del plain["explain"]
    assert mr.JobSpec(**plain).explain == mr.ExplainSpec(p_mask=0.1)
    again = mr.JobSpec(**job(folder, "out", explain={"p_mask": 0.5}).model_dump(mode="json"))
    assert again == job(folder, "out", explain={"p_mask": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reid": None}, "reid: expected a gallery for kind reid, found none; give reid.gallery"),
        ({"kind": "explain"}, "reid: expected kind reid with a gallery, found kind explain"),
        (
            {"targets": "top5"},
            r"targets: expected none for kind reid, which explains matches; say reid.matches",
        ),
        ({"model": {"model": "m:f", "classes": "c.txt"}}, "model.classes: expected none for kind reid"),
        (
            {"model": {"model": "m:f", "preprocessing": {"activation": "softmax"}}},
            "model.preprocessing.activation: expected none for kind reid",
        ),
        ({"reid": {"gallery": ()}}, "expected at least one source of gallery images, found none"),
        (
            {"reid": {"gallery": "g", "matches": "top0"}},
            "expected matches top1, topN, correct, wrong or named",
        ),
        ({"reid": {"gallery": "g", "matches": "named"}}, "together with the match 'named', found no pairs"),
        (
            {"reid": {"gallery": "g", "pairs": "p.csv"}},
            "together with the match 'named', found pairs without",
        ),
        ({"reid": {"gallery": "g", "d0": 0}}, "d0: Input should be greater than 0, found 0"),
        ({"reid": {"gallery": "g", "distance": "l1"}}, "distance: Input should be 'euclidean' or 'cosine'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    values = {**job(folder, "out").model_dump(mode="json"), **changes}
    with pytest.raises(SpecError, match=message):
        mr.JobSpec(**values)


# The command line.

COMMON = ("--size", "16x8", "--input-range", "0-1", "--masks", "64", "--grid", "4x2", "--actors", "0")


def mcrise(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def reid(root: Path, output: Path, *more: object) -> Result:
    sides = (root / "query", "--gallery", root / "gallery", "--model", "blackboxes:halves")
    return mcrise("reid", *sides, *COMMON, "--output", output, *more)


def test_reid_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    said = ("--match", "correct+wrong", "--match", "top1", "--figures", 1, "--gallery-store", store)
    done = reid(folder, tmp_path / "out", *said)
    assert done.exit_code == 0, done.stderr
    assert "4 images explained, 0 errors, 8 maps, 256 masks" in done.stdout
    assert "re-identified: recall@1 100.0%, mAP " in done.stdout
    assert "of 4 queries of known people" in done.stdout
    assert "embedded 28 images of queries and gallery" in done.stderr
    assert len(list((tmp_path / "out/figures").iterdir())) == 1
    stored = json.loads((tmp_path / "out/job.json").read_text())
    assert stored["spec"]["explain"]["p_mask"] == 0.1
    assert stored["spec"]["reid"]["gallery_store"] == str(store)
    assert {row.target_role for row in mr.read_results(str(tmp_path / "out"))} == {"correct", "wrong"}
    again = reid(folder, tmp_path / "out", *said)
    assert (again.exit_code, "4 images explained, 0 errors, 8 maps (4 images by earlier" in again.stdout) == (
        0,
        True,
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (("--match", "best"), "matches: expected matches top1, topN, correct, wrong or named"),
        (
            ("--match", "named"),
            "pairs (--pairs): expected a list together with the match 'named', found no pairs",
        ),
        (("--d0", "0"), "d0: Input should be greater than 0"),
        (("--p-mask", "1"), "p_mask: expected a probability"),
        (("--distance", "l2"), "distance: Input should be 'euclidean' or 'cosine'"),
        (("--gallery", "nowhere"), "nowhere"),
        (("--model", "torchvision:resnet18"), "expected --model torchreid:NAME"),
        (("--match", "named", "--pairs", "none.csv"), "none.csv"),
    ],
)
def test_bad_input_is_one_line_that_names_the_knob(
    folder: Path, tmp_path: Path, said: tuple[str, ...], message: str
) -> None:
    done = reid(folder, tmp_path / "out", *said)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_job_file_is_checked_and_run(mixed: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    values = job(mixed, tmp_path / "out").model_dump(mode="json")
    file.write_text(yaml.safe_dump({**values, "reid": {"gallery": "mixed/gallery", "matches": "top2+wrong"}}))
    checked = mcrise("job", "check", file)
    assert checked.exit_code == 0, checked.stderr
    lines = dict(line.split(maxsplit=1) for line in checked.stdout.splitlines())
    assert (lines["images"], lines["gallery"], lines["rows"]) == ("8", "27", "at most 24")
    assert lines["masks"] == f"{8 * 256:,}"
    done = mcrise("run", file)
    assert done.exit_code == 1
    assert "5 images explained, 5 errors" in done.stdout


# Ray.


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_TMPDIR"] = f"/tmp/mcrise-test-{os.getpid()}"
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)
    with cluster.local_ray(cpus=8):
        yield


def test_actors_give_the_bits_of_one_process(
    local_ray: None, folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, str], Any]
) -> None:
    summary = run(job(folder, tmp_path / "out", actors=2))
    assert summary.retries == {}
    assert content(tmp_path / "out") == undisturbed


def test_actors_that_are_killed_cost_no_bits(
    local_ray: None, folder: Path, tmp_path: Path, undisturbed: dict[tuple[str, str], Any]
) -> None:
    """Real processes: one ends at a batch as only embedding has them, another while it explains."""
    flags = [tmp_path / "flag4", tmp_path / "flag8"]
    for flag in flags:
        flag.touch()
    args = {"flag": str(tmp_path / "flag")}
    summary = run(job(folder, tmp_path / "out", actors=2, args=args))
    assert not any(flag.exists() for flag in flags)
    assert summary.replaced == 2
    assert content(tmp_path / "out") == undisturbed
