"""Batches in parts, side by side: the same scores in the same order, whatever the parts are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import networks
import pytest
import torch
from torch import Tensor, nn

from mcrise_ray import sessions
from mcrise_ray.sessions import Converted, SideBySide

SIZE = (32, 48)


def noise(count: int) -> Tensor:
    return torch.rand((count, 3, *SIZE), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Asks:
    """Answers with each image's first pixel, and keeps how many images each call had."""

    def __init__(self) -> None:
        self.parts: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.parts.append(len(images))
        return images[:, :, 0, 0]


def faster(*larger: int) -> Callable[[Callable, Callable, int], float]:
    """A clock by which parts of these sizes are faster than any before them."""

    def ratio(base: Callable, trial: Callable, repeats: int) -> float:
        _, part = trial.args
        return 1.5 if part in larger else 0.9

    return ratio


@pytest.mark.parametrize(
    ("count", "threads", "parts"),
    [
        (1, 2, [1]),
        (2, 2, [2]),
        (3, 2, [3]),
        (4, 2, [2, 2]),
        (7, 2, [2, 2, 3]),
        (8, 1, [2, 2, 2, 2]),
        (9, 3, [2, 2, 2, 3]),
    ],
)
def test_no_part_of_several_images_is_a_single_one(
    count: int, threads: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "speed_ratio", faster())
    asks = Asks()
    side_by_side = SideBySide(asks, threads, 2)
    side_by_side(noise(count))  # in which larger parts are tried
    asks.parts.clear()
    torch.testing.assert_close(side_by_side(noise(count)), noise(count)[:, :, 0, 0], rtol=0, atol=0)
    assert sorted(asks.parts) == parts


@pytest.mark.parametrize(
    ("larger", "parts"), [((), 2), ((4,), 4), ((4, 8), 8), ((4, 8, 16), 16), ((4, 8, 16, 32), 16), ((8,), 2)]
)
def test_parts_grow_as_long_as_that_is_faster_and_leaves_work_to_every_thread(
    larger: tuple[int, ...], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "speed_ratio", faster(*larger))
    asks = Asks()
    side_by_side = SideBySide(asks, 2, 2)
    for count in (5, 8, 16, 32):  # the first is too small to tell, later ones allow more
        side_by_side(noise(count))
    asks.parts.clear()
    side_by_side(noise(32))
    assert asks.parts == [parts] * (32 // parts)
    asks.parts.clear()
    side_by_side(noise(11))
    assert sum(asks.parts) == 11
    assert len(asks.parts) >= 2


def test_parts_that_round_otherwise_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: which parts a worker takes must not show."""
    monkeypatch.setattr(sessions, "speed_ratio", faster(4, 8, 16))
    parts: list[int] = []

    def rounds(images: Tensor) -> Tensor:
        parts.append(len(images))
        return images[:, :, 0, 0] + (1e-7 if len(images) >= 8 else 0)

    side_by_side = SideBySide(rounds, 2, 2)
    side_by_side(noise(32))
    parts.clear()
    side_by_side(noise(32))
    assert parts == [4] * 8


def test_every_thread_has_a_part_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=30)  # which breaks unless three are inside

    def asks(images: Tensor) -> Tensor:
        together.wait()
        return images[:, :, 0, 0]

    torch.testing.assert_close(SideBySide(asks, 3, 2)(noise(6)), noise(6)[:, :, 0, 0], rtol=0, atol=0)


def test_errors_of_a_part_are_those_of_the_batch() -> None:
    def fails(images: Tensor) -> Tensor:
        raise MemoryError(f"no room for {len(images)}")

    with pytest.raises(MemoryError, match="no room for 2"):
        SideBySide(fails, 2, 2)(noise(4))


class Mixed(nn.Module):
    """Layers of every kind whose kernels might look at the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 24, 3, 2, padding=1),
                nn.BatchNorm2d(24),
                nn.ReLU6(),
                nn.Conv2d(24, 24, 3, padding=1, groups=24),
                nn.GELU(),
                nn.Conv2d(24, 40, 1),
                nn.AdaptiveAvgPool2d((4, 6)),
                nn.Flatten(2),
            )
            self.attention = nn.MultiheadAttention(40, 4, batch_first=True)
            self.head = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, networks.CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.layers(images).mT
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


@pytest.mark.usefixtures("two_threads")
def test_a_converted_network_gives_an_image_the_same_bits_in_any_batch_and_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Mixed().eval()
    images = noise(33)
    found = []
    for larger in ((), (4,), (4, 8, 16)):
        monkeypatch.setattr(sessions, "speed_ratio", faster(*larger))
        converted = Converted(network, SIZE, 32)
        assert isinstance(converted._ask, SideBySide)
        found.append(converted(images))
        for count in (2, 5, 20):
            assert torch.equal(converted(images[:count]), found[0][:count])
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0], network(images).detach(), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("network", "batch_size"),
    [(networks.Returns(lambda images: images.amax((2, 3)) - images.mean()), 8), (networks.tiny(), 3)],
    ids=["images depend on each other", "too few for two threads"],
)
def test_a_batch_stays_whole_where_parts_would_not_do(network: nn.Module, batch_size: int) -> None:
    network = network.eval()
    converted = Converted(network, SIZE, batch_size)
    assert not isinstance(converted._ask, SideBySide)
    torch.testing.assert_close(converted(noise(8)), network(noise(8)).detach(), rtol=0, atol=1e-6)
