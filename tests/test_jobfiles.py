"""Job files: every format, every key, every mistake; and what a job may use."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mcrise_ray import jobfiles
from mcrise_ray.errors import SpecError
from mcrise_ray.jobfiles import example_job, load_job, parse_job
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.loading import ModelSpec
from mcrise_ray.spec import PALETTES

SMALL = {"images": ["a.png"], "model": {"model": "m:f"}, "output": "out"}

FORMS = {
    "job.yaml": """
images: [images, "s3://bucket/more"]
model:
  model: torchvision:resnet18
  preprocessing: {size: [96, 96]}
output: out
explain: {masks: 500, colors: "red,#00ff80"}
targets: predicted+truth
""",
    "job.json": """{
"images": ["images", "s3://bucket/more"],
"model": {"model": "torchvision:resnet18", "preprocessing": {"size": [96, 96]}},
"output": "out", "explain": {"masks": 500, "colors": "red,#00ff80"}, "targets": "predicted+truth"}""",
    "job.toml": """
images = ["images", "s3://bucket/more"]
output = "out"
targets = "predicted+truth"
[model]
model = "torchvision:resnet18"
preprocessing = {size = [96, 96]}
[explain]
masks = 500
colors = "red,#00ff80"
""",
}


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_the_same_job(tmp_path: Path, name: str) -> None:
    job = load_job(write(tmp_path, FORMS[name], name))
    assert job.images == (str(tmp_path / "images"), "s3://bucket/more")
    assert job.output == str(tmp_path / "out")
    assert job.model.preprocessing == {"size": (96, 96)}
    assert (job.explain.masks, job.explain.colors) == (500, ("#ff0000", "#00ff80"))
    assert job.targets == ("predicted", "truth")
    assert job == parse_job(yaml.safe_load(FORMS["job.yaml"]), tmp_path)


def test_palettes_and_fills_may_be_listed_together(tmp_path: Path) -> None:
    job = parse_job({**SMALL, "explain": {"colors": ["paper5", "#808080"]}}, tmp_path)
    assert job.explain.colors == (*PALETTES["paper5"], "#808080")


def test_the_example_loads_to_the_defaults(tmp_path: Path) -> None:
    assert example_job().endswith("\n")  # a key that is appended starts a line
    job = load_job(write(tmp_path, example_job()))
    model = ModelSpec(model="torchvision:resnet50?weights=IMAGENET1K_V2")
    assert job == JobSpec(images=(str(tmp_path / "images"),), model=model, output=str(tmp_path / "results"))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("  relative_error: null", "  relative_error: 0.1", {"masks": 100_000, "relative_error": 0.1}),
        ('  method: "mc-rise"', '  method: "rise"', {"method": "rise", "colors": ("#000000",)}),
    ],
)
def test_what_is_changed_in_the_example_brings_its_own_defaults(
    tmp_path: Path, old: str, new: str, found: dict
) -> None:
    assert old in example_job()
    job = load_job(write(tmp_path, example_job().replace(old, new)))
    assert job.explain.model_dump(include=set(found)) == found


def test_the_example_names_and_explains_every_key() -> None:
    values = yaml.safe_load(example_job())
    for key in jobfiles._keys(JobSpec):
        *sections, name = key.split(".")
        inside = values
        for section in sections:
            inside = inside[section]
        if sections[-1:] in (["preprocessing"], ["actors"], ["reid"]):
            assert f"#   {name}: " in example_job()
        elif key in jobfiles._DEPENDING:
            assert f"\n  # {name}: " in example_job()
        else:
            assert name in inside, key
    lines = example_job().splitlines()
    for before, line in pairwise(lines):
        if line.strip() and not line.strip().startswith("#"):
            assert before.strip().startswith("#"), f"nothing explains {line}"
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_dumped_job_loads_to_itself(tmp_path: Path, suffix: str) -> None:
    job = load_job(write(tmp_path, FORMS["job.yaml"]))
    values = job.model_dump(mode="json")
    text = json.dumps(values) if suffix == "json" else yaml.safe_dump(values)
    assert load_job(write(tmp_path, text, f"again.{suffix}")) == job


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "images: [~/data, 'imagefolder:~/train']\noutput: ~/results\n"
    text += "model: {model: 'm:f', weights: ~/w.pth}\n"
    (tmp_path / "job.yaml").write_text(text)
    job = load_job(tmp_path / "job.yaml")
    assert job.images == ("/home/me/data", "imagefolder:/home/me/train")
    assert (job.output, job.model.weights) == ("/home/me/results", "/home/me/w.pth")


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "vit").mkdir()
    job = load_job(
        write(
            tmp_path / "deep",
            json.dumps(
                {
                    "images": [
                        "../a.png",
                        "/data/b.png",
                        "imagefolder:train",
                        "torchvision:GTSRB?root=data&split=test",
                        "gs://bucket/c",
                        "shard-{000..009}.tar",
                    ],
                    "model": {"model": "m:f", "weights": "../w.safetensors", "classes": "c.txt"},
                    "output": "gs://bucket/out",
                }
            ),
            "job.json",
        )
    )
    deep = tmp_path / "deep"
    assert job.images == (
        str(tmp_path / "a.png"),
        "/data/b.png",
        f"imagefolder:{deep}/train",
        f"torchvision:GTSRB?root={deep}/data&split=test",
        "gs://bucket/c",
        f"{deep}/shard-{{000..009}}.tar",
    )
    assert (job.model.weights, job.model.classes) == (f"{tmp_path}/w.safetensors", f"{deep}/c.txt")
    assert job.output == "gs://bucket/out"


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("hf:vit", "hf:{folder}/vit"),
        ("hf:google/vit", "hf:google/vit"),
        ("net.pt2", "{folder}/net.pt2"),
        ("net.onnx?output=y", "{folder}/net.onnx?output=y"),
        ("torchvision:resnet18?num_classes=3", "torchvision:resnet18?num_classes=3"),
        ("package.module:factory", "package.module:factory"),
        ("http://host/v2/models/net", "http://host/v2/models/net"),
    ],
)
def test_models_that_are_files_start_there_too(tmp_path: Path, model: str, found: str) -> None:
    (tmp_path / "vit").mkdir()
    assert parse_job({**SMALL, "model": {"model": model}}, tmp_path).model.model == found.format(
        folder=tmp_path
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"explain": {"mask": 3}}, r"unknown key explain\.mask; did you mean explain\.masks$"),
        ({"masks": 3}, r"unknown key masks; did you mean explain\.masks$"),
        ({"weights": "w"}, r"unknown key weights; did you mean model\.weights$"),
        # Not images, reid and actors, which are less near and in their own section.
        ({"mask": 3}, r"unknown key mask; did you mean explain\.masks$"),
        ({"Grid": [8, 8]}, r"unknown key Grid; did you mean explain\.grid$"),
        ({"clors": "red"}, r"unknown key clors; did you mean explain\.colors$"),
        ({"OUTPUT": "o"}, r"unknown key OUTPUT; did you mean output$"),
        (
            {"model": {"model": "m:f", "preprocessing": {"sise": [1, 1]}}},
            r"preprocessing\.sise; did you mean",
        ),
        ({"qqq": 3}, r"unknown key qqq; expected one of images, model, output"),
        ({"explain": 8000}, r"explain: expected keys such as method, found 8000"),
        ({"model": "torchvision:resnet18"}, r"model: expected keys such as model, found 'torchvision"),
        ({"explain": {"p_mask": 1.5}}, r"^explain\.p_mask: expected a probability"),
        ({"output": None}, r"expected output, found none; .*job init"),
        ({"output": ""}, r"expected output, found none; .*job init"),
        ({"images": ""}, r"expected images, found none; .*job init"),
        ({"images": 3}, r"images: .*found 3"),
        ({"model": {"weights": "w"}}, r"expected model\.model, found none"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_key(change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_job({**SMALL, **change})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("job.yaml", "images: [", r"job\.yaml: expected YAML: "),
        ("job.json", "{", r"job\.json: expected JSON: "),
        ("job.toml", "images = ", r"job\.toml: expected TOML: "),
        ("job.yaml", "- a", r"expected keys such as images, model and output, found list"),
        ("job.yaml", "", r"expected keys such as images, model and output, found NoneType"),
        ("job.yaml", "output: a\nimages: b\noutput: c", r"expected each key once, found output twice"),
        ("job.json", '{"output": 1, "output": 2}', r"expected each key once, found output twice"),
        ("job.yaml", "output: !!python/object/apply:os.getcwd []", r"expected YAML: .*python/object"),
        ("job.txt", "", r"expected a file with one of the suffixes \.yaml"),
    ],
)
def test_files_that_are_no_jobs(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_job(write(tmp_path, text, name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml: cannot read it: No such file"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"images": ["s3://AKIA:hunter2@bucket/x"]}, "images"),
        ({"output": "s3://AKIA:hunter2@bucket/x"}, "output"),
        ({"output": "s3://bucket/x?secret_key=hunter2"}, "output"),
        ({"model": {"model": "m:f", "args": {"api_key": "hunter2"}}}, "model.args.api_key"),
        (
            {"model": {"model": "m:f", "args": {"deep": {"hub_token": "hunter2"}}}},
            "model.args.deep.hub_token",
        ),
    ],
)
def test_secrets_are_refused_and_not_repeated(change: dict, where: str) -> None:
    with pytest.raises(SpecError, match=rf"^{where}: expected no secrets") as refusal:
        parse_job({**SMALL, **change})
    assert "hunter2" not in str(refusal.value)


def test_what_only_looks_like_a_secret_passes() -> None:
    changes = {
        "images": ["s3://bucket/a@b.png?endpoint_override=localhost:9000", "tokens/secret.png"],
        "model": {"model": "m:f", "args": {"tokens": 77, "num_tokens": "16", "tokenizer": "bpe"}},
    }
    args = {"tokens": 77, "num_tokens": "16", "tokenizer": "bpe"}  # on the command line all are text
    assert parse_job({**SMALL, **changes}).model.args == args


# What a job may use.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"actors": "some"},
            r"actors: expected auto, a whole number, or min and max, found 'some'",
        ),
        ({"actors": -1}, r"actors: expected auto, .*found -1"),
        ({"actors": {"min": 0}}, r"actors: min: .*found 0"),
        ({"actors": {"min": 3, "max": 2}}, r"actors: expected min to be at most max, found 3 and 2"),
        ({"actors": {"mix": 3}}, r"unknown key actors\.mix; did you mean actors\.min"),
        ({"actors": True}, r"actors: expected auto, .*found True"),
        ({"gpus_per_actor": 1.5}, r"gpus_per_actor: expected a fraction below 1 or a whole number"),
        (
            {"gpus_per_actor": 1e-5},
            r"gpus_per_actor: expected a fraction .* between 0 and 0.0001, found 1e-05",
        ),
        ({"gpus_per_actor": -0.1}, r"gpus_per_actor: "),
        ({"cpus_per_actor": 0}, r"cpus_per_actor: "),
        ({"max_retries": -1}, r"max_retries: "),
        ({"deadline": 0}, r"deadline: "),
        ({"precision": "bfloat16"}, r"batch_size: expected a number beside precision bfloat16"),
        ({"precision": "float8"}, r"precision: .*found 'float8'"),
        ({"batch_size": "x"}, r"^batch_size: expected auto or a whole number of at least 1, found 'x'$"),
        ({"batch_size": 0}, r"^batch_size: expected auto or a whole number of at least 1, found 0$"),
        ({"batch_size": True}, r"^batch_size: expected auto or a whole number of at least 1, found True$"),
        ({"label_selector": {"zone": 3}}, r"label_selector\.zone: "),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(values: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_job({**SMALL, **values})


def test_what_a_job_may_use_does_not_change_what_it_is() -> None:
    asked = {"actors": 4, "gpus_per_actor": 0.5, "label_selector": {"ray.io/accelerator-type": "A100"}}
    job = parse_job({**SMALL, **asked})
    assert (job.actors, job.gpus_per_actor) == (4, 0.5)
    assert job.hash == parse_job(SMALL).hash


REID = {**SMALL, "kind": "reid", "reid": {"gallery": "crops"}}


def test_a_reid_job_from_a_file(tmp_path: Path) -> None:
    values = {
        **REID,
        "reid": {"gallery": ["crops", "s3://b/more"], "pairs": "p.csv", "matches": "top3+named", "d0": 4},
        "explain": {"masks": 100},
    }
    job = load_job(write(tmp_path, yaml.safe_dump(values)))
    assert job.reid is not None
    assert job.reid.gallery == (str(tmp_path / "crops"), "s3://b/more")
    assert (job.reid.pairs, job.reid.matches) == (str(tmp_path / "p.csv"), ("top3", "named"))
    assert (job.explain.p_mask, job.explain.masks) == (0.1, 100)
    assert parse_job(json.loads(job.model_dump_json()), tmp_path) == job
    assert parse_job({**REID, "explain": {"p_mask": 0.4}}).explain.p_mask == 0.4
    stored = parse_job({**REID, "reid": {"gallery": "g", "gallery_store": "store"}}, "/data").reid
    assert stored is not None
    assert (stored.gallery, stored.gallery_store) == (("/data/g",), "/data/store")


def test_the_example_becomes_a_reid_job(tmp_path: Path) -> None:
    """By uncommenting its section and saying the kind."""
    head, tail = example_job().split("reid: null\n")
    section, rest = tail.split("\n\n", 1)
    lines = [line.removeprefix("# ") for line in section.splitlines()]
    text = "\n".join([head.replace('kind: "explain"', "kind: reid"), "reid:", *lines, "", rest])
    job = load_job(write(tmp_path, text))
    assert job.reid is not None
    assert job.reid.gallery == (str(tmp_path / "gallery"),)
    assert job.explain.p_mask == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reid": {"galery": "g"}}, r"unknown key reid\.galery; did you mean reid\.gallery$"),
        ({"gallery": "g"}, r"unknown key gallery; did you mean reid\.gallery$"),
        ({"reid": {"matches": "top1"}}, r"^reid\.gallery: Field required"),
        ({"reid": {"gallery": "g", "matches": "best"}}, r"^reid\.matches: expected matches top1, topN"),
        ({"reid": {"gallery": "g", "matches": None}}, r"^reid\.matches: expected matches .*found None"),
        ({"reid": {"gallery": "g", "d0": -1}}, r"^reid\.d0: Input should be greater than 0, found -1"),
        ({"reid": "gallery"}, r"^reid: Input should be a valid dictionary or instance of ReidSpec"),
        ({"targets": "top5"}, r"^targets: expected none for kind reid, .* say reid\.matches"),
        ({"kind": "match"}, r"^kind: Input should be 'explain' or 'reid', found 'match'"),
    ],
)
def test_mistakes_in_a_reid_job_are_named(change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_job({**REID, **change})
