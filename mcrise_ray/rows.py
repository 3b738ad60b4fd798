"""The rows of results, and how they become Parquet: columns for any tool that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32


@dataclass(frozen=True)
class MapRow:
    """One explained (image, target).

    Attributes:
        image_id, uri: of the image.
        height, width: of the map, which has the size of the model's input, or of the image where that was
            asked for; reshape a flat `map` by them and `colors`.
        target, target_name: class index, and its name where known.
        target_role: `predicted`, `top2` and so on, `truth` or `asked`.
        score: of the unmasked image.
        method, colors: the map's M channels are the colours for MC-RISE, a single one for the RISE methods.
        masks: N.
        relative_error: `rms(standard_error) / rms(map)`; null where that is no number (see `Explanation`).
        map: `(M, H, W)`.
        baseline: `(H, W)`.
        standard_error: `(M, H, W)`, or None unless asked for.
        seconds: of actors' time spent on the image.
        spec_hash: of the `ExplainSpec`.
    """

    image_id: str
    uri: str
    height: int
    width: int
    target: int
    target_name: str | None
    target_role: str
    score: float
    method: str
    colors: tuple[str, ...]
    masks: int
    relative_error: float | None
    map: Float32[np.ndarray, "M H W"]
    baseline: Float32[np.ndarray, "H W"]
    standard_error: Float32[np.ndarray, "M H W"] | None
    seconds: float
    spec_hash: str


@dataclass(frozen=True)
class MatchRow(MapRow):
    """One explained (query, match); of a ReID job.

    Attributes:
        target, target_name: place of the match among those of its query, and its `image_id`.
        target_role: `match` (the nearest), `top2` and so on, `correct`, `wrong` or `named`.
        score: `exp(-distance / d0)`.
        match_id, match_uri: `image_id` and `uri` of the match.
        distance: of the embeddings of the unmasked query and the match.
        d0: that the distances of masked queries are divided by.
        rank: 1 plus the number of gallery images that may match the query and are nearer.
        pid, camid, match_pid, match_camid: person and camera, where known.
    """

    match_id: str
    match_uri: str
    distance: float
    d0: float
    rank: int
    pid: int | None
    camid: int | None
    match_pid: int | None
    match_camid: int | None


@dataclass(frozen=True)
class ErrorRow:
    """One image that could not be explained: at which stage, and why.

    Stages are `list`, `read`, `explain`; of a ReID job also `embed` and `match`, and `gallery` for images of
    the gallery, whose `image_id` begins with `gallery:` there.
    """

    image_id: str
    uri: str
    stage: str
    error: str


ERROR_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "uri", "stage", "error")])


def map_schema(shape: tuple[int, int, int]) -> pa.Schema:
    """Schema of `maps/` for maps of shape `(M, H, W)`."""
    tensor = pa.fixed_shape_tensor(pa.float32(), shape)
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("target_name", pa.string()),
            pa.field("target_role", pa.string(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("method", pa.string(), nullable=False),
            pa.field("colors", pa.list_(pa.string()), nullable=False),
            pa.field("masks", pa.int64(), nullable=False),
            pa.field("relative_error", pa.float64()),
            pa.field("map", tensor, nullable=False),
            pa.field("baseline", pa.fixed_shape_tensor(pa.float32(), shape[1:]), nullable=False),
            pa.field("standard_error", tensor),
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("spec_hash", pa.string(), nullable=False),
        ]
    )


def match_schema(shape: tuple[int, int, int]) -> pa.Schema:
    """Schema of the `maps/` of a ReID job."""
    told = ("match_id", "match_uri", "distance", "d0", "rank")
    kinds = (pa.string(), pa.string(), pa.float64(), pa.float64(), pa.int64())
    people = ("pid", "camid", "match_pid", "match_camid")
    more = [pa.field(name, kind, nullable=False) for name, kind in zip(told, kinds, strict=True)]
    return pa.schema([*map_schema(shape), *more, *(pa.field(name, pa.int64()) for name in people)])


def map_table(rows: Sequence[MapRow]) -> pa.Table:
    """Rows of one kind whose maps have one shape."""
    schema = (match_schema if isinstance(rows[0], MatchRow) else map_schema)(rows[0].map.shape)
    columns = {
        name: _column(schema.field(name).type, [getattr(row, name) for row in rows]) for name in schema.names
    }
    return pa.table(columns, schema=schema)


def error_table(rows: Sequence[ErrorRow]) -> pa.Table:
    """Any rows."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=ERROR_SCHEMA)


def _column(kind: pa.DataType, values: list[Any]) -> pa.Array:
    if not isinstance(kind, pa.FixedShapeTensorType):
        return pa.array(values, type=kind)
    width = int(np.prod(kind.shape))
    flat = np.concatenate(
        [np.zeros(width, np.float32) if v is None else np.asarray(v, np.float32).ravel() for v in values]
    )
    missing = pa.array([value is None for value in values])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat), width, mask=missing)
    return pa.ExtensionArray.from_storage(kind, storage)
