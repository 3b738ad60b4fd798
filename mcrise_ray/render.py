"""Figures: the input, then one heat map per colour, as in the paper's figures 4 and 7."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mcrise_ray.spec import color_name

# Neither end is one of the palettes' colours, so that a heat map is not mistaken for its fill.
_DIVERGING = "PuOr_r"
_SEQUENTIAL = "viridis"

MOST_LINES = 12  # of a figure, one per target: more make pictures of which programs refuse to show the height
_TITLE_WIDTH = 30  # characters

_MEANING = {
    "mc-rise": "change of the {score} when a pixel takes the colour",
    "debiased-rise": "change of the {score} when a pixel is retained",
    "rise": "mean {score} where a pixel is retained",
}


Picture = tuple[str, UInt8[np.ndarray, "h w 3"]]
"""A title and an image."""


class FigureRow:
    """One target of a figure: its title and its maps.

    Args:
        title: of the input.
        method, colors: of the maps.
        maps: one per colour for MC-RISE, a single one for the RISE methods.
        relative_error: None where unknown, as of a single mask.
        match: the gallery image whose similarity to the input is explained.
    """

    def __init__(
        self,
        title: str,
        method: str,
        colors: Sequence[str],
        maps: Float32[np.ndarray, "M H W"],
        relative_error: float | None,
        match: Picture | None = None,
    ) -> None:
        self.title, self.method, self.maps = title, method, maps
        self.relative_error, self.match = relative_error, match
        self.colors: tuple[str | None, ...] = tuple(colors) if method == "mc-rise" else (None,)

    @property
    def meaning(self) -> str:
        """What a value of the maps is."""
        return _MEANING[self.method].format(score="score" if self.match is None else "similarity")


def draw(image: UInt8[np.ndarray, "H W 3"], rows: Sequence[FigureRow]) -> Figure:
    """One line per target: input, match, maps under the swatch of their colour, one scale and bar a line.

    The scale of MC-RISE and debiased RISE is symmetric about zero; RISE, which has no zero, spans its range.
    Of very many targets the first are drawn, and the figure says how many are not.
    """
    left_out = max(0, len(rows) - MOST_LINES)
    rows = rows[:MOST_LINES]
    pictures = 1 + any(row.match is not None for row in rows)
    columns = pictures + max(len(row.maps) for row in rows)
    aspect = image.shape[0] / image.shape[1]
    cell = 1.7
    figure = Figure(figsize=(cell * columns + 1.0, (cell * aspect + 0.7) * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, picture) in zip(line, _pictures(image, row), strict=False):
            axis.imshow(picture)
            axis.set_title(_in_lines(title), fontsize=8)
        norm = _scale(row)
        palette = _SEQUENTIAL if row.method == "rise" else _DIVERGING
        for axis, color, heat in zip(line[pictures:], row.colors, row.maps, strict=False):
            shown = axis.imshow(heat, cmap=palette, norm=norm)
            if color is not None:
                _swatch(axis, color, aspect)
        error = row.relative_error
        known = error is not None and np.isfinite(error)
        note = f"\nrelative error {error:.2f}" if known else "\nrelative error unknown"
        bar = figure.colorbar(shown, ax=list(line), fraction=0.05, pad=0.01)
        bar.set_label(_wrap(row.meaning) + note, fontsize=6)
        bar.ax.tick_params(labelsize=6)
    if left_out:
        figure.supxlabel(f"and {left_out} more targets, which are in maps/ alone", fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _in_lines(title: str) -> str:
    """As wide as a picture; of class names that list every synonym, the beginning."""
    return "\n".join(fill(line, _TITLE_WIDTH, max_lines=2, placeholder=" ...") for line in title.splitlines())


def _pictures(image: UInt8[np.ndarray, "H W 3"], row: FigureRow) -> list[Picture]:
    return [(row.title, image), *([row.match] if row.match is not None else [])]


def _scale(row: FigureRow) -> Normalize:
    if row.method == "rise":
        return Normalize(float(np.nanmin(row.maps)), float(np.nanmax(row.maps)))
    # A map of zeros still needs a scale with some width.
    limit = float(np.nanmax(np.abs(row.maps))) or 1e-12
    return Normalize(-limit, limit)


def _swatch(axis: Axes, color: str, aspect: float) -> None:
    """The colour and its name above a map of that height over width."""
    axis.set_title(color_name(color), fontsize=8, pad=15)
    axis.add_patch(
        Rectangle(
            (0.3, 1 + 0.02 / aspect),
            0.4,
            0.09 / aspect,
            transform=axis.transAxes,
            clip_on=False,
            facecolor=color,
            edgecolor="0.4",
            lw=0.6,
        )
    )


def _wrap(text: str) -> str:
    head, _, tail = text.partition(" when ")
    return f"{head}\nwhen {tail}" if tail else text.replace(" where ", "\nwhere ")
