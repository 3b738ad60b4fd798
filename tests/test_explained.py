"""What of a model that embeds is explained: how it is tried, how a query is prepared, what is bit-stable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from people import SIZE, person, save
from torch import Tensor, nn

import mcrise_ray as mr
from mcrise_ray import tuning
from mcrise_ray.decode import DecodeOptions
from mcrise_ray.embedders import Embedder, load_embedder
from mcrise_ray.errors import TargetError
from mcrise_ray.explained import Likeness
from mcrise_ray.loading import ModelSpec
from mcrise_ray.precision import apply
from mcrise_ray.reidspec import ReidSpec
from mcrise_ray.scores import ask, input_space
from mcrise_ray.tasks import GalleryMatch, Query
from mcrise_ray.tuning import Settled, settle

SPEC = mr.reid_spec(masks=2000, grid=(4, 2))
IMAGE = person(1)
IMAGE[:8, :5] = (200, 30, 60)  # not its own mirror image


class Drifting(nn.Module):
    """An embedder that autocast moves: all embeddings alike, or with their images."""

    def __init__(self, together: float, apart: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.together, self.apart = together, apart

    def forward(self, images: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        halves = self.conv(images).relu().float()
        embeddings = torch.cat([halves[..., :2].mean((2, 3)), halves[..., 2:].mean((2, 3))], dim=1)
        moved = self.together + self.apart * images[:, :1].mean((2, 3)) * torch.arange(32)
        return embeddings + autocast * moved


def drifting(together: str = "0", apart: str = "0") -> nn.Module:
    return Drifting(float(together), float(apart))


def likeness(**args: str) -> Likeness:
    model = ModelSpec(
        model="test_explained:drifting",
        args=args,
        preprocessing={"size": SIZE, "input_range": "0-1"},
        device="cpu",
    )
    return Likeness(model, SPEC, ReidSpec(gallery="g"), DecodeOptions())


def tried(monkeypatch: pytest.MonkeyPatch, image: np.ndarray = IMAGE, **args: str) -> Settled[Embedder]:
    """What is chosen where each step seems to be twice as fast."""
    monkeypatch.setattr(tuning, "speed_ratio", lambda base, trial, repeats: 2.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("nothing is compiled for little work"))
    explained = likeness(**args)
    return settle(explained.model, SPEC, image, scored=explained.scored, batch_size=8, masks=2000)


def test_precision_is_judged_by_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tried(monkeypatch).execution.precision
    assert chosen.bfloat16
    assert 0 < chosen.difference < tuning.TOLERANCE
    assert any(note.startswith("bfloat16: 2.00 times as fast, differences") for note in chosen.notes)


def test_what_moves_all_embeddings_alike_moves_no_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, together="0.05").execution.precision.bfloat16


def test_what_changes_similarities_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = tried(monkeypatch, apart="0.1").execution.precision
    assert not precision.bfloat16
    assert any("bfloat16" in note and "not kept" in note and "beyond 3%" in note for note in precision.notes)


def test_float32_changes_nothing() -> None:
    explained = likeness()
    settled = settle(explained.model, SPEC, IMAGE, scored=explained.scored, precision="float32", batch_size=8)
    assert settled.execution.precision.is_float32
    assert settled.model is explained.model


def test_every_worker_asks_as_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = tried(monkeypatch)
    other = apply(likeness().model, settled.execution)
    images = np.stack([settled.model.prepare(person(n)) for n in range(8)])
    ours, theirs = (mr.embeddings_of(model, images) for model in (settled.model, other))
    np.testing.assert_array_equal(ours, theirs)
    plain = mr.embeddings_of(likeness().model, images)
    assert 0 < np.abs(ours - plain).max() < 0.02 * np.abs(plain).max()


def test_an_image_that_is_its_own_mirror_image_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    explained = likeness()
    grey = np.full((*SIZE, 3), 99, np.uint8)
    box = explained.scored(explained.model, grey)
    space = input_space(box)
    rgb = torch.from_numpy(grey).permute(2, 0, 1)[None] / 255
    assert ask(space.function, space.normalize(rgb))[0, 0] == pytest.approx(np.exp(-1))
    assert tried(monkeypatch, image=grey).execution.batch_size == 8


def query(path: Path, embeddings: np.ndarray) -> Query:
    save(path, person(1))
    matches = tuple(
        GalleryMatch(f"{place}.png", f"/{place}.png", None, None, f"top{place}", place, f.astype(np.float32))
        for place, f in enumerate(embeddings)
    )
    return Query("q.png", str(path), matches=matches)


def test_d0_is_the_same_whoever_finds_it(tmp_path: Path) -> None:
    model = ModelSpec(model="blackboxes:halves", preprocessing={"size": SIZE, "input_range": "0-1"})
    embedder = load_embedder(model)
    others = mr.embeddings_of(embedder, np.stack([embedder.prepare(person(n)) for n in range(2, 5)]))
    image = query(tmp_path / "q.png", others)
    found = []
    for _ in range(2):
        explained = Likeness(model, SPEC, ReidSpec(gallery="g"), DecodeOptions())
        found.append(explained.prepare(image, mr.read_image(image.uri)).choose())
    assert found[0] == found[1]
    f = mr.embeddings_of(embedder, embedder.prepare(person(1))[None])[0]
    for target, match in zip(found[0], image.matches, strict=True):
        assert target.distance == target.d0 == np.sqrt(np.square(f - match.embedding).sum())
        assert (target.name, target.role) == (match.image_id, match.role)


def test_a_copy_of_the_query_is_named(tmp_path: Path) -> None:
    explained = likeness()
    f = mr.embeddings_of(explained.model, explained.model.prepare(person(1))[None])
    image = query(tmp_path / "q.png", np.stack([f[0] + 1, f[0]]))
    with pytest.raises(TargetError, match=r"found 1\.png at distance .*, where exp\(-d / d0\) means nothing"):
        explained.prepare(image, person(1))
