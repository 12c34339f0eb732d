"""Spectra from Gram matrices against torch's SVD of the dense product in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayfed_sub.core.lowrank import EPS, directions, from_grams, singular_values, spectrum

SIZES = st.integers(1, 12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double()


@settings(max_examples=60, deadline=None)
@given(m=SIZES, n=SIZES, R=SIZES, seed=st.integers(0, 99), stretch=st.sampled_from([1.0, 1e-6, 1e6]))
def test_singular_values_match_the_dense_product(m: int, n: int, R: int, seed: int, stretch: float) -> None:
    """R below and above min(m, n); one side is up to far larger than the other, which balancing compensates."""
    left, right = stretch * drawn(m, R, seed=seed), drawn(R, n, seed=seed + 1) / stretch
    theirs = torch.linalg.svdvals(dense(left, right))
    ours = singular_values(left, right)
    assert len(ours) == min(m, n, R)
    assert torch.allclose(ours, theirs[: len(ours)], atol=1e-7 * float(theirs[0]), rtol=1e-7)


def test_badly_scaled_pairs_keep_their_precision() -> None:
    """Pairs (w_i u_i) (v_i / w_i)^T / 1e9 of a product U V^T / 1e9, w = 1e-9, 1, 1e-9, 1, beside a pair with a zero, so
    that the left Gram goes through eigenvectors.  Unbalanced, its entries of 1e-18 would be lost beside those of 1."""
    U, V = drawn(9, 4).double(), drawn(7, 4, seed=1).double()
    w = torch.tensor([1e-9, 1.0, 1e-9, 1.0], dtype=torch.float64)
    left = torch.cat([U * w, torch.zeros(9, 1)], dim=1)
    right = torch.cat([(V / w / 1e9).T, torch.ones(1, 7)])
    assert torch.allclose(1e9 * singular_values(left, right)[:4], torch.linalg.svdvals(U @ V.T)[:4], rtol=1e-12)


@pytest.mark.parametrize("copies", [1, 2])
def test_singular_gram_is_handled(copies: int) -> None:
    """Repeated factors (Cholesky fails), and columns of zeros as from padding."""
    left, right = drawn(9, 3).repeat(1, copies), drawn(3, 7, seed=1).repeat(copies, 1)
    left, right = torch.cat([left, torch.zeros(9, 1)], 1), torch.cat([right, drawn(1, 7, seed=2)])
    ours = from_grams(left.double().T @ left.double(), right.double() @ right.double().T)
    theirs = torch.linalg.svdvals(dense(left, right))
    assert torch.allclose(ours[:3], theirs[:3], rtol=1e-9)
    assert float(ours[3:].max()) < 1e-7 * float(ours[0])
    assert spectrum(ours, 9).rank == 3


def test_batch_matches_its_members() -> None:
    left, right = drawn(4, 9, 3).double(), drawn(4, 3, 7, seed=1).double()
    together = from_grams(left.mT @ left, right @ right.mT)
    for g in range(4):
        assert torch.allclose(together[g], torch.linalg.svdvals(left[g] @ right[g])[:3], rtol=1e-9)


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9)])
def test_directions_are_singular_vectors(m: int, n: int) -> None:
    """W @ right has orthonormal rows, the strongest first, and its first q rows span those of the dense SVD."""
    left, right = drawn(m, 4).double(), drawn(4, n, seed=1).double()
    left[:, 3] = left[:, 2]  # with equal right rows: a product of rank 3
    right[3] = right[2]
    sigma, W = directions(left.T @ left, right @ right.T, max(m, n))
    V = W @ right
    theirs = torch.linalg.svd(left @ right)
    assert torch.allclose(sigma[:3], theirs.S[:3], rtol=1e-9)
    assert torch.allclose(V[:3] @ V[:3].T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert not V[3:].any()
    for q in (1, 2, 3):
        assert torch.allclose(V[:q].T @ V[:q], theirs.Vh[:q].T @ theirs.Vh[:q], atol=1e-8)


def test_spectrum_figures_by_hand() -> None:
    """sigma = 4, 2, 1, 1: norm sqrt 22, stable rank 22 / 16; shares 1/2, 1/4, 1/8, 1/8: entropy 1.75 ln 2."""
    found = spectrum(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]), 5)
    assert found.norm == pytest.approx(math.sqrt(22))
    assert (found.rank, found.values) == (4, (4.0, 2.0, 1.0, 1.0))
    assert found.stable_rank == pytest.approx(22 / 16)
    assert found.effective_rank == pytest.approx(2**1.75)


def test_rank_threshold_is_numpy_s_for_float32() -> None:
    """max(m, n) eps sigma_1 = 100 * 2^-23 = 1.19e-5 for a 100 x 30 matrix whose largest sigma is 1."""
    cut = 100 * 2.0**-23
    assert cut == 100 * EPS
    assert spectrum(torch.tensor([1.0, 1.01 * cut, 0.99 * cut]), 100).rank == 2
    dense = drawn(100, 5) @ drawn(5, 30, seed=1)
    assert spectrum(torch.linalg.svdvals(dense), 100).rank == int(torch.linalg.matrix_rank(dense)) == 5


def test_zero_matrix_has_rank_zero() -> None:
    zero = spectrum(singular_values(torch.zeros(4, 2), drawn(2, 3)), 4)
    assert (zero.norm, zero.rank, zero.stable_rank, zero.effective_rank, zero.values) == (0.0, 0, 0.0, 0.0, ())
    assert spectrum(torch.zeros(0), 4) == zero
