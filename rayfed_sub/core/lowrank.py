"""Low-rank arithmetic on factors: side rule, signs, padding, truncation, Gram roots, singular values, spectra.

Truncation is the best approximation of a product by factors of lower rank (Eckart, Young, 1936), by QR of both factors
and an SVD of the small core between them: with L = Q_L C_L and R^T = Q_R C_R, L R = Q_L (C_L C_R^T) Q_R^T, and the
core's singular values are those of L R.  The (m, n) matrix is never formed.

Singular values come from Grams in float64.  With L^T L = F F^T the product L R has the singular values of F^T R, whose
squares are the eigenvalues of F^T (R R^T) F, an (R, R) matrix: neither (m, n) nor an SVD is needed, and the Grams of
several products are blocks of the one of their stacked factors.  A Gram squares the condition: the result is right down
to about 1e-7 of the largest singular value, which is where float32 ends.  Before, column i of L and row i of R are
brought to equal length: that leaves the product as it is, and an eigendecomposition no small pair beside a large one.

Legend: m, n layer sizes, R columns of the left factor and rows of the right one, k = min(m, n, R); ... batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from rayfed_sub.core.devices import sent
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, Tensors


def truncated(left_mR: Tensor, right_Rn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U diag(sigma) (m, k), V^T (k, n)) of the best rank-k approximation of left @ right; k = min(rank, m, n, R).

    Float32, worked out in float64.  Its error is sqrt(sum of the dropped sigma^2).  Rows of V^T are signed by a fixed
    reference vector, so that equal products give equal factors.

    >>> left, right = truncated(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2), 1)
    >>> (left @ right).abs()
    tensor([[0., 0.],
            [0., 4.]])
    """
    left_mR, right_Rn = left_mR.double(), right_Rn.double()
    core_qR = torch.linalg.qr(left_mR, mode="r").R
    base_nq, core_sR = torch.linalg.qr(right_Rn.T)
    V_ks = torch.linalg.svd(core_qR @ core_sR.T, full_matrices=False).Vh[:rank]
    right_kn = signed(V_ks @ base_nq.T, None)
    left_mk = left_mR @ (right_Rn @ right_kn.T)  # U diag(sigma), with the signs that the rows were given
    return left_mk.float(), right_kn.float()


def signed(new_rk: Tensor, old_rk: Tensor | None) -> Tensor:
    """`new_rk`, (..., r, k), with each row's sign chosen to agree with the old basis: diag(new old^T) > 0.

    Singular vectors are defined up to sign, but Adam's moments kept over a refresh live in that basis.  Where there
    is no old row, or it is orthogonal to the new one, a fixed reference vector takes its place.

    >>> signed(torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
    tensor([[1., -0.]])
    """
    agree_r = new_rk @ sent(torch.from_numpy(_reference(new_rk.shape[-1])).to(new_rk.dtype), new_rk.device)
    if old_rk is not None:
        old_agree_r = (new_rk * old_rk).sum(dim=-1)
        agree_r = torch.where(old_agree_r != 0, old_agree_r, agree_r)
    return torch.where(agree_r < 0, -1.0, 1.0)[..., None] * new_rk


def orthonormal_rows(draw: Generator, rank: int, size: int) -> Tensor:
    """Uniformly distributed orthonormal rows (rank, size), float32, by QR of standard normal numbers in float64.

    >>> from numpy.random import default_rng
    >>> Q = orthonormal_rows(default_rng(0), 2, 4)
    >>> torch.allclose(Q @ Q.T, torch.eye(2), atol=1e-6)
    True
    """
    Q_kr: Tensor = torch.linalg.qr(torch.from_numpy(draw.standard_normal((size, rank)))).Q
    return Q_kr.T.float().contiguous()


def block_diagonal(core_hrr: Tensor, scale_h: Tensor) -> Tensor:
    """Cores (..., h, r, r), each times its scale (..., h), on the diagonal of one matrix (..., h r, h r).

    A gradient has the same bits for one client as beside others.

    >>> block_diagonal(torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([1.0, 10.0]))
    tensor([[ 2.,  0.],
            [ 0., 30.]])
    """
    h, r, _ = core_hrr.shape[-3:]
    flat = (scale_h[..., None] * core_hrr.flatten(-2)).flatten(-2)
    at = torch.arange(h * r, device=flat.device).view(h, r)
    index = (at[:, :, None] * (h * r) + at[:, None, :]).flatten()
    whole = flat.new_zeros((*flat.shape[:-1], (h * r) ** 2)).index_copy(-1, index, flat)
    return whole.view(*flat.shape[:-1], h * r, h * r)


def inner_core(tensors: Tensors, layer: str) -> Tensor | None:
    """The matrix between a layer's two factors, (..., r, r): its core, or with `<layer>/heads` (..., h) the cores
    (..., h, r, r) of several heads, each times its scale, on the diagonal; None where the factors meet."""
    core, heads = tensors.get(f"{layer}/core"), tensors.get(f"{layer}/heads")
    return core if core is None or heads is None else block_diagonal(core, heads)


def sides(layer: Layer) -> tuple[str, str]:
    """(fixed, trained) tensor names by GaLore's `std` rule: project the shorter side; a square layer its right side.

    >>> sides(Layer("up", m=8, n=4))
    ('up/right', 'up/left')
    """
    left, right = f"{layer.name}/left", f"{layer.name}/right"
    return (right, left) if layer.m >= layer.n else (left, right)


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` with zeros appended on each axis up to `shape`; itself where nothing is missing."""
    if tensor.shape == torch.Size(shape):
        return tensor
    return pad(
        tensor,
        [x for have, want in zip(tensor.shape[::-1], shape[::-1], strict=True) for x in (0, want - have)],
    )


def root(gram_RR: Tensor) -> Tensor:
    """F (..., R, R) with F F^T the Gram, or its positive part where rounding made it indefinite; by eigenvectors, which
    take ten times longer, where one is singular.

    >>> F = root(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    >>> torch.allclose(F @ F.T, torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    True
    """
    root_RR: Tensor
    root_RR, failed = torch.linalg.cholesky_ex(gram_RR)
    if failed.any():
        w_R, U_RR = torch.linalg.eigh(gram_RR)
        root_RR = U_RR * w_R.clamp_min(0).sqrt()[..., None, :]
    return root_RR


@cache
def _reference(k: int) -> NDArray[np.float64]:
    """The vector (k,) that a sign without a past goes by; no tensor, which the first plan of a process would count."""
    return stream(0, "sign reference").standard_normal(k)


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
    """Singular values of left @ right, (k,) float64, largest first.

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
    """Spectrum of one matrix from its singular values, (k,), largest first; size: max(m, n).

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
