"""What a ReID job is told of its gallery and of the matches to explain."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mcrise_ray.errors import SpecError
from mcrise_ray.matching import parse_matches
from mcrise_ray.reid import DistanceKind
from mcrise_ray.spec import StrictModel, as_text


def _one_or_more(sources: Any) -> Any:
    if isinstance(sources, list | tuple):
        return tuple(map(as_text, sources))
    return (sources,) if isinstance(sources, str) else sources


def _words(asked: Any) -> tuple[str, ...]:
    try:
        return parse_matches(asked)
    except SpecError as error:
        raise ValueError(str(error)) from None


Sources = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""Of images, see `ImageSource`; a single one may stand alone."""

MatchChoice = Annotated[tuple[str, ...], BeforeValidator(_words)]


class ReidSpec(StrictModel):
    """Which gallery images a query is explained against, and how their likeness is measured.

    Args:
        gallery: files, folders, manifests, shards: see `ImageSource`. People and cameras come from a
            manifest's columns `pid` and `camid`, or from names as in Market-1501.
        gallery_store: folder or URL of the gallery's embeddings, to be used again by other jobs; `gallery` in
            the output by default.
        matches: `"top1"`, `"top5"`, `"correct+wrong"` (the nearest image of the same and of another person),
            `"named"`; several matches share one pass.
        pairs: a CSV with the columns `query` and `match`, for `named`.
        d0: scale of the distance; by default that of the unmasked query to each match.
        distance: `"euclidean"` or `"cosine"`.
    """

    gallery: Sources
    gallery_store: str | None = None
    matches: MatchChoice = ("top1",)
    pairs: str | None = None
    d0: float | None = Field(default=None, gt=0)
    distance: DistanceKind = "euclidean"

    @field_validator("gallery")
    @classmethod
    def _check_gallery(cls, gallery: tuple[str, ...]) -> tuple[str, ...]:
        if not gallery:
            raise ValueError("expected at least one source of gallery images, found none")
        return gallery

    @model_validator(mode="after")
    def _check_pairs(self) -> ReidSpec:
        if ("named" in self.matches) != (self.pairs is not None):
            found = "pairs without it" if self.pairs is not None else "no pairs"
            raise ValueError(
                f"pairs (--pairs): expected a list together with the match 'named', found {found}"
            )
        return self
