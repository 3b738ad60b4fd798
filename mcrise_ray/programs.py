"""Networks that come as a file with their own program: torch.export (`.pt2`) and ONNX."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mcrise_ray.errors import ModelError
from mcrise_ray.layout import Layout, in_parts
from mcrise_ray.loading import Loaded, ModelSpec, first_line, optional, options_of
from mcrise_ray.normalisation import without_normalisation
from mcrise_ray.preprocess import Triple
from mcrise_ray.sessions import Converted, open_session


class ExportedProgram(nn.Module):
    """A program of torch.export, asked in batches of the sizes that it was exported for.

    Args:
        program: takes `(B, 3, H, W)`.
        least, most: images that it takes at once; `most` may be None.
        mean, std: of a normalisation that was part of it, and is left to who asks.
    """

    def __init__(self, program: nn.Module, least: int, most: int | None, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.program, self.least, self.most = program, least, most
        self.mean, self.std = mean, std

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Tensor:
        """The program's output."""
        return in_parts(self._ask, images, least=self.least, most=self.most)

    def _ask(self, images: Tensor) -> Tensor:
        # Strides are part of some programs, and the images may be a view.
        output: Any = self.program(images.contiguous())
        if isinstance(output, tuple | list) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor):
            raise ModelError(
                f"expected a program that returns one tensor (B, classes), found {type(output).__name__}; "
                "export one that picks the tensor"
            )
        return output


def load_exported(spec: ModelSpec, device: torch.device) -> Loaded:
    """`FILE.pt2`: a program saved by `torch.export.save`.

    `torch.export.load` unpickles some parts of a file; such parts are refused first. The program itself is
    code all the same, as a factory's is: load programs that you trust.
    """
    path, _ = options_of(spec.model, ())
    _refuse_pickles(path)
    try:
        exported = torch.export.load(path)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, device)
        program = exported.module()
    except Exception as error:
        raise ModelError(
            f"cannot load --model {path} on {device}: {first_line(error)}; "
            "expected a file of torch.export.save"
        ) from error
    names = exported.graph_signature.user_inputs
    inputs = [
        node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in names
    ]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise ModelError(
            f"expected a program of one tensor (B, 3, H, W) in {path}, found {len(inputs)} inputs"
        )
    if inputs[0].dtype != torch.float32:
        raise ModelError(f"expected a program of float32 images in {path}, found {inputs[0].dtype}")
    layout = Layout.of(inputs[0].shape, "FP32", f"the program in {path}")
    if layout.channels_last:
        raise ModelError(f"expected a program of images (B, 3, H, W) in {path}, found (B, H, W, 3)")
    least, most = _batch_range(exported, inputs[0])
    mean, std = without_normalisation(program)
    return Loaded(ExportedProgram(program, least, most, mean, std), layout.preprocessing(), device)


def load_onnx(spec: ModelSpec, device: torch.device) -> Loaded:
    """`FILE.onnx[?output=NAME]`, on ONNX Runtime; with its CUDA provider where there is one."""
    path, options = options_of(spec.model, ("output",))
    if not Path(path).is_file():
        raise ModelError(f"expected an ONNX model, found nothing at {path}; check --model")
    onnxruntime = optional("onnxruntime", "onnx")
    on_gpu = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device.type != "cpu" and not on_gpu and spec.device is not None:
        raise ModelError(
            f"expected a device of ONNX Runtime, which has no CUDA here, found {device}; "
            "say --device cpu, or install onnxruntime-gpu"
        )
    cuda = (("CUDAExecutionProvider", {"device_id": device.index or 0}),) if on_gpu else ()
    try:
        session = open_session(path, cuda)
    except Exception as error:
        raise ModelError(
            f"cannot load --model {path}: {first_line(error)}; expected an ONNX model"
        ) from error
    if len(session.get_inputs()) != 1:
        have = [tensor.name for tensor in session.get_inputs()]
        raise ModelError(f"expected a model of one input in {path}, found {have}")
    given = session.get_inputs()[0]
    layout = Layout.of(given.shape, given.type, f"input {given.name!r} of {path}")
    ask = _onnx_function(session, given.name, _onnx_output(session, options.get("output"), path), layout)

    def network(images: Tensor) -> Tensor:
        return in_parts(ask, images, least=1, most=layout.batch)

    return Loaded(network, layout.preprocessing(), device if on_gpu else torch.device("cpu"))


def converted(network: nn.Module, size: tuple[int, int], batch_size: int) -> Converted:
    """A network on the CPU as ONNX Runtime runs it there; an exported program in batches of its sizes.

    Raises:
        ModelError: ONNX Runtime or what exports to it is not installed. Whatever export raises passes
            through.
    """
    if isinstance(network, ExportedProgram):
        return Converted(network.program, size, batch_size, network.least, network.most)
    return Converted(network, size, batch_size)


def _onnx_function(session: Any, name: str, output: str, layout: Layout) -> Callable[[Tensor], Tensor]:
    def ask(images: Tensor) -> Tensor:
        (scores,) = session.run([output], {name: layout.pack(images)})
        return torch.from_numpy(np.asarray(scores, np.float32))[: len(images)]

    return ask


def _onnx_output(session: Any, asked: str | None, path: str) -> str:
    have = [tensor.name for tensor in session.get_outputs()]
    if asked in have:
        return str(asked)
    if asked is None and len(have) == 1:
        return str(have[0])
    raise ModelError(
        f"expected one of the outputs {', '.join(have)} of {path}, found {asked}; use ?output=NAME"
    )


def _batch_range(exported: Any, images: Tensor) -> tuple[int, int | None]:
    """The fewest and the most images that a program takes at once."""
    size = images.shape[0]
    if isinstance(size, int):
        return size, size
    bounds = exported.range_constraints.get(size.node.expr)
    if bounds is None:
        return 1, None
    most = int(bounds.upper) if bounds.upper.is_Integer else None
    return max(1, int(bounds.lower)), most


def _refuse_pickles(path: str) -> None:
    """Raise `ModelError` for an archive of which `torch.export.load` would unpickle something."""
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _pickle_in(archive)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"cannot read --model {path}: {first_line(error)}; expected a file of torch.export.save"
        ) from error
    if problem:
        raise ModelError(
            f"expected a program without pickled code in {path}, found {problem}, which is never run; "
            "export it again with torch.export.save of torch 2.9 or later"
        )


def _pickle_in(archive: zipfile.ZipFile) -> str | None:
    """What `torch.export.load` would unpickle in full or run as machine code, or None."""
    files = archive.namelist()
    root = files[0].partition("/")[0] if files else ""
    # One root and no name twice: nothing that torch's own reader of archives could see otherwise.
    alike = len(set(files)) == len(files) and all(name.startswith(f"{root}/") for name in files)
    if not alike or f"{root}/archive_format" not in files:
        return "an archive of another or older format"
    found = (_pickle_at(archive, name, name.removeprefix(f"{root}/")) for name in files)
    return next((problem for problem in found if problem), None)


def _pickle_at(archive: zipfile.ZipFile, name: str, inner: str) -> str | None:
    folder, _, file = inner.rpartition("/")
    if inner.startswith("data/aotinductor/"):
        return f"compiled code ({inner})"
    if folder in {"data/weights", "data/constants"} and file.endswith(".pt"):
        return f"pickled tensors ({inner})"
    if folder in {"data/weights", "data/constants"} and file.endswith("_config.json"):
        for key, entry in json.loads(archive.read(name))["config"].items():
            # Constants of any other name are objects, which have only their pickled form.
            if entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_")):
                return f"a pickled object ({key})"
    if folder == "data/sample_inputs" and archive.getinfo(name).file_size:
        try:
            torch.load(BytesIO(archive.read(name)), weights_only=True)
        except Exception:  # noqa: BLE001 - whatever the reason, torch would go on to unpickle it in full
            return f"pickled sample inputs ({inner})"
    return None
