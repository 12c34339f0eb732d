"""The four ways to pick GaLore's basis from a batch (GaLore, arXiv 2403.03507; `random`: GoLore, 2410.11289).

A layer's gradient for one client is G = d^T x (m, n), where x (N, n) is the layer's input and d (N, m) the
gradient of its output; neither `exact`, `randomized` nor `random` forms G while N < min(m, n).
The basis is returned as rows, (r, k): for the right side (m >= n, k = n) these are G's top right singular
vectors; for the left side (m < n, k = m) call with x and d swapped, which transposes G.

Legend: N tokens (rows of x and d), m, n layer sizes, r rank, k = size of the projected side, q = kept directions.
"""

from __future__ import annotations

import torch
from numpy.random import Generator
from torch import Tensor

from rayfed_sub.streams import stream

_GRAM_CUT = 1e-13  # eigenvalues of d d^T below this share of the largest are rounding (float64 Gram of float32 data)
_ENERGY_CUT = 1e-14  # squared singular values of G below this share of the largest count as zero: rank(G) < r
_OVERSAMPLE = 4  # extra directions of the randomised range finder
_POWER_STEPS = 2  # its subspace iterations


def basis(
    kind: str, x_Nn: Tensor, d_Nm: Tensor, rank: int, old_rn: Tensor | None, rng: Generator, *, swapped: bool = False
) -> Tensor:
    """The (rank, n) orthonormal row basis of one client's gradient d^T x, in float32; rows beyond rank(G) are zero.

    kind: `exact` | `svd` | `randomized` | `random`.  old_rn: the basis so far (None or zero rows: none); new rows
    are signed to agree with it, except for `svd`, which is torch's answer untouched, as galore-torch uses it.
    rng: the random projectors' draws.  swapped: x and d have changed places, for the left side (only `svd` minds: torch
    gives a matrix and its transpose other signs, and galore-torch factorises the gradient as it lies).
    A gradient of zero gives a basis of zeros; the caller has already refused non-finite input.

    >>> x, d = torch.eye(3)[:2], torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0]])   # G has singular values 3 and 2
    >>> basis("exact", x, d, 1, None, stream(0)).abs()
    tensor([[1., 0., 0.]])
    """
    # Padding and masked tokens send no gradient; on the left side x is what the gradient flows through.
    used_N = (d_Nm != 0).any(dim=1) & (x_Nn != 0).any(dim=1)
    x_Nn, d_Nm = x_Nn[used_N], d_Nm[used_N]
    n = x_Nn.shape[1]
    if kind == "random":
        new_rn = _orthonormal(torch.from_numpy(rng.standard_normal((rank, n))).to(x_Nn.device))
    elif not len(x_Nn):
        return x_Nn.new_zeros(rank, n, dtype=torch.float32)
    elif kind == "exact":
        new_rn = _exact(x_Nn, d_Nm, rank)
    elif kind == "svd":
        G_mn = d_Nm.float().T @ x_Nn.float()
        if swapped:
            return _padded(torch.linalg.svd(G_mn.T, full_matrices=False).U.T[:rank], rank)
        return _padded(torch.linalg.svd(G_mn, full_matrices=False).Vh[:rank], rank)
    elif kind == "randomized":
        new_rn = _randomized(x_Nn, d_Nm, rank, old_rn, rng)
    else:
        raise AssertionError(f"unknown projector {kind}")
    return signed(_padded(new_rn.float(), rank), old_rn)


def signed(new_rk: Tensor, old_rk: Tensor | None) -> Tensor:
    """`new_rk` with each row's sign chosen to agree with the old basis: diag(new old^T) > 0.

    Singular vectors are defined up to sign, but Adam's moments kept over a refresh live in that basis.  Where there
    is no old row, or it is orthogonal to the new one, a fixed reference vector takes its place.

    >>> signed(torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
    tensor([[1., -0.]])
    """
    reference_k = torch.from_numpy(stream(0, "sign reference").standard_normal(new_rk.shape[1])).to(new_rk)
    agree_r = new_rk @ reference_k
    if old_rk is not None:
        old_agree_r = (new_rk * old_rk).sum(dim=1)
        agree_r = torch.where(old_agree_r != 0, old_agree_r, agree_r)
    return torch.where(agree_r < 0, -1.0, 1.0)[:, None] * new_rk


def _exact(x_Nn: Tensor, d_Nm: Tensor, rank: int) -> Tensor:
    """Top right singular vectors of d^T x from token Grams: with d d^T = C C^T, (C^T x)(C^T x)^T = M is (N, N), and M's
    eigenvectors E with eigenvalues w give V = w^-1/2 E^T C^T x.  float64, because the Grams square the condition."""
    (N, n), m = x_Nn.shape, d_Nm.shape[1]
    x_Nn, d_Nm = x_Nn.double(), d_Nm.double()
    if min(m, n) <= N:  # the Gram would be larger than the matrix itself: form G, then the Gram of its short side
        G_mn = d_Nm.T @ x_Nn
        if n <= m:
            _, E_nn = torch.linalg.eigh(_scaled(G_mn.T @ G_mn))
            rows_qn = E_nn.flip(1).T[:rank]
            energy_q = (G_mn @ rows_qn.T).square().sum(0)
        else:
            _, E_mm = torch.linalg.eigh(_scaled(G_mn @ G_mn.T))
            rows_qn = E_mm.flip(1).T[:rank] @ G_mn
            energy_q = rows_qn.square().sum(1)
        return _orthonormal(rows_qn[energy_q > _ENERGY_CUT * energy_q[0]])
    D_NN = _scaled(d_Nm @ d_Nm.T)
    C_NN, failed = torch.linalg.cholesky_ex(D_NN)
    if failed:  # linearly dependent output gradients: the positive part is all there is
        s_N, U_NN = torch.linalg.eigh(D_NN)
        kept_N = s_N > _GRAM_CUT * s_N[-1]
        C_NN = U_NN[:, kept_N] * s_N[kept_N].sqrt()
    M_NN = C_NN.T @ (x_Nn @ x_Nn.T) @ C_NN
    w_N, E_NN = torch.linalg.eigh(_scaled(M_NN))
    w_q, E_Nq = w_N.flip(0)[:rank], E_NN.flip(1)[:, :rank]
    kept_q = w_q > _ENERGY_CUT * w_q[0]
    return _orthonormal((C_NN @ E_Nq[:, kept_q]).T @ x_Nn)


def _randomized(x_Nn: Tensor, d_Nm: Tensor, rank: int, old_rn: Tensor | None, rng: Generator) -> Tensor:
    """Randomised subspace iteration (Halko, Martinsson, Tropp 2011), started from the old basis where there is one.
    G v = d^T (x v) and G^T u = x^T (d u), so G is never formed."""
    n, size = x_Nn.shape[1], min(rank + _OVERSAMPLE, *x_Nn.shape, d_Nm.shape[1])
    start_sn = torch.from_numpy(rng.standard_normal((size, n))).to(x_Nn)
    if old_rn is not None:
        warm = min(rank, size)
        start_sn[:warm] += n**0.5 * old_rn[:warm].to(start_sn)  # a random row has length sqrt(n)
    V_ns = start_sn.T
    for _ in range(_POWER_STEPS):
        U_ms = torch.linalg.qr(d_Nm.T @ (x_Nn @ V_ns)).Q
        V_ns = torch.linalg.qr(x_Nn.T @ (d_Nm @ U_ms)).Q
    GV_ms = d_Nm.T @ (x_Nn @ V_ns)
    s_s, W_ss = torch.linalg.svd(GV_ms.double(), full_matrices=False)[1:]
    rows_sn = W_ss @ V_ns.double().T
    return _orthonormal(rows_sn[:rank][s_s[:rank] > 1e-7 * s_s[0]])


def _orthonormal(rows_qn: Tensor) -> Tensor:
    """Rows made orthonormal in order, each keeping its direction (one QR with a positive diagonal)."""
    if not len(rows_qn):
        return rows_qn
    Q_nq, R_qq = torch.linalg.qr(rows_qn.T)
    rows: Tensor = (Q_nq * torch.where(R_qq.diagonal() < 0, -1.0, 1.0)).T
    return rows


def _padded(rows_qn: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(rows_qn, (0, 0, 0, rank - len(rows_qn)))


def _scaled(gram: Tensor) -> Tensor:
    """The Gram divided by its mean diagonal: tiny gradients must not underflow in a factorisation."""
    return gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
