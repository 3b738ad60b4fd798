"""Traffic signs drawn from nothing but polygons, so that the demo owes no picture to anybody.

Axes: sign coordinates run over [-1, 1] x [-1, 1], x to the right and y down; images are `(row, column, RGB)`.
The classes and their order are those of GTSRB (Stallkamp et al. 2012), so real crops may join the training.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

BLACK: Final[Colour] = (22, 22, 24)
WHITE: Final[Colour] = (244, 244, 240)
GREY: Final[Colour] = (128, 130, 130)
VARIANTS: Final = 12
_SUPERSAMPLING: Final = 3
_STROKES: Final = (0, 7, 10)


@dataclass(frozen=True)
class _Paint:
    """Colours and lettering that differ from maker to maker and with age."""

    red: Colour
    blue: Colour
    yellow: Colour
    font: int

    @staticmethod
    def of(variant: int) -> "_Paint":
        rng = np.random.default_rng((7, variant))

        def near(colour: Colour) -> Colour:
            r, g, b = (int(np.clip(c + rng.normal(0, 10), 0, 255)) for c in colour)
            return r, g, b

        return _Paint(near((194, 24, 34)), near((20, 84, 172)), near((248, 192, 24)), variant % 3)


class _Pen:
    """Draws in sign coordinates on a transparent square."""

    def __init__(self, pixels: int, paint: _Paint) -> None:
        self.image = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
        self.paint = paint
        self._draw = ImageDraw.Draw(self.image)
        self._half = pixels / 2

    def _at(self, points: Sequence[Point]) -> list[Point]:
        return [((x + 1) * self._half, (y + 1) * self._half) for x, y in points]

    def polygon(self, colour: Colour, *points: Point) -> None:
        self._draw.polygon(self._at(points), fill=colour)

    def disc(self, colour: Colour, radius: float, centre: Point = (0, 0)) -> None:
        x, y = centre
        self._draw.ellipse(self._at([(x - radius, y - radius), (x + radius, y + radius)]), fill=colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        self.polygon(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        self._draw.line(self._at(points), fill=colour, width=round(width * self._half), joint="curve")
        for point in points:
            self.disc(colour, width / 2, point)

    def arc(self, colour: Colour, radius: float, width: float, span: Point, centre: Point = (0, 0)) -> None:
        x, y = centre
        bounds = self._at([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.arc(bounds, *span, fill=colour, width=round(width * self._half))

    def arrowhead(self, colour: Colour, tip: Point, degrees: float, size: float) -> None:
        """A triangle that points to `degrees` (0 right, 90 down)."""
        angle = math.radians(degrees)
        forward, side = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
        base = (tip[0] - size * forward[0], tip[1] - size * forward[1])
        corners = [(base[0] + s * size * 0.7 * side[0], base[1] + s * size * 0.7 * side[1]) for s in (1, -1)]
        self.polygon(colour, tip, *corners)

    def text(self, colour: Colour, label: str, width: float, height: float) -> None:
        """Letters stretched to a centred box, as narrow road lettering is."""
        font = _font(self.paint.font)
        stroke = _STROKES[self.paint.font]
        left, top, right, bottom = font.getbbox(label, stroke_width=stroke)
        glyphs = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
        ImageDraw.Draw(glyphs).text((-left, -top), label, 255, font, stroke_width=stroke)
        box = (round(width * self._half), round(height * self._half))
        corner = (round(self._half - box[0] / 2), round(self._half - box[1] / 2))
        self.image.paste(colour, corner, glyphs.resize(box, Image.Resampling.LANCZOS))


@lru_cache(maxsize=3)
def _font(font: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if font == 0:
        bold = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
        return ImageFont.truetype(str(bold), 160)
    return ImageFont.load_default(160)


Draw = Callable[[_Pen], None]

# Plates: the outline of a sign, inside which a pictogram is drawn.


def _prohibition(pictogram: Draw, pen: _Pen) -> None:
    pen.disc(WHITE, 0.98)
    pen.disc(pen.paint.red, 0.95)
    pen.disc(WHITE, 0.72)
    pictogram(pen)


def _warning(pictogram: Draw, pen: _Pen) -> None:
    pen.line(WHITE, 0.16, (0, -0.82), (0.88, 0.72), (-0.88, 0.72), (0, -0.82))
    pen.polygon(WHITE, (0, -0.82), (0.88, 0.72), (-0.88, 0.72))
    pen.line(pen.paint.red, 0.12, (0, -0.82), (0.88, 0.72), (-0.88, 0.72), (0, -0.82))
    pen.polygon(pen.paint.red, (0, -0.82), (0.88, 0.72), (-0.88, 0.72))
    pen.polygon(WHITE, (0, -0.52), (0.66, 0.6), (-0.66, 0.6))
    pictogram(pen)


def _mandatory(pictogram: Draw, pen: _Pen) -> None:
    pen.disc(WHITE, 0.98)
    pen.disc(pen.paint.blue, 0.93)
    pictogram(pen)


def _end(pictogram: Draw, pen: _Pen) -> None:
    pen.disc(GREY, 0.98)
    pen.disc(WHITE, 0.94)
    pictogram(pen)
    for offset in (-0.24, -0.12, 0.0, 0.12, 0.24):
        pen.line(BLACK, 0.055, (-0.62 + offset, 0.62 + offset), (0.62 + offset, -0.62 + offset))


def _stop(pen: _Pen) -> None:
    for radius, colour in ((1.0, WHITE), (0.94, pen.paint.red)):
        turns = [math.radians(22.5 + 45 * i) for i in range(8)]
        pen.polygon(colour, *[(radius * math.cos(a), radius * math.sin(a)) for a in turns])
    pen.text(WHITE, "STOP", 1.5, 0.56)


def _yield(pen: _Pen) -> None:
    for width, colour in ((0.16, WHITE), (0.12, pen.paint.red)):
        corners = ((0, 0.82), (0.88, -0.72), (-0.88, -0.72))
        pen.line(colour, width, *corners, corners[0])
        pen.polygon(colour, *corners)
    pen.polygon(WHITE, (0, 0.46), (0.6, -0.58), (-0.6, -0.58))


def _priority_road(pen: _Pen) -> None:
    for reach, width, colour in ((0.85, 0.2, GREY), (0.84, 0.18, WHITE), (0.54, 0.1, pen.paint.yellow)):
        corners = ((0, -reach), (reach, 0), (0, reach), (-reach, 0))
        pen.line(colour, width, *corners, corners[0])
        pen.polygon(colour, *corners)


def _no_entry(pen: _Pen) -> None:
    pen.disc(WHITE, 0.98)
    pen.disc(pen.paint.red, 0.95)
    pen.box(WHITE, -0.72, -0.17, 0.72, 0.17)


# Pictograms.


def _nothing(_: _Pen) -> None:
    pass


def _number(label: str, colour: Colour, pen: _Pen) -> None:
    pen.text(colour, label, 1.12 if len(label) == 3 else 0.96, 0.66)


def _car(colour: Colour, x: float, pen: _Pen, y: float = 0.0, size: float = 1.0) -> None:
    def at(dx: float, dy: float) -> Point:
        return x + dx * size, y + dy * size

    pen.polygon(colour, at(-0.25, 0.14), at(-0.25, -0.04), at(0.25, -0.04), at(0.25, 0.14))
    pen.polygon(colour, at(-0.2, -0.04), at(-0.13, -0.23), at(0.13, -0.23), at(0.2, -0.04))
    pen.polygon(WHITE, at(-0.13, -0.05), at(-0.09, -0.17), at(0.09, -0.17), at(0.13, -0.05))
    for wheel in (-0.19, 0.19):
        pen.line(colour, 0.1 * size, at(wheel, 0.14), at(wheel, 0.2))


def _truck(colour: Colour, x: float, pen: _Pen) -> None:
    pen.box(colour, x - 0.34, -0.3, x + 0.1, 0.14)
    pen.box(colour, x + 0.13, -0.14, x + 0.34, 0.14)
    for wheel in (-0.2, 0.2):
        pen.disc(colour, 0.1, (x + wheel, 0.18))


def _overtaking(left: Colour | None, right: Colour, pen: _Pen) -> None:
    _car(left or pen.paint.red, -0.29, pen)
    _car(right, 0.29, pen)


def _overtaking_truck(left: Colour | None, right: Colour, pen: _Pen) -> None:
    _truck(left or pen.paint.red, -0.24, pen)
    _car(right, 0.42, pen, 0.08, 0.8)


def _crossing(pen: _Pen) -> None:
    pen.line(BLACK, 0.08, (-0.28, 0.2), (0.28, 0.2))
    pen.line(BLACK, 0.15, (0, -0.02), (0, 0.46))
    pen.arrowhead(BLACK, (0, -0.34), -90, 0.32)


def _exclamation(pen: _Pen) -> None:
    pen.polygon(BLACK, (-0.11, -0.28), (0.11, -0.28), (0.05, 0.26), (-0.05, 0.26))
    pen.disc(BLACK, 0.1, (0, 0.43))


def _bend(side: int, pen: _Pen) -> None:
    pen.line(BLACK, 0.13, (-0.12 * side, 0.5), (-0.14 * side, 0.2), (-0.02 * side, 0.06), (0.1 * side, -0.02))
    pen.arrowhead(BLACK, (0.3 * side, -0.14), -32 if side > 0 else 212, 0.26)


def _double_bend(pen: _Pen) -> None:
    pen.line(BLACK, 0.12, (0.1, 0.52), (0.12, 0.34), (-0.1, 0.2), (-0.1, 0.08), (0.02, -0.04))
    pen.arrowhead(BLACK, (0.16, -0.22), -50, 0.24)


def _bumps(pen: _Pen) -> None:
    for x in (-0.2, 0.2):
        pen.disc(BLACK, 0.19, (x, 0.38))
    pen.box(BLACK, -0.48, 0.36, 0.48, 0.5)


def _slippery(pen: _Pen) -> None:
    _car(BLACK, 0.0, pen, 0.02)
    for x in (-0.14, 0.14):
        pen.line(BLACK, 0.07, (x, 0.26), (x + 0.1, 0.34), (x - 0.08, 0.42), (x + 0.04, 0.52))


def _narrows(pen: _Pen) -> None:
    pen.line(BLACK, 0.1, (-0.14, 0.52), (-0.14, -0.14))
    pen.line(BLACK, 0.1, (0.24, 0.52), (0.24, 0.28), (0.08, 0.1), (0.08, -0.14))


def _road_work(pen: _Pen) -> None:
    pen.disc(BLACK, 0.1, (0.04, -0.16))
    pen.line(BLACK, 0.12, (-0.02, 0.0), (-0.08, 0.2))
    pen.line(BLACK, 0.08, (-0.08, 0.2), (-0.22, 0.5))
    pen.line(BLACK, 0.08, (-0.08, 0.2), (0.06, 0.34), (0.04, 0.52))
    pen.line(BLACK, 0.06, (-0.02, 0.02), (0.16, 0.14))
    pen.line(BLACK, 0.05, (-0.16, 0.04), (0.26, 0.26))
    pen.polygon(BLACK, (0.16, 0.54), (0.34, 0.26), (0.54, 0.54))


def _lights(pen: _Pen) -> None:
    for y, colour in ((-0.18, pen.paint.red), (0.12, pen.paint.yellow), (0.42, (20, 140, 70))):
        pen.disc(BLACK, 0.16, (0, y))
        pen.disc(colour, 0.13, (0, y))


def _walker(x: float, y: float, size: float, pen: _Pen) -> None:
    def at(dx: float, dy: float) -> Point:
        return x + dx * size, y + dy * size

    pen.disc(BLACK, 0.1 * size, at(0, -0.38))
    pen.line(BLACK, 0.13 * size, at(0, -0.2), at(0, 0.06))
    pen.line(BLACK, 0.08 * size, at(0, 0.06), at(-0.2, 0.42))
    pen.line(BLACK, 0.08 * size, at(0, 0.06), at(0.17, 0.42))
    pen.line(BLACK, 0.07 * size, at(-0.2, 0.04), at(0, -0.2), at(0.2, 0.02))


def _pedestrian(pen: _Pen) -> None:
    _walker(0, 0.12, 0.86, pen)
    for x in (-0.46, -0.24, 0.24, 0.46):
        pen.line(BLACK, 0.06, (x * 0.9, 0.46), (x * 1.05, 0.54))


def _children(pen: _Pen) -> None:
    _walker(-0.17, 0.2, 0.74, pen)
    _walker(0.22, 0.28, 0.58, pen)


def _bicycle(pen: _Pen) -> None:
    for x in (-0.27, 0.27):
        pen.arc(BLACK, 0.2, 0.06, (0, 360), (x, 0.34))
    pen.line(BLACK, 0.055, (-0.27, 0.34), (-0.12, 0.08), (0.18, 0.08), (0.0, 0.36), (-0.14, 0.02))
    pen.line(BLACK, 0.055, (0.27, 0.34), (0.15, -0.02), (0.24, -0.06))
    pen.line(BLACK, 0.055, (-0.2, 0.0), (-0.06, 0.0))


def _snowflake(pen: _Pen) -> None:
    for turn in range(6):
        angle = math.radians(90 + 60 * turn)
        x, y = math.cos(angle), math.sin(angle)
        pen.line(BLACK, 0.055, (0, 0.2), (0.34 * x, 0.2 + 0.34 * y))
        for side in (-1, 1):
            branch = angle + side * 0.7
            root = (0.18 * x, 0.2 + 0.18 * y)
            tip = (root[0] + 0.14 * math.cos(branch), root[1] + 0.14 * math.sin(branch))
            pen.line(BLACK, 0.045, root, tip)


def _deer(pen: _Pen) -> None:
    pen.polygon(BLACK, (-0.34, 0.2), (-0.1, 0.06), (0.16, 0.02), (0.2, 0.18), (-0.02, 0.26), (-0.28, 0.34))
    pen.line(BLACK, 0.07, (-0.28, 0.26), (-0.4, 0.36), (-0.36, 0.52))
    pen.line(BLACK, 0.06, (-0.2, 0.28), (-0.14, 0.52))
    pen.line(BLACK, 0.06, (0.14, 0.14), (0.34, 0.2), (0.36, 0.32))
    pen.line(BLACK, 0.1, (0.14, 0.08), (0.2, -0.1), (0.28, -0.08))
    pen.line(BLACK, 0.04, (0.18, -0.12), (0.08, -0.26), (0.12, -0.34))


def _ahead(pen: _Pen) -> None:
    pen.line(WHITE, 0.2, (0, 0.6), (0, -0.2))
    pen.arrowhead(WHITE, (0, -0.72), -90, 0.5)


def _turn(side: int, pen: _Pen) -> None:
    pen.line(WHITE, 0.2, (-0.34 * side, 0.56), (-0.34 * side, -0.1), (0.2 * side, -0.1))
    pen.arrowhead(WHITE, (0.68 * side, -0.1), 0 if side > 0 else 180, 0.48)


def _ahead_or(side: int, pen: _Pen) -> None:
    pen.line(WHITE, 0.17, (-0.24 * side, 0.62), (-0.24 * side, -0.3))
    pen.arrowhead(WHITE, (-0.24 * side, -0.76), -90, 0.4)
    pen.line(WHITE, 0.17, (-0.24 * side, 0.22), (0.28 * side, 0.22))
    pen.arrowhead(WHITE, (0.72 * side, 0.22), 0 if side > 0 else 180, 0.4)


def _keep(side: int, pen: _Pen) -> None:
    pen.line(WHITE, 0.2, (-0.42 * side, -0.46), (0.2 * side, 0.2))
    pen.arrowhead(WHITE, (0.54 * side, 0.56), 46 if side > 0 else 134, 0.54)


def _roundabout(pen: _Pen) -> None:
    for start in (0, 120, 240):
        pen.arc(WHITE, 0.6, 0.17, (start, start + 72))
        angle = math.radians(start + 112)
        tip = (0.52 * math.cos(angle), 0.52 * math.sin(angle))
        pen.arrowhead(WHITE, tip, start + 112 + 78, 0.36)


def _limit(kilometres: int) -> tuple[str, Draw]:
    return f"speed limit {kilometres}", partial(_prohibition, partial(_number, str(kilometres), BLACK))


SIGNS: Final[tuple[tuple[str, Draw], ...]] = (
    *map(_limit, (20, 30, 50, 60, 70, 80)),
    ("end of speed limit 80", partial(_end, partial(_number, "80", GREY))),
    *map(_limit, (100, 120)),
    ("no overtaking", partial(_prohibition, partial(_overtaking, None, BLACK))),
    ("no overtaking by trucks", partial(_prohibition, partial(_overtaking_truck, None, BLACK))),
    ("priority at next crossing", partial(_warning, _crossing)),
    ("priority road", _priority_road),
    ("yield", _yield),
    ("stop", _stop),
    ("no vehicles", partial(_prohibition, _nothing)),
    ("no trucks", partial(_prohibition, partial(_truck, BLACK, 0.0))),
    ("no entry", _no_entry),
    ("danger", partial(_warning, _exclamation)),
    ("bend to the left", partial(_warning, partial(_bend, -1))),
    ("bend to the right", partial(_warning, partial(_bend, 1))),
    ("double bend", partial(_warning, _double_bend)),
    ("bumpy road", partial(_warning, _bumps)),
    ("slippery road", partial(_warning, _slippery)),
    ("road narrows on the right", partial(_warning, _narrows)),
    ("road work", partial(_warning, _road_work)),
    ("traffic lights", partial(_warning, _lights)),
    ("pedestrians", partial(_warning, _pedestrian)),
    ("children", partial(_warning, _children)),
    ("bicycles", partial(_warning, _bicycle)),
    ("ice or snow", partial(_warning, _snowflake)),
    ("wild animals", partial(_warning, _deer)),
    ("end of all limits", partial(_end, _nothing)),
    ("turn right", partial(_mandatory, partial(_turn, 1))),
    ("turn left", partial(_mandatory, partial(_turn, -1))),
    ("ahead only", partial(_mandatory, _ahead)),
    ("ahead or right", partial(_mandatory, partial(_ahead_or, 1))),
    ("ahead or left", partial(_mandatory, partial(_ahead_or, -1))),
    ("keep right", partial(_mandatory, partial(_keep, 1))),
    ("keep left", partial(_mandatory, partial(_keep, -1))),
    ("roundabout", partial(_mandatory, _roundabout)),
    ("end of no overtaking", partial(_end, partial(_overtaking, GREY, GREY))),
    ("end of no overtaking by trucks", partial(_end, partial(_overtaking_truck, GREY, GREY))),
)
CLASSES: Final = tuple(name for name, _ in SIGNS)


@lru_cache(maxsize=len(SIGNS) * VARIANTS)
def plate(label: int, variant: int, pixels: int) -> Image.Image:
    """Draw the sign of class `label` face on, as RGBA with antialiased edges."""
    pen = _Pen(pixels * _SUPERSAMPLING, _Paint.of(variant))
    SIGNS[label][1](pen)
    return pen.image.reduce(_SUPERSAMPLING)
