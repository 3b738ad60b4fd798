"""Figures: the input, then one heat map per colour, as in the paper's figures 4 and 7."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import fill

import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from mcrise_ray.spec import color_name

# Neither end is one of the palettes' colours, so that a heat map is not mistaken for its fill.
_DIVERGING = "PuOr_r"
_SEQUENTIAL = "viridis"
_CUT_OFF = "0.6"  # grey: white would say that it does not matter

MOST_LINES = 12  # of a figure, one per target: more make pictures of which programs refuse to show the height

_TITLE_WIDTH = 30  # characters, where they are no wider than usual
_MORE = " ..."

# Inches.
_MOST_HEIGHT = 100.0  # of a figure, for the same reason
_CELL = 1.7  # width of a picture
_ABOVE = 0.7  # a picture
_LEAST_HEIGHT = 0.9  # of a picture's place: what the bar beside it means needs as much

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
    height = _ABOVE + max(_LEAST_HEIGHT, _CELL * image.shape[0] / image.shape[1])
    size = _CELL * columns + 1.0, min(height * len(rows), _MOST_HEIGHT)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, picture) in zip(line, _pictures(image, row), strict=False):
            axis.imshow(picture)
            axis.set_title(_in_lines(title, figure), fontsize=8, parse_math=False)
        norm = _scale(row)
        palette = colormaps[_SEQUENTIAL if row.method == "rise" else _DIVERGING].with_extremes(bad=_CUT_OFF)
        for axis, color, heat in zip(line[pictures:], row.colors, row.maps, strict=False):
            shown = axis.imshow(heat, cmap=palette, norm=norm)
            if color is not None:
                _swatch(axis, color, figure)
        error = row.relative_error
        known = error is not None and np.isfinite(error)
        note = f"\nrelative error {error:.2f}" if known else "\nrelative error unknown"
        bar = figure.colorbar(shown, ax=list(line), fraction=0.05, pad=0.01)
        bar.set_label(_wrap(row.meaning) + note, fontsize=6)
        bar.ax.tick_params(labelsize=6)
        bar.ax.yaxis.get_offset_text().set_fontsize(6)
    notes = [f"and {left_out} more targets, which are in maps/ alone"] * (left_out > 0)
    if any(np.isnan(row.maps).any() for row in rows):
        notes.append("grey: cut off before the model sees it")
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _in_lines(title: str, figure: Figure) -> str:
    """As wide as a picture; of class names that list every synonym, the beginning."""
    return "\n".join(_wrapped(line, figure) for line in title.splitlines())


def _wrapped(line: str, figure: Figure) -> str:
    """In at most two lines that fit above a picture: capitals and Chinese are wide."""
    measure = figure.canvas.get_renderer().get_text_width_height_descent  # type: ignore[attr-defined]
    for width in range(_TITLE_WIDTH, len(_MORE), -1):
        text = fill(line, width, max_lines=2, placeholder=_MORE)
        if all(
            measure(part, FontProperties(size=8), ismath=False)[0] < _CELL * figure.dpi
            for part in text.splitlines()
        ):
            break
    return text


def _pictures(image: UInt8[np.ndarray, "H W 3"], row: FigureRow) -> list[Picture]:
    return [(row.title, image), *([row.match] if row.match is not None else [])]


def _scale(row: FigureRow) -> Normalize:
    values = row.maps[~np.isnan(row.maps)]
    if row.method == "rise" and values.size:
        return Normalize(float(values.min()), float(values.max()))
    # A map of zeros still needs a scale with some width.
    limit = float(np.abs(values).max(initial=0)) or 1e-12
    return Normalize(-limit, limit)


def _swatch(axis: Axes, color: str, figure: Figure) -> None:
    """The colour and its name above a map."""
    axis.set_title(color_name(color), fontsize=8, pad=15)
    top = ScaledTranslation(0.5, 1, axis.transAxes)  # type: ignore[arg-type]  # takes any transform
    axis.add_patch(
        Rectangle(
            (-0.32, 0.03),
            0.64,
            0.14,
            transform=figure.dpi_scale_trans + top,
            clip_on=False,
            facecolor=color,
            edgecolor="0.4",
            lw=0.6,
        )
    )


def _wrap(text: str) -> str:
    head, _, tail = text.partition(" when ")
    return f"{head}\nwhen {tail}" if tail else text.replace(" where ", "\nwhere ")
