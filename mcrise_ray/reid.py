"""How similar a query stays to its matches while it is masked: equation 21, as a black box.

Axes: B images of a batch; L matches; D dimensions of an embedding; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from mcrise_ray.errors import ModelError, SpecError, TargetError
from mcrise_ray.scores import BlackBox, InputSpace, ask, check_image, input_space
from mcrise_ray.spec import ExplainSpec

DistanceKind = Literal["euclidean", "cosine"]

P_MASK: Final = 0.1
"""The paper's p_mask for ReID (appendix D): with more, hardly anything of the person is left."""

_SAME: Final = 1e-3  # of the embeddings' norm: far above rounding, far below two frames of one person


def reid_spec(**settings: Any) -> ExplainSpec:
    """An `ExplainSpec` with the paper's p_mask for ReID where nothing else is said."""
    return ExplainSpec(**{"p_mask": P_MASK, **settings})


def distance(
    f: Float[np.ndarray, "*many D"], other: Float[np.ndarray, "*others D"], kind: DistanceKind = "euclidean"
) -> Float64[np.ndarray, "*broadcast"]:
    """d(f, f_match), in float64; the same pair gives the same bits in any company.

    Args:
        f: embeddings, broadcast against
        other: the others.
        kind: `"cosine"` is one minus the cosine; to an embedding of zeros it is 1.

    Raises:
        SpecError: there is no such kind.
    """
    if kind not in get_args(DistanceKind):
        raise SpecError(f"expected a distance of {' or '.join(get_args(DistanceKind))}, found {kind!r}")
    f, other = np.asarray(f, np.float64), np.asarray(other, np.float64)
    if kind == "euclidean":
        return np.asarray(np.sqrt(np.square(f - other).sum(axis=-1)))
    norms = np.sqrt(np.square(f).sum(axis=-1) * np.square(other).sum(axis=-1))
    cosine = (f * other).sum(axis=-1) / np.where(norms > 0, norms, 1.0)
    return np.asarray(np.maximum(1.0 - cosine, 0.0))


def embeddings_of(embedder: BlackBox, images: UInt8[np.ndarray, "B H W 3"]) -> Float64[np.ndarray, "B D"]:
    """The embeddings of unmasked images at the size that the embedder reads.

    Raises:
        ImageError: one of them is no uint8 RGB array `(H, W, 3)`, or of another size.
    """
    space = input_space(embedder)
    rgb = torch.from_numpy(np.stack([check_image(image, space.size) for image in images]))
    rgb = rgb.to(space.device, torch.float32).permute(0, 3, 1, 2) / 255
    return ask(space.function, space.normalize(rgb).contiguous(), kind="embeddings")


class Similarity:
    """Equation 21 for L matches at once: `exp(-d(f, f_match) / d0)`, from one embedding per image.

    Args:
        embedder: from RGB in [0, 1], `(B, 3, H, W)`, to embeddings `(B, D)`.
        matches: `f_match` of each match.
        d0: the scale of each match's distance.
        kind: of distance.
    """

    def __init__(
        self,
        embedder: BlackBox,
        matches: Float[np.ndarray, "L D"],
        d0: Float64[np.ndarray, " L"],
        kind: DistanceKind = "euclidean",
    ) -> None:
        self.embedder, self.matches, self.d0, self.kind = embedder, matches, d0, kind

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float64[Tensor, "B L"]:
        """Scores of RGB images in [0, 1]."""
        return self._scores(self.embedder, images)

    def input_space(self) -> InputSpace:
        """That of the embedder."""
        space = input_space(self.embedder)
        return replace(space, function=partial(self._scores, space.function))

    def _scores(self, function: BlackBox, images: Float[Tensor, "B 3 H W"]) -> Float64[Tensor, "B L"]:
        # Embeddings are checked before the exponential: it would turn an infinite one into a fine zero.
        embeddings = ask(function, images, kind="embeddings")
        columns = [distance(embeddings, match, self.kind) for match in self.matches]
        return torch.from_numpy(np.exp(-np.stack(columns, axis=1) / self.d0))


def similarity(
    embedder: BlackBox,
    query: Float[np.ndarray, " D"],
    matches: Float[np.ndarray, "L _"],
    *,
    d0: float | None = None,
    kind: DistanceKind = "euclidean",
    names: Sequence[str] = (),
) -> Similarity:
    """The black box that explains why a query is like its matches.

    Args:
        embedder: see `Similarity`.
        query: the embedding of the unmasked query, from `embeddings_of()`.
        matches: embeddings of the matches, by the same embedder.
        d0: one scale for all matches; by default each match's distance to the unmasked query, whose score
            is then exp(-1).
        kind: of distance.
        names: of the matches, for messages.

    Raises:
        TargetError: matches are no array `(L, D)`; or no `d0` is given, and a match is no further from the
            query than the query itself.
        ModelError: the matches were embedded by another model.
        SpecError: `d0` is not above zero, or there is no such kind.
    """
    query, matches = np.asarray(query), np.asarray(matches)
    if matches.ndim != 2 or not len(matches):
        raise TargetError(
            f"expected embeddings of matches as an array (L, D), found shape {matches.shape}; one match is "
            "match[None]"
        )
    if query.shape[-1] != matches.shape[-1]:
        raise ModelError(
            f"expected matches of {query.shape[-1]} dimensions, as the model embeds, found "
            f"{matches.shape[-1]}; was the gallery embedded with another --model"
        )
    if d0 is not None:
        if not (np.isfinite(d0) and d0 > 0):
            raise SpecError(f"d0: expected a distance above 0, found {d0}")
        return Similarity(embedder, matches, np.full(len(matches), float(d0)), kind)
    scales = distance(query, matches, kind)
    for index in np.flatnonzero(scales <= _least(query, kind)).tolist():
        name = names[index] if names else f"match {index}"
        raise TargetError(
            f"expected a match other than the query itself, found {name} at distance {scales[index]:.3g}, "
            "where exp(-d / d0) means nothing; take this copy of the query out of --gallery, or say --d0"
        )
    return Similarity(embedder, matches, scales, kind)


def _least(query: Float[np.ndarray, " D"], kind: DistanceKind) -> float:
    """The distance up to which two embeddings are of the same image."""
    return _SAME**2 / 2 if kind == "cosine" else _SAME * float(np.linalg.norm(query))
