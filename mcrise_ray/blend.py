"""Image and cells to masked images, in four channels whatever the number of fills.

The masked image `i'(y, x) = i(y, x) m_0(y, x) + sum_k c_k m_k(y, x)` (paper, section 4.2) needs only two
low-resolution images: `kept` (1 channel) and `colour` (3 channels), both looked up from the cells, because
the resize is linear: `i' = i * up(kept) + up(colour)`.

Axes: B masks of a batch; h, w cells; H, W pixels; K fills.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mcrise_ray.masks import Masks, upsampling_tables

# Masks blended at a time: few enough that the four upsampled channels stay in a CPU's cache.
_CHUNK = 16


class Blender:
    """Masks one image, again and again, into buffers that it keeps.

    Args:
        image: `(3, H, W)`, in whatever space the model reads (RGB, or normalised: blending is affine and the
            coverages of a pixel sum to one, so the two commute).
        palette: `(K, 3)` fills in the same space.
        grid: (h, w).
    """

    def __init__(
        self, image: Float[Tensor, "3 H W"], palette: Float[Tensor, "K 3"], grid: tuple[int, int]
    ) -> None:
        self._image = image
        kept = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=image.dtype, device=image.device)
        self._channels_of_cell = torch.cat([kept, torch.nn.functional.pad(palette, (1, 0))])
        height, width = image.shape[1:]
        self._rows = torch.tensor(upsampling_tables(grid[0], height)).to(image)
        self._columns = torch.tensor(upsampling_tables(grid[1], width)).to(image).mT.contiguous()
        self._upsampled = image.new_empty((_CHUNK, 4, height, width))
        self._batch = image.new_empty((0, 3, height, width))

    def __call__(self, masks: Masks) -> Float[Tensor, "B 3 H W"]:
        """The masked images. The buffer is overwritten by the next call: fresh memory would cost more time
        than the blending does.
        """
        image, device = self._image, self._image.device
        count, (height, width) = len(masks), self._image.shape[1:]
        if len(self._batch) < count:
            self._batch = image.new_empty((count, 3, height, width))
        batch = self._batch[:count]
        shifts = torch.from_numpy(masks.shifts((height, width))).to(device)
        cells = torch.from_numpy(masks.cells).to(device, torch.int64)
        low = self._channels_of_cell[cells].permute(0, 3, 1, 2).contiguous()
        h, w = low.shape[2:]
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            size = part.stop - part.start
            wide = torch.bmm(low[part].view(size, 4 * h, w), self._columns[shifts[part, 1]])
            up = torch.matmul(
                self._rows[shifts[part, 0]][:, None],
                wide.view(size, 4, h, width),
                out=self._upsampled[:size],
            )
            torch.addcmul(up[:, 1:], image, up[:, :1], out=batch[part])
        return batch
