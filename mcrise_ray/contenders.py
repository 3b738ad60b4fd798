"""Others and ours in a process of its own each: what a run takes there, in time and in memory.

In the process that measures, malloc keeps what it frees (`mcrise_ray.memory.keep_freed`), as it does for all
that we ask of a CPU. Others do not ask for that: there they would be up to three times as fast as they are.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from mcrise_ray.baselines import BATCH_SIZE, rise_as_published, xaitk_mc_rise
from mcrise_ray.errors import MCRiseError, ModelError
from mcrise_ray.explainer import Subject, explain
from mcrise_ray.loading import ModelSpec
from mcrise_ray.masks import draw
from mcrise_ray.memory import forget_peak, keep_freed, peak_memory
from mcrise_ray.models import Model, load_model
from mcrise_ray.scores import launch
from mcrise_ray.spec import ExplainSpec

Name = Literal["rise", "xaitk", "ours"]


@dataclass(frozen=True)
class Contender:
    """Who explains what.

    Args:
        name: RISE as published, the MC-RISE of xaitk-saliency, or ours.
        model: the plain one for all: what compiling once takes would hide what explaining takes.
        image: at the model's input size.
        spec: of the masks.
        batch_size: of ours; others have their own.
        threads: of torch.
        keeps_freed: malloc is told what ours is.
    """

    name: Name
    model: ModelSpec
    image: UInt8[np.ndarray, "H W 3"]
    spec: ExplainSpec
    batch_size: int
    threads: int
    keeps_freed: bool = False


class Apart:
    """A contender in a process of its own, which has its model and waits to be told.

    Raises:
        MCRiseError: what it raised there, or that it has died.
    """

    def __init__(self, contender: Contender) -> None:
        self._name = contender.name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

    def explain(self) -> None:
        """Explain the image once."""
        self._ask("explain")

    def memory(self) -> int:
        """Bytes that the process takes at most while it explains, beyond what its model takes; to be asked
        once, and first.
        """
        peak: int = self._ask("memory")
        return peak

    def _ask(self, what: str) -> Any:
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise ModelError(
                f"the process of {self._name} ended with exit code {self._process.exitcode}: lower --masks"
            ) from None
        if isinstance(answer, MCRiseError):
            raise answer
        return answer


def bare_forward(model: Model, image: UInt8[np.ndarray, "H W 3"], spec: ExplainSpec, batch_size: int) -> None:
    """The model's answers to N images that are there already."""
    subject = Subject(model, image, spec)
    images = subject.blend(draw(spec, 0, min(batch_size, spec.masks)))
    answers = [
        launch(subject.function, images[: min(batch_size, spec.masks - start)])
        for start in range(0, spec.masks, batch_size)
    ]
    for answer in answers:
        answer.read()


def _serve(connection: Connection, contender: Contender) -> None:
    torch.set_num_threads(contender.threads)
    if contender.keeps_freed:
        keep_freed()
    try:
        model: Model | MCRiseError = load_model(contender.model)
    except MCRiseError as error:
        model = error
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        try:
            answer = model if isinstance(model, MCRiseError) else _TASKS[what](model, contender)
        except MCRiseError as error:
            answer = error
        connection.send(answer)


def _explain(model: Model, contender: Contender) -> None:
    image, spec = contender.image, contender.spec
    if contender.name == "ours":
        explain(model, image, 0, spec, batch_size=contender.batch_size)
    elif contender.name == "xaitk":
        xaitk_mc_rise(model, model.classes, image, spec)
    else:
        subject = Subject(model, image, spec)
        rise_as_published(subject.function, subject.image, draw(spec, 0, spec.masks), spec.p_mask)


def _memory(model: Model, contender: Contender) -> int:
    size = contender.batch_size if contender.name == "ours" else BATCH_SIZE
    forget_peak()
    few = contender.spec.model_copy(update={"masks": 2 * size})
    bare_forward(model, contender.image, few, size)
    bare = peak_memory()
    forget_peak()
    _explain(model, contender)
    return max(0, peak_memory() - bare)


_TASKS: dict[str, Callable[[Model, Contender], object]] = {"explain": _explain, "memory": _memory}
