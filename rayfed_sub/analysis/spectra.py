"""Singular values of a product of two factors, and what they say: rank, stable rank, effective rank.

From Grams in float64.  With L^T L = F F^T the product L R has the singular values of F^T R, whose squares are the
eigenvalues of F^T (R R^T) F, an (R, R) matrix: neither (m, n) nor an SVD is needed, and the Grams of several products
are blocks of the one of their stacked factors.  A Gram squares the condition: what comes out is right down to about
1e-7 of the largest singular value, which is where float32 ends.  Before, column i of L and row i of R are brought to
equal length: that leaves the product as it is, and an eigendecomposition no small pair beside a large one.

Legend: m, n layer sizes, R columns of the left factor and rows of the right one, k = min(m, n, R); ... batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed_sub.training.grams import root

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Spectrum:
    """The singular values sigma of an (m, n) matrix as figures without unit, but norm and values in the matrix's own.

    norm: Frobenius.  rank: how many sigma lie above max(m, n) * eps(float32) * sigma_1, numpy's and torch's rule.
    stable_rank: ||.||_F^2 / sigma_1^2, from 1 to rank.  effective_rank: exp of the entropy of sigma / sum(sigma), from
    1 to rank (Roy, Vetterli, 2007).  values: the sigma above the cut, largest first; to both of these, and to the
    stable rank, those below the cut are zero.  A matrix of zeros has norm and ranks 0 and no values.
    """

    norm: float
    rank: int
    stable_rank: float
    effective_rank: float
    values: tuple[float, ...]


def singular_values(left_mR: Tensor, right_Rn: Tensor) -> Tensor:
    """Those of left @ right, (k,) float64, largest first.

    >>> left, right = torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> singular_values(left, right).square().round(decimals=4)  # [[2, 0], [-1, 0]]
    tensor([5., 0.], dtype=torch.float64)
    """
    left_mR, right_Rn = left_mR.double(), right_Rn.double()
    (m, R), n = left_mR.shape, right_Rn.shape[1]
    if min(m, n) < R:  # the Grams would be larger than that of the product's short side
        product = left_mR @ right_Rn
        return _roots(torch.linalg.eigvalsh(product.T @ product if n <= m else product @ product.T))
    return from_grams(left_mR.T @ left_mR, right_Rn @ right_Rn.T)


def from_grams(left_RR: Tensor, right_RR: Tensor) -> Tensor:
    """The singular values of L R, (..., R) float64, largest first, from L^T L and R R^T, (..., R, R) float64."""
    return _roots(torch.linalg.eigvalsh(_core(left_RR, right_RR)[0]))


def directions(far_RR: Tensor, near_RR: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(sigma (..., R), W (..., R, R)), largest first, float64: with V = W @ near, near the factor whose Gram `near_RR`
    is, as rows (R, .), the rows of V are the product's singular vectors on that factor's side.

    far_RR: the other factor's Gram.  size: max(m, n); rows of W at and beyond the numerical rank are zero.
    """
    core_RR, turn_RR = _core(far_RR, near_RR)
    w_R, U_RR = torch.linalg.eigh(core_RR)
    sigma_R = _roots(w_R)
    kept_R = sigma_R > size * EPS * sigma_R[..., :1]
    inverse_R = torch.where(kept_R, 1 / torch.where(kept_R, sigma_R, 1.0), 0.0)
    return sigma_R, inverse_R[..., None] * (U_RR.flip(-1).mT @ turn_RR)


def spectrum(sigma_k: Tensor, size: int) -> Spectrum:
    """What the singular values of one matrix, (k,), largest first, say; size: max(m, n).

    >>> found = spectrum(torch.tensor([2.0, 2.0, 0.0]), 3)
    >>> found.rank, found.stable_rank, round(found.effective_rank, 6), found.values
    (2, 2.0, 2.0, (2.0, 2.0))
    """
    if not len(sigma_k) or not float(sigma_k[0]):
        return Spectrum(0.0, 0, 0.0, 0.0, ())
    kept = sigma_k[sigma_k > size * EPS * sigma_k[0]].double()
    relative, share = kept / kept[0], kept / kept.sum()
    return Spectrum(
        norm=float(sigma_k.double().norm()),
        rank=len(kept),
        stable_rank=float(relative.square().sum()),
        effective_rank=float(torch.exp(-(share * share.log()).sum())),
        values=tuple(kept.tolist()),
    )


def _core(far_RR: Tensor, near_RR: Tensor) -> tuple[Tensor, Tensor]:
    """(F^T near F, F^T with the balance that `near` needs), where far = F F^T, both Grams balanced first."""
    far_R, near_R = (gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt() for gram in (far_RR, near_RR))
    alive_R = (far_R > 0) & (near_R > 0)  # a pair with a zero adds nothing to the product
    ratio_R = torch.where(alive_R, near_R, 1.0) / torch.where(alive_R, far_R, 1.0)
    far_scale_R = torch.where(alive_R, ratio_R.sqrt(), 0.0)
    near_scale_R = torch.where(alive_R, 1 / ratio_R.sqrt(), 0.0)
    root_RR = root(far_RR * far_scale_R[..., None] * far_scale_R[..., None, :])
    turn_RR = root_RR.mT * near_scale_R[..., None, :]
    return turn_RR @ near_RR @ turn_RR.mT, turn_RR


def _roots(squares: Tensor) -> Tensor:
    """Ascending eigenvalues of a Gram as descending singular values."""
    return squares.flip(-1).clamp_min(0).sqrt()
