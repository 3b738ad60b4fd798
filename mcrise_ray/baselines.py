"""What others do, to be measured against: RISE as it was published, and the MC-RISE of xaitk-saliency.

Axes: N masks; C classes; K fills; h, w cells; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from mcrise_ray.loading import optional
from mcrise_ray.masks import Masks, cell_size
from mcrise_ray.scores import BlackBox, ask, input_space
from mcrise_ray.spec import ExplainSpec

BATCH_SIZE = 100  # `gpu_batch` of the published code


def rise_as_published(
    function: BlackBox, image: Float[Tensor, "3 H W"], masks: Masks, p_mask: float
) -> Float32[np.ndarray, "C H W"]:
    """RISE (eq. 2) step by step as in the code of Petsiuk et al. (2018), without any shortcut.

    All masks are made first and held in float32, all masked images are made next, then the model is asked in
    batches, and one matrix product weights the masks by the scores of every class.

    Args:
        function: takes batches in the space of `image`.
        image: zero is the fill.
        masks: with one fill; ours, so that both sides mask alike.
        p_mask: probability that a cell is masked.

    Notes:
        Departs from the published code where that is slower for no reason of the algorithm: masks are drawn
        by us and resized by torch (the published resize mirrors at the border, within half a cell of it).
    """
    size = image.shape[1], image.shape[2]
    upsampled = _resized_masks(masks, size).to(image.device)
    stack = upsampled[:, None] * image
    scores = np.concatenate(
        [ask(function, stack[n : n + BATCH_SIZE]) for n in range(0, len(masks), BATCH_SIZE)]
    )
    weights = torch.from_numpy(scores).to(upsampled)
    saliency = weights.T @ upsampled.flatten(1) / len(masks) / (1 - p_mask)
    return saliency.view(-1, *size).cpu().numpy()


def _resized_masks(masks: Masks, size: tuple[int, int]) -> Float[Tensor, "N H W"]:
    """1 where kept: each grid resized to (h + 1, w + 1) cells and cropped at its shift."""
    grids = torch.from_numpy((masks.cells == 0).astype(np.float32))
    (h, w), (span_y, span_x) = masks.cells.shape[1:], cell_size(masks.cells.shape[1:], size)
    resized = torch.empty(len(masks), *size)
    for n, (sy, sx) in enumerate(masks.shifts(size).tolist()):
        whole = interpolate(grids[None, None, n], ((h + 1) * span_y, (w + 1) * span_x), mode="bilinear")[0, 0]
        resized[n] = whole[sy : sy + size[0], sx : sx + size[1]]
    return resized


def xaitk_mc_rise(
    black_box: BlackBox, classes: int, image: UInt8[np.ndarray, "H W 3"], spec: ExplainSpec
) -> Float64[np.ndarray, "K C H W"]:
    """MC-RISE of the package xaitk-saliency with the settings of the spec; its masks are its own.

    Args:
        black_box: takes RGB in [0, 1]; it is asked in batches as the published RISE code does.
        classes: C.
        image: at the size that the model reads.
        spec: of the masks; its grid must be square.

    Raises:
        ModelError: the package is not installed.
    """
    name = "xaitk_saliency.impls.gen_image_classifier_blackbox_sal.mc_rise"
    stack = optional(name, "bench").MCRISEStack(
        n=spec.masks,
        s=spec.grid[0],
        p1=1 - spec.p_mask,
        fill_colors=[[round(255 * value) for value in fill] for fill in spec.palette],
        seed=spec.seed,
    )
    saliency: np.ndarray = stack.generate(image, _as_smqtk(black_box, classes))
    return saliency


def _as_smqtk(black_box: BlackBox, classes: int) -> Any:
    """A black box behind the interface that xaitk-saliency asks."""
    device = input_space(black_box).device
    interface = optional("smqtk_classifier.interfaces.classify_image", "bench").ClassifyImage

    class Classify(interface):  # type: ignore[misc, valid-type]
        def get_labels(self) -> list[int]:
            return list(range(classes))

        def classify_images(self, images: Iterable[np.ndarray]) -> Iterator[dict[int, float]]:
            for batch in _batches(images):
                tensor = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2).float() / 255
                for scores in ask(black_box, tensor.contiguous()):
                    yield dict(enumerate(scores.tolist()))

        def get_config(self) -> dict[str, Any]:
            return {}

    return Classify()


def _batches(images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch
