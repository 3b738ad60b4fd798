"""Which classes of an image are explained: what a user asks for, and what that means for one image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64
from pydantic import BeforeValidator

from mcrise_ray import files
from mcrise_ray.errors import TargetError
from mcrise_ray.images import ImageRef, ImageSource
from mcrise_ray.models import Model
from mcrise_ray.scores import check_targets
from mcrise_ray.tasks import Target

_WORD = re.compile(r"predicted|truth|manifest|top([1-9][0-9]*)")


def parse_targets(asked: Any) -> tuple[int | str, ...]:
    """What is asked for, as a tuple of class indices, class names and the words below.

    - `predicted`: the class of the highest score; `topN`: the N classes of the highest scores.
    - `truth`: the image's label. `manifest`: what its manifest asks for.

    They are joined by `+` (`predicted+truth`); a number in text is an index, any other text a class name, or
    a sum with one, which only the model's names can tell apart (see `choose_targets`).

    Raises:
        ValueError: nothing is asked for, or something that is neither number nor text.
    """
    parts: list[int | str] = []
    for target in asked if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]:
        if isinstance(target, bool) or not isinstance(target, int | str) or target == "":
            raise ValueError(
                f"expected predicted, truth, manifest, topN, a class index or a class name, found {target!r}"
            )
        if isinstance(target, str) and re.fullmatch(r"[+-]?[0-9]+", target):
            parts.append(int(target))
        elif isinstance(target, str) and all(_WORD.fullmatch(part) for part in target.split("+")):
            parts += target.split("+")
        else:
            parts.append(target)
    if not parts:
        raise ValueError("expected at least one target such as predicted, found none")
    return tuple(parts)


TargetChoice = Annotated[tuple[int | str, ...], BeforeValidator(parse_targets)]


def choose_targets(
    choice: Sequence[int | str], image: ImageRef, scores: Float64[np.ndarray, " C"], model: Model
) -> tuple[Target, ...]:
    """The targets of one image, each once, with the first reason for which it was chosen.

    Roles are `predicted`, `top2` and so on, `truth`, and `asked`.

    Raises:
        TargetError: the model has no such class, or the image has no label or no target of its own.
    """
    chosen: dict[int, str] = {}
    for part in _parts(choice, model):
        word = _word(part)
        if word is None:
            chosen.setdefault(model.class_index(part), "asked")
        elif part == "truth":
            if image.label is None:
                raise TargetError(
                    "expected a label for target 'truth', found none; give one in a manifest (column label), "
                    "or use imagefolder:FOLDER"
                )
            chosen.setdefault(_true_class(image, image.label, model, len(scores)), "truth")
        elif part == "manifest":
            if not image.targets:
                raise TargetError("expected a class in the manifest's column target, found none")
            for target in image.targets:
                chosen.setdefault(model.class_index(target), "asked")
        else:
            count = _count(word, len(scores))
            # Stable, so that equal scores come in the order of their classes, as argmax has it.
            for rank, index in enumerate(np.argsort(-scores, kind="stable")[:count], start=1):
                chosen.setdefault(int(index), "predicted" if rank == 1 else f"top{rank}")
    check_targets(list(chosen), len(scores))
    return tuple(
        Target(index, model.class_name(index), role, float(scores[index])) for index, role in chosen.items()
    )


def check_choice(choice: Sequence[int | str], model: Model) -> None:
    """Find out before the first image what would be wrong with the targets of all of them.

    Raises:
        TargetError: the model has no such class, or not so many.
    """
    for part in _parts(choice, model):
        word = _word(part)
        if word is None:
            check_targets([model.class_index(part)], model.classes)
        else:
            _count(word, model.classes)


def check_source(choice: Sequence[int | str], source: ImageSource) -> None:
    """Find out before the first image that none can have the label, or the targets of its own, asked for.

    Raises:
        TargetError: no source has them.
    """
    words = set(summands(choice))
    for word, column, advice in (
        ("truth", "label", "use imagefolder:FOLDER, or give a manifest with that column"),
        ("manifest", "target", "give a manifest with that column"),
    ):
        if word in words and not source.may_have(column):
            shown = ", ".join(map(files.shown, source.sources))
            raise TargetError(f"expected a {column} for target {word!r}, found none in {shown}; {advice}")


def summands(choice: Sequence[int | str]) -> list[int | str]:
    """What is asked for with all sums taken apart, also those that are the name of one class, which only a
    model can tell.
    """
    return [
        piece
        for part in choice
        for piece in (part.split("+") if isinstance(part, str) else [part])
        if piece != ""
    ]


def _word(part: int | str) -> re.Match[str] | None:
    return _WORD.fullmatch(part) if isinstance(part, str) else None


def _count(word: re.Match[str], classes: int) -> int:
    """N of `topN`."""
    count = int(word[1] or 1)
    if count > classes:
        raise TargetError(f"expected at most top{classes} (the model's classes), found {word[0]}")
    return count


def _parts(choice: Sequence[int | str], model: Model) -> Iterator[int | str]:
    """Sums with indices and names taken apart, but for a class whose name looks like one."""
    for part in choice:
        pieces = part.split("+") if isinstance(part, str) and part not in model.class_names else [part]
        yield from parse_targets(pieces) if all(pieces) and len(pieces) > 1 else [part]


def _true_class(image: ImageRef, label: int | str, model: Model, classes: int) -> int:
    """The index that a label has among the model's classes.

    The place of a class folder is that of its class only where every class has one, as in the data that the
    model was trained on, and none is called as a class is: names are certain, and do not go with places.
    """
    if image.class_folder is None:
        return model.class_index(label)
    if image.class_folder in model.class_names:
        return model.class_index(image.class_folder)
    named = next((name for name in image.class_folders if name in model.class_names), None)
    if named is not None:
        raise TargetError(
            f"expected a folder called as one of the model's classes, as {named!r} is, found "
            f"{image.class_folder!r}; rename it, or give labels in a manifest (column label)"
        )
    if len(image.class_folders) != classes:
        raise TargetError(
            f"expected a folder for each of the model's {classes} classes, whose places are the labels, or "
            f"folders called as its classes; found {len(image.class_folders)} folders, and "
            f"{image.class_folder!r} is no class name; see --classes, or give labels in a manifest "
            "(column label)"
        )
    return model.class_index(label)
