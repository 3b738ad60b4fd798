"""Sessions of ONNX Runtime: of a file, and of a torch network that it runs faster than torch on a CPU."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mcrise_ray.layout import in_parts
from mcrise_ray.loading import optional
from mcrise_ray.timing import speed_ratio

_EXTRA = "onnx"
_EXAMPLE = 2  # images that a network is exported with: of a batch of 1, export would take the size for fixed
_SMALLEST = 2  # images in a part of a batch: for a single one, some kernels round otherwise
_REPEATS = 5


def open_session(path: str, providers: tuple[Any, ...] = (), *, threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU behind any `providers`; on torch's number of threads where
    none is given.

    Raises:
        ModelError: ONNX Runtime is not installed. Whatever it raises itself passes through.
    """
    onnxruntime = optional("onnxruntime", _EXTRA)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or torch.get_num_threads()
    settings.inter_op_num_threads = 1
    # Threads that wait for work by spinning would keep torch's from blending the next batch.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(path, settings, providers=[*providers, "CPUExecutionProvider"])


def can_convert() -> bool:
    """What `Converted` needs is installed."""
    return all(find_spec(name) is not None for name in ("onnxruntime", "onnxscript"))


class Converted:
    """A torch network as ONNX Runtime runs it on the CPU, in float32.

    Args:
        network: takes `(B, 3, H, W)` and returns `(B, C)`, or an object that has that as `logits`.
        size: (H, W).
        batch_size: of whole batches.
        least, most: images that the network takes at once; `most` may be None.

    Raises:
        ModelError: what it needs is not installed. Whatever export raises passes through.
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        batch_size: int,
        least: int = 1,
        most: int | None = None,
    ) -> None:
        optional("onnxscript", _EXTRA)
        is_fixed = least == most
        example = torch.zeros(least if is_fixed else max(least, _EXAMPLE), 3, *size)
        free = None if is_fixed else ({0: torch.export.Dim.DYNAMIC},)
        # A file, because no message of protobuf holds 2 GiB; export warns of its own inner workings.
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = str(Path(folder) / "network.onnx")
            exported = torch.onnx.export(
                _Logits(network), (example,), dynamo=True, dynamic_shapes=free, verbose=False
            )
            if exported is None:
                raise AssertionError("torch.onnx.export returns a program where no file is named")
            exported.save(path)
            self._ask = _fastest(path, size, batch_size, least, most)

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """What the network returns."""
        return self._ask(images.contiguous())


class SideBySide:
    """Batches in parts of a few images, each of which is the work of one thread.

    Where all threads share the work on each layer for a whole batch, its activations leave the caches before
    the next layer reads them; those of a few images stay. Where weights are many and images small, larger
    parts are faster, because each reads all weights: how large is found by trial, in the first batches.

    Args:
        ask: runs on the thread that calls it, and gives an image the same bits in a part of any size.
        threads: how many call it.
        smallest: images of a part, where the batch has so many.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], threads: int, smallest: int) -> None:
        self._ask, self._threads, self._smallest = ask, threads, smallest
        self._pool = ThreadPoolExecutor(threads)
        self._part, self._settled = smallest, False

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """The answers for a batch, in its order."""
        while not self._settled and len(images) >= 2 * self._part * self._threads:
            self._try_larger(images)
        return self._in_parts(images, self._part)

    def _in_parts(self, images: Tensor, part: int) -> Tensor:
        busy = min(self._threads, len(images) // self._smallest)
        parts = images.tensor_split(max(1, busy, len(images) // part))
        return torch.cat(list(self._pool.map(self._ask, parts)))

    def _try_larger(self, images: Tensor) -> None:
        """Twice as many images in a part, where that is faster."""
        larger = 2 * self._part
        some = images[: larger * self._threads]
        now, then = (partial(self._in_parts, some, part) for part in (self._part, larger))
        # Which parts are fastest differs from worker to worker, and their bits must not.
        if torch.equal(now(), then()) and speed_ratio(now, then, _REPEATS) > 1:
            self._part = larger
        else:
            self._settled = True


def _fastest(
    path: str, size: tuple[int, int], batch_size: int, least: int, most: int | None
) -> Callable[[Tensor], Tensor]:
    """Parts side by side; where threads would be without work, or the bits of an image depend on those beside
    it, all threads on the whole batch.
    """
    threads, smallest = torch.get_num_threads(), max(least, _SMALLEST)
    if batch_size >= smallest * threads:
        ask = _function(path, 1, least, most)
        if least == most or _is_same_in_parts(ask, size, smallest):
            return SideBySide(ask, threads, smallest)
    return _function(path, threads, least, most)


def _is_same_in_parts(ask: Callable[[Tensor], Tensor], size: tuple[int, int], smallest: int) -> bool:
    images = torch.rand(2 * smallest, 3, *size, generator=torch.Generator().manual_seed(0))
    return torch.equal(ask(images), torch.cat([ask(part) for part in images.tensor_split(2)]))


def _function(path: str, threads: int, least: int, most: int | None) -> Callable[[Tensor], Tensor]:
    session = open_session(path, threads=threads)
    name = session.get_inputs()[0].name

    def ask(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        (scores,) = session.run(None, {name: images.numpy()})
        return torch.from_numpy(scores)

    return partial(in_parts, ask, least=least, most=most)


class _Logits(nn.Module):
    """A network's output as one tensor, as `mcrise_ray.scores.Classifier` takes it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.eval()  # of this module alone: the network is in inference mode, and not every one can be told
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        tensor: Tensor = getattr(output, "logits", output)
        return tensor
