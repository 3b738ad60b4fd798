"""Laws 2 and 3: masks are a pure function of their index, with the geometry of the original RISE code."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replica import color_mask
from skimage.transform import resize

from mcrise_ray.masks import coverage, draw, overlap_kernels, upsampling_tables
from mcrise_ray.spec import ExplainSpec

SIZES = [((96, 96), (8, 8)), ((37, 53), (8, 8)), ((64, 48), (5, 7)), ((9, 31), (4, 1)), ((6, 5), (8, 8))]


def test_golden_masks_never_change() -> None:
    spec = ExplainSpec(grid=(3, 4), p_mask=0.5, seed=7)
    masks = draw(spec, 0, 2)
    assert masks.cells.tolist() == GOLDEN_CELLS
    assert masks.shifts((96, 96)).tolist() == GOLDEN_SHIFTS
    far = draw(ExplainSpec(grid=(2, 2), p_mask=0.7, colors="paper8", seed=2**64 - 1), 10**11, 10**11 + 1)
    assert far.cells.tolist() == GOLDEN_FAR_CELLS
    assert far.shift_words.tolist() == GOLDEN_FAR_WORDS


@given(
    start=st.integers(0, 10**11),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=50, deadline=None)
def test_masks_do_not_depend_on_how_they_are_batched(
    start: int, lengths: list[int], grid: tuple[int, int], seed: int
) -> None:
    spec = ExplainSpec(grid=grid, seed=seed)
    whole = draw(spec, start, start + sum(lengths))
    ends = list(itertools.accumulate(lengths, initial=start))
    pieces = [draw(spec, a, b) for a, b in itertools.pairwise(ends)]
    shuffled = [draw(spec, n, n + 1) for n in reversed(range(start, ends[-1]))][::-1]
    for parts in (pieces, shuffled):
        np.testing.assert_array_equal(np.concatenate([p.cells for p in parts]), whole.cells)
        np.testing.assert_array_equal(np.concatenate([p.shift_words for p in parts]), whole.shift_words)


def test_many_masks_take_little_more_memory_than_their_cells() -> None:
    spec = ExplainSpec(grid=(32, 32))
    tracemalloc.start()
    many = draw(spec, 5, 5005)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 * many.cells.nbytes  # a word alone takes eight times as much as its cell
    pieces = [draw(spec, 5, 1100), draw(spec, 1100, 5005)]
    np.testing.assert_array_equal(np.concatenate([p.cells for p in pieces]), many.cells)
    np.testing.assert_array_equal(np.concatenate([p.shift_words for p in pieces]), many.shift_words)


def test_different_seeds_give_different_masks() -> None:
    first, second = (draw(ExplainSpec(seed=seed), 0, 1).cells for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("p_mask", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("colors", ["black", "paper5", "paper8"])
def test_share_of_masked_cells(p_mask: float, colors: str) -> None:
    spec = ExplainSpec(p_mask=p_mask, colors=colors)
    cells = draw(spec, 0, 4000).cells
    shares = np.bincount(cells.ravel(), minlength=spec.K + 1) / cells.size
    expected = np.array([1 - p_mask, *[p_mask / spec.K] * spec.K])
    sigma = np.sqrt(expected * (1 - expected) / cells.size)
    assert (np.abs(shares - expected) < 4.5 * sigma).all()


def test_shifts_are_uniform() -> None:
    shifts = draw(ExplainSpec(), 0, 20000).shifts((37, 96))
    assert shifts.min() == 0
    for axis, span in enumerate((5, 12)):
        counts = np.bincount(shifts[:, axis], minlength=span)
        assert len(counts) == span
        chi_square = ((counts - 20000 / span) ** 2 / (20000 / span)).sum()
        assert chi_square < span + 5 * np.sqrt(2 * span)


@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_geometry_is_that_of_torch_and_scikit_image(size: tuple[int, int], grid: tuple[int, int]) -> None:
    spec = ExplainSpec(grid=grid)
    masks = draw(spec, 0, 6)
    full = [(g + 1) * -(-s // g) for g, s in zip(grid, size, strict=True)]
    ours = coverage(spec, size, range(6))
    for n, (sy, sx) in enumerate(masks.shifts(size)):
        one_hot = (masks.cells[n] == np.arange(1, spec.K + 1)[:, None, None]).astype(float)
        by_torch = torch.nn.functional.interpolate(
            torch.from_numpy(one_hot)[None], size=full, mode="bilinear", align_corners=False
        )[0].numpy()
        crop = np.s_[:, sy : sy + size[0], sx : sx + size[1]]
        np.testing.assert_allclose(ours[n], by_torch[crop], atol=1e-12)
        by_skimage = np.stack([resize(m, full, order=1, mode="edge", anti_aliasing=False) for m in one_hot])
        np.testing.assert_allclose(ours[n], by_skimage[crop], atol=1e-12)
        np.testing.assert_allclose(ours[n], color_mask(masks.cells[n], (sy, sx), spec.K, size), atol=1e-12)


@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_tables_are_shares(size: tuple[int, int], grid: tuple[int, int]) -> None:
    for cells, pixels in zip(grid, size, strict=True):
        table = upsampling_tables(cells, pixels)
        assert table.shape == (-(-pixels // cells), pixels, cells)
        assert table.min() >= 0
        np.testing.assert_allclose(table.sum(axis=2), 1, atol=1e-15)


@pytest.mark.parametrize("p_mask", [0.1, 0.5, 0.7])
def test_moments_of_coverage(p_mask: float) -> None:
    """Mean `p_mask / K`; covariance `(q delta_kj - q^2) Ky Kx`, within Monte-Carlo error."""
    spec = ExplainSpec(grid=(3, 2), p_mask=p_mask, colors="red,blue")
    size, N = (7, 5), 8000
    q = p_mask / 2
    maps = coverage(spec, size, range(N)).reshape(N, -1)
    sigma = maps.std(axis=0) / np.sqrt(N)
    assert (np.abs(maps.mean(axis=0) - q) < 4.5 * sigma).all()

    ky, kx = overlap_kernels((3, 2), size)
    expected = np.kron(q * np.eye(2) - q**2, np.kron(ky, kx))
    centred = maps - q
    found = centred.T @ centred / N
    fourth = (centred**2).T @ (centred**2) / N
    sigma = np.sqrt((fourth - found**2) / N)
    z = np.abs(found - expected) / sigma
    # 4900 correlated entries: none beyond 5.5 sigma, and few beyond 3.
    assert z.max() < 5.5
    assert (z > 3).mean() < 0.02


GOLDEN_CELLS = [[[0, 3, 5, 5], [1, 0, 3, 0], [1, 0, 0, 0]], [[1, 0, 0, 5], [5, 4, 4, 2], [0, 3, 3, 0]]]
GOLDEN_SHIFTS = [[14, 20], [9, 0]]
GOLDEN_FAR_CELLS = [[[7, 4], [7, 0]]]
GOLDEN_FAR_WORDS = [[2435674514, 2266598428]]
