"""Every source lists what it should, lazily and without losing anything, and every reference can be read."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
from corpus import CASES, Decoded, encoded
from PIL import Image
from reporting import Silent
from torch import nn

from mcrise_ray import ImageSource, JobSpec, files, read_image, read_results, run_job, shards
from mcrise_ray.decode import DecodeOptions
from mcrise_ray.errors import ImageError
from mcrise_ray.images import ImageRef
from mcrise_ray.lease import Lease
from mcrise_ray.loading import ModelSpec
from mcrise_ray.seen import Seen
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.store import Store

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 99, 199)]
NAMES = ["cat/a b.png", "cat/ü#1.png", "dog/100%.png", "dog/z.png"]
LABELS = [0, 0, 1, 1]


def png(index: int) -> bytes:
    return encoded(Image.new("RGB", (5, 4), COLORS[index]), "PNG")


def color_of(uri: str) -> int:
    pixels = read_image(uri)
    assert pixels.shape == (4, 5, 3)
    return COLORS.index(tuple(pixels[0, 0].tolist()))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def encoded_table(count: int, metadata: dict[str, str] | None = None) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": png(i % 4), "path": f"{i}.png"} for i in range(count)]
    table = pa.table({"image": pa.array(images, kind), "label": [i % 4 for i in range(count)]})
    return table.replace_schema_metadata(metadata)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four images as a folder, as manifests, as Parquet and as tar shards."""
    root = tmp_path_factory.mktemp("some data")
    for index, name in enumerate(NAMES):
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(png(index))
    (root / "folder" / "cat" / "notes.txt").write_text("no image")
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["label", "uri", "target"], *([LABELS[i], f"folder/{NAMES[i]}", "1|dog"] for i in range(4))]
        )
    uris = [f"folder/{name}" for name in NAMES]
    manifest = pa.table(
        {"uri": uris, "label": ["cat", "cat", "dog", "dog"], "target": [[1, 2], [0], [], None]}
    )
    pa.parquet.write_table(manifest, root / "list.parquet")
    features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = encoded_table(4, {"huggingface": json.dumps(features)})
    pa.parquet.write_table(table, root / "encoded.parquet", row_group_size=3)
    for shard in range(2):
        write_tar(
            root / f"shard-{shard:03d}.tar",
            [
                entry
                for index in (2 * shard, 2 * shard + 1)
                for entry in (
                    (f"part/{index}.cls", b"7\n") if index != 3 else (f"part/{index}.json", b'{"label": 8}'),
                    (f"part/{index}.png", png(index)),
                )
            ],
        )
    return root


@pytest.fixture(scope="module")
def s3(data: Path, s3_server: str) -> str:
    """The same on a real S3 server; `{}` stands for the key."""
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://pictures/?{s3_server}")
    filesystem.create_dir("pictures")
    pyarrow.fs.copy_files(str(data), "pictures/some data", destination_filesystem=filesystem)
    return f"s3://pictures/some%20data/{{}}?{s3_server}"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, data: Path) -> str:
    return request.getfixturevalue("s3") if request.param == "s3" else f"{data}/{{}}"


SOURCES = {
    "folder": [(name, None, ()) for name in NAMES],
    "list.csv": [(f"folder/{name}", label, (1, "dog")) for name, label in zip(NAMES, LABELS, strict=True)],
    "list.parquet": [
        (f"folder/{name}", label, targets)
        for name, label, targets in zip(
            NAMES, ["cat", "cat", "dog", "dog"], [(1, 2), (0,), (), ()], strict=True
        )
    ],
    "encoded.parquet": [(f"{i}.png", i, ()) for i in range(4)],
    "shard-{000..001}.tar": [
        (f"shard-00{i // 2}.tar/part/{i}.png", 8 if i == 3 else 7, ()) for i in range(4)
    ],
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_list_ids_labels_and_targets_and_can_be_read(source: str, place: str) -> None:
    images = ImageSource(place.replace("{}", source))
    refs = list(images)
    assert [(ref.image_id, ref.label, ref.targets) for ref in refs] == SOURCES[source]
    assert [color_of(ref.uri) for ref in refs] == [0, 1, 2, 3]
    assert [color_of(ref.uri) for ref in reversed(refs)] == [3, 2, 1, 0]
    assert list(images) == refs, "a source can be listed again"
    assert pickle.loads(pickle.dumps(images)).sources == images.sources


def test_image_folders_have_labels(place: str) -> None:
    images = ImageSource("imagefolder:" + place.format("folder"))
    assert [(ref.image_id, ref.label) for ref in images] == list(zip(NAMES, LABELS, strict=True))
    assert images.class_names == ("cat", "dog")
    assert {(ref.label, ref.class_folder, ref.class_folders) for ref in images} == {
        (0, "cat", ("cat", "dog")),
        (1, "dog", ("cat", "dog")),
    }
    assert [color_of(ref.uri) for ref in images] == [0, 1, 2, 3]


def test_one_image_of_a_larger_file_is_a_source_too(place: str) -> None:
    for source in ("encoded.parquet", "shard-000.tar"):
        ref = list(ImageSource(place.format(source)))[1]
        (again,) = ImageSource(ref.uri)
        assert color_of(again.uri) == 1


def test_files_are_known_by_the_path_they_are_given_as(place: str) -> None:
    # A URL is percent-encoded, a path is not.
    names = [quote(name) if "://" in place else name for name in NAMES]
    sources = [place.format(f"folder/{name}") for name in names]
    assert [ref.image_id for ref in ImageSource(sources)] == sources
    assert [color_of(ref.uri) for ref in ImageSource(sources)] == [0, 1, 2, 3]


def test_image_folder_labels_are_torchvisions(data: Path) -> None:
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(data / "folder"))
    ours = ImageSource(f"imagefolder:{data / 'folder'}")
    assert [(ref.uri, ref.label) for ref in ours] == theirs.samples
    assert list(ours.class_names) == theirs.classes


def test_torchvision_datasets(tmp_path: Path) -> None:
    for label in range(2):
        folder = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}"
        folder.mkdir(parents=True)
        for index in range(2):
            picture = Image.new("RGB", (5, 4), COLORS[2 * label + index])
            (folder / f"{index}.ppm").write_bytes(encoded(picture, "PPM"))
    source = f"torchvision:GTSRB?root={tmp_path}&split=train"
    refs = list(ImageSource(source))
    assert [(ref.image_id, ref.label) for ref in refs] == [("0", 0), ("1", 0), ("2", 1), ("3", 1)]
    assert refs[3].uri == f"{source}#3"
    assert [color_of(ref.uri) for ref in refs] == [0, 1, 2, 3]
    (one,) = ImageSource(f"{source}#2")
    assert color_of(one.uri) == 2
    named = ImageSource(f"torchvision:ImageFolder?root={tmp_path / 'gtsrb' / 'GTSRB' / 'Training'}")
    assert named.class_names == ("00000", "00001")
    (tmp_path / "gtsrb" / "GTSRB" / "Training" / "00001" / "1.ppm").write_bytes(b"P6 5 4 255\n")
    with pytest.raises(ImageError, match=r"#3: truncated image"):
        read_image(refs[3].uri)


def test_labels_of_caltech(tmp_path: Path) -> None:
    """Its list of labels has a name that no other data set of torchvision has."""
    for place, name in enumerate(["001.ak47", "002.american-flag"], start=1):
        (tmp_path / "caltech256" / "256_ObjectCategories" / name).mkdir(parents=True)
        (tmp_path / "caltech256" / "256_ObjectCategories" / name / f"{place:03d}_0001.jpg").touch()
    assert [ref.label for ref in ImageSource(f"torchvision:Caltech256?root={tmp_path}")] == [0, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:GTSBR?root=.", "no dataset 'GTSBR'; did you mean: GTSRB"),
        ("torchvision:GTSRB?root=nowhere", "cannot open torchvision dataset GTSRB .*nothing is downloaded"),
        ("torchvision:MNIST?root=nowhere&train=False", r"'train': False.*Dataset not found"),
        ("torchvision:GTSRB?root=.&download=true", "take download= out"),
        ("nowhere", "expected a file or a folder, found nothing there"),
        ("nowhere.csv", "expected a file or a folder, found nothing there"),
        ("nowhere-{00..11}.tar", "expected a file or a folder, found nothing there"),
        ("nowhere/*.jpg", r"found nothing there; of patterns only \{000..009\} is known here"),
        ("shard-{11..00}.tar", "expected a range that goes up"),
        ("imagefolder:nowhere", "no such file"),
        ("http://example.org/a.png", r"expected a local path or one of s3://, gs://, hdfs://"),
        ("s3://me:secret@bucket/a.png", "expected no password in a URL"),
        ("a.tar.gz", "expected an uncompressed tar file"),
    ],
)
def test_sources_that_cannot_work_fail_before_the_job(source: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ImageSource(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"expected a first line with the columns uri\[,label\]\[,target\]"),
        ("a.csv", b"path,label\nx.png,1\n", "found .*path"),
        ("a.parquet", b"no parquet", "expected a Parquet file"),
    ],
)
def test_manifests_of_another_kind_fail_before_the_job(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=message):
        ImageSource(str(tmp_path / name))


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"expected a column uri, or a column of encoded images.*found x"):
        ImageSource(str(tmp_path / "a.parquet"))


def test_a_bad_row_of_a_manifest_is_one_problem(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    rows = [
        b"\xef\xbb\xbfURI, Label ,target",
        b"a.png,3,",
        b",4,",
        b"",
        b"b.png",
        b'"two\nlines.png", cat ,0',
        b"c.png," + b"9" * 5000 + b",",
        b"x" * 140_000 + b",1,",
        b"latin-\xe9.png,1,",
        b"d.png,-1,a|b c| 5 ",
    ]
    manifest.write_bytes(b"\r\n".join(rows))
    refs = list(ImageSource(str(manifest)))
    assert [(ref.image_id, ref.label, ref.targets) for ref in refs if ref.problem is None] == [
        ("a.png", 3, ()),
        ("b.png", None, ()),
        ("two\nlines.png", "cat", (0,)),
        ("latin-\\xe9.png", 1, ()),
        ("d.png", -1, ("a", "b c", 5)),
    ]
    problems = [ref.problem for ref in refs if ref.problem is not None]
    assert len(problems) == 3
    assert problems[0] == f"{manifest}#line=3: expected a uri, found ''"
    assert "integer string conversion" in problems[1]
    assert "field larger than field limit" in problems[2]


def test_a_quote_that_never_ends_hides_no_rows(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text('uri,label\na.png,1\nb.png,"2" \nc.png,"3\nd.png,4\ne.png,5\n')
    first, closed, open_quote = ImageSource(str(manifest))
    assert (first.image_id, first.problem) == ("a.png", None)
    assert closed.problem == f"{manifest}#line=3: ',' expected after '\"'; the row ends in line 3"
    assert open_quote.problem == f"{manifest}#line=4: unexpected end of data; the row ends in line 6"


def test_a_manifest_may_be_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9"))
    folder.mkdir()
    (folder / "a.png").write_bytes(png(3))
    (folder / "list.csv").write_text("uri\na.png\n")
    (ref,) = ImageSource(str(folder / "list.csv"))
    assert ref.image_id == "a.png"
    assert ref.uri.encode()  # or no table could hold it
    assert color_of(ref.uri) == 3


def test_rows_of_a_parquet_manifest(tmp_path: Path) -> None:
    table = pa.table(
        {"uri": ["a.png", None, "", "b.png", "/c.png"], "label": [1.0, 2.0, 3.0, 0.5, float("nan")]}
    )
    pa.parquet.write_table(table, tmp_path / "list.parquet")
    refs = list(ImageSource(str(tmp_path / "list.parquet")))
    assert [(ref.image_id, ref.label) for ref in refs if ref.problem is None] == [
        ("a.png", 1),
        ("/c.png", None),
    ]
    assert [(ref.problem or "").partition(": ")[2] for ref in refs[1:4]] == [
        "expected a uri, found None",
        "expected a uri, found ''",
        "expected a class index or a class name, found 0.5",
    ]
    assert refs[-1].uri == "/c.png"


def test_images_of_one_name_neither_meet_nor_vanish(data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\na.png\na.png\na.png#2\na.png\n")
    refs = list(ImageSource(str(tmp_path / "list.csv")))
    assert [ref.image_id for ref in refs] == ["a.png", "a.png#2", "a.png#2#3", "a.png#4"]
    folder = str(data / "folder")
    assert [ref.image_id for ref in ImageSource([folder, folder])] == [
        *NAMES,
        *(f"{n}#{5 + i}" for i, n in enumerate(NAMES)),
    ]


def test_labels_are_told_by_names_where_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million files in a bucket are not asked for one by one."""
    source = ImageSource("gone-{0..99999}.jpg")
    monkeypatch.setattr(files, "kind_of", None)
    monkeypatch.setattr(files, "open_seekable", None)
    assert not source.may_have("label")


def test_a_manifest_whose_first_line_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("uri," + "x" * 200_000)
    with pytest.raises(ImageError, match=r"long.csv: cannot read its first line: field larger"):
        ImageSource(str(tmp_path / "long.csv"))


def test_seen_overlooks_nothing() -> None:
    seen = Seen()
    names = [f"images/{i:06d}.jpg" for i in range(20_000)]
    assert all(seen.add(name) for name in names)
    assert not any(seen.add(name) for name in names)


def test_what_looks_like_the_end_of_a_shard_must_be_its_end(tmp_path: Path) -> None:
    """`tarfile` stops in silence where it cannot read a header, and behind the zeros of a first archive."""
    shard, members = tmp_path / "s.tar", [f"{n}.png" for n in range(6)]
    with tarfile.open(shard, "w") as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
    whole, size = shard.read_bytes(), 512 + -(-len(png(0)) // 512) * 512
    flipped = bytearray(whole)
    flipped[3 * size + 10] ^= 1
    cases = {
        "flipped": (bytes(flipped), 3),
        "zeroed": (whole[: 3 * size] + bytes(512) + whole[3 * size + 512 :], 3),
        "cut": (whole[: 3 * size + 100], 3),
        "twice": (whole + whole, 6),
    }
    for name, (content, listed) in cases.items():
        shard.write_bytes(content)
        *refs, problem = ImageSource(str(shard))
        assert [ref.image_id for ref in refs] == [f"s.tar/{member}" for member in members[:listed]], name
        assert problem.problem is not None, name
        assert "expected the end of the shard" in problem.problem, name
    for content in (whole, whole[: 6 * size], whole + bytes(100_000)):
        shard.write_bytes(content)
        assert [ref.problem for ref in ImageSource(str(shard))] == [None] * 6


def test_members_of_a_shard_may_be_called_anything(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        info = tarfile.TarInfo("caf\udce9.png")
        info.size = len(png(2))
        tar.addfile(info, io.BytesIO(png(2)))
    (ref,) = ImageSource(str(tmp_path / "s.tar"))
    assert ref.image_id == "s.tar/caf\\xe9.png"
    assert color_of(ref.uri) == 2


def test_rows_behind_a_damaged_page_are_not_those_of_another(tmp_path: Path) -> None:
    """The column is read in order; where that fails, nothing may be taken for what was asked for."""
    file = tmp_path / "encoded.parquet"
    rng = np.random.default_rng(0)
    rows = [{"bytes": rng.bytes(2000), "path": f"{n}.png"} for n in range(64)]
    table = pa.table({"image": pa.array(rows)})
    small = {"data_page_size": 4000, "write_batch_size": 2, "use_dictionary": False}
    pa.parquet.write_table(table, file, compression="zstd", **small)
    shards._rows_of.cache_clear()
    whole = bytearray(file.read_bytes())
    frames = [match.start() for match in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), whole)]
    broken = max(place for place in frames if place < whole.index(rows[40]["bytes"][:16]))
    whole[broken : broken + 4] = bytes(4)
    file.write_bytes(whole)
    right = wrong = 0
    for n, row in enumerate(rows):
        try:
            right += shards.read_inside(f"{file}#row={n}", DecodeOptions()) == row["bytes"]
        except ImageError:
            wrong += 1
    assert right + wrong == 64
    assert 16 <= right < 64


def test_a_label_that_is_no_class_costs_no_image(tmp_path: Path) -> None:
    encoded = pa.table({"image": [{"bytes": png(0), "path": "a.png"}], "label": [[0, 1]]})
    pa.parquet.write_table(encoded, tmp_path / "encoded.parquet")
    pa.parquet.write_table(pa.table({"uri": ["a.png"], "label": [[0, 1]]}), tmp_path / "list.parquet")
    for name in ("encoded.parquet", "list.parquet"):
        (ref,) = ImageSource(str(tmp_path / name))
        assert (ref.label, ref.problem) == (None, None)


def test_whole_numbers_that_pandas_wrote(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,label,pid,camid\na.png,3.0,7.0,1.\nb.png,,,\nc.png,3.5,,\n")
    found = [(ref.label, ref.pid, ref.camid) for ref in ImageSource(str(tmp_path / "list.csv"))]
    assert found == [(3, 7, 1), (None, None, None), ("3.5", None, None)]


def test_a_damaged_shard_is_one_problem_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    whole = (data / "shard-000.tar").read_bytes()
    (tmp_path / "s-0.tar").write_bytes(whole[:3000])
    (tmp_path / "s-1.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "s-3.tar").write_bytes(whole)
    refs = list(ImageSource(str(tmp_path / "s-{0..3}.tar")))
    problems = [ref for ref in refs if ref.problem is not None]
    assert [ref.image_id[-7:] for ref in problems] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert all("\n" not in (ref.problem or "") for ref in problems)
    assert [color_of(ref.uri) for ref in refs if ref.image_id.startswith("s-3")] == [0, 1]


@pytest.mark.parametrize("name", ["list.csv", "folder"])
def test_a_disk_that_fails_in_the_midst_of_a_listing_is_one_problem(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failure = OSError(errno.EIO, os.strerror(errno.EIO))

    class Failing(io.BytesIO):
        def read1(self, size: int = -1) -> bytes:
            if not (read := super().read1(size)):
                raise failure
            return read

    class Entries(AbstractContextManager[Any]):
        def __init__(self, folder: str) -> None:
            self.folder, self.entries = folder, scandir(folder)

        def __exit__(self, *error: object) -> None:
            self.entries.close()

        def __iter__(self) -> Iterator[Any]:
            yield from self.entries
            if self.folder.endswith("bad"):
                raise failure

    scandir = os.scandir
    (tmp_path / "folder/bad").mkdir(parents=True)
    for where in ("folder/a.png", "folder/bad/b.png", "folder/c.png"):
        (tmp_path / where).write_bytes(png(0))
    last = tmp_path / "last.png"
    last.write_bytes(png(0))
    monkeypatch.setattr(files, "open_seekable", lambda location: Failing(b"uri\na.png\nb.png\n"))
    monkeypatch.setattr(os, "scandir", Entries)
    (tmp_path / "list.csv").write_text("uri\n")
    refs = list(ImageSource([str(tmp_path / name), str(last)]))
    (problem,) = (ref.problem for ref in refs if ref.problem is not None)
    bad = tmp_path / ("folder/bad" if name == "folder" else name)
    assert problem == f"{bad}: cannot read it: Input/output error"
    found = ["a.png", "c.png" if name == "folder" else "b.png", str(last)]
    assert [ref.image_id for ref in refs if ref.problem is None] == found


def test_a_shard_cut_after_listing_is_an_image_error(data: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes((data / "shard-000.tar").read_bytes())
    ref = list(ImageSource(str(shard)))[1]
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ImageError, match="the shard has been cut short"):
        read_image(ref.uri)


def test_members_of_a_shard_whose_bytes_are_elsewhere_are_problems(tmp_path: Path) -> None:
    """Links vanished, and a sparse file was said to have been cut short."""
    for kind in ("cls", "png"):
        (tmp_path / f"a.{kind}").write_bytes(b"3" if kind == "cls" else png(0))
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    with open(tmp_path / "d.bmp", "wb") as file:
        file.write(b"BM")
        file.truncate(2**20)
    for form in ("gnu", "pax"):
        made = ["tar", f"--format={form}", "--sparse", "-C", str(tmp_path), "-cf", str(tmp_path / "s.tar")]
        subprocess.run([*made, "a.cls", "a.png", "b.png", "c.png", "d.bmp"], check=True)
        whole, hard, soft, sparse = ImageSource(str(tmp_path / "s.tar"))
        assert (whole.label, whole.problem, color_of(whole.uri)) == (3, None, 0)
        for link in (hard, soft):
            assert "found a link to a.png; make the shard with tar --deref" in (link.problem or "")
        assert "found one with holes; make the shard without tar --sparse" in (sparse.problem or "")
        assert [ref.image_id for ref in (hard, soft, sparse)] == ["s.tar/b.png", "s.tar/c.png", "s.tar/d.bmp"]


def test_webdataset_samples_have_several_images_and_labels(tmp_path: Path) -> None:
    members = [
        ("a/1.left.png", png(0)),
        ("a/1.right.png", png(1)),
        ("a/1.cls", b"cat"),
        ("b/1.jpg", png(2)),
        ("b/1.json", b"no json"),
        ("b/2.txt", b"alone"),
    ]
    write_tar(tmp_path / "s.tar", members)
    refs = list(ImageSource(str(tmp_path / "s.tar")))
    assert [(ref.image_id, ref.label) for ref in refs] == [
        ("s.tar/a/1.left.png", "cat"),
        ("s.tar/a/1.right.png", "cat"),
        ("s.tar/b/1.jpg", None),
    ]


def test_rows_of_encoded_parquet_are_read_in_any_order(tmp_path: Path, rng: np.random.Generator) -> None:
    file = str(tmp_path / "many.parquet")
    pa.parquet.write_table(encoded_table(300), file, row_group_size=70)
    refs = list(ImageSource(file))
    for index in rng.permutation(300)[:60]:
        assert color_of(refs[index].uri) == index % 4
    with pytest.raises(ImageError, match="expected a row below 300, found row 300"):
        read_image(f"{file}#row=300")


def test_encoded_parquet_without_bytes_is_an_image_error(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array([{"bytes": None, "path": "a.png"}, None], kind)})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    refs = list(ImageSource(str(tmp_path / "a.parquet")))
    assert [ref.image_id for ref in refs] == ["a.png", "row=1"]
    for ref in refs:
        with pytest.raises(ImageError, match="expected encoded bytes in column img, found none"):
            read_image(ref.uri)


def test_images_are_those_of_the_column_image_whatever_stands_before_it(tmp_path: Path) -> None:
    table = encoded_table(1).add_column(0, "mask", encoded_table(2)["image"][1:])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    (ref,) = ImageSource(str(tmp_path / "a.parquet"))
    assert (ref.image_id, color_of(ref.uri)) == ("0.png", 0)


def test_links_to_folders_are_followed_and_cycles_are_not(data: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "up").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(data / "folder")
    assert [ref.image_id for ref in ImageSource(str(tmp_path))] == [f"link/{name}" for name in NAMES]


@pytest.mark.parametrize("output", [".", "results"])
def test_figures_of_a_job_that_wrote_among_its_images_are_no_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(shutil.copytree(data / "folder", tmp_path / "images"))
    shutil.copytree("cat", "dog/figures")
    listed = list(ImageSource("."))
    assert len(listed) == 6
    Store(output).write_figure("theirs", (data / "folder" / NAMES[0]).read_bytes())
    assert len(list(ImageSource("."))) == 7
    Lease(Store(output)).release()
    assert list(ImageSource(".")) == listed
    assert len(list(ImageSource(f"{output}/figures"))) == 1  # said in so many words
    assert "results" not in ImageSource("imagefolder:.").class_names


def test_listing_is_lazy_and_flat(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        manifest = tmp_path / f"{rows}.csv"
        manifest.write_text("uri,label\n" + "".join(f"images/{i:07d}.jpg,{i % 10}\n" for i in range(rows)))
        tracemalloc.start()
        assert sum(1 for _ in ImageSource(str(manifest))) == rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(6_000) < peak(600) + 200_000
    assert len(list(islice(ImageSource(str(tmp_path / "6000.csv")), 3))) == 3


# A whole job: nothing is lost.


def tiny() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


class Counting(Silent):
    """A reporter that counts, and wants its lines to be lines."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int | None = -1
        self.ended = 0

    def start(self, images: int | None, masks_per_image: int | None, done: int = 0) -> None:
        self.total = images

    def image_done(self, masks: int) -> None:
        self.ended += 1

    def image_failed(self, image_id: str, stage: str, message: str) -> None:
        assert "\n" not in message
        self.ended += 1

    def note(self, text: str) -> None:
        assert "\n" not in text


def job(output: Path, *sources: str, **settings: object) -> JobSpec:
    model = ModelSpec(model=f"{__name__}:tiny", preprocessing={"size": (8, 8)}, device="cpu")
    explain = ExplainSpec(masks=8, grid=(2, 2), colors="red")
    return JobSpec(
        images=sources, model=model, output=str(output), explain=explain, actors=0, figures=0, **settings
    )


def test_every_file_of_the_corpus_ends_in_maps_or_errors(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for case in CASES:
        (folder / case.name).write_bytes(case.make())
    (folder / "a folder.png").mkdir()
    (folder / "a folder.png" / "inside.png").write_bytes(png(0))
    (folder / "broken link.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/no utf-8 \xff.png")).write_bytes(png(0))
    expected = {case.name: isinstance(case.expected, Decoded) for case in CASES} | {
        "a folder.png/inside.png": True,
        "broken link.png": False,
        "pipe.png": False,
        "no utf-8 \\xff.png": True,
    }
    reporter = Counting()
    summary = run_job(job(tmp_path / "out", str(folder)), reporter)
    results = read_results(str(tmp_path / "out"))
    explained = {row.image_id for row in results}
    refused = {row.image_id: row for row in results.errors}
    assert explained == {name for name, decoded in expected.items() if decoded}
    assert set(refused) == {name for name, decoded in expected.items() if not decoded}
    assert (summary.images, summary.errors) == (len(explained), len(refused))
    assert summary.images + summary.errors == reporter.total == reporter.ended == len(expected)
    assert "no such file" in refused["broken link.png"].error
    assert "found a folder or a device" in refused["pipe.png"].error
    (odd,) = (row.uri for row in results if row.image_id == "no utf-8 \\xff.png")
    assert odd.startswith("file:///")
    assert color_of(odd) == 0
    for name, row in refused.items():
        assert row.stage == "read"
        assert "\n" not in row.error, name


def test_a_job_from_a_bad_manifest_loses_nothing(data: Path, tmp_path: Path) -> None:
    rows = ["uri,label,target", f"{data}/folder/dog/z.png,1,0|2", ",1,", "gone.png,0,1"]
    rows += [
        f"{data}/folder/dog/z.png,,1",
        f"{data}/folder/dog/z.png,poodle,1",
        f"{data}/folder/dog/z.png,1,7",
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    run_job(job(tmp_path / "out", str(tmp_path / "list.csv"), targets="truth+manifest"), Counting())
    results = read_results(str(tmp_path / "out"))
    assert sorted((row.target, row.target_role) for row in results) == [
        (0, "asked"),
        (1, "truth"),
        (2, "asked"),
    ]
    assert sorted((row.stage, row.error.rpartition(": ")[2][:40]) for row in results.errors) == [
        ("explain", "expected a class index or a class name, "),
        ("explain", "expected a label for target 'truth', foun"[:40]),
        ("explain", "expected a target from 0 to 2 (the model"[:40]),
        ("list", "expected a uri, found ''"),
        ("read", "no such file"),
    ]


def test_the_decoding_knobs_reach_the_worker(tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == "truncated.jpg")
    (tmp_path / case.name).write_bytes(case.make())
    lenient = {"allow_truncated": True}
    strict = run_job(job(tmp_path / "a", str(tmp_path / case.name)), Counting())
    relaxed = run_job(job(tmp_path / "b", str(tmp_path / case.name), decode=lenient), Counting())
    assert (strict.errors, relaxed.images) == (1, 1)


def test_a_long_list_starts_without_a_total(data: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri\n" + "gone.png\n" * 1100)
    reporter = Counting()
    summary = run_job(job(tmp_path / "out", str(tmp_path / "list.csv")), reporter)
    assert reporter.total is None
    assert (summary.errors, reporter.ended) == (1100, 1100)


def test_no_images_at_all_is_said_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "emp\nty").mkdir()
    with pytest.raises(ImageError, match=r"expected images, found none in .*emp\\nty$"):
        run_job(job(tmp_path / "out", str(tmp_path / "emp\nty")), Counting())


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("no\nwhere.png", r"no\\nwhere.png: no such file"),
        ("zero\0byte.png", r"zero\\x00byte.png: cannot read it: embedded null byte"),
        ("nowhere.tar#offset=0&size=1&member=a", "no such file"),
        ("torchvision:GTSRB?root=.", "expected torchvision:NAME"),
        ("ftp://host/a.png", "expected a local path or one of s3://"),
    ],
)
def test_reading_what_is_not_there(uri: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_image(uri)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user other than root, whom no permission stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_is_a_problem_of_one_file_or_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "a.png").write_bytes(png(0))
        Path(folder, "a.png").chmod(0)
        Path(folder, "locked").mkdir(mode=0)
        with unprivileged():
            file, locked = ImageSource(folder)
            with pytest.raises(ImageError, match=r"a\.png: cannot read it: Permission denied"):
                read_image(file.uri)
        assert (file.image_id, file.problem, locked.image_id) == ("a.png", None, "locked")
        assert (locked.problem or "").endswith("locked: cannot read it: Permission denied")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("../people/a#b.png", "/data/people/a#b.png"),
        ("file:///data/a.png", "/data/a.png"),
        ("file:///data/./caf%E9.png", "file:///data/caf%E9.png"),
        ("s3://bucket/./a.png?region=x", "s3://bucket/./a.png?region=x"),
        (
            "a.tar#offset=512&size=9&member=../../b.png",
            "/data/here/a.tar#offset=512&size=9&member=../../b.png",
        ),
        ("./a.parquet#row=7", "/data/here/a.parquet#row=7"),
        ("torchvision:GTSRB?root=../gtsrb&split=test#7", "torchvision:GTSRB?root=/data/gtsrb&split=test#7"),
    ],
)
def test_uris_may_be_made_absolute(monkeypatch: pytest.MonkeyPatch, uri: str, expected: str) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/data/here")
    assert shards.absolute(uri) == expected
    assert shards.absolute(expected) == expected


def test_missing_objects_and_buckets(s3: str) -> None:
    with pytest.raises(ImageError, match=r"gone.png.*no such file"):
        read_image(s3.format("gone.png"))
    with pytest.raises(ImageError, match="expected a file or a folder, found nothing there"):
        ImageSource(s3.format("nowhere"))
    manifest = replace(next(iter(ImageSource(s3.format("list.csv")))), image_id="x")
    assert manifest == ImageRef("x", s3.format("folder/cat/a%20b.png"), 0, (1, "dog"))


def test_paths_of_pathlib_are_taken_wherever_text_is(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(file)
    assert read_image(file).shape == (4, 5, 3)
    assert list(ImageSource(file)) == list(ImageSource([file])) == list(ImageSource(str(file)))
    settings = {"weights": tmp_path / "w.pt", "classes": tmp_path / "names.txt"}
    paths = JobSpec(images=[file], model={"model": "timm:x", **settings}, output=tmp_path / "out")
    texts = {name: str(value) for name, value in settings.items()}
    text = JobSpec(images=str(file), model={"model": "timm:x", **texts}, output=str(tmp_path / "out"))
    assert paths == text == JobSpec(**{**dict(text), "images": file})
    assert paths.hash == text.hash
