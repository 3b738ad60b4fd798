"""How alike masks are: what neighbouring cells do together is learnt.

The kernel is a mean, over overlapping windows of the image, of Gaussians of the features in each window. What
the scores hardly depend on, patches of the image or differences between fills, hardly tells masks apart: how
much they depend on it is told by the slopes of a first fit to a few masks, as in recursive feature machines
(Radhakrishnan et al. 2024).

Axes: N masks; S masks learnt from; M of these; Q quantities that are predicted; L targets; D features, which
are Y patch rows, K fills and X patch columns; W windows, of V features each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from mcrise_ray.kernel_regression import factor, ridges

_WIDER = 1.4, 2.0, 2.8  # times the width: rarer fills need wider kernels, by image too
_CONTRAST = 0.75  # power of the relevance by which squared differences, and windows, are weighted
_LEAST = 1e-3  # relevance of what the scores do not depend on, where the mean is 1
_LOOKED_AT = 256  # masks that the relevance is learnt from, and judged by: more tell hardly more
_CONDENSED = 1e-3  # ridge of condensed weights: ten times as much and what they miss doubles
_AT_ONCE = 1024  # masks compared with those learnt from: with fewer, two threads have too little to do


@dataclass(frozen=True)
class _Layout:
    """Of the windows.

    Attributes:
        length: share of the image's.
        apart: how far, at most, as a share of their length.
        width: of the narrowest kernel, in mean squared differences of features of a window.
    """

    length: float
    apart: float
    width: float

    @staticmethod
    def of(fills: int) -> _Layout:
        """Where there is one fill, patches are finer than cells: smaller windows that are closer together
        tell more then, and leave 5 to 8 % less variance.
        """
        return _Layout(5 / 14, 0.4, 0.6) if fills == 1 else _Layout(1 / 2, 0.5, 0.85)


@dataclass(frozen=True, eq=False)
class Metric:
    """How far apart masks are.

    Attributes:
        by_patch: how much differences in each patch count; 1 in the mean.
        by_fill: and differences in each fill, and in each pair of fills; its trace is K.
        scale: of differences: the standard deviation of a feature, or a multiple for a wider kernel.
    """

    by_patch: Float64[np.ndarray, "Y X"]
    by_fill: Float64[np.ndarray, "K K"]
    scale: float

    @staticmethod
    def flat(shape: tuple[int, int, int], scale: float) -> Metric:
        """That counts all differences alike, of features whose axes are (Y, K, X)."""
        return Metric(np.ones((shape[0], shape[2])), np.eye(shape[1]), scale)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Y, K, X)."""
        return self.by_patch.shape[0], len(self.by_fill), self.by_patch.shape[1]


@dataclass(frozen=True, eq=False)
class Windows:
    """Masks as the kernel sees them.

    Attributes:
        right: per window, the features, 1, and half their squares off the logarithm to base 2 of the window's
            share in the kernel's mean: products with `_left` of other masks are exponents.
        mixed: what the features of all fills are multiplied by.
        stretched: and then those of each patch.
        widths: by which those of each window are divided.
        shape: (Y, K, X).
    """

    right: Float32[Tensor, "W rows S"]
    mixed: Float32[Tensor, "K K"]
    stretched: Float32[Tensor, "Y 1 X 1"]
    widths: Float32[Tensor, "W 1 1"]
    shape: tuple[int, int, int]

    @property
    def features(self) -> int:
        """V, of each window."""
        return self.right.shape[1] - 2

    @staticmethod
    def of(
        features: Float64[np.ndarray, "S D"], metric: Metric, device: torch.device | str = "cpu"
    ) -> Windows:
        """Of masks with the given features, on the device on which likeness is computed."""
        shape, places = metric.shape, _places(metric.shape)
        squared = (metric.by_patch + _LEAST) ** _CONTRAST
        # Powers of two are computed fastest. A window's width does not depend on its relevance.
        means = [squared[place].mean() * squared[place].size * shape[1] for place in places]
        widths = metric.scale * (_Layout.of(shape[1]).width * np.array(means) * np.log(2)) ** 0.5
        shares = np.array([(metric.by_patch[place].mean() + _LEAST) ** _CONTRAST for place in places])
        parts = _root(metric.by_fill), squared[:, None, :, None] ** 0.5, widths[:, None, None]
        mixed, stretched, each = (torch.from_numpy(part).to(device, torch.float32) for part in parts)
        windows = _seen(features, mixed, stretched, each, shape)
        share = torch.from_numpy(np.log2(shares / shares.mean())).to(windows)[:, None, None]
        right = torch.cat([windows, torch.ones_like(windows[:, :1]), share - _half(windows)], dim=1)
        return Windows(right, mixed, stretched, each, shape)

    def alike(self, features: Float64[np.ndarray, "N D"]) -> Float64[Tensor, "N S"]:
        """How alike other masks are to each of these, between 0 and 1."""
        found = self.right.new_empty(len(features), self.right.shape[2], dtype=torch.float64)
        # A few rows at a time, in the same buffers: new memory would take as long as the products.
        one, total = self.right.new_empty(2, min(_AT_ONCE, len(features)), self.right.shape[2])
        for start in range(0, len(features), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(features)))
            lefts = _left(self._seen(features[part]))
            rows = slice(lefts.shape[2])
            for place, (left, right) in enumerate(zip(lefts, self.right, strict=True)):
                into = one[rows] if place else total[rows]
                torch.mm(left.T, right, out=into).exp2_()
                if place:
                    total[rows].add_(into)
            found[part] = total[rows].div_(len(self.right))
        return found

    def similar(
        self, features: Float64[np.ndarray, "N D"], weights: Float32[np.ndarray, "W S Q"]
    ) -> Float64[np.ndarray, "N Q"]:
        """How alike other masks are to these in each window, times their weights there."""
        count, weight = weights.shape[2], self._padded(weights)
        found = np.empty((len(features), count))
        one = self.right.new_empty(min(_AT_ONCE, len(features)), self.right.shape[2])
        for start in range(0, len(features), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(features)))
            lefts = _left(self._seen(features[part]))
            alike = one[: lefts.shape[2]]
            total = weight.new_zeros(len(alike), weight.shape[2])
            for left, right, each in zip(lefts, self.right, weight, strict=True):
                total.addmm_(torch.mm(left.T, right, out=alike).exp2_(), each)
            found[part] = total[:, :count].div_(len(self.right)).cpu().numpy()
        return found

    def condensed(
        self, features: Float64[np.ndarray, "N D"], weights: Float64[np.ndarray, "S Q"], few: slice
    ) -> Float32[np.ndarray, "W M Q"]:
        """Weights for `similar` of M of these masks, one for each window, in place of one of each mask of
        all: fitted to what these say of other masks, window by window.

        A window has few features, so a few masks tell there nearly what all do, in a fraction of the time.
        """
        if len(weights[few]) == len(weights):
            return np.broadcast_to(weights.astype(np.float32), (len(self.right), *weights.shape))
        weight, found = self._padded(weights), []
        for left, right in zip(_left(self._seen(features)), self.right, strict=True):
            alike = torch.mm(left.T, right).exp2_()
            wanted, basis = (alike @ weight).double(), alike[:, few].double()
            squares = basis.T @ basis
            squares.diagonal().add_(_CONDENSED)
            found.append(torch.cholesky_solve(basis.T @ wanted, torch.linalg.cholesky(squares)).float())
        return torch.stack(found)[..., : weights.shape[1]].cpu().numpy()

    def slopes(
        self, features: Float64[np.ndarray, "N D"], weights: Float64[np.ndarray, "S L"]
    ) -> Float32[Tensor, "L N Y K X"]:
        """How `similar`, with the same weights in all windows, changes with each of the features of these;
        they are held all at once.
        """
        weight = torch.tensor(weights.T, device=self.right.device, dtype=torch.float32)
        found = weight.new_zeros(len(weight), features.shape[1], len(features))
        inside = _inside(self.shape).to(weight.device)
        windows = self._seen(features)
        for window, left, right, width, index in zip(
            windows, _left(windows), self.right, self.widths, inside, strict=True
        ):
            alike = torch.mm(left.T, right).exp2_()
            for out, one in zip(found, weight, strict=True):
                pull = alike * one
                out.index_add_(0, index, (right[:-2] @ pull.T - window * pull.sum(dim=1)).div_(width))
        along = found.view(len(found), *self.shape, -1) * self.stretched
        along *= np.log(2) / len(self.right)
        return torch.einsum("lykxn,jk->lnyjx", along, self.mixed)

    def _padded(self, weights: Float[np.ndarray, "... Q"]) -> Float32[Tensor, "... columns"]:
        """With columns of zeros: products of a few take up to four times as long as those of 16."""
        count = weights.shape[-1]
        # Copied: what Ray hands out is read-only.
        weight = torch.tensor(weights, device=self.right.device, dtype=torch.float32)
        return torch.nn.functional.pad(weight, (0, -count % 16 if count > 1 else 0))

    def _seen(self, features: Float64[np.ndarray, "N D"]) -> Float32[Tensor, "W V N"]:
        return _seen(features, self.mixed, self.stretched, self.widths, self.shape)


def learn_metric(
    features: Float64[np.ndarray, "S D"],
    truth: Float64[np.ndarray, "S L"],
    shape: tuple[int, int, int],
    scale: float,
    device: torch.device | str = "cpu",
    most: int = _LOOKED_AT,
) -> Metric:
    """How much the targets depend on each patch, and on each fill and pair of fills: products of the slopes
    of a first fit, in the mean; the same for all where that predicts no worse, by at most so many masks. Then
    the scale, or a multiple: the first that no larger one improves on.

    Few masks tell these better than they tell what each fill does in each patch.

    Args:
        features: of masks that were scored.
        truth: what is to be predicted.
        shape: (Y, K, X).
        scale: standard deviation of a feature.
        device: on which masks are compared.
        most: masks that metrics are judged by.
    """
    features, truth = features[-_LOOKED_AT:], truth[-_LOOKED_AT:]
    around = torch.from_numpy(truth - truth.mean(axis=0)).to(device)
    best, few = Metric.flat(shape, scale), slice(-most, None)
    windows = Windows.of(features, best, device)
    alike = windows.alike(features)
    least, strengths = ridges(alike[few, few], around[few])
    weights = torch.cholesky_solve(around, factor(alike, strengths))
    along = windows.slopes(features, weights.cpu().numpy()).cpu().double().numpy()
    along /= np.maximum((along**2).mean(axis=(1, 2, 3, 4), keepdims=True), 1e-300) ** 0.5
    fills = np.moveaxis(along, 3, 4).reshape(-1, shape[1])

    def error(metric: Metric) -> float:
        return ridges(Windows.of(features[few], metric, device).alike(features[few]), around[few])[0]

    # Slopes tell features apart by chance too, and are largest where most windows overlap.
    found = Metric((along**2).mean(axis=(0, 1, 3)), fills.T @ fills / len(fills), scale)
    if (with_it := error(found)) < least:
        best, least = found, with_it
    for times in _WIDER:
        wider = replace(best, scale=times * scale)
        if not (with_it := error(wider)) < least:
            break
        best, least = wider, with_it
    return best


def _root(by_fill: Float64[np.ndarray, "K K"]) -> Float64[np.ndarray, "K K"]:
    """What features are multiplied by for a contrast between fills; in the mean it leaves squares alone."""
    values, vectors = np.linalg.eigh(by_fill)
    squared = (np.maximum(values, 0) + _LEAST) ** _CONTRAST
    found: np.ndarray = (vectors * (squared / squared.mean()) ** 0.5) @ vectors.T
    return found


def _seen(
    features: Float64[np.ndarray, "N D"],
    mixed: Float32[Tensor, "K K"],
    stretched: Float32[Tensor, "Y 1 X 1"],
    widths: Float32[Tensor, "W 1 1"],
    shape: tuple[int, int, int],
) -> Float32[Tensor, "W V N"]:
    """The features in each window, as the kernel has them: it is `2 ** (-|a - b|**2 / 2)`."""
    images = torch.from_numpy(features).to(mixed.device, torch.float32).T.reshape(*shape[:2], -1)
    images = torch.matmul(mixed.T, images).view(*shape, -1) * stretched
    inside = _inside(shape).to(mixed.device)
    return images.flatten(0, 2)[inside.flatten()].view(*inside.shape, -1).div_(widths)


@lru_cache(maxsize=16)
def _inside(shape: tuple[int, int, int]) -> Int64[Tensor, "W V"]:
    """Which features are in each window."""
    index = np.arange(math.prod(shape)).reshape(shape)
    return torch.from_numpy(np.stack([index[rows, :, columns].ravel() for rows, columns in _places(shape)]))


@lru_cache(maxsize=16)
def _places(shape: tuple[int, int, int]) -> tuple[tuple[slice, slice], ...]:
    """Patch rows and columns of each window; all windows are of the same size."""
    layout = _Layout.of(shape[1])
    rows, columns = (
        [slice(place, place + span) for place in places]
        for span, places in (_along(count, layout) for count in (shape[0], shape[2]))
    )
    return tuple((y, x) for y in rows for x in columns)


def _along(count: int, layout: _Layout) -> tuple[int, list[int]]:
    """Length and places of the windows along an axis of so many patches."""
    span = math.ceil(count * layout.length)
    windows = 1 + math.ceil((count - span) / (layout.apart * span))
    return span, sorted({round(place) for place in np.linspace(0, count - span, windows)})


def _left(windows: Float32[Tensor, "W V N"]) -> Float32[Tensor, "W V+2 N"]:
    """What has to be multiplied with `Windows.right` for `-|a - b|**2 / 2`."""
    return torch.cat([windows, -_half(windows), torch.ones_like(windows[:, :1])], dim=1)


def _half(windows: Float32[Tensor, "W V N"]) -> Float32[Tensor, "W 1 N"]:
    return windows.square().sum(dim=1, keepdim=True) / 2
