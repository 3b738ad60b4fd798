"""`load_model()`: networks by name and from factories, weights without pickled code, and the self-check."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import mcrise_ray as mr
from mcrise_ray import tuning, zoo
from mcrise_ray.errors import ImageError, ModelError, SpecError
from mcrise_ray.loading import class_count

SMALL = {"size": (16, 24)}
SHARED = Path(__file__).parents[2] / "shared"


def noise(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    return torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(1))


def normalized(images: torch.Tensor, record: mr.Preprocessing) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (record.mean, record.std))
    return (images - mean) / std


def test_factory_of_a_module_gets_normalisation_and_softmax() -> None:
    model = mr.load_model("networks:tiny", args={"classes": "4"}, preprocessing=SMALL)
    images = noise((16, 24))
    expected = networks.tiny(4).eval()(normalized(images, model.preprocessing)).softmax(1)
    torch.testing.assert_close(model(images), expected)
    assert (model.classes, model.class_names, str(model.device)) == (4, (), "cpu")
    assert model.preprocessing == mr.Preprocessing(**SMALL)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"count": "64"}, 64),
        ({"scale": "2"}, 2),
        ({"scale": "0.5"}, 0.5),
        ({"scale": "half"}, "half"),
        ({"deep": "true"}, True),
        ({"deep": "False"}, False),
        ({"name": "12"}, "12"),
        ({"tag": "1.0"}, "1.0"),
        ({"sizes": "[3, 4]"}, (3, 4)),
        ({"sizes": [3, 4]}, [3, 4]),
        ({"scale": 3.5}, 3.5),
        ({"at": "cpu"}, "cpu"),
        ({"other": "7"}, "7"),
    ],
)
def test_text_is_what_a_factory_says(text: dict, value: object) -> None:
    model = mr.load_model("networks:given", args={"count": 1, **text}, preprocessing=SMALL)
    (name,) = text
    found = model.black_box.given[name]
    assert (found, type(found)) == (value, type(value))


def test_text_that_is_not_what_a_factory_says() -> None:
    assert mr.load_model("networks:Wide", args={"classes": "7"}, preprocessing=SMALL).classes == 7
    with pytest.raises(ModelError, match="--model-arg classes: expected int, as the factory says, found 'x'"):
        mr.load_model("networks:Wide", args={"classes": "x"})
    with pytest.raises(ModelError, match=r"--model-arg init: expected Literal\['zeros', .*found 'ones'"):
        mr.load_model("networks:Wide", args={"init": "ones"})


def test_factory_of_a_classifier_keeps_what_it_says_and_can_be_overruled() -> None:
    model = mr.load_model("networks:own_classifier", preprocessing=SMALL)
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.preprocessing.activation == "sigmoid"
    images = noise((16, 24))
    torch.testing.assert_close(model(images), networks.own_classifier().eval()(images))
    other = mr.load_model("networks:own_classifier", preprocessing={**SMALL, "activation": "softmax"})
    torch.testing.assert_close(other(images).sum(1), torch.ones(3))


def test_a_classifier_may_be_of_a_function() -> None:
    model = mr.load_model("networks:classifier_of_a_function", preprocessing=SMALL)
    images = noise((16, 24))
    torch.testing.assert_close(model(images), networks.own_classifier().eval()(images))


@pytest.mark.parametrize("factory", ["scripted", "frozen", "exported"])
def test_factory_of_a_program(factory: str) -> None:
    model = mr.load_model(f"networks:{factory}", preprocessing=SMALL)
    images = noise((16, 24))
    torch.testing.assert_close(
        model(images), mr.load_model("networks:tiny", preprocessing=SMALL)(images), atol=1e-6, rtol=0
    )


def test_factory_of_a_callable_is_a_black_box_of_rgb() -> None:
    model = mr.load_model("networks:means", preprocessing=SMALL)
    images = noise((16, 24))
    np.testing.assert_array_equal(model(images), images.mean((2, 3)))
    assert model.preprocessing == mr.Preprocessing(**SMALL, mean=(0, 0, 0), std=(1, 1, 1), activation="none")
    bytes_ = mr.load_model(
        "networks:means", preprocessing={**SMALL, "input_range": "0-255", "activation": "none"}
    )
    np.testing.assert_allclose(bytes_(images), 255 * images.mean((2, 3)), rtol=1e-5)


def test_a_network_may_write_to_its_batch() -> None:
    model = mr.load_model("networks:in_place", preprocessing={**SMALL, "input_range": "0-1"})
    image = np.full((16, 24, 3), 128, np.uint8)
    settled = tuning.settle(model, mr.ExplainSpec(masks=2000), image, masks=2000, batch_size=8)
    torch.testing.assert_close(
        settled.model(noise((16, 24))), (10 * noise((16, 24)).mean((2, 3)) - 3).softmax(1)
    )


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({"size": (112, 112), "resize": "crop"}, 128),
        ({"size": (256, 128), "resize": "crop"}, 146),
        ({"size": (112, 112), "resize": "crop", "shorter_side": 112}, 112),
        ({"resize": "crop"}, 256),
    ],
)
def test_a_crop_of_any_size_has_the_usual_margin(fields: dict, side: int) -> None:
    model = mr.load_model("networks:tiny", preprocessing=fields)
    assert model.preprocessing.shorter_side == side


def test_an_image_that_is_not_prepared_is_refused_and_not_scored_at_another_size() -> None:
    image, spec = np.zeros((40, 30, 3), np.uint8), mr.ExplainSpec(masks=2)
    model = mr.load_model("networks:tiny", preprocessing=SMALL)
    embedder = mr.load_embedder("networks:tiny", preprocessing=SMALL)
    told = r"expected an image of 16 x 24 pixels, .* found 40 x 30; .*model\.prepare"
    with pytest.raises(ImageError, match=told):
        mr.explain(model, image, spec=spec)
    with pytest.raises(ImageError, match=told):
        mr.embeddings_of(embedder, image[None])
    with pytest.raises(ImageError, match=told):
        mr.explain(mr.similarity(embedder, np.ones(5), np.ones((1, 5)), d0=1.0), image, 0, spec)
    assert mr.explain(model, model.prepare(image), spec=spec).maps.shape == (1, 5, 16, 24)
    assert mr.explain(model.black_box, image, spec=spec).maps.shape == (1, 5, 40, 30)


def test_logits_are_explained_when_asked_for_in_so_many_words() -> None:
    with pytest.raises(
        ModelError, match=r"expected scores in \[0, 1\] .* found -.*: logits\? say --activation"
    ):
        mr.load_model("networks:logits_without_module", preprocessing=SMALL)
    model = mr.load_model("networks:logits_without_module", preprocessing={**SMALL, "activation": "none"})
    assert model(noise((16, 24))).min() < -1
    soft = mr.load_model("networks:logits_without_module", preprocessing={**SMALL, "activation": "softmax"})
    torch.testing.assert_close(soft(noise((16, 24))).sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("factory", "fields", "message"),
    [
        ("soft", {}, "probabilities that sum to 1 already.*say --activation none"),
        ("soft", {"activation": "softmax"}, "second softmax"),
        ("one", {}, "a single score, of which a softmax is always 1; say --activation sigmoid"),
        ("features", {}, r"expected scores of shape \(2, classes\) from the model, found \(2, 8, 7, 11\)"),
        ("a_dict", {}, "expected the network to return one tensor .*, found dict; wrap it"),
        ("nans", {}, "found NaN or infinity for 2 of 2 images"),
        ("raises", {}, r"raised RuntimeError on a batch of shape \(2, 3, 16, 24\): first line second line"),
        ("fixed_size", {}, "fails on noise of 16 x 24 pixels.*check --size"),
        (
            "half",
            {},
            r"check that it takes images of float32, with weights of torch.float16: call .float\(\)",
        ),
        ("over_the_batch", {}, "other scores alone than in a batch of two .*training mode"),
        ("in_training_mode", {}, "other scores alone than in a batch of two .*training mode"),
        ("one_by_one", {}, r"of shape \(2, classes\).* found \(1, 3\); check that it takes batches, because"),
        ("fails", {}, "--model networks:fails raised ValueError: no such file"),
        ("number", {}, "expected an nn.Module or a callable from --model networks:number, found int"),
        ("absent", {}, "cannot import --model networks:absent: .* expected package.module:factory"),
    ],
)
def test_self_check_names_the_knob(factory: str, fields: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        mr.load_model(f"networks:{factory}", preprocessing={**SMALL, **fields})
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("line", ["raise ValueError('no\\nlicence')", "def f(:"])
def test_a_module_that_cannot_be_imported(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"cannot import --model broken_module:f: (Value|Syntax)Error: \w+"):
        mr.load_model("broken_module:f")


def test_class_names_must_be_as_many_as_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    assert mr.load_model("networks:tiny", args={"classes": 3}, classes=str(names), preprocessing=SMALL)
    with pytest.raises(
        ModelError, match=r"expected 5 class names, .* found 3 in .*names.txt; check --classes"
    ):
        mr.load_model("networks:tiny", classes=str(names), preprocessing=SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet18"}, "expected --model torchvision:NAME, .*, found 'resnet18'"),
        ({"model": "a b:c"}, "expected --model torchvision:NAME, .*, found 'a b:c'"),
        ({"model": "torchvision:resnet17"}, "no classification model 'resnet17'; did you mean: resnet"),
        (
            {"model": "torchvision:resnet18?classes=3"},
            r"expected \?weights= or \?num_classes= .* found classes",
        ),
        (
            {"model": "torchvision:resnet18?num_classes=x"},
            "whole number of at least 1 for .num_classes=, found 'x'",
        ),
        (
            {"model": "torchvision:resnet18?weights=BEST"},
            "expected .weights= to be IMAGENET1K_V1 or DEFAULT for resnet18, found 'BEST'",
        ),
        (
            {"model": "torchvision:resnet18?weights=DEFAULT", "weights": "w.pt"},
            "expected .weights= alone.*leave out --weights",
        ),
        (
            {"model": "torchvision:resnet18", "args": {"a": 1}},
            "--model-arg: expected none, because --model .* is no package.module:factory, found a",
        ),
        ({"model": "networks:tiny", "device": "gpu"}, "expected --device cuda, cuda:1 or cpu, found 'gpu'"),
        (
            {"model": "networks:means", "weights": "w.pt"},
            "--weights: expected an nn.Module from --model .*, found function",
        ),
        (
            {"model": "networks:tiny", "weights": "no.pt"},
            "expected a file of weights, found nothing at no.pt",
        ),
        ({"model": "networks:tiny", "classes": "no.txt"}, "cannot read class names from no.txt"),
    ],
)
def test_wrong_settings_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mr.load_model(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"cannot move the model to device cuda:3: .*; check --device"):
        mr.load_model("networks:tiny", device="cuda:3")


@pytest.mark.parametrize(
    "suffix", ["safetensors", "pt", "nested.pt", "parallel.pt", "parallel.safetensors", "lightning.pt"]
)
def test_weights_of_every_kind(tmp_path: Path, suffix: str) -> None:
    network = networks.tiny()
    with torch.no_grad():
        network.head.bias.add_(1)
    path = str(tmp_path / f"w.{suffix}")
    prefix = {"lightning.pt": "net._orig_mod."}.get(
        suffix, "module." if suffix.startswith("parallel") else ""
    )
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    if suffix.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(state if suffix in {"pt", "parallel.pt"} else {"state_dict": state, "epoch": 3}, path)
    model = mr.load_model("networks:tiny", weights=path, preprocessing=SMALL)
    images = noise((16, 24))
    expected = network.eval()(normalized(images, model.preprocessing)).softmax(1)
    torch.testing.assert_close(model(images), expected)


def test_weights_that_are_used_twice(tmp_path: Path) -> None:
    network, path = networks.tied(), str(tmp_path / "w.safetensors")
    nn.init.constant_(network.head.weight, 3)
    save_model(network, path)
    assert len(load_file(path)) < len(network.state_dict())
    model = mr.load_model("networks:tied", weights=path, preprocessing=SMALL)
    torch.testing.assert_close(model.black_box.network.classifier.weight, network.head.weight)


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_without_running(tmp_path: Path, protocol: str) -> None:
    path, target = tmp_path / "w.pt", tmp_path / "was-here"
    payload = {"conv.weight": Malicious(str(target))}
    if protocol == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    why = r"holds pickled code that calls \w+.mkdir" if protocol == "torch" else "no archive of torch.save"
    with pytest.raises(ModelError, match=f"{why}.*pickled code is never run"):
        mr.load_model("networks:tiny", weights=str(path))
    assert not target.exists()


def test_weights_that_are_no_state_dict_or_do_not_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pt")
    torch.save([torch.zeros(2)], path)
    with pytest.raises(
        ModelError, match=r"expected a state dict of tensors in .*, found list; save the state dict"
    ):
        mr.load_model("networks:tiny", weights=path)
    torch.save({"net": networks.tiny().state_dict(), "acc": 0.9}, path)
    with pytest.raises(ModelError, match="found dict of net, acc; save the state dict alone, or check"):
        mr.load_model("networks:tiny", weights=path)
    torch.jit.save(networks.scripted(), path)
    with pytest.raises(
        ModelError, match=r"is a program of TorchScript, which a factory may return: torch.jit"
    ):
        mr.load_model("networks:tiny", weights=path)
    torch.save(networks.tiny(7).state_dict(), path)
    with pytest.raises(ModelError, match="do not fit --model networks:tiny: size mismatch for head"):
        mr.load_model("networks:tiny", weights=path)


@pytest.mark.parametrize("query", ["", "?num_classes=6"])
def test_torchvision_counts_classes_of_weights(tmp_path: Path, query: str) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file(torchvision.models.get_model("squeezenet1_1", num_classes=6).state_dict(), path)
    model = mr.load_model(f"torchvision:squeezenet1_1{query}", weights=path, preprocessing={"size": (64, 64)})
    assert (model.classes, model.preprocessing.size) == (6, (64, 64))


def test_classes_are_counted_of_a_last_layer_without_bias() -> None:
    """As that of torchvision's MaxViT."""

    def network(classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, classes, bias=False))

    assert class_count(network(5), network(7).state_dict()) == {"num_classes": 7}
    assert class_count(network(5), network(5).state_dict()) == {}


def test_torchvision_weights_tell_preprocessing_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.get_model_weights("mobilenet_v3_small")["IMAGENET1K_V1"]
    asked = []

    def build(name: str, weights: object) -> nn.Module:
        asked.append((name, weights))
        return torchvision.models.mobilenet_v3_small()

    monkeypatch.setattr(torchvision.models, "get_model", build)
    model = mr.load_model("torchvision:mobilenet_v3_small?weights=IMAGENET1K_V1")
    assert asked == [("mobilenet_v3_small", weights)]
    assert model.preprocessing == mr.Preprocessing(size=(224, 224), resize="crop", shorter_side=256)
    assert (model.classes, model.class_name(0)) == (1000, "tench")
    # A size of one's own keeps the margin that the weights were evaluated with.
    half = mr.load_model(
        "torchvision:mobilenet_v3_small?weights=IMAGENET1K_V1", preprocessing={"size": (112, 112)}
    )
    assert half.preprocessing.shorter_side == 128


def test_torchvision_weights_that_are_broken_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.get_model_weights("mobilenet_v3_small")["IMAGENET1K_V1"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / Path(weights.url).name).write_bytes(b"half of a file")
    with pytest.raises(ModelError, match=rf"in {tmp_path}/checkpoints: .*; remove the file there, or use"):
        mr.load_model("torchvision:mobilenet_v3_small?weights=IMAGENET1K_V1")


def test_timm_tells_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = mr.load_model("timm:mobilenetv3_small_050?num_classes=7")
    config = timm.data.resolve_model_data_config(timm.create_model("mobilenetv3_small_050"))
    record = model.preprocessing
    assert (model.classes, record.resize, record.interpolation) == (7, "crop", config["interpolation"])
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    expected = timm.data.create_transform(**config)(torchvision.transforms.functional.to_pil_image(image))
    ours = normalized(torch.from_numpy(record.prepare(image).copy()).permute(2, 0, 1) / 255, record)
    torch.testing.assert_close(ours, expected)
    # Weights of other classes need no ?num_classes=.
    path = str(tmp_path / "w.safetensors")
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=7).state_dict(), path)
    assert mr.load_model("timm:mobilenetv3_small_050", weights=path).classes == 7


def test_timm_names_classes_of_pretrained_networks_alone() -> None:
    timm = pytest.importorskip("timm")
    names = zoo._timm_class_names(timm, timm.create_model("mobilenetv3_small_050"))
    assert len(names) in {0, 1000}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:mobilenetv3_small_051", "timm has no model .*; did you mean: .*mobilenetv3_small"),
        ("timm:resnet18?pretrained=yes", "expected .pretrained=true or .pretrained=false, found 'yes'"),
        ("timm:resnet18?pretrained=true&num_classes=9", r"alone, .* found \?num_classes=9 beside it; leave"),
    ],
)
def test_timm_errors(model: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message):
        mr.load_model(model)


def test_timm_crop_modes() -> None:
    spec = mr.ModelSpec(model="timm:x")
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash"}
    assert zoo._timm_resize("x", config, spec) == {"resize": "stretch"}
    config["crop_mode"] = "border"
    with pytest.raises(ModelError, match=r"timm evaluates x with crop mode border .* choose with --resize"):
        zoo._timm_resize("x", config, spec)
    assert zoo._timm_resize("x", config, mr.ModelSpec(model="m", preprocessing={"resize": "crop"})) == {}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    labels = dict(enumerate(("stop", "yield", "go")))
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], resample=3
    ).save_pretrained(folder)
    return folder


def test_huggingface_folder_tells_all(vit_folder: Path) -> None:
    import transformers

    model = mr.load_model(f"hf:{vit_folder}")
    assert (model.classes, model.class_names) == (3, ("stop", "yield", "go"))
    record = model.preprocessing
    assert (record.size, record.resize, record.interpolation) == ((32, 32), "stretch", "bicubic")
    assert record.mean == pytest.approx((0.4, 0.5, 0.6))
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    network = transformers.AutoModelForImageClassification.from_pretrained(vit_folder).eval()
    small = record.prepare(image)
    processor = transformers.AutoImageProcessor.from_pretrained(vit_folder)
    inputs = processor(small, do_resize=False, return_tensors="pt")
    ours = model(torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours, network(**inputs).logits.softmax(1).detach(), atol=1e-5, rtol=1e-4)


def test_huggingface_weights_are_asked_in_float32(vit_folder: Path, tmp_path: Path) -> None:
    import transformers

    network = transformers.AutoModelForImageClassification.from_pretrained(vit_folder)
    network.bfloat16().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(
        (vit_folder / "preprocessor_config.json").read_bytes()
    )
    model = mr.load_model(f"hf:{tmp_path}")
    assert {weight.dtype for weight in model.black_box.parameters()} == {torch.float32}


def test_huggingface_without_a_trained_classifier_is_refused(vit_folder: Path, tmp_path: Path) -> None:
    import transformers

    transformers.AutoModel.from_pretrained(vit_folder).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"expected all weights of .* found no classifier.bias, classifier.weight"
    ):
        mr.load_model(f"hf:{tmp_path}")


def test_huggingface_errors(vit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="expected a folder of a transformers model, found none at /no/where"
    ):
        mr.load_model("hf:/no/where")
    with pytest.raises(ModelError, match="cannot load an image classifier from hf:"):
        mr.load_model(f"hf:{tmp_path}")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((vit_folder / file).read_bytes())
    with pytest.raises(ModelError, match=r"cannot load an image processor .* say --size, --mean and --std"):
        mr.load_model(f"hf:{tmp_path}")
    said = {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert mr.load_model(f"hf:{tmp_path}", preprocessing=said).classes == 3


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 192},
                "do_center_crop": True,
            },
            {"size": (224, 192), "resize": "crop", "shorter_side": 256},
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, {"size": (224, 224), "shorter_side": 256}),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, {"size": (384, 384), "resize": "stretch"}),
        ({"size": {"shortest_edge": 99}}, {"size": (99, 99), "resize": "crop", "shorter_side": 99}),
        ({"size": {"height": 8, "width": 9}, "resample": 1}, {"size": (8, 9), "interpolation": "lanczos"}),
        (
            {
                "size": {"height": 8, "width": 8},
                "do_rescale": False,
                "image_mean": [127.5] * 3,
                "image_std": [255.0] * 3,
            },
            {"mean": (0.5,) * 3, "std": (1.0,) * 3},
        ),
        (
            {
                "size": {"height": 8, "width": 8},
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
                "do_normalize": False,
            },
            {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        ),
    ],
)
def test_image_processors_in_our_terms(processor: dict, expected: dict) -> None:
    config = SimpleNamespace(to_dict=lambda: processor)
    library = SimpleNamespace(AutoImageProcessor=SimpleNamespace(from_pretrained=lambda name: config))
    fields = zoo._processor_fields(library, "x", mr.ModelSpec(model="hf:x"))
    for name, value in expected.items():
        assert fields[name] == pytest.approx(value) if name in {"mean", "std"} else fields[name] == value


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {}),
        ("ConvNext", {}),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("Bit", {}),
        ("CLIP", {}),
        ("EfficientNet", {}),
        ("EfficientNet", {"include_top": False}),
        ("Levit", {}),
        ("PoolFormer", {}),
        ("MobileNetV2", {}),
        ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [255.0] * 3}),
    ],
)
def test_images_are_prepared_as_by_their_processor(kind: str, settings: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    getattr(transformers, f"{kind}ImageProcessor")(**settings).save_pretrained(tmp_path)
    spec = mr.ModelSpec(model=f"hf:{tmp_path}")
    fields = zoo._processor_fields(transformers, str(tmp_path), spec)
    zoo._check_processor(transformers, str(tmp_path), fields, spec)


def test_a_processor_that_does_something_else_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    odd = transformers.ViTImageProcessor(do_resize=False, size={"height": 99, "width": 99})
    odd.save_pretrained(tmp_path)
    spec = mr.ModelSpec(model=f"hf:{tmp_path}")
    fields = zoo._processor_fields(transformers, str(tmp_path), spec)
    with pytest.raises(ModelError, match=r"differ by .* from those of ViTImageProcessor.*; say --size"):
        zoo._check_processor(transformers, str(tmp_path), fields, spec)
    said = spec.model_copy(update={"preprocessing": {"size": (224, 224)}})
    zoo._check_processor(transformers, str(tmp_path), fields, said)


def test_a_processor_that_flips_channels_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"which reads BGR; use a factory"):
        zoo._processor_fields(transformers, str(tmp_path), mr.ModelSpec(model=f"hf:{tmp_path}"))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_that_do_not_say_how_they_were_normalised(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{name}: expected --mean and --std beside --weights"):
        mr.load_model(f"torchvision:{name}", weights=str(tmp_path / "published.pth"))


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r'cannot import timm.*pip install "mcrise-ray\[timm\]"'):
        mr.load_model("timm:resnet18")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models")
def test_gtsrb_resnet_reads_signs() -> None:
    model = mr.load_model(
        "torchvision:resnet18",
        weights=str(SHARED / "models/gtsrb_resnet18.safetensors"),
        preprocessing={"size": (96, 96), "mean": (0.3417, 0.3126, 0.3217), "std": (0.2768, 0.2646, 0.2706)},
    )
    signs = torchvision.datasets.GTSRB(SHARED / "data/gtsrb", split="test")
    right = 0
    for index in range(20):
        image, label = signs[index]
        pixels = torch.from_numpy(model.prepare(np.asarray(image)).copy()).permute(2, 0, 1)[None] / 255
        right += int(model(pixels).argmax()) == label
    assert right >= 18


@pytest.mark.parametrize("original", [False, True])
def test_a_job_stores_the_model_and_maps_of_the_size_asked_for(tmp_path: Path, original: bool) -> None:
    from PIL import Image
    from reporting import Silent

    from mcrise_ray.jobs import draw_figures, run_job
    from mcrise_ray.jobspec import JobSpec

    sizes = {"a": (30, 50), "b": (30, 50), "c": (64, 20)}
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    record = {"size": (16, 16), "resize": "crop", "shorter_side": 18}
    job = JobSpec(
        images=(str(tmp_path),),
        model=mr.ModelSpec(model="networks:tiny", preprocessing=record),
        output=str(tmp_path / "out"),
        explain=mr.ExplainSpec(masks=64),
        actors=0,
        standard_error=True,
        original_size=original,
    )
    reporter = Silent()
    assert run_job(job, reporter).images == 3
    assert reporter.notes == ["model networks:tiny on cpu: float32, batches of 64, threads 1"]
    results = mr.read_results(job.output)
    assert json.loads(json.dumps(results.job["model"])) == {
        "model": "networks:tiny",
        "device": "cpu",
        "classes": networks.CLASSES,
        "preprocessing": mr.Preprocessing(**record).model_dump(mode="json"),
        "probe": list(mr.load_model(job.model).probe),
    }
    rows = {Path(row.image_id).stem: row for row in results}
    assert len(results) == len(rows) == 3
    for name, size in sizes.items():
        height, width = size if original else (16, 16)
        row = rows[name]
        assert (row.height, row.width) == (height, width)
        assert row.map.shape == row.standard_error.shape == (5, height, width)
        assert row.baseline.shape == (height, width)
        assert np.isnan(row.map).any() == original
    assert len(draw_figures(job, Silent())) == 3


def test_command_line_says_the_whole_record(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from mcrise_ray import cli

    jobs = []
    monkeypatch.setattr(cli, "_run_and_report", lambda job, *_: jobs.append(job))
    said = {
        "size": "96x64",
        "resize": "crop",
        "shorter-side": "100",
        "interpolation": "bicubic",
        "mean": "127.5,0,0",
        "std": "1,2,3",
        "input-range": "0-255",
        "activation": "none",
    }
    options = [part for name, value in said.items() for part in (f"--{name}", value)]
    arguments = ["explain", "a.png", "--model", "m.onnx", "--original-size", *options]
    outcome = CliRunner().invoke(cli.app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert jobs[0].original_size
    assert jobs[0].model.preprocessing == {
        "size": (96, 64),
        "resize": "crop",
        "shorter_side": 100,
        "interpolation": "bicubic",
        "mean": (127.5, 0, 0),
        "std": (1, 2, 3),
        "input_range": "0-255",
        "activation": "none",
    }


def test_a_server_in_a_spec_holds_no_password() -> None:
    with pytest.raises(SpecError, match=r"without user and password.*MCRISE_MODEL_TOKEN") as caught:
        mr.ModelSpec(model="https://me:geheim@host/v2/models/x")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(("model", "side"), [("torchvision:resnet18", 32), ("networks:fixed_size", 8)])
def test_weights_that_are_drawn_at_random_are_the_same_in_every_actor(model: str, side: int) -> None:
    """Masks of one image were scored by as many networks as there were actors."""
    images = torch.rand(2, 3, side, side)
    before = torch.get_rng_state()
    one, other = (mr.load_model(model, preprocessing={"size": (side, side)}) for _ in range(2))
    assert torch.equal(one(images), other(images))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "weights", "untrained"),
    [
        ("torchvision:resnet18", None, True),
        ("torchvision:resnet18?num_classes=3", None, True),
        ("torchvision:resnet18?weights=IMAGENET1K_V1", None, False),
        ("torchvision:resnet18", "w.safetensors", False),
        ("timm:vit_tiny", None, True),
        ("timm:vit_tiny?num_classes=3&pretrained=true", None, False),
        ("hf:google/vit", None, False),
        ("module:factory", None, False),
    ],
)
def test_random_weights_are_known_as_such(model: str, weights: str | None, untrained: bool) -> None:
    assert mr.ModelSpec(model=model, weights=weights).is_untrained is untrained
