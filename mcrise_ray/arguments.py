"""How commands read what they are given, and tell what is wrong with it in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of ours as one line and exit code 2; a bug keeps its traceback."""
    from mcrise_ray.errors import MCRiseError

    try:
        yield
    except MCRiseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def pair(option: str, text: str) -> tuple[int, int]:
    """Two whole numbers, as in 96x96."""
    from mcrise_ray.errors import SpecError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise SpecError(f"{option}: expected two whole numbers such as 96x96, found {text!r}")
    return int(parts[0]), int(parts[1])


def triple(option: str, text: str) -> tuple[float, ...]:
    """Three numbers, as in 0.5,0.5,0.5."""
    from mcrise_ray.errors import SpecError

    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise SpecError(f"{option}: expected three numbers such as 0.485,0.456,0.406, found {text!r}")
    return values


def key_value(argument: str) -> tuple[str, str]:
    """KEY=VALUE."""
    from mcrise_ray.errors import SpecError

    key, separator, value = argument.partition("=")
    if not separator or not key.isidentifier():
        raise SpecError(f"--model-arg: expected KEY=VALUE, found {argument!r}")
    return key, value


def label(argument: str) -> tuple[str, str]:
    """KEY=VALUE, where the key may be as ray.io/node-group."""
    from mcrise_ray.errors import SpecError

    key, separator, value = argument.partition("=")
    if not separator or not key or not value:
        raise SpecError(
            f"--label-selector: expected KEY=VALUE such as ray.io/accelerator-type=A100, found {argument!r}"
        )
    return key, value


def actor_count(text: str) -> int | str | dict[str, int]:
    """What `--actors` means: `auto`, a number, or the range 2-8."""
    from mcrise_ray.errors import SpecError

    least, dash, most = text.partition("-")
    if text == "auto":
        return text
    if dash and least.isdigit() and most.isdigit():
        return {"min": int(least), "max": int(most)}
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text == "0":
        raise SpecError(
            "--actors: expected 1 or more on Ray, found 0; mcrise explain, and a job file with actors: 0, "
            "work without it"
        )
    raise SpecError(f"--actors: expected auto, a number, or a range such as 2-8, found {text!r}")
