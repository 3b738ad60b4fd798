"""Figures say what is in the maps, whatever the names, the shape of the image and what is not known."""

from __future__ import annotations

import io
import warnings
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from mcrise_ray import render

COLORS = ("#ff0000", "#000000")


def row(title: str = "query", size: tuple[int, int] = (8, 8), method: str = "mc-rise") -> render.FigureRow:
    maps = np.linspace(-1, 1, 2 * size[0] * size[1], dtype=np.float32).reshape(2, *size)
    return render.FigureRow(title, method, COLORS, maps if method == "mc-rise" else maps[:1], 0.1)


def drawn(*rows: render.FigureRow) -> Figure:
    figure = render.draw(np.zeros((*rows[0].maps.shape[1:], 3), np.uint8), rows)
    figure.canvas.draw()
    return figure


def heats(figure: Figure) -> list[np.ndarray]:
    """The maps as they are coloured, (H, W, RGBA)."""
    images = [axis.images[0] for axis in figure.axes if axis.images]
    return [np.asarray(image.to_rgba(image.get_array())) for image in images if image.get_array().ndim == 2]


@pytest.mark.parametrize("name", ["$5 or $10 bill", r"a$\no{ tex$"])
def test_names_are_no_formulas(name: str) -> None:
    assert drawn(row(name)).axes[0].get_title() == name
    assert not drawn(row(name)).axes[0].title.get_parse_math()


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["M" * 40, "CONSTRUCTION VEHICLES AND OTHER WORDS IN CAPITALS", "停止" * 20])
def test_titles_are_no_wider_than_their_picture(name: str) -> None:
    figure = drawn(row(name))
    width = figure.axes[0].title.get_window_extent().width
    assert 0.6 * figure.dpi < width < 1.7 * figure.dpi
    assert figure.axes[0].get_title().count("\n") == 1


@pytest.mark.parametrize("method", ["mc-rise", "rise"])
def test_what_the_model_never_saw_is_not_shown_as_if_it_did_not_matter(method: str) -> None:
    some = row(method=method)
    some.maps[:, :, :3] = np.nan
    figure = drawn(some)
    for heat in heats(figure):
        assert np.all(heat[:, :3] == to_rgba("0.6"))
        assert not np.any(np.all(heat[:, 3:] == to_rgba("0.6"), axis=-1))
    assert figure.get_supxlabel() == "grey: cut off before the model sees it"
    assert drawn(row(method=method)).get_supxlabel() == ""


@pytest.mark.parametrize("method", ["mc-rise", "rise"])
def test_a_map_of_which_nothing_was_seen_is_drawn(method: str) -> None:
    """As of an image of two pixels, whose centres a crop cuts off."""
    none = row(method=method)
    none.maps[:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(np.all(heat == to_rgba("0.6")) for heat in heats(drawn(none)))


def test_what_bars_mean_fits_beside_them_whatever_the_shape_of_the_image() -> None:
    for size in ((2, 100), (10, 40), (40, 10)):
        figure = drawn(*[row(size=size)] * 3)
        labels = [axis.yaxis.label for axis in figure.axes if axis.get_ylabel()]
        spans = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in labels))
        assert spans[0][0] >= 0
        assert spans[-1][1] <= figure.bbox.height
        assert all(below[1] < above[0] for below, above in pairwise(spans))


def test_a_figure_is_no_higher_than_programs_show() -> None:
    figure = render.draw(np.zeros((100, 2, 3), np.uint8), [row(size=(100, 2))] * 12)
    with Image.open(io.BytesIO(render.to_png(figure))) as picture:
        assert picture.height <= 2**14
