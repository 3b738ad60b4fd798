"""Real images beside the repository, where they are there; see `../shared/data/README.md`."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from people import identities

from mcrise_ray import ImageSource, load_embedder, load_model, read_image
from mcrise_ray.embed import embed
from mcrise_ray.identity import Protocol, retrieval
from mcrise_ray.matching import correct_ranks

SHARED = Path(__file__).parents[2] / "shared"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

GTSRB = f"torchvision:GTSRB?root={SHARED / 'data' / 'gtsrb'}&split=test"


def test_gtsrb_through_torchvision_is_classified_right() -> None:
    import torch

    model = load_model(
        "torchvision:resnet18",
        weights=str(SHARED / "models" / "gtsrb_resnet18.safetensors"),
        preprocessing={
            "size": (96, 96),
            "mean": (0.3417, 0.3126, 0.3217),
            "std": (0.2768, 0.2646, 0.2706),
        },
        device="cpu",
    )
    refs = list(ImageSource(GTSRB))
    assert len(refs) == 1983
    some = refs[::50]
    batch = np.stack([model.prepare(read_image(ref.uri)) for ref in some])
    scores = model(torch.from_numpy(batch).permute(0, 3, 1, 2) / 255)
    right = sum(int(guess) == ref.label for guess, ref in zip(scores.argmax(1), some, strict=True))
    assert right >= 0.9 * len(some)


def test_imagenet_as_an_image_folder() -> None:
    images = ImageSource(f"imagefolder:{SHARED / 'data' / 'imagenet'}")
    refs = list(images)
    assert len(refs) == len({ref.image_id for ref in refs}) == 100
    assert [ref.label for ref in refs] == list(range(100))
    assert images.class_names[0] == "n01440764"
    assert all(min(read_image(ref.uri).shape[:2]) == 256 for ref in refs[::10])


@pytest.mark.parametrize(
    ("library", "model", "settings"),
    [
        (
            "torchreid",
            "torchreid:osnet_x0_25",
            {"weights": str(SHARED / "models" / "osnet_x0_25_market1501.pth")},
        ),
        (
            "onnxruntime",
            str(SHARED / "models" / "osnet_x0_25_msmt17.onnx"),
            {"preprocessing": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}},
        ),
    ],
)
def test_pedestrians_are_re_identified(library: str, model: str, settings: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library, exc_type=ImportError)
    embedder = load_embedder(model, device="cpu", **settings)
    assert embedder.dimensions == 512
    sides = []
    for folder in ("query", "gallery"):
        refs = list(ImageSource(str(SHARED / "data" / "pedestrians" / folder)))
        rows, errors = embed(embedder, refs, batch_size=8)
        assert not errors
        who = identities([row.pid for row in rows], [row.camid for row in rows])
        sides.append((np.stack([row.embedding for row in rows]), who))
    (queries, who), (gallery, whom) = sides
    found = retrieval(correct_ranks(queries, gallery, Protocol(who, whom, np.full(5, -1))))
    assert found is not None
    assert (found.queries, found.recall_at_1, found.mean_average_precision) == (5, 1.0, 1.0)
