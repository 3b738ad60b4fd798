"""One worker alone: what becomes of the tasks of a call."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mcrise_ray import worker as module
from mcrise_ray.decode import DecodeOptions
from mcrise_ray.errors import ImageError
from mcrise_ray.faults import FaultKind
from mcrise_ray.images import ImageRef, read_image
from mcrise_ray.loading import ModelSpec
from mcrise_ray.plan import unit
from mcrise_ray.reduction import ScoreUnit
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tasks import Call, Done, Failure, Inspection, InspectTask, WorkTask
from mcrise_ray.worker import Setup, Worker

SPEC = ExplainSpec(masks=192, grid=(4, 4))

raised: list[Exception] = []


class Scripted(nn.Module):
    """Raises the next of `raised` whenever it is asked about more than one image."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2 and raised:
            raise raised.pop(0)
        return images.mean(dim=(2, 3))


def scripted() -> nn.Module:
    return Scripted()


@pytest.fixture
def worker() -> Worker:
    model = ModelSpec(model=f"{__name__}:scripted", preprocessing={"size": (20, 24)}, device="cpu")
    made = Worker(Setup(model, SPEC, (0,), DecodeOptions(), "float32", 64, 1, None, ImageRef("a", "a")))
    execution = made.load().execution
    assert (execution.batch_size, execution.threads) == (64, 1)
    assert execution.precision.is_float32
    return made


@pytest.fixture
def image(tmp_path: Path) -> ImageRef:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return ImageRef("a.png", str(tmp_path / "a.png"))


def units(image: ImageRef, *indices: int) -> Call:
    return Call(tuple(WorkTask(image, (0,), ScoreUnit(unit(SPEC, index))) for index in indices), 64)


@pytest.mark.parametrize(
    ("device", "threads", "gpus", "part"),
    [
        ("cuda:0", 4, None, 1.0),
        ("cuda:0", 4, 0.25, 0.25),
        ("cuda:0", 4, 2.0, 1.0),
        ("cpu", 4, 0.25, 0.25),
        ("cpu", 32, None, 1.0),
        ("cpu", None, None, 1.0),
    ],
)
def test_batches_leave_memory_to_the_workers_beside(
    monkeypatch: pytest.MonkeyPatch, device: str, threads: int | None, gpus: float | None, part: float
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    nothing = ModelSpec(model="m:f"), SPEC, (0,), DecodeOptions(), "float32"
    setup = Setup(*nothing, "auto", threads, None, ImageRef("a", "a"), gpus=gpus)
    assert Worker(setup)._part(device) == part


def test_a_call_does_its_tasks_in_order(worker: Worker, image: ImageRef) -> None:
    (inspection,) = worker.do(Call((InspectTask(image),), 64)).outcomes
    assert isinstance(inspection, Inspection)
    assert inspection.size == (20, 24)
    reply = worker.do(units(image, 0, 1, 2))
    assert [len(outcome.result) for outcome in reply.outcomes if isinstance(outcome, Done)] == [64] * 3
    assert reply.fault is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), FaultKind.DEVICE_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), FaultKind.DEVICE_MEMORY),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FaultKind.DIED),
    ],
)
def test_a_fault_ends_a_call_and_keeps_what_came_before(
    worker: Worker, image: ImageRef, error: Exception, kind: FaultKind
) -> None:
    whole = worker.do(units(image, 0, 1, 2))
    try:
        call = units(image, 0)
        first = worker.do(call)
        raised.append(error)
        reply = worker.do(units(image, 1, 2))
    finally:
        raised.clear()
    assert first.fault is None
    assert reply.outcomes == ()
    assert reply.fault is not None
    assert reply.fault.kind is kind
    assert len(whole.outcomes) == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), FaultKind.DIED),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), FaultKind.DIED),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), FaultKind.DEVICE_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), FaultKind.DEVICE_MEMORY),
        (RuntimeError("a bug"), FaultKind.BROKEN),
    ],
)
@pytest.mark.parametrize("where", ["mcrise_ray.blend.Blender.__call__", "mcrise_ray.scores.Answer.read"])
def test_a_gpu_tells_late_that_it_has_failed(
    worker: Worker,
    image: ImageRef,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: FaultKind,
    where: str,
) -> None:
    """Whoever blends, copies or waits next is told: the actor is to blame, not the image."""

    def fails(*_: object) -> None:
        raise error

    worker.do(units(image, 0))
    with monkeypatch.context() as patch:
        patch.setattr(where, fails)
        reply = worker.do(units(image, 1))
    assert reply.fault is not None
    assert reply.fault.kind is kind
    assert str(error) in reply.fault.message


def test_an_error_of_the_model_fails_the_image(worker: Worker, image: ImageRef) -> None:
    raised.append(ValueError("wrong"))
    (failure,) = worker.do(units(image, 0)).outcomes
    assert failure == Failure(
        "explain", "the model raised ValueError on a batch of shape (64, 3, 20, 24): wrong"
    )


def test_a_bug_of_ours_is_a_fault_that_says_where(
    worker: Worker, image: ImageRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(module, "perform", broken)
    reply = worker.do(units(image, 0))
    assert reply.fault is not None
    assert reply.fault.kind is FaultKind.BROKEN
    assert "KeyError: 'x' (" in reply.fault.message
    assert "test_worker.py" in reply.fault.message


def test_the_upcoming_image_is_decoded_meanwhile_and_once(
    worker: Worker, image: ImageRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    begun = threading.Event()

    def reading(uri: str, options: DecodeOptions) -> np.ndarray:
        read.append(threading.current_thread().name)
        begun.set()
        return read_image(uri, options)

    monkeypatch.setattr(module, "read_image", reading)
    upcoming = ImageRef("b.png", image.uri)
    call = units(image, 0)
    worker.do(Call(call.tasks, call.batch_size, upcoming))
    assert begun.wait(10)
    (inspection,) = worker.do(Call((InspectTask(upcoming),), 64)).outcomes
    assert isinstance(inspection, Inspection)
    assert len(read) == 2
    assert all(name.startswith("reader") for name in read)


def test_an_upcoming_image_that_cannot_be_read_fails_at_its_own_turn(
    worker: Worker, image: ImageRef, tmp_path: Path
) -> None:
    gone = ImageRef("gone.png", str(tmp_path / "gone.png"))
    call = units(image, 0)
    reply = worker.do(Call(call.tasks, call.batch_size, gone))
    assert isinstance(reply.outcomes[0], Done)
    (failure,) = worker.do(Call((InspectTask(gone),), 64)).outcomes
    assert isinstance(failure, Failure)
    assert failure.stage == "read"
    with pytest.raises(ImageError, match=r"gone\.png"):
        read_image(gone.uri)
