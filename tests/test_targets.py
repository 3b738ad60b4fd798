"""Which classes are explained, for every way to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from mcrise_ray import JobSpec
from mcrise_ray.errors import SpecError, TargetError
from mcrise_ray.images import ImageRef, ImageSource
from mcrise_ray.loading import ModelSpec
from mcrise_ray.models import Model
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.targets import check_choice, check_source, choose_targets, parse_targets

MODEL = Model(lambda images: images, Preprocessing(), 4, ("cat", "dog", "owl", "fox"), torch.device("cpu"))
SCORES = np.array([0.1, 0.4, 0.1, 0.4])


def chosen(asked: Any, **known: Any) -> list[tuple[int, str]]:
    image = ImageRef("a.png", "a.png", **known)
    targets = choose_targets(parse_targets(asked), image, SCORES, MODEL)
    assert all(target.score == SCORES[target.index] for target in targets)
    assert all(target.name == MODEL.class_names[target.index] for target in targets)
    return [(target.index, target.role) for target in targets]


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        ("predicted", {}, [(1, "predicted")]),
        ("truth", {"label": 2}, [(2, "truth")]),
        ("truth", {"label": "owl"}, [(2, "truth")]),
        ("predicted+truth", {"label": 0}, [(1, "predicted"), (0, "truth")]),
        ("predicted+truth", {"label": 1}, [(1, "predicted")]),
        ("truth+predicted", {"label": 1}, [(1, "truth")]),
        ("truth", {"label": 0, "class_folder": "owl", "class_folders": ("owl", "x")}, [(2, "truth")]),
        (
            "truth",
            {"label": 3, "class_folder": "n3", "class_folders": ("n0", "n1", "n2", "n3")},
            [(3, "truth")],
        ),
        ("top1", {}, [(1, "predicted")]),
        ("top3", {}, [(1, "predicted"), (3, "top2"), (0, "top3")]),
        ("top2+truth", {"label": 3}, [(1, "predicted"), (3, "top2")]),
        ("manifest", {"targets": (3, "cat", 3)}, [(3, "asked"), (0, "asked")]),
        (["fox", 0, "2"], {}, [(3, "asked"), (0, "asked"), (2, "asked")]),
        (["predicted", "owl"], {}, [(1, "predicted"), (2, "asked")]),
        (2, {}, [(2, "asked")]),
        ("predicted+fox+0", {}, [(1, "predicted"), (3, "asked"), (0, "asked")]),
        ("cat+owl", {}, [(0, "asked"), (2, "asked")]),
        ("dog+cat", {}, [(1, "asked"), (0, "asked")]),
    ],
)
def test_each_class_once_with_its_reason(
    asked: Any, known: dict[str, Any], expected: list[tuple[int, str]]
) -> None:
    assert chosen(asked, **known) == expected


@pytest.mark.parametrize(
    ("asked", "known", "message"),
    [
        ("truth", {}, "expected a label for target 'truth', found none"),
        ("truth", {"label": "dgo"}, r"found 'dgo'.*did you mean dog"),
        ("truth", {"label": -1}, "expected a target from 0 to 3 .*found -1"),
        (
            "truth",
            {"label": 1, "class_folder": "n0203", "class_folders": ("n0101", "n0203")},
            "folder for each of the model's 4 classes.*found 2 folders, and 'n0203' is no class name; see",
        ),
        (
            "truth",
            {"label": 0, "class_folder": "big_cat", "class_folders": ("big_cat", "cat", "dog", "owl")},
            "folder called as one of the model's classes, as 'cat' is, found 'big_cat'; rename it",
        ),
        ("manifest", {}, "expected a class in the manifest's column target, found none"),
        ("manifest", {"targets": (9,)}, "expected a target from 0 to 3 .*found 9"),
        ("top5", {}, r"expected at most top4 \(the model's classes\), found top5"),
        ("fox+", {}, r"expected a class index or a class name, found 'fox\+'"),
        ("fox+9", {}, "expected a target from 0 to 3 .*found 9"),
        ("predictd", {}, "expected a class index or a class name, found 'predictd'"),
    ],
)
def test_targets_that_the_image_or_the_model_does_not_have(
    asked: Any, known: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        chosen(asked, **known)


@pytest.mark.parametrize("asked", ["", [], [True], [1.5], None])
def test_a_job_refuses_what_is_no_target(asked: Any) -> None:
    with pytest.raises(SpecError, match="targets: expected"):
        JobSpec(images=("a.png",), model=ModelSpec(model="torchvision:resnet18"), output="out", targets=asked)


def test_a_job_keeps_its_targets_as_a_list() -> None:
    job = JobSpec(
        images=("a.png",), model=ModelSpec(model="torchvision:resnet18"), output="out", targets="top5+truth"
    )
    assert job.targets == ("top5", "truth")
    assert JobSpec(**job.model_dump(mode="json")).targets == job.targets


def with_names(*names: str) -> Model:
    return Model(MODEL.black_box, MODEL.preprocessing, len(names), names, MODEL.device)


def test_a_name_that_looks_like_a_sum_is_one_class() -> None:
    model = with_names("c", "c+c", "d")
    targets = choose_targets(parse_targets("c+c+d"), ImageRef("a", "a"), SCORES[:3], model)
    assert [target.index for target in targets] == [0, 2]
    targets = choose_targets(parse_targets("c+c"), ImageRef("a", "a"), SCORES[:3], model)
    assert [target.index for target in targets] == [1]


def test_a_name_of_two_classes_is_refused() -> None:
    model = with_names("crane", "ox", "crane")
    with pytest.raises(TargetError, match=r"of that name, found 'crane' as \[0, 2\]; give the index"):
        choose_targets(parse_targets("crane"), ImageRef("a", "a"), SCORES[:3], model)


@pytest.mark.parametrize("asked", ["predicted+truth+manifest", "top4", "fox", ["3", 0]])
def test_targets_that_can_be_there(asked: Any) -> None:
    check_choice(parse_targets(asked), MODEL)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("truth+top5", r"expected at most top4 \(the model's classes\), found top5"),
        ("predicted+owk", "found 'owk'.*did you mean owl"),
        (4, "expected a target from 0 to 3 .*found 4"),
    ],
)
def test_targets_that_no_image_can_have(asked: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        check_choice(parse_targets(asked), MODEL)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Of every kind that may have labels, or not."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"")
    (tmp_path / "s-0.tar").write_bytes(b"")
    (tmp_path / "plain.csv").write_text("uri,pid\na.png,3\n")
    (tmp_path / "half.csv").write_text("uri\na.png\n")
    (tmp_path / "torn-0.csv").write_text("uri\na.png\n")
    (tmp_path / "known-0.csv").write_text("uri\na.png\n")
    (tmp_path / "known-1.csv").write_text("URI, Label\na.png,3\n")
    (tmp_path / "asked.csv").write_text("uri,target\na.png,3\n")
    encoded = {"image": [{"bytes": b"", "path": "a"}], "target": [1]}
    for name, table in (
        ("plain.parquet", {"uri": ["a"]}),
        ("known.parquet", {"uri": ["a"], "label": [1], "target": [[1]]}),
        ("encoded.parquet", encoded),
        ("encoded_known.parquet", encoded | {"label": [2]}),
    ):
        pa.parquet.write_table(pa.table(table), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("truth", ["imagefolder:."]),
        ("predicted+truth", ["s-0.tar"]),
        ("truth", ["known-{0..1}.csv"]),
        ("truth", ["cat", "cat/gone.png", "known.parquet"]),
        ("truth", ["encoded_known.parquet"]),
        ("manifest", ["asked.csv"]),
        ("truth+manifest", ["known.parquet"]),
        ("predicted", ["cat"]),
        ("truth", ["torn-{0..1}.csv"]),  # who knows
    ],
)
def test_sources_whose_images_may_have_the_label_or_target(
    sources: Path, asked: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources)
    check_source(parse_targets(asked), ImageSource(names))


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        ("truth", ["cat"], "expected a label for target 'truth', found none in cat; use imagefolder:FOLDER"),
        ("truth", ["cat/a.png", "cat/gone.png"], "expected a label"),
        ("predicted+truth", ["plain.csv", "plain.parquet"], "in plain.csv, plain.parquet"),
        ("truth", ["encoded.parquet", "half.csv"], "expected a label"),
        ("3+truth", ["cat"], "expected a label for target 'truth'"),
        ("truth+owl", ["cat"], "expected a label for target 'truth'"),
        ("manifest", ["imagefolder:."], "expected a target for target 'manifest'.*give a manifest"),
        ("manifest", ["encoded_known.parquet"], "expected a target"),
        ("truth+manifest", ["known-1.csv"], "expected a target"),
    ],
)
def test_sources_whose_images_cannot_have_it(
    sources: Path, asked: Any, names: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources)
    with pytest.raises(TargetError, match=message):
        check_source(parse_targets(asked), ImageSource(names))
