"""Image and cells to masked images, in at most four channels whatever the number of fills.

The masked image `i'(y, x) = i(y, x) m_0(y, x) + sum_k c_k m_k(y, x)` (paper, section 4.2) needs only two
low-resolution images: `kept` (1 channel) and `colour` (3 channels), both looked up from the cells, because
the resize is linear: `i' = i * up(kept) + up(colour)`. With one fill `c`, `kept` says it all, in half the
time: `i' = c + (i - c) * up(kept)`. A network that wants its channels last in memory gets them so at once:
`kept` is then upsampled three times, which costs less than to rearrange the batch.

Axes: B masks of a batch; h, w cells; H, W pixels; K fills.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mcrise_ray.masks import Masks, upsampling_tables

# Upsampled channels of the masks that are blended at a time, in bytes: few enough to stay in a CPU's cache. A
# GPU has no such cache, and is better off with fewer and larger steps.
_STEP_CPU = 4 * 2**20
_STEP_GPU = 256 * 2**20


class Blender:
    """Masks one image, again and again, into buffers that it keeps.

    Args:
        image: `(3, H, W)`, in whatever space the model reads (RGB, or normalised: blending is affine and the
            coverages of a pixel sum to one, so the two commute).
        palette: `(K, 3)` fills in the same space.
        grid: (h, w).
        channels_last: how the batches lie in memory; their values are the same.
    """

    def __init__(
        self,
        image: Float[Tensor, "3 H W"],
        palette: Float[Tensor, "K 3"],
        grid: tuple[int, int],
        *,
        channels_last: bool = False,
    ) -> None:
        kept = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=image.dtype, device=image.device)
        channels_of_cell = torch.cat([kept, torch.nn.functional.pad(palette, (1, 0))])
        self._one_fill = len(palette) == 1
        self._channels_of_cell = channels_of_cell[:, :1] if self._one_fill else channels_of_cell
        height, width = image.shape[1:]
        self._size = height, width
        self._rows = image.new_tensor(upsampling_tables(grid[0], height))
        self._columns = image.new_tensor(upsampling_tables(grid[1], width)).mT.contiguous()
        self._channels_last = channels_last
        # The planes that are upsampled: kept and three of colour, or both with interleaved channels.
        self._image = image.permute(1, 2, 0).reshape(height, width * 3) if channels_last else image
        self._fill = palette[0].repeat(width) if channels_last else palette[0, :, None, None]
        channels = 1 if channels_last else 3
        planes = 1 if self._one_fill else 1 + channels
        plane_bytes = self._image.shape[-2] * self._image.shape[-1] * image.element_size()
        step = (_STEP_GPU if image.is_cuda else _STEP_CPU) // (planes * plane_bytes)
        self._upsampled = image.new_empty((max(1, step), planes, *self._image.shape[-2:]))
        self._batch = image.new_empty((0, channels, *self._image.shape[-2:]))

    def __call__(self, masks: Masks) -> Float[Tensor, "B 3 H W"]:
        """The masked images. The buffer is overwritten by the next call: fresh memory would cost more time
        than the blending does.
        """
        count = len(masks)
        if len(self._batch) < count:
            self._batch = self._batch.new_empty((count, *self._batch.shape[1:]))
        batch = self._batch[:count]
        shifts = _to_device(torch.from_numpy(masks.shifts(self._size)), batch.device)
        wide = self._widened(_to_device(torch.from_numpy(masks.cells), batch.device).long(), shifts[:, 1])
        rows = self._rows[shifts[:, 0], None]
        for start in range(0, count, len(self._upsampled)):
            part = slice(start, min(start + len(self._upsampled), count))
            up = torch.matmul(rows[part], wide[part], out=self._upsampled[: part.stop - part.start])
            if self._one_fill:
                torch.lerp(self._fill, self._image, up, out=batch[part])
            else:
                torch.addcmul(up[:, 1:], self._image, up[:, :1], out=batch[part])
        if self._channels_last:
            return batch.view(count, *self._size, 3).permute(0, 3, 1, 2)
        return batch

    def _widened(
        self, cells: Int64[Tensor, "B h w"], shifts: Int64[Tensor, " B"]
    ) -> Float[Tensor, "B planes h width"]:
        """The low-resolution planes at full width; with interleaved channels, the width is 3 W."""
        count, h, w = cells.shape
        low = self._channels_of_cell[cells].permute(0, 3, 1, 2).reshape(count, -1, w)
        wide = torch.bmm(low, self._columns[shifts]).view(count, -1, h, self._size[1])
        if not self._channels_last:
            return wide
        kept, colour = wide[:, :1].expand(-1, 3, -1, -1), wide[:, 1:]
        planes = torch.stack([kept] if self._one_fill else [kept, colour], dim=1)
        return planes.permute(0, 1, 3, 4, 2).reshape(count, planes.shape[1], h, -1)


def _to_device(array: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU fetches by itself: from memory that is not pinned it would wait for the stream."""
    return array if device.type == "cpu" else array.pin_memory().to(device, non_blocking=True)
