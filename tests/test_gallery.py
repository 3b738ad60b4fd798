"""The stored gallery: what a chunk of images becomes, resuming, reuse by the same model, and order."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mcrise_ray.embed import GalleryRow, embed, identified, read_pairs
from mcrise_ray.embedders import Embedder, load_embedder
from mcrise_ray.errors import ImageError, StoreError
from mcrise_ray.gallery import GalleryStore
from mcrise_ray.identity import UNKNOWN
from mcrise_ray.images import ImageRef, ImageSource
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


def stored(tmp_path: Path, folder: Path, chunk: int = 3) -> GalleryStore:
    store, embedder = GalleryStore(str(tmp_path / "gallery")), embedder_of()
    store.begin(embedder, "test_gallery:grid")
    refs = list(ImageSource(str(folder)))
    for at in range(0, len(refs), chunk):
        rows, _ = embed(embedder, refs[at : at + chunk], batch_size=2)
        store.write(rows)
    return store


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


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, folder: Path) -> None:
    embedder, location = embedder_of(), str(tmp_path / "gallery")
    refs = list(ImageSource(str(folder)))
    first = GalleryStore(location)
    assert not first.exists()
    first.begin(embedder, "grid")
    first.write(embed(embedder, refs[:3], 3)[0])
    (tmp_path / "gallery" / "rows" / "half.parquet.tmp-17").write_bytes(b"PAR1")

    again = GalleryStore(location)
    assert again.exists()
    again.begin(embedder, "grid")
    missing = list(again.missing(refs))
    assert [ref.image_id for ref in missing] == [ref.image_id for ref in refs[3:]]
    assert missing[0].pid == 3
    again.write(embed(embedder, missing, 3)[0])
    assert [ref.image_id for ref in again.missing(refs)] == ["0003_c2s1_broken.png", "blue.png"]
    whole = stored(tmp_path / "other", folder, chunk=100).load()
    resumed = again.load()
    np.testing.assert_array_equal(resumed.embeddings, whole.embeddings)
    assert resumed.image_ids.to_pylist() == whole.image_ids.to_pylist()


def test_rows_written_twice_count_once(tmp_path: Path, folder: Path) -> None:
    store, embedder = stored(tmp_path, folder), embedder_of()
    refs = list(ImageSource(str(folder)))
    files = sorted(path.name for path in (tmp_path / "gallery" / "rows").iterdir())
    store.write(embed(embedder, refs[:3], 3)[0])
    assert sorted(path.name for path in (tmp_path / "gallery" / "rows").iterdir()) == files
    store.write(embed(embedder, refs[1:5], 3)[0])
    assert len(store.load()) == 7


def test_the_order_is_that_of_the_names_whatever_was_written_first(tmp_path: Path) -> None:
    rows = [GalleryRow(f"{n:03d}", f"/{n}.png", n, None, np.full(6, n, np.float32)) for n in range(40)]
    backwards = GalleryStore(str(tmp_path / "b"))
    backwards.begin(embedder_of(), "grid")
    for at in reversed(range(0, 40, 7)):
        backwards.write(rows[at : at + 7][::-1])
    gallery = backwards.load()
    assert gallery.image_ids.to_pylist() == [row.image_id for row in rows]
    np.testing.assert_array_equal(gallery.embeddings[:, 0], np.arange(40))
    np.testing.assert_array_equal(gallery.identities.pids, np.arange(40))
    assert (gallery.identities.camids == UNKNOWN).all()


def test_only_the_listed_images_belong_to_the_gallery(tmp_path: Path, folder: Path) -> None:
    store = stored(tmp_path, folder)
    refs = list(ImageSource(str(folder)))[2:4]
    assert store.load(refs).image_ids.to_pylist() == [refs[0].image_id, refs[1].image_id]
    moved = [ImageRef(ref.image_id, f"/elsewhere/{ref.image_id}") for ref in refs]
    assert len(list(store.missing(moved))) == 2
    with pytest.raises(StoreError, match=r"expected embeddings in .*gallery, found none of --gallery"):
        store.load(moved)


def test_a_cache_is_shared_and_made_once(tmp_path: Path, folder: Path) -> None:
    store = stored(tmp_path, folder)
    cache = tmp_path / "cache"
    first, second = store.load(cache=str(cache)), store.load(cache=str(cache))
    assert isinstance(first.embeddings, np.memmap)
    assert isinstance(second.embeddings, np.memmap)
    assert len(list(cache.iterdir())) == 1
    np.testing.assert_array_equal(first.embeddings, store.load().embeddings)
    part = store.load(list(ImageSource(str(folder)))[:2], cache=str(cache))
    assert (len(part), len(list(cache.iterdir()))) == (2, 2)


def test_another_model_or_preprocessing_is_refused(tmp_path: Path, folder: Path) -> None:
    store = stored(tmp_path, folder)
    store.begin(embedder_of(), "the same weights under another name")
    with pytest.raises(
        StoreError, match=r"expected a gallery embedded by grid2, found one by test_gallery:grid"
    ):
        store.begin(embedder_of(2.0), "grid2")
    other = load_embedder("test_gallery:grid", preprocessing={"size": (24, 8), "input_range": "0-1"})
    with pytest.raises(
        StoreError, match=r"expected a gallery embedded with size \[24, 8\], found \[16, 8\] in"
    ):
        store.begin(other, "grid")


def test_images_are_found_by_name_and_by_place(tmp_path: Path, folder: Path, monkeypatch) -> None:
    gallery = stored(tmp_path, folder).load()
    name = gallery.image_ids[4].as_py()
    assert gallery.find([name, str(folder / name)]) == [4, 4]
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(gallery.own([name, "elsewhere.png", f"file://{folder / name}"]), [4, -1, 4])
    with pytest.raises(ImageError, match=r"expected an image of --gallery, found 'x.png'; check --pairs"):
        gallery.find([name, "x.png"])


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
    store = stored(tmp_path, folder)
    victim = next((tmp_path / "gallery" / "rows").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"cannot read .*{victim.name} of the gallery"):
        store.load()


def test_manifests_carry_people_and_cameras(tmp_path: Path) -> None:
    manifest = tmp_path / "people.csv"
    manifest.write_text("uri,pid,camid\n0009_c1s1_1.png,12,3\nb.png,,\n0007_c2s1_1.png,,\nc.png,x,1\n")
    refs = [identified(ref) for ref in ImageSource(str(manifest))]
    assert [(ref.pid, ref.camid) for ref in refs] == [(12, 3), (None, None), (7, 2), (None, None)]
    assert "expected a whole number as pid, found 'x'" in (refs[3].problem or "")


def test_named_pairs(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,match\nq1.png,a.png\nq2.png,b.png\n\nq1.png,c.png\n")
    assert read_pairs(str(pairs)) == {"q1.png": ["a.png", "c.png"], "q2.png": ["b.png"]}
    pairs.write_text("query,match\nq1.png\n")
    with pytest.raises(
        ImageError, match=r"pairs.csv#line=2: expected a query and a match, found \['q1.png'\]"
    ):
        read_pairs(str(pairs))
    pairs.write_text("a,b\n")
    with pytest.raises(ImageError, match="expected a first line with the columns query,match, found"):
        read_pairs(str(pairs))
