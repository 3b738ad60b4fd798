"""What is to be computed: the settings that decide every bit of a map, and nothing about where it runs.

Polarity is fixed here and nowhere else: `p_mask` is the probability that a cell is *masked*.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from mcrise_ray.errors import SpecError

Estimator = Literal["importance", "control-variate", "paper"]
Method = Literal["rise", "debiased-rise", "mc-rise"]

COLOR_NAMES = {
    "red": "#ff0000",
    "green": "#00ff00",
    "blue": "#0000ff",
    "white": "#ffffff",
    "black": "#000000",
    "cyan": "#00ffff",
    "magenta": "#ff00ff",
    "yellow": "#ffff00",
}
"""The named fills: those of the paper's section 5.1, then those that its appendix E adds."""

PALETTES = {"paper5": tuple(COLOR_NAMES.values())[:5], "paper8": tuple(COLOR_NAMES.values())}

MAX_FILLS = 255  # a cell is one byte: 0 = kept, k + 1 = masked with fill k
MAX_MASKS = 10**12
MAX_CELLS = 2**16
_MOST_MASKS = 100_000  # spent on a relative error where nobody says otherwise

_HEX_COLOR = re.compile(r"#[0-9a-f]{6}")


class StrictModel(BaseModel):
    """A frozen pydantic model whose constructor raises a `SpecError` of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecError(one_line(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: Any) -> Any:
        return {name: as_text(v) for name, v in values.items()} if isinstance(values, dict) else values


def as_text(value: Any) -> Any:
    """The text of a `pathlib.Path`; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def one_line(error: ValidationError) -> str:
    """Every problem of a validation error on one line: which field, what is wrong, what was found."""
    problems = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in {"value_error", "missing"} else f", found {problem['input']!r}"
        problems.append(f"{where}: {message}{found}" if where else message)
    return "; ".join(problems)


def parse_colors(colors: Any) -> tuple[str, ...]:
    """The fills that names of palettes and colours and `#rrggbb` mean: a list, or a string with commas."""
    if isinstance(colors, str):
        colors = colors.split(",")
    if not isinstance(colors, Iterable):
        # YAML takes what follows a # for a comment.
        raise ValueError(f"expected names of palettes or colours, and '#rrggbb' in quotes, found {colors!r}")
    fills: list[str] = []
    for color in colors:
        value = str(color).strip().lower()
        meant = PALETTES.get(value, (COLOR_NAMES.get(value, value),))
        if not _HEX_COLOR.fullmatch(meant[0]):
            known = ", ".join([*PALETTES, *COLOR_NAMES])
            raise ValueError(f"expected one of {known}, or #rrggbb, found {color!r}")
        fills += meant
    repeated = {fill for fill in fills if fills.count(fill) > 1}
    if repeated:
        raise ValueError(f"expected distinct fills, found {sorted(repeated)} more than once")
    if not 1 <= len(fills) <= MAX_FILLS:
        raise ValueError(f"expected 1 to {MAX_FILLS} fills, found {len(fills)}")
    return tuple(fills)


def color_name(color: str) -> str:
    """The common name of a `#rrggbb` fill, or the code itself where it has none."""
    return next((name for name, value in COLOR_NAMES.items() if value == color), color)


class ExplainSpec(StrictModel):
    """One explanation: method, masks, fills, seed. Two equal specs give the same maps.

    Args:
        method: `"mc-rise"` (eq. 9), `"debiased-rise"` (eq. 5) or `"rise"` (eq. 2).
        masks: N, the number of masks, 8000 by default; where a relative error is asked for, the most masks
            spent on it, 100,000 by default.
        grid: (h, w), rows and columns of the cell grid.
        p_mask: probability that a cell is masked, strictly between 0 and 1; 0.5 by default, and 0.1 in jobs
            of kind `reid`.
        colors: fills of MC-RISE: names of palettes and colours, `#rrggbb` codes. The two RISE methods
            have one black fill and refuse any other.
        seed: 0 to 2**64 - 1.
        estimator: `"paper"` is equation 9 to the letter. The others have the same expectation with far less
            noise: `"control-variate"` takes what can be predicted of a score out of the sums and puts it back
            exactly; `"importance"` also picks the masks that the model is asked about, where there are enough
            of them to learn from and scores are probabilities.
        relative_error: stop as soon as every map has it (see `Explanation.relative_error`).

    Raises:
        SpecError: a value is out of range; the message names the field.
    """

    method: Method = "mc-rise"
    masks: int = 8000
    grid: tuple[int, int] = (8, 8)
    p_mask: float = 0.5
    colors: tuple[str, ...] = PALETTES["paper5"]
    seed: int = 0
    estimator: Estimator = "importance"
    relative_error: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _room_for_a_relative_error(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("relative_error") is not None:
            return {"masks": _MOST_MASKS, **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _one_black_fill_for_rise(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") in ("rise", "debiased-rise"):
            return {"colors": ("#000000",), **values}
        return values

    @field_validator("colors", mode="before")
    @classmethod
    def _parse_colors(cls, colors: Any) -> tuple[str, ...]:
        return parse_colors(colors)

    @field_validator("masks")
    @classmethod
    def _check_masks(cls, masks: int) -> int:
        if not 1 <= masks <= MAX_MASKS:
            raise ValueError(f"expected 1 to {MAX_MASKS:,} masks, found {masks}")
        return masks

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: tuple[int, int]) -> tuple[int, int]:
        if min(grid) < 1 or grid[0] * grid[1] > MAX_CELLS:
            raise ValueError(
                f"expected at least 1 x 1 and at most {MAX_CELLS} cells, found {grid[0]} x {grid[1]}"
            )
        return grid

    @field_validator("p_mask")
    @classmethod
    def _check_p_mask(cls, p_mask: float) -> float:
        if not 1e-9 <= p_mask <= 1 - 1e-9:
            raise ValueError(
                "expected a probability that a cell is masked, at least 1e-9 away from 0 and from 1, found "
                f"{p_mask}"
            )
        return p_mask

    @field_validator("relative_error")
    @classmethod
    def _check_relative_error(cls, relative_error: float | None) -> float | None:
        if relative_error is not None and relative_error <= 0:
            raise ValueError(f"expected a number above 0, such as 0.1, found {relative_error}")
        return relative_error

    @field_validator("seed", mode="before")
    @classmethod
    def _seed_of_numpy(cls, seed: Any) -> Any:
        # pydantic takes no more than 2**63 - 1 of it.
        return int(seed) if isinstance(seed, Integral) else seed

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, seed: int) -> int:
        if not 0 <= seed < 2**64:
            raise ValueError(f"expected 0 to 2**64 - 1, found {seed}")
        return seed

    @model_validator(mode="after")
    def _check_fills(self) -> ExplainSpec:
        if self.method != "mc-rise" and self.colors != ("#000000",):
            raise ValueError(
                f"colors: {self.method} masks with black alone, found {', '.join(self.colors)}; "
                "leave colors out, or use method mc-rise"
            )
        return self

    @property
    def K(self) -> int:
        """Number of fills."""
        return len(self.colors)

    @property
    def palette(self) -> tuple[tuple[float, float, float], ...]:
        """The K fills as RGB in [0, 1]."""
        return tuple(tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in self.colors)  # type: ignore[misc]

    @property
    def hash(self) -> str:
        """Sixteen hex digits that differ whenever any setting differs, the same on every machine."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]
