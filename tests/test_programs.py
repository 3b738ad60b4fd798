"""Files with their own program: torch.export and ONNX, with every kind of batch, layout and number."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.export import Dim
from torchvision.transforms.v2.functional import normalize

import mcrise_ray as mr
from mcrise_ray import programs
from mcrise_ray.errors import ModelError, SpecError
from mcrise_ray.precision import Execution, Precision, apply

SIZE = (16, 24)
SHARED = Path(__file__).parents[2] / "shared"


def noise(count: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(1))


def exported(path: Path, batch: Dim | int | None, network: nn.Module | None = None) -> str:
    network = networks.tiny().eval() if network is None else network.eval()
    shapes = {0: batch} if isinstance(batch, Dim) else None
    example = noise(batch if isinstance(batch, int) else 3)
    program = torch.export.export(network, (example,), dynamic_shapes=(shapes,))
    torch.export.save(program, path)
    return str(path)


@pytest.mark.parametrize(
    "batch",
    [Dim("batch"), Dim("batch", min=2, max=8), Dim("batch", min=3, max=4), 1, 4],
    ids=["free", "2 to 8", "3 to 4", "1", "4"],
)
def test_exported_programs_take_any_number_of_images(tmp_path: Path, batch: Dim | int) -> None:
    model = mr.load_model(exported(tmp_path / "m.pt2", batch))
    assert (model.classes, model.preprocessing.size) == (networks.CLASSES, SIZE)
    assert (model.preprocessing.mean, model.preprocessing.std) == ((0, 0, 0), (1, 1, 1))
    for count in (1, 2, 3, 11):
        images = noise(count)
        torch.testing.assert_close(model(images), networks.tiny().eval()(images).softmax(1))


@pytest.mark.parametrize("batch", [Dim("batch"), Dim("batch", min=2, max=8), 4], ids=["free", "2 to 8", "4"])
def test_onnxruntime_runs_exported_programs_in_their_batches(tmp_path: Path, batch: Dim | int) -> None:
    model = mr.load_model(exported(tmp_path / "m.pt2", batch))
    plan = Execution(batch_size=5, threads=1, precision=Precision(onnxruntime=True))
    fast = apply(model, plan)
    for count in (1, 3, 11):
        images = noise(count)
        torch.testing.assert_close(fast(images), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch", [Dim("batch", min=2, max=4), 1], ids=["2 to 4", "1"])
def test_an_exported_program_is_compiled_once_whatever_its_batches(
    tmp_path: Path, batch: Dim | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one graph, a batch of 64 of a MobileNetV2 for single images would be 64 of them: hours."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    model = mr.load_model(exported(tmp_path / "m.pt2", batch))
    fast = apply(model, Execution(batch_size=8, threads=1, precision=Precision(compiled=True)))
    assert compiled == [model.black_box.network.program]
    torch.testing.assert_close(fast(noise(8)), model(noise(8)))


def test_onnxruntime_runs_networks_that_return_objects() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = networks.tiny()

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.network(pixel_values))

    network = Named().eval()
    torch.testing.assert_close(
        programs.converted(network, SIZE, 4)(noise(3)), network(noise(3)).logits.detach(), rtol=0, atol=1e-6
    )


def test_without_onnxscript_nothing_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r"cannot import onnxscript.*mcrise-ray\[onnx\]"):
        programs.converted(networks.tiny().eval(), SIZE, 4)


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])


class Normalised(nn.Module):
    """A network behind some function of its images, which may use two buffers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.network = function, networks.tiny()
        self.register_buffer("mean", MEAN.view(3, 1, 1))
        self.register_buffer("std", STD.view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.function(self, images))


@pytest.mark.parametrize(
    ("function", "mean", "std"),
    [
        (lambda _, x: x * 2 - 1, (0.5,) * 3, (0.5,) * 3),
        (lambda of, x: (x - of.mean) / of.std, MEAN.tolist(), STD.tolist()),
        (lambda _, x: normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]), MEAN.tolist(), STD.tolist()),
        (lambda _, x: (x - MEAN[:, None, None]).div_(STD.view(3, 1, 1)), MEAN.tolist(), STD.tolist()),
        (lambda of, x: (x + 1) * 255 / of.std, (-1,) * 3, (STD / 255).tolist()),
        (lambda _, x: x * -1, (0,) * 3, (-1,) * 3),
    ],
    ids=["scalars", "buffers", "torchvision", "in place", "add", "negative"],
)
def test_normalisation_of_an_exported_program_is_done_once_an_image(
    tmp_path: Path, function, mean: tuple, std: tuple
) -> None:
    network = Normalised(function).eval()
    path = exported(tmp_path / "m.pt2", Dim("batch"), network)
    model = mr.load_model(path)
    torch.testing.assert_close(model(noise(3)), network(noise(3)).softmax(1))
    found = model.black_box.network
    assert (found.mean, found.std) == (pytest.approx(mean, abs=1e-6), pytest.approx(std, rel=1e-6))
    (images,) = (node for node in found.program.graph.nodes if node.op == "placeholder")
    assert [node.target for node in images.users if node.op == "call_function"] == [
        torch.ops.aten.conv2d.default
    ]
    torch.testing.assert_close(model.input_space().normalize(noise(3)), function(network, noise(3)))
    # Beside what is asked for outside of it, and with what runs it faster.
    outside = mr.load_model(path, preprocessing={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)})
    expected = network(
        (noise(3) - torch.tensor([0.1, 0.2, 0.3])[:, None, None])
        / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    )
    torch.testing.assert_close(outside(noise(3)), expected.softmax(1))
    fast = apply(model, Execution(batch_size=3, threads=1, precision=Precision(onnxruntime=True)))
    torch.testing.assert_close(fast(noise(3)), model(noise(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x,
        lambda _, x: (x * 2 - 1) + x,
        lambda _, x: x * x.mean(),
        lambda _, x: x - torch.linspace(0, 1, SIZE[1]),
        lambda _, x: x - torch.ones(1, 3, *SIZE),
        lambda _, x: torch.sub(x, MEAN[:, None, None], alpha=2),
        lambda _, x: 1 - x,
        lambda _, x: x * 0 + 0.5,
        lambda _, x: x.clone().relu() - 1,
        # What is overwritten then must not be the batch of who asks.
        lambda _, x: (x * 2 - 1).relu_(),
        lambda _, x: (x * 2 - 1).view(-1, 3, *SIZE).relu_(),
    ],
    ids=[
        "none",
        "twice",
        "computed",
        "columns",
        "pixels",
        "alpha",
        "from_one",
        "nothing",
        "relu",
        "overwritten",
        "view",
    ],
)
def test_what_is_no_normalisation_stays_in_the_program(tmp_path: Path, function) -> None:
    network = Normalised(function).eval()
    model, images = mr.load_model(exported(tmp_path / "m.pt2", Dim("batch"), network)), noise(3)
    torch.testing.assert_close(model(images), network(noise(3)).softmax(1))
    assert torch.equal(images, noise(3))
    assert (model.black_box.network.mean, model.black_box.network.std) == ((0, 0, 0), (1, 1, 1))


def test_exported_program_with_another_normalisation(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.pt2", Dim("batch"))
    model = mr.load_model(path, preprocessing={"input_range": "0-255", "activation": "sigmoid"})
    images = noise(2)
    torch.testing.assert_close(model(images), networks.tiny().eval()(images * 255).sigmoid())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (32, 32)}, r"fails on noise of 32 x 32 pixels: .* check --size"),
        ({"activation": "none"}, None),
    ],
)
def test_settings_of_an_exported_program(tmp_path: Path, fields: dict, message: str | None) -> None:
    path = exported(tmp_path / "m.pt2", Dim("batch"))
    if message is None:
        torch.testing.assert_close(
            mr.load_model(path, preprocessing=fields)(noise(2)), networks.tiny().eval()(noise(2))
        )
        return
    with pytest.raises(ModelError, match=message):
        mr.load_model(path, preprocessing=fields)


def test_probabilities_of_a_file_need_a_word(tmp_path: Path) -> None:
    path = exported(tmp_path / "soft.pt2", Dim("batch"), networks.soft())
    with pytest.raises(ModelError, match=r"probabilities that sum to 1 already.*say --activation none"):
        mr.load_model(path)
    assert mr.load_model(path, preprocessing={"activation": "none"}).classes == networks.CLASSES
    path = exported(tmp_path / "sigmoid.pt2", Dim("batch"), nn.Sequential(networks.tiny(), nn.Sigmoid()))
    with pytest.raises(ModelError, match="may be probabilities or logits; say --activation none, softmax or"):
        mr.load_model(path)


def test_files_take_no_weights_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"weights: expected none, because m.pt2 has its own, found w.pt"):
        mr.load_model("m.pt2", weights="w.pt")
    with pytest.raises(ModelError, match=r"cannot read --model no.pt2: .*No such file"):
        mr.load_model("no.pt2")
    with pytest.raises(ModelError, match=r"found nothing at no.onnx; check --model"):
        mr.load_model("no.onnx")
    for name in ("text.pt2", "text.onnx"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ModelError, match=f"cannot (read|load) --model .*{name}: .*; expected a"):
            mr.load_model(str(tmp_path / name))
    two = torch.export.export(networks.Returns(torch.neg), (noise(1)[0],))
    torch.export.save(two, tmp_path / "flat.pt2")
    with pytest.raises(ModelError, match=r"expected a program of one tensor \(B, 3, H, W\)"):
        mr.load_model(str(tmp_path / "flat.pt2"))


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize(
    "place", ["sample inputs", "pickled weight", "pickled constant", "old weights", "old"]
)
def test_pickled_code_in_an_archive_is_not_run(tmp_path: Path, place: str) -> None:
    source, path, target = exported(tmp_path / "m.pt2", 2), tmp_path / "bad.pt2", tmp_path / "was-here"
    evil = tmp_path / "evil.pt"
    torch.save((Malicious(str(target)),), evil)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sample_inputs/model.pt") and place == "sample inputs":
                content = evil.read_bytes()
            if name.endswith("weights_config.json") and place == "pickled weight":
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            if name.endswith("constants_config.json") and place == "pickled constant":
                entry = {
                    "path_name": "opaque_obj_0",
                    "is_param": False,
                    "use_pickle": False,
                    "tensor_meta": None,
                }
                content = json.dumps({"config": {"thing": entry}}).encode()
            if not (name.endswith("archive_format") and place == "old"):
                new.writestr(name, content)
        if place == "old weights":
            new.writestr("m/data/weights/model.pt", evil.read_bytes())
        if place == "pickled constant":
            new.writestr("m/data/constants/opaque_obj_0", pickle.dumps(Malicious(str(target))))
    with pytest.raises(
        ModelError, match=r"expected a program without pickled code in .*, which is never run"
    ):
        mr.load_model(str(path))
    assert not target.exists()


def test_torch_would_have_run_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why archives are looked into first: should this fail one day, that can go."""
    source, path, target = exported(tmp_path / "m.pt2", 2), tmp_path / "bad.pt2", tmp_path / "was-here"
    evil = tmp_path / "evil.pt"
    torch.save((Malicious(str(target)),), evil)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            inside = name.endswith("sample_inputs/model.pt")
            new.writestr(name, evil.read_bytes() if inside else old.read(name))
    # torch's own warning about it has a broken format string.
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    torch.export.load(path)
    assert target.exists()


def onnx_file(path: Path, shape: list, *, kind: str = "FLOAT", outputs: tuple[str, ...] = ("logits",)) -> str:
    """A file whose scores are the channel means of NCHW or NHWC images, times 8, minus 2."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    axes = [1, 2] if shape[3] == 3 else [2, 3]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "eight"], ["scaled"]),
        *(helper.make_node("Sub", ["scaled", "two"], [name]) for name in outputs),
    ]
    numbers = {"axes": np.array(axes), "eight": np.array(8, np.float32), "two": np.array(2, np.float32)}
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("image", getattr(TensorProto, kind), shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], 3]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize(
    "shape", [["b", 3, 16, 24], [1, 3, 16, 24], [4, 3, 16, 24], ["b", 16, 24, 3], [4, 16, 24, 3]]
)
@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "UINT8"])
def test_onnx_takes_any_batch_layout_and_number(tmp_path: Path, shape: list, kind: str) -> None:
    said = {"activation": "none"}
    model = mr.load_model(onnx_file(tmp_path / "m.onnx", shape, kind=kind), preprocessing=said)
    white = 255 if kind == "UINT8" else 1
    assert (model.preprocessing.size, model.classes) == (SIZE, 3)
    assert model.preprocessing.input_range == ("0-255" if kind == "UINT8" else "0-1")
    for count in (1, 2, 7):
        images = noise(count)
        expected = images.mean((2, 3)) * 8 * white - 2
        torch.testing.assert_close(model(images), expected, rtol=2e-3, atol=2e-2 if kind == "UINT8" else 2e-3)


def test_onnx_of_free_size_takes_the_size_that_is_said(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", ["b", 3, "h", "w"])
    assert mr.load_model(path).preprocessing.size == (224, 224)
    assert mr.load_model(path, preprocessing={"size": (20, 30)}).preprocessing.size == (20, 30)


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        (
            ["b", 1, 16, 24],
            "FLOAT",
            r"expected shape \(B, 3, H, W\) or \(B, H, W, 3\) for input 'image' of .*onnx",
        ),
        (["b", 3, 16, 24], "INT64", r"expected numbers of type tensor\(float\), .*, found tensor\(int64\)"),
    ],
)
def test_onnx_of_no_images(tmp_path: Path, shape: list, kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mr.load_model(onnx_file(tmp_path / "m.onnx", shape, kind=kind))


def test_onnx_of_several_outputs(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", ["b", 3, 16, 24], outputs=("logits", "features"))
    with pytest.raises(ModelError, match=r"expected one of the outputs logits, features .*, found None; use"):
        mr.load_model(path)
    assert mr.load_model(f"{path}?output=logits").classes == 3


def test_onnx_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", ["b", 3, 16, 24])
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ModelError, match="which has no CUDA here, found cuda; say --device cpu, or install"):
        mr.load_model(path, device="cuda")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models")
def test_gtsrb_vgg_reads_signs() -> None:
    model = mr.load_model(str(SHARED / "models/gtsrb_vgg16_bn.pt2"))
    signs = torchvision.datasets.GTSRB(SHARED / "data/gtsrb", split="test")
    pairs = [signs[index] for index in range(10)]
    pixels = np.stack([model.prepare(np.asarray(image)) for image, _ in pairs])
    predicted = model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).argmax(1)
    assert (predicted == torch.tensor([label for _, label in pairs])).sum() >= 9


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models")
def test_the_same_network_as_pt2_and_onnx_gives_the_same_maps() -> None:
    pytest.importorskip("onnxruntime")
    names = str(SHARED / "data/imagenet_classes.txt")
    pt2, onnx = (
        mr.load_model(str(SHARED / f"models/imagenet_mobilenet_v2.{kind}"), classes=names)
        for kind in ("pt2", "onnx")
    )
    image = pt2.prepare(mr.read_image(str(next((SHARED / "data/imagenet/n01440764").iterdir()))))
    spec = mr.ExplainSpec(masks=32)
    ours, theirs = (mr.explain(model, image, spec=spec) for model in (pt2, onnx))
    assert pt2.class_name(ours.targets[0]) == "tench, Tinca tinca"
    assert ours.targets == theirs.targets
    np.testing.assert_allclose(ours.score, theirs.score, atol=1e-3)
    assert np.corrcoef(ours.maps.ravel(), theirs.maps.ravel())[0, 1] > 0.999
