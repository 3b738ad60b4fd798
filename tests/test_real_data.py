"""Real images beside the repository, where they are there; see `../shared/data/README.md`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mcrise_ray import ImageSource, load_model, read_image

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
