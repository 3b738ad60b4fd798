"""Sessions of ONNX Runtime: of a file, and of a torch network that it runs faster than torch on a CPU."""

from __future__ import annotations

import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mcrise_ray.loading import optional

_EXTRA = "onnx"
_EXAMPLE = 2  # images that a network is exported with: of a batch of 1, export would take the size for fixed


def open_session(path: str, providers: tuple[Any, ...] = ()) -> Any:
    """An `onnxruntime.InferenceSession` on as many threads as torch has, on the CPU behind any `providers`.

    Raises:
        ModelError: ONNX Runtime is not installed. Whatever it raises itself passes through.
    """
    onnxruntime = optional("onnxruntime", _EXTRA)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
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
        batch: of images, where the network takes no other.

    Raises:
        ModelError: what it needs is not installed. Whatever export raises passes through.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], batch: int | None = None) -> None:
        optional("onnxscript", _EXTRA)
        example = torch.zeros(batch or _EXAMPLE, 3, *size)
        free = None if batch else ({0: torch.export.Dim.DYNAMIC},)
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
            self._session = open_session(path)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C"]:
        """What the network returns."""
        (scores,) = self._session.run(None, {self._input: images.contiguous().numpy()})
        return torch.from_numpy(scores)


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
