"""Four rules for GaLore's basis from a batch (GaLore, arXiv 2403.03507; `random`: GoLore, 2410.11289).

A layer's gradient for one client is G = d^T x (m, n), where x (N, n) is the layer's input and d (N, m) the
gradient of its output; neither `exact`, `randomized` nor `random` forms G while N < min(m, n).
The basis is returned as rows, (r, k): for the right side (m >= n, k = n) these are G's top right singular
vectors; for the left side (m < n, k = m) call with x and d swapped, which transposes G.

Legend: G clients, g of them of like size, N tokens (rows of x and d), m, n layer sizes, r rank,
k = size of the projected side, q = kept directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional

from rayfed_sub.core.devices import free_to_read, kind_of, onto, sent
from rayfed_sub.core.lowrank import signed

_GRAM_CUT = 1e-13  # eigenvalues of d d^T below this share of the largest are rounding (float64 Gram of float32 data)
_ENERGY_CUT = 1e-14  # squared singular values of G below this share of the largest count as zero: rank(G) < r
_TOGETHER = 2**22  # numbers of x and d that are factorised at once: their float64 copies take 32 MiB
_OVERSAMPLE = 4  # extra directions of the randomised range finder
_POWER_STEPS = 2  # its subspace iterations
_EVEN = 8  # numbers of float64 in 64 bytes
_MORE = 8  # directions besides the rank that float32's subspace iteration carries along
_SMALLEST, _RESIDUAL = 1e-3, 5e-5  # of float32's answers that are taken, see `single`
_TINY = torch.finfo(torch.float32).tiny
_QUICK_IN_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities


def bases(
    kind: str,
    x_GNn: Tensor,
    d_GNm: Tensor,
    old_Grn: Tensor,
    draw: Callable[[int], Generator],
    *,
    swapped: bool = False,
) -> Tensor:
    """The orthonormal row bases (G, r, n) of the clients' gradients d^T x, float32; rows beyond a gradient's rank are
    zero.

    kind: `exact` | `svd` | `randomized` | `random`.  old_Grn: the bases so far (zero rows: none); new rows are signed
    to agree with them, except for `svd`, which is torch's answer untouched, as galore-torch uses it.  draw: the stream
    of the client at a position, for the random projectors.  swapped: x and d have changed places, for the left side
    (only `svd` minds: torch gives a matrix and its transpose other signs, and galore-torch factorises the gradient as
    it lies).  A gradient of zero gives a basis of zeros; the caller has already refused non-finite input.  A client's
    basis has the same bits beside any others.
    """
    rows_Grn = torch.zeros_like(old_Grn)
    rank = rows_Grn.shape[1]
    # Padding and masked tokens send no gradient; on the left side x is what the gradient flows through.
    used_GN = (extremes(x_GNn) != 0).any(dim=0) & (extremes(d_GNm) != 0).any(dim=0)
    if not free_to_read(x_GNn.device):
        rows_Grn = _unasked(kind, x_GNn, d_GNm, used_GN, old_Grn, draw, swapped)
        return rows_Grn if kind == "svd" else signed(rows_Grn, old_Grn)
    if kind != "exact":
        for g in range(len(rows_Grn)):
            if used_GN[g].any() or kind == "random":
                x_Nn, d_Nm = x_GNn[g, used_GN[g]], d_GNm[g, used_GN[g]]
                rows_Grn[g] = _one(kind, x_Nn, d_Nm, rank, old_Grn[g], draw(g), swapped)
        return rows_Grn if kind == "svd" else signed(rows_Grn, old_Grn)
    for alike, count, x_gNn, d_gNm in _alike(used_GN, x_GNn, d_GNm):
        unused_gN = (torch.arange(x_gNn.shape[1], device=x_gNn.device) >= count).expand(len(alike), -1)
        rows_Grn[alike] = _exact(x_gNn, d_gNm, unused_gN, rank)
    return signed(rows_Grn, old_Grn)


def _unasked(
    kind: str,
    x_GNn: Tensor,
    d_GNm: Tensor,
    used_GN: Tensor,
    old_Grn: Tensor,
    draw: Callable[[int], Generator],
    swapped: bool,
) -> Tensor:
    """The bases, unsigned, on a device that is asked for nothing but what a factorisation asks itself: no token is left
    out, for their numbers would have to be known."""
    (G, rank), (N, n), m = old_Grn.shape[:2], x_GNn.shape[1:], d_GNm.shape[2]
    if kind == "exact":
        together = max(1, _TOGETHER // (N * (n + m)))
        some = [slice(first, first + together) for first in range(0, G, together)]
        return torch.cat([_on_this_device(x_GNn[g], d_GNm[g], ~used_GN[g], rank) for g in some])
    rows_Grn = torch.stack([_one(kind, x_GNn[g], d_GNm[g], rank, old_Grn[g], draw(g), swapped) for g in range(G)])
    return rows_Grn if kind == "random" else rows_Grn * used_GN.any(dim=1)[:, None, None]


def eigen_dtype(device: torch.device) -> torch.dtype:
    """The type of `exact`'s eigenproblems.  float64 on processors and on GPUs that are quick in it (P100, V100, A100,
    H100, B200: a half of float32's speed; others have a thirty-second or a sixty-fourth)."""
    if device.type == "cuda":
        return torch.float64 if torch.cuda.get_device_capability(device) in _QUICK_IN_DOUBLE else torch.float32
    return torch.float32 if kind_of(device) == "cuda" else torch.float64


def _on_this_device(x_gNn: Tensor, d_gNm: Tensor, unused_gN: Tensor, rank: int) -> Tensor:
    """`_exact` in the device's type; in float64 where float32 does not do."""
    if eigen_dtype(x_gNn.device) == torch.float64:
        return _exact(x_gNn.double(), d_gNm.double(), unused_gN, rank)
    rows_grn, close_g = single(x_gNn, d_gNm, rank)
    others = [g for g, close in enumerate(close_g.tolist()) if not close]
    if others:
        index = onto(others, x_gNn.device)
        rows_grn[index] = _exact(x_gNn[index].double(), d_gNm[index].double(), unused_gN[index], rank)
    return rows_grn


def single(x_gNn: Tensor, d_gNm: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Top right singular vectors (g, rank, n) of each d^T x in float32, and whether they are close to the exact ones:
    the last singular value is above `_SMALLEST` of the first, and of no vector's A^T A v a share of more than
    `_RESIDUAL` lies beside the directions that were looked at.

    With d^T = Q R the rows of A = R x have the same right singular vectors (where d has fewer columns than rows, of
    d^T x itself).  The eigenvectors of A's scaled Gram are right but for directions whose share of the largest singular
    value is below a root of float32's precision; two steps of subspace iteration by QR, which squares nothing, mend
    those.
    """
    (N, n), m = x_gNn.shape[1:], d_gNm.shape[2]
    x_gNn, d_gNm = (t / t.abs().amax(dim=(1, 2), keepdim=True).clamp_min(_TINY) for t in (x_gNn.float(), d_gNm.float()))
    A_gan = torch.linalg.qr(d_gNm.mT, mode="r").R @ x_gNn if m > N else d_gNm.mT @ x_gNn
    a = A_gan.shape[1]
    size = min(rank + _MORE, a, n)
    if a < n:
        V_gnq = A_gan.mT @ torch.linalg.eigh(_scaled(A_gan @ A_gan.mT)).eigenvectors[:, :, -size:].flip(2)
    else:
        V_gnq = torch.linalg.eigh(_scaled(A_gan.mT @ A_gan)).eigenvectors[:, :, -size:].flip(2)
    V_gnq = torch.linalg.qr(V_gnq).Q
    for _ in range(_POWER_STEPS):
        V_gnq = torch.linalg.qr(A_gan.mT @ torch.linalg.qr(A_gan @ V_gnq).Q).Q
    s_gq, W_gqq = torch.linalg.svd(torch.linalg.qr(A_gan @ V_gnq, mode="r").R)[1:]
    rows_gqn, s_gq = (W_gqq @ V_gnq.mT)[:, :rank], s_gq[:, :rank]
    left_gqn = (rows_gqn @ A_gan.mT) @ A_gan
    left_gqn = left_gqn - (left_gqn @ V_gnq) @ V_gnq.mT  # beside the directions that the small problem has seen
    apart_gq = left_gqn.norm(dim=2) / s_gq.square().clamp_min(_TINY)
    full = rows_gqn.shape[1] == rank
    close_g = (s_gq[:, -1] > _SMALLEST * s_gq[:, 0]) & (apart_gq.amax(dim=1) < _RESIDUAL) & full
    return functional.pad(_orthonormal(rows_gqn), (0, 0, 0, rank - rows_gqn.shape[1])), close_g


def extremes(x_GNn: Tensor) -> Tensor:
    """The largest and the smallest number of each row, (2, G, N); both are NaN where one is.  A mask over
    all numbers finds rows that are not finite, or zero, ten times more slowly."""
    return torch.stack([x_GNn.amax(dim=2), x_GNn.amin(dim=2)])


def _alike(used_GN: Tensor, x_GNn: Tensor, d_GNm: Tensor) -> Iterator[tuple[Sequence[int], int, Tensor, Tensor]]:
    """Clients with equally many used tokens, their number, and these tokens alone, (g, N, n) and (g, N, m) float64:
    they share their factorisations, as many of them as `_TOGETHER` allows.

    Zeros follow the tokens up to a multiple of `_EVEN`: factorisations have other bits where memory is not aligned.
    """
    G, N = used_GN.shape
    counts: list[int] = [N] * G if used_GN.all() else used_GN.sum(dim=1).tolist()
    for count in sorted({count for count in counts if count}):
        alike = [g for g, own in enumerate(counts) if own == count]
        together = max(1, _TOGETHER // (count * (x_GNn.shape[2] + d_GNm.shape[2])))
        for some in (alike[i : i + together] for i in range(0, len(alike), together)):
            pair = [x_GNn[some], d_GNm[some]] if len(some) < G else [x_GNn, d_GNm]
            if count < N:
                token_gN = used_GN[some].nonzero()[:, 1].view(len(some), count)
                client_g1 = torch.arange(len(some), device=token_gN.device)[:, None]
                pair = [t[client_g1, token_gN] for t in pair]
            x_gNn, d_gNm = (t.double() for t in pair)
            if more := -count % _EVEN:
                x_gNn, d_gNm = (functional.pad(t, (0, 0, 0, more)) for t in (x_gNn, d_gNm))
            yield some, count, x_gNn, d_gNm


def basis(
    kind: str, x_Nn: Tensor, d_Nm: Tensor, rank: int, old_rn: Tensor | None, rng: Generator, *, swapped: bool = False
) -> Tensor:
    """The basis (rank, n) of one client, as `bases` gives it.

    >>> from rayfed_sub.core.rng import stream
    >>> x, d = torch.eye(3)[:2], torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0]])   # G has singular values 3 and 2
    >>> basis("exact", x, d, 1, None, stream(0)).abs()
    tensor([[1., 0., 0.]])
    """
    old_1rn = x_Nn.new_zeros(1, rank, x_Nn.shape[1], dtype=torch.float32)
    if old_rn is not None:
        old_1rn[0] = old_rn
    return bases(kind, x_Nn[None], d_Nm[None], old_1rn, lambda g: rng, swapped=swapped)[0]


def _one(kind: str, x_Nn: Tensor, d_Nm: Tensor, rank: int, old_rn: Tensor, rng: Generator, swapped: bool) -> Tensor:
    """A client's basis (rank, n), unsigned, by a rule that takes clients one at a time."""
    n = x_Nn.shape[1]
    if kind == "random":
        new_rn = _orthonormal(sent(torch.from_numpy(rng.standard_normal((rank, n))), x_Nn.device))
    elif kind == "svd":
        G_mn = d_Nm.float().T @ x_Nn.float()
        if swapped:
            new_rn = torch.linalg.svd(G_mn.T, full_matrices=False).U.T[:rank]
        else:
            new_rn = torch.linalg.svd(G_mn, full_matrices=False).Vh[:rank]
    elif kind == "randomized":
        new_rn = _randomized(x_Nn, d_Nm, rank, old_rn, rng)
    else:
        raise AssertionError(f"unknown projector {kind}")
    return functional.pad(new_rn.float(), (0, 0, 0, rank - len(new_rn)))


def _exact(x_GNn: Tensor, d_GNm: Tensor, unused_GN: Tensor, rank: int) -> Tensor:
    """Top right singular vectors (G, rank, n) of each d^T x, zero beyond its rank, from token Grams: with
    d d^T = C C^T, (C^T x)(C^T x)^T = M is (N, N), and M's eigenvectors E with eigenvalues w give V = w^-1/2 E^T C^T x.
    float64, because the Grams square the condition.  unused_GN: tokens that are zeros."""
    (N, n), m = x_GNn.shape[1:], d_GNm.shape[2]
    if min(m, n) > N:
        C_GNN = _roots(d_GNm @ d_GNm.mT, unused_GN)
        w_GN, E_GNN = torch.linalg.eigh(_scaled(C_GNN.mT @ (x_GNn @ x_GNn.mT) @ C_GNN))
        energy_Gq, E_GNq = w_GN.flip(1)[:, :rank], E_GNN.flip(2)[:, :, :rank]
        rows_Gqn = (C_GNN @ E_GNq).mT @ x_GNn
    else:  # the Gram would be larger than the matrix itself: form G, then the Gram of its short side
        G_Gmn = d_GNm.mT @ x_GNn
        if n <= m:
            _, E_Gnn = torch.linalg.eigh(_scaled(G_Gmn.mT @ G_Gmn))
            rows_Gqn = E_Gnn.flip(2).mT[:, :rank]
            energy_Gq = (G_Gmn @ rows_Gqn.mT).square().sum(1)
        else:
            _, E_Gmm = torch.linalg.eigh(_scaled(G_Gmn @ G_Gmn.mT))
            rows_Gqn = E_Gmm.flip(2).mT[:, :rank] @ G_Gmn
            energy_Gq = rows_Gqn.square().sum(2)
    kept_Gq = (energy_Gq > _ENERGY_CUT * energy_Gq[:, :1]).cumprod(1).bool()
    # Left-out rows come last, so that they do not turn the rows before them.
    rows_Gqn = _orthonormal(rows_Gqn) * kept_Gq[:, :, None]
    return functional.pad(rows_Gqn.float(), (0, 0, 0, rank - rows_Gqn.shape[1]))


def _roots(gram_GNN: Tensor, unused_GN: Tensor) -> Tensor:
    """C (G, N, N) with C C^T = each Gram, up to a positive factor; ones on the diagonal at unused tokens, or the Gram
    would not be definite."""
    scaled_GNN = _scaled(gram_GNN)
    scaled_GNN.diagonal(dim1=1, dim2=2).masked_fill_(unused_GN, 1.0)
    C_GNN, failed_G = torch.linalg.cholesky_ex(scaled_GNN)
    if failed_G.any():  # linearly dependent output gradients: the positive part is all there is
        s_gN, U_gNN = torch.linalg.eigh(scaled_GNN[failed_G > 0])
        s_gN = torch.where(s_gN > _GRAM_CUT * s_gN[:, -1:], s_gN, 0.0)
        C_GNN[failed_G > 0] = U_gNN * s_gN.sqrt()[:, None]
    roots: Tensor = C_GNN
    return roots


def _randomized(x_Nn: Tensor, d_Nm: Tensor, rank: int, old_rn: Tensor, rng: Generator) -> Tensor:
    """Randomised subspace iteration (Halko, Martinsson, Tropp 2011), started from the old basis, zeros without one.
    G v = d^T (x v) and G^T u = x^T (d u), so G is never formed."""
    dtype = eigen_dtype(x_Nn.device)
    x_Nn, d_Nm = x_Nn.to(dtype), d_Nm.to(dtype)  # directions of like size are as unsure as the rounding
    n, size = x_Nn.shape[1], min(rank + _OVERSAMPLE, *x_Nn.shape, d_Nm.shape[1])
    start_sn = sent(torch.from_numpy(rng.standard_normal((size, n))).to(x_Nn.dtype), x_Nn.device)
    warm = min(rank, size)
    start_sn[:warm] += n**0.5 * old_rn[:warm].to(start_sn)  # a random row has length sqrt(n)
    V_ns = start_sn.T
    for _ in range(_POWER_STEPS):
        U_ms = torch.linalg.qr(d_Nm.T @ (x_Nn @ V_ns)).Q
        V_ns = torch.linalg.qr(x_Nn.T @ (d_Nm @ U_ms)).Q
    GV_ms = d_Nm.T @ (x_Nn @ V_ns)
    s_s, W_ss = torch.linalg.svd(GV_ms, full_matrices=False)[1:]
    rows_sn = W_ss @ V_ns.T
    kept_r = s_s[:rank] > 1e-7 * s_s[0]
    if free_to_read(kept_r.device):
        return _orthonormal(rows_sn[:rank][kept_r])
    rows: Tensor = _orthonormal(rows_sn[:rank]) * kept_r[:, None]
    return rows


def _orthonormal(rows_qn: Tensor) -> Tensor:
    """Rows (..., q, n) made orthonormal in order, each keeping its direction (one QR with a positive diagonal)."""
    Q_nq, R_qq = torch.linalg.qr(rows_qn.mT)
    rows: Tensor = (Q_nq * torch.where(R_qq.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]).mT
    return rows


def _scaled(gram: Tensor) -> Tensor:
    """Each Gram divided by its mean diagonal: tiny gradients must not underflow in a factorisation."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return gram / mean.clamp_min(torch.finfo(gram.dtype).tiny)
