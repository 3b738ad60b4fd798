"""Numpy's threads stay out of the way of torch's, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest
from threadpoolctl import OpenBLASController, ThreadpoolController

from mcrise_ray import ExplainSpec, explain, guide, reduction
from mcrise_ray.threads import one_blas_thread

SPINNING = ThreadpoolController().select(internal_api="openblas").select(threading_layer="pthreads")
# Scipy brings another, which a test may load later.
POOLS = SPINNING.select(
    filepath=[pool["filepath"] for pool in SPINNING.info() if "numpy" in pool["filepath"]]
)
pytestmark = pytest.mark.skipif(not POOLS.info(), reason="numpy has a BLAS whose threads do not spin")


def counts() -> set[int]:
    return {pool["num_threads"] for pool in POOLS.info()}


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    with POOLS.limit(limits=3):
        OpenBLASController.clear_controlling_thread()  # or no other thread could change it
        yield


def test_only_inside_there_is_one() -> None:
    assert (counts(), one_blas_thread(counts)(), counts()) == ({3}, {1}, {3})


def test_errors_give_the_threads_back() -> None:
    def fail() -> None:
        raise ValueError(f"inside {counts()}")

    with pytest.raises(ValueError, match=r"inside \{1\}"):
        one_blas_thread(fail)()
    assert counts() == {3}


def test_there_is_one_until_the_last_of_several_leaves() -> None:
    first, second, left = Event(), Event(), Event()

    @one_blas_thread
    def stay(enters: Event, leaves: Event) -> set[int]:
        enters.set()
        assert leaves.wait(30)
        return counts()

    with ThreadPoolExecutor() as pool:
        one = pool.submit(stay, first, second)
        assert first.wait(30)
        other = pool.submit(stay, second, left)
        assert one.result() == {1}
        assert counts() == {1}
        left.set()
        assert other.result() == {1}
    assert counts() == {3}


def test_models_keep_their_threads_and_numerics_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, set[int]] = {name: set() for name in ("model", "predict", "learn")}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: object, **kwargs: object) -> Any:
            found[name] |= counts()
            return function(*args, **kwargs)

        return noted

    def scores(images: np.ndarray) -> np.ndarray:
        """Probabilities that are close to 0 behind most masks, for which masks are picked."""
        bright = np.asarray(images).mean(axis=(1, 2, 3))
        return np.stack([1 / (1 + np.exp(50 * (0.6 - bright))), np.zeros_like(bright)], axis=1)

    monkeypatch.setattr(guide, "predict", watched("predict", guide.predict))
    monkeypatch.setattr(reduction, "learn", watched("learn", reduction.learn))
    explain(
        watched("model", scores), np.full((16, 16, 3), 255, np.uint8), 0, ExplainSpec(masks=1024, grid=(3, 3))
    )
    assert found == {"model": {3}, "predict": {1}, "learn": {1}}
