"""Jobs as files: from YAML, JSON or TOML to a `JobSpec`, and an example that is written from its fields.

Keys are those of `JobSpec` and of the models inside it. Paths start at the folder of the file.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mcrise_ray.access import refuse_secrets
from mcrise_ray.errors import SpecError
from mcrise_ray.files import is_url
from mcrise_ray.images import IMAGE_FOLDER
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.preprocess import Preprocessing
from mcrise_ray.servers import is_server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES: Final = (".yaml", ".yml", ".json", ".toml")

# Shown in the example where a field has no default.
_EXAMPLES: Final[dict[str, Any]] = {
    "images": ["images/"],
    "model.model": "torchvision:resnet50?weights=IMAGENET1K_V2",
    "output": "results",
    "reid.gallery": ["gallery/"],
}
_REQUIRED: Final = ("images", "model.model", "output")

# Commented out in the example, because their defaults depend on the kind of the job, on whether a relative
# error is asked for, and on the method.
_DEPENDING: Final = frozenset({"explain.p_mask", "explain.masks", "explain.colors"})

_LIKE: Final = 0.6  # of 1, how alike a wrong key and the right one are at least

# Fields that hold part of another model, as free mappings.
_PARTS: Final[dict[str, type[BaseModel]]] = {"model.preprocessing": Preprocessing}


def load_job(file: str | os.PathLike[str]) -> JobSpec:
    """The job that a file describes.

    Args:
        file: YAML, JSON or TOML, by its suffix.

    Raises:
        SpecError: it cannot be read, a key is unknown (the nearest right one is named) or twice there, or a
            value is wrong.
    """
    path = Path(file)
    try:
        return parse_job(_read(path), path.parent)
    except SpecError as error:
        raise SpecError(f"{file}: {error}") from error


def parse_job(values: Mapping[str, Any], folder: str | os.PathLike[str] = ".") -> JobSpec:
    """The job of a mapping with the keys of a job file.

    Args:
        values: nested mappings.
        folder: where relative paths start.

    Raises:
        SpecError: a key is unknown, a value is wrong, or one holds a password.
    """
    _refuse_unknown(values, JobSpec)
    missing = [path for path in _REQUIRED if not _is_given(values, path)]
    if missing:
        raise SpecError(f"expected {' and '.join(missing)}, found none; `mcrise job init` writes an example")
    refuse_secrets(values)
    job: JobSpec = _built(_resolved(values, Path(folder).absolute()), JobSpec, "")
    return job


def example_job() -> str:
    """A commented job file in YAML with every key at its default, written from the fields of `JobSpec`."""
    head = "# A job of mcrise. Paths start at the folder of this file; null means: not set.\n"
    return head + "\n".join(_example(JobSpec, "", 0)) + "\n"


def _read(path: Path) -> Mapping[str, Any]:
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise SpecError(f"expected a file with one of the suffixes {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
        if kind == ".json":
            values = json.loads(text, object_pairs_hook=_no_key_twice)
        elif kind == ".toml":
            values = tomllib.loads(text)
        else:
            values = yaml.load(text, _YamlLoader)
    except OSError as error:
        raise SpecError(f"cannot read it: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SpecError(f"expected {kind[1:].upper()}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SpecError(f"expected keys such as images, model and output, found {type(values).__name__}")
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise SpecError(f"expected each key once, found {next(n for n in names if names.count(n) > 1)} twice")
    return values


class _YamlLoader(yaml.SafeLoader):
    """YAML without the silent overwriting of a key by its second occurrence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SpecError(f"expected each key once, found {twice} twice, line {node.start_mark.line + 1}")
        values: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return values


def _section(field: FieldInfo, path: str) -> type[BaseModel] | None:
    """The model behind a field that holds one, may hold one, or holds part of one."""
    inside = (_model(kind) for kind in (field.annotation, *get_args(field.annotation)))
    return next((model for model in inside if model is not None), _PARTS.get(path))


def _whole_section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds one, or nothing."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    return _model(kinds[0]) if len(kinds) == 1 else None


def _model(kind: Any) -> type[BaseModel] | None:
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a job file, dotted."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        inner = _section(field, path)
        if inner is not None:
            yield from _keys(inner, f"{path}.")


def _refuse_unknown(values: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    for name, value in values.items():
        path = f"{prefix}{name}"
        field = model.model_fields.get(str(name))
        if field is None:
            raise SpecError(f"unknown key {path}; {_suggestion(str(name), model, prefix)}")
        inner = _section(field, path)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(value, inner, f"{path}.")
        elif (section := _model(field.annotation)) is not None:
            keys = f"keys such as {next(iter(section.model_fields))}"
            raise SpecError(f"{path}: expected {keys}, found {value!r}")


def _suggestion(name: str, model: type[BaseModel], prefix: str) -> str:
    """The right key nearest to a wrong one, wherever it belongs; of two as near, its own section's."""
    known: dict[str, str] = {}
    for path in (*(f"{prefix}{own}" for own in model.model_fields), *_keys(JobSpec)):
        known.setdefault(path.rpartition(".")[2], path)

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, key, name.lower()).ratio()

    nearest = max(known, key=likeness)  # the first among equals
    if likeness(nearest) < _LIKE:
        longer = (key for key in known if len(name) > 2 and name.lower() in key)
        nearest = next(longer, "")
    return f"did you mean {known[nearest]}" if nearest else f"expected one of {', '.join(model.model_fields)}"


def _built(values: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Any:
    """The model of some values, section by section, so that an error names the whole key."""
    done = dict(values)
    for name, field in model.model_fields.items():
        inner = _whole_section(field)
        if inner is not None and isinstance(done.get(name), Mapping):
            done[name] = _built(done[name], inner, f"{prefix}{name}.")
    try:
        return model(**done)
    except SpecError as error:
        raise SpecError(f"{prefix}{error}") from None


def _is_given(values: Mapping[str, Any], path: str) -> bool:
    name, _, rest = path.partition(".")
    value = values.get(name)
    return _is_given(value, rest) if rest and isinstance(value, Mapping) else value not in (None, "")


def _resolved(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same with every path made absolute."""
    done = dict(values)
    model = dict(done["model"])
    for name in ("weights", "classes"):
        if isinstance(model.get(name), str):
            model[name] = _absolute(model[name], folder)
    if isinstance(model.get("model"), str):
        model["model"] = _absolute_model(model["model"], folder)
    done["images"] = _absolute_sources(done["images"], folder)
    if isinstance(done["output"], str):
        done["output"] = _absolute(done["output"], folder)
    if isinstance(done.get("reid"), Mapping):
        done["reid"] = _resolved_reid(done["reid"], folder)
    return {**done, "model": model}


def _resolved_reid(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    done = dict(values)
    for name in ("gallery_store", "pairs"):
        if isinstance(done.get(name), str):
            done[name] = _absolute(done[name], folder)
    if "gallery" in done:
        done["gallery"] = _absolute_sources(done["gallery"], folder)
    return done


def _absolute(location: str, folder: Path) -> str:
    return location if is_url(location) else os.path.normpath(folder / os.path.expanduser(location))


def _absolute_sources(sources: Any, folder: Path) -> Any:
    """Of images: one or several; what is neither is left to be refused."""
    if isinstance(sources, list | tuple):
        return [_absolute_sources(source, folder) for source in sources]
    return _absolute_images(sources, folder) if isinstance(sources, str) else sources


def _absolute_images(source: str, folder: Path) -> str:
    if source.startswith(IMAGE_FOLDER):
        return IMAGE_FOLDER + _absolute(source.removeprefix(IMAGE_FOLDER), folder)
    if source.startswith("torchvision:"):
        return re.sub(r"([?&]root=)([^&]*)", lambda m: m[1] + _absolute(m[2], folder), source)
    return _absolute(source, folder)


def _absolute_model(model: str, folder: Path) -> str:
    name, mark, options = model.partition("?")
    if name.endswith((".pt2", ".onnx")) and not is_server(model):
        return _absolute(name, folder) + mark + options
    local = folder / name.removeprefix("hf:")
    if name.startswith("hf:") and local.is_dir():
        return f"hf:{os.path.normpath(local)}"
    return model


def _example(model: type[BaseModel], prefix: str, depth: int) -> Iterator[str]:
    margin = "  " * depth
    said = _documented(model)
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield ""
        for line in textwrap.wrap(said[name], width=100 - len(margin)):
            yield f"{margin}# {line}"
        inner = _model(field.annotation)
        if inner is not None:
            yield f"{margin}{name}:"
            yield from _example(inner, f"{path}.", depth + 1)
            continue
        value = _EXAMPLES[path] if field.is_required() else field.get_default(call_default_factory=True)
        yield f"{margin}{'# ' if path in _DEPENDING else ''}{name}: {json.dumps(value)}"
        part = _section(field, path)
        if part is not None:
            # Commented out, because a part that is given replaces the default, such as what the
            # model says of itself, or goes with another kind of job.
            lines = (line for line in _example(part, f"{path}.", 1) if line)
            yield from (f"{margin}# {line}" for line in lines)


def _documented(model: type[BaseModel]) -> dict[str, str]:
    """What the docstring says of each field, on one line each."""
    section = inspect.cleandoc(model.__doc__ or "").partition("Args:\n")[2]
    said: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        opening = re.match(r"    ([a-z][a-z_0-9, ]*): (.*)", line)
        if opening:
            names = opening[1].split(", ")
            said.update(dict.fromkeys(names, opening[2]))
        else:
            said.update({name: f"{said[name]} {line.strip()}".rstrip() for name in names})
    return said
