"""Kernel ridge regression: what masks are predicted to score by how alike they are (see `kernels`), and by
products of their features where lines predict well.

Axes: S masks learnt from, of which T are tested; Q quantities that are predicted; D features.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

TESTED = 512  # masks by which the ridge is chosen and judged: eigenvectors of more take seconds

_STRENGTHS = 10.0 ** np.arange(-3, 2.1, 0.5)  # of the ridge; a mask is alike to itself by 1
_SHARES = 0.3, 1.0, 3.0  # of the features' products, which are alike to themselves by 1 too; or none
# Of the error without products, at most, or there are none: lines are sure of masks that are like no other.
# Where they gain less than this, some explanations of rare classes had half as much variance again.
_WORTH = 0.9
_JUDGES = 128  # masks by which the share is chosen: each takes an eigendecomposition


def kernel_ridge(
    alike: Float64[Tensor, "S S"],
    features: Float64[np.ndarray, "S D"],
    truth: Float64[np.ndarray, "S Q"],
    most: int = TESTED,
) -> tuple[
    Float64[np.ndarray, " Q"],
    Float64[np.ndarray, "S Q"],
    Float64[np.ndarray, "D Q"],
    Int64[np.ndarray, " T"],
    Float64[np.ndarray, "T Q"],
]:
    """Constants, weights, and slopes of the features; and of T of the masks, at most `most`, which ones,
    and what they are predicted to have by a fit to all masks but themselves.

    What follows from the features by lines is learnt from far fewer masks where the kernel is `alike` plus a
    share of the features' products; where nothing does, these only add noise. The share and the ridge are
    those with the least error of predictions of each of the T (for the share, of some of them) by the others.
    The ridge does not depend on their number: it is the noise of a score in units of the kernel.
    """
    constants = truth.mean(axis=0)
    tested = np.arange(0, len(alike), -(-len(alike) // most))
    # The tested ones come last: of the inverse, what concerns them is the inverse of the last block alone.
    order = np.concatenate([np.delete(np.arange(len(alike)), tested), tested])
    along = torch.from_numpy(order).to(alike.device)
    alike = alike[along[:, None], along]
    around = torch.from_numpy((truth - constants)[order]).to(alike.device)
    scaled = torch.from_numpy(features[order] / features.std() / features.shape[1] ** 0.5).to(alike.device)
    last = slice(len(order) - len(tested), None)
    share = _share(alike[last, last], scaled[last], around[last])
    if share:
        alike.addmm_(scaled, scaled.T, alpha=share)
    _, strengths = ridges(alike[last, last], around[last])
    lower = factor(alike, strengths)
    solved = torch.cholesky_solve(around, lower)
    left = solved[last] / torch.cholesky_inverse(lower[last, last]).diagonal()[:, None]
    weights = np.empty(truth.shape)
    weights[order] = solved.cpu().numpy()
    slopes = features.T @ weights * (share / features.var() / features.shape[1])
    return constants, weights, slopes, tested, constants + (around[last] - left).cpu().numpy()


def _share(
    alike: Float64[Tensor, "T T"], scaled: Float64[Tensor, "T D"], around: Float64[Tensor, "T Q"]
) -> float:
    """Of the products in the kernel: the first that no larger one improves on, by a few masks; or none."""
    few = slice(None, None, -(-len(alike) // _JUDGES))
    products = scaled[few] @ scaled[few].T
    best, least = 0.0, _WORTH * ridges(alike[few, few], around[few])[0]
    for share in _SHARES:
        error, _ = ridges(alike[few, few] + share * products, around[few])
        if not error < least:
            break
        best, least = share, error
    return best


def ridges(alike: Float64[Tensor, "T T"], around: Float64[Tensor, "T Q"]) -> tuple[float, list[float]]:
    """The least error of predictions of each by all the others; the ridge that makes it, and all above."""
    # In float32, which takes half the time: its roundings are far below the least ridge.
    values, vectors = (found.double() for found in torch.linalg.eigh(alike.float()))
    strengths = torch.from_numpy(_STRENGTHS).to(alike.device)
    shrunk = (1 / (values.clamp_min(0)[:, None] + strengths))[..., None]
    along = shrunk * (vectors.T @ around)[:, None]
    left = (vectors @ along.flatten(1)).view_as(along) / (vectors.square() @ shrunk[..., 0])[..., None]
    scale = around.square().sum(dim=0).clamp_min(1e-300)
    errors = (left.square().sum(dim=0) / scale).sum(dim=1)
    best = int(errors.argmin())
    return float(errors[best]), [float(strength) for strength in _STRENGTHS[best:]]


def factor(alike: Float64[Tensor, "S S"], strengths: list[float]) -> Float64[Tensor, "S S"]:
    """Cholesky's, of the matrix with the first ridge that is larger than its roundings; it is overwritten."""
    diagonal = alike.diagonal().clone()
    lower = alike
    for strength in strengths:
        alike.diagonal().copy_(diagonal + strength)
        lower, failed = torch.linalg.cholesky_ex(alike)
        if not failed:
            break
    return lower
