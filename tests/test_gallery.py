"""The stored gallery: what a chunk of images becomes, resuming, reuse by the same model, and order."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mcrise_ray import embed as embed_module
from mcrise_ray.embed import GalleryRow, chunks, embed, identified, read_pairs
from mcrise_ray.embedders import Embedder, embedder_facts, load_embedder
from mcrise_ray.errors import ImageError, StoreError
from mcrise_ray.gallery import GalleryStore
from mcrise_ray.identity import UNKNOWN
from mcrise_ray.images import ImageRef, ImageSource
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import ModelFacts
from mcrise_ray.reid import embeddings_of

SIZE = {"size": (16, 8)}


class Grid(nn.Module):
    """Embeddings of 6 numbers, NaN for an image that is all blue."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        blue = images[:, 2].mean(dim=(1, 2)) - images[:, :2].mean(dim=(1, 2, 3))
        halves = torch.cat([images[:, :, :8].mean(dim=(2, 3)), images[:, :, 8:].mean(dim=(2, 3))], dim=1)
        return halves.square() * self.scale + 1 + torch.where(blue > 0.99, torch.nan, 0.0)[:, None]


def grid(scale: float = 1.0) -> Grid:
    return Grid(scale)


def embedder_of(scale: float = 1.0) -> Embedder:
    preprocessing = {**SIZE, "input_range": "0-1"}
    return load_embedder("test_gallery:grid", args={"scale": scale}, preprocessing=preprocessing)


def facts_of(embedder: Embedder, name: str = "test_gallery:grid") -> ModelFacts:
    return embedder_facts(ModelSpec(model=name), embedder)


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Seven people's images, a file that is none, and one whose embedding is NaN."""
    place = tmp_path / "images"
    place.mkdir()
    for number in range(7):
        picture = rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{number:04d}_c{number % 3 + 1}s1_000001_00.png")
    (place / "0003_c2s1_broken.png").write_bytes(b"no image")
    blue = np.zeros((20, 10, 3), np.uint8)
    blue[..., 2] = 255
    Image.fromarray(blue).save(place / "blue.png")
    return place


class Stored:
    """A gallery of a folder in chunks of that many images at most."""

    def __init__(self, place: Path, folder: Path, most: int = 3) -> None:
        self.store, embedder = GalleryStore(str(place)), embedder_of()
        self.store.begin(facts_of(embedder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embed_module, "_MOST", most)
            listed = list(chunks(ImageSource(str(folder))))
        self.chunks = [chunk.name for chunk in listed]
        for chunk in listed:
            self.store.write(chunk.name, *embed(embedder, chunk.refs, batch_size=2))

    def load(self, **settings):
        return self.store.load(self.chunks, **settings)


def stored(tmp_path: Path, folder: Path, most: int = 3) -> Stored:
    return Stored(tmp_path / "gallery", folder, most)


def test_every_image_becomes_a_row_or_an_error(folder: Path) -> None:
    embedder = embedder_of()
    refs = [*ImageSource(str(folder)), ImageRef("gone", "gone.png", problem="line 7 is empty")]
    rows, errors = embed(embedder, refs, batch_size=4)
    assert [(error.image_id, error.stage) for error in errors] == [
        ("0003_c2s1_broken.png", "read"),
        ("blue.png", "embed"),
        ("gone", "list"),
    ]
    assert "expected finite embeddings" in errors[1].error
    assert errors[2].error == "line 7 is empty"
    assert [(row.pid, row.camid) for row in rows] == [(n, n % 3 + 1) for n in range(7)]
    assert {row.image_id for row in rows} | {error.image_id for error in errors} == {r.image_id for r in refs}
    for row in rows:
        picture = np.asarray(Image.open(row.uri))
        expected = embeddings_of(embedder, embedder.prepare(picture)[None])[0]
        np.testing.assert_allclose(row.embedding, expected, rtol=1e-6)
    assert embed(embedder, [], batch_size=4) == ([], [])


def test_chunks_are_what_is_committed(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    (tmp_path / "gallery" / "rows" / "half.parquet.tmp-17").write_bytes(b"PAR1")
    assert made.store.present() == set(made.chunks)
    assert [error.image_id for error in made.store.errors(made.chunks)] == [
        "0003_c2s1_broken.png",
        "blue.png",
    ]
    assert list(made.store.errors(made.chunks[:1])) == []
    whole = stored(tmp_path / "other", folder, 100)
    assert len(made.chunks) == 3
    assert made.load().image_ids == whole.load().image_ids
    np.testing.assert_allclose(made.load().embeddings, whole.load().embeddings, rtol=1e-6)


def test_a_chunk_without_rows_is_done_as_well(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    made.store.write("none", [], list(made.store.errors(made.chunks)))
    assert "none" in made.store.present()
    assert len(made.store.load([*made.chunks, "none"])) == 7
    empty = made.store.load(["none"], str(tmp_path / "none.npy"))
    assert empty.embeddings.shape == (0, 6)


def test_chunks_are_a_function_of_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, many in (("_LEAST", 4), ("_USUAL", 8), ("_MOST", 16)):
        monkeypatch.setattr(embed_module, name, many)
    refs = [ImageRef(f"{n:04d}_c1s1_1.png", f"/{n}.png") for n in range(500)]
    whole = list(chunks(iter(refs)))
    assert whole == list(chunks(refs))
    assert [ref.image_id for chunk in whole for ref in chunk.refs] == [ref.image_id for ref in refs]
    assert all(4 <= len(chunk.refs) <= 16 for chunk in whole[:-1])
    assert whole[0].refs[3].pid == 3
    for place in (0, 250, 500):
        grown = list(chunks([*refs[:place], ImageRef("new", "/new.png"), *refs[place:]]))
        changed = {chunk.name for chunk in whole} - {chunk.name for chunk in grown}
        assert 1 <= len(changed) <= 8
    assert next(chunks(refs[1::-1])).name != next(chunks(refs[:2])).name


def test_a_chunk_written_twice_counts_once(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    files = sorted(path.name for path in (tmp_path / "gallery" / "rows").iterdir())
    again = stored(tmp_path, folder)
    assert sorted(path.name for path in (tmp_path / "gallery" / "rows").iterdir()) == files
    assert again.chunks == made.chunks
    assert len(again.load()) == 7


def test_two_jobs_that_mend_a_chunk_at_a_time_lose_no_image(tmp_path: Path, folder: Path) -> None:
    """And one that reads it meanwhile sees it as it was, or as it will be."""
    made = stored(tmp_path, folder, 100)
    (chunk,), before = made.chunks, made.load()
    broken, blue = made.store.errors([chunk])
    like = GalleryRow(broken.image_id, broken.uri, 3, 2, before.embeddings[0])
    other = GalleryRow(blue.image_id, blue.uri, None, None, before.embeddings[1])
    reading = made.store.errors([chunk])
    made.store.mend(chunk, [like], [replace(blue, error="one job found no way")])
    made.store.mend(chunk, [other], [replace(broken, error="the other job neither")])
    assert list(made.store.errors([chunk])) == []
    assert {error.image_id for error in reading} == {broken.image_id, blue.image_id}
    both = made.load()
    assert set(both.image_ids.to_pylist()) == {*before.image_ids.to_pylist(), like.image_id, other.image_id}
    made.store.mend(chunk, [other, like], [])  # a third, that began before both
    again = made.load(memory_map=str(tmp_path / "again.npy"))
    assert again.image_ids == both.image_ids
    np.testing.assert_array_equal(again.embeddings, both.embeddings)
    place = both.image_ids.to_pylist().index(like.image_id)
    np.testing.assert_array_equal(both.embeddings[place], like.embedding)
    assert both.identities.pids[place] == 3
    assert made.store.present() == {chunk}


def test_folders_with_images_of_the_same_names_share_no_chunk(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for place in ("a", "b"):
        shutil.copytree(folder, tmp_path / place / "gallery")
        monkeypatch.chdir(tmp_path / place)
        names += [chunk.name for chunk in chunks(ImageSource("gallery"))]
        assert names[-1] == next(chunks(ImageSource(str(tmp_path / place / "gallery")))).name
    assert len(set(names)) == 2


def test_the_newest_error_is_told(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder, 100)
    (chunk,), (broken, blue) = made.chunks, made.store.errors(made.chunks)
    made.store.mend(chunk, [], [replace(broken, error="still no image")])
    assert list(made.store.errors([chunk])) == [replace(broken, error="still no image"), blue]


def test_an_error_left_by_a_job_that_died_before_its_rows_does_not_count(
    tmp_path: Path, folder: Path
) -> None:
    made = stored(tmp_path, folder, 100)
    (chunk,), errors = made.chunks, list(made.store.errors(made.chunks))
    rows = [GalleryRow(error.image_id, error.uri, None, None, np.zeros(6, np.float32)) for error in errors]
    made.store.write(chunk, rows)
    assert list(made.store.errors([chunk])) == []


def test_the_order_is_that_of_the_names_whatever_was_written_first(tmp_path: Path) -> None:
    rows = [GalleryRow(f"{n:03d}", f"/{n}.png", n, None, np.full(6, n, np.float32)) for n in range(40)]
    backwards = GalleryStore(str(tmp_path / "b"))
    backwards.begin(facts_of(embedder_of()))
    starts = list(reversed(range(0, 40, 7)))
    for at in starts:
        backwards.write(str(at), rows[at : at + 7][::-1])
    gallery = backwards.load([str(at) for at in starts])
    assert gallery.image_ids.to_pylist() == [row.image_id for row in rows]
    np.testing.assert_array_equal(gallery.embeddings[:, 0], np.arange(40))
    np.testing.assert_array_equal(gallery.identities.pids, np.arange(40))
    assert (gallery.identities.camids == UNKNOWN).all()


def test_only_the_listed_chunks_belong_to_the_gallery(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    part = made.store.load(made.chunks[:1])
    assert part.image_ids.to_pylist() == [ref.image_id for ref in list(ImageSource(str(folder)))[:3]]
    with pytest.raises(StoreError, match=r"cannot read .*gallery/rows/nothing\.parquet of the gallery"):
        made.store.load(["nothing"])


def test_embeddings_may_be_a_memory_map(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    mapped = made.load(memory_map=str(tmp_path / "embeddings.npy"))
    assert isinstance(mapped.embeddings, np.memmap)
    np.testing.assert_array_equal(mapped.embeddings, made.load().embeddings)
    with pytest.raises(StoreError, match=r"cannot write embeddings to .*no/where.npy: .*; set TMPDIR"):
        made.load(memory_map=str(tmp_path / "no" / "where.npy"))
    if Path("/dev/full").exists():  # where whatever is written finds no space
        with pytest.raises(
            StoreError, match=r"cannot write embeddings to /dev/full: .*No space left.*TMPDIR"
        ):
            made.load(memory_map="/dev/full")


def test_another_model_or_preprocessing_is_refused(tmp_path: Path, folder: Path) -> None:
    store = stored(tmp_path, folder).store
    store.begin(facts_of(embedder_of(), "m:the_same_weights_under_another_name"))
    with pytest.raises(
        StoreError, match=r"expected a gallery embedded by m:grid2, found one by test_gallery:grid"
    ):
        store.begin(facts_of(embedder_of(2.0), "m:grid2"))
    other = load_embedder("test_gallery:grid", preprocessing={"size": (24, 8), "input_range": "0-1"})
    with pytest.raises(
        StoreError, match=r"expected a gallery embedded with size \[24, 8\], found \[16, 8\] in"
    ):
        store.begin(facts_of(other))


def test_images_are_found_by_name_and_by_place(tmp_path: Path, folder: Path, monkeypatch) -> None:
    gallery = stored(tmp_path, folder).load()
    name = gallery.image_ids[4].as_py()
    np.testing.assert_array_equal(gallery.find([name, str(folder / name), "x.png"]), [4, 4, -1])
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(gallery.own([name, "elsewhere.png", f"file://{folder / name}"]), [4, -1, 4])


def test_any_tool_reads_the_rows(tmp_path: Path, folder: Path) -> None:
    store = stored(tmp_path, folder)
    paths = str(tmp_path / "gallery" / "rows" / "*.parquet")
    found = duckdb.sql(f"select image_id, pid, camid, embedding from '{paths}' order by image_id").fetchall()
    gallery = store.load()
    assert [row[:3] for row in found] == list(
        zip(gallery.image_ids.to_pylist(), range(7), [1, 2, 3, 1, 2, 3, 1], strict=True)
    )
    np.testing.assert_array_equal([row[3] for row in found], gallery.embeddings)
    schema = pq.read_schema(next((tmp_path / "gallery" / "rows").iterdir()))
    assert schema.names == ["image_id", "uri", "pid", "camid", "embedding"]
    assert str(schema.field("embedding").type).startswith("fixed_size_list<element: float")


def test_a_damaged_file_is_named(tmp_path: Path, folder: Path) -> None:
    made = stored(tmp_path, folder)
    victim = next((tmp_path / "gallery" / "rows").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"cannot read .*{victim.name} of the gallery"):
        made.load()


def test_manifests_carry_people_and_cameras(tmp_path: Path) -> None:
    manifest = tmp_path / "people.csv"
    manifest.write_text("uri,pid,camid\n0009_c1s1_1.png,12,3\nb.png,,\n0007_c2s1_1.png,,\nc.png,x,1\n")
    refs = [identified(ref) for ref in ImageSource(str(manifest))]
    assert [(ref.pid, ref.camid) for ref in refs] == [(12, 3), (None, None), (7, 2), (None, None)]
    assert "expected a whole number as pid, found 'x'" in (refs[3].problem or "")


def test_people_are_numbers_that_a_column_holds(tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.png"], "pid": pa.array([2**63], pa.uint64())})
    pq.write_table(table, tmp_path / "q.parquet")
    (ref,) = ImageSource(str(tmp_path / "q.parquet"))
    assert "expected a pid below 2**63, found 9223372036854775808" in (ref.problem or "")


def test_named_pairs(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,match\nq1.png,a.png\nq2.png,b.png\n\nq1.png,c.png\n")
    assert read_pairs(str(pairs)) == {"q1.png": ["a.png", "c.png"], "q2.png": ["b.png"]}
    pairs.write_text("query,match\nq1.png\n")
    with pytest.raises(
        ImageError, match=r"pairs.csv#line=2: expected a query and a match, found \['q1.png'\]"
    ):
        read_pairs(str(pairs))
    pairs.write_text('query,match\n"q1.png,a.png\n' + "q2.png,b.png\n" * 20_000)  # of quotes that never end
    with pytest.raises(ImageError, match=r"pairs.csv#line=\d+: field larger than .*; check --pairs"):
        read_pairs(str(pairs))
    pairs.write_text('query,match\nq1.png,"a.png\nq2.png,b.png\n')
    with pytest.raises(ImageError, match=r"pairs.csv#line=3: unexpected end of data; check --pairs"):
        read_pairs(str(pairs))
    pairs.write_text("a,b\n")
    with pytest.raises(ImageError, match="expected a first line with the columns query,match, found"):
        read_pairs(str(pairs))
