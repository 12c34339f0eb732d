"""Diagnostics of a cohort, by layer, from watched clients' changes: norms, ranks, drift, overlap, truncation.

D_k and E_k are client k's change and term (see `client_change.py`), p_k its weight divided by the watched clients' sum:
    D = sum_k p_k D_k    mean change (m, n)
    P = sum_k p_k E_k    mean term (m, n)
All figures but the spectra of wide sums follow from two Gram matrices in float64, of all clients' left factors and of
all clients' right factors: <D_j, D_k> is a sum over one block of both, a client's spectrum needs its diagonal blocks,
the spectrum of D the whole.  Norms have the unit of the weights, other figures none.  An undefined figure (direction of
a zero change, pairs of a single client) is None, never NaN.

Legend: N watched clients, m, n layer sizes, a columns of a client's term, R of its change, K = N R, q directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed_sub.core.lowrank import EPS, Spectrum, directions, from_grams, sides, singular_values, spectrum
from rayfed_sub.core.schemas import ClientLayer, CohortLayer
from rayfed_sub.core.types import Layer
from rayfed_sub.diagnostics.client_change import ClientChange, rows

CLIENT_VALUES, COHORT_VALUES = 16, 64
"""Most singular values that a row keeps."""

Watched = Sequence[tuple[int, float, ClientChange]]
"""(client, raw weight, change) of each watched client."""


def diagnose(round: int, layer: Layer, watched: Watched) -> tuple[list[ClientLayer], CohortLayer]:
    """Rows of a layer and round, for at least one client; `accumulated` and `server_rank` stay None.

    It takes O(K^2 (m + n) + K^3) operations and two (K, K) float64 matrices, K the columns of all clients' factors;
    nothing of size N m n, and of size m n only where K > min(m, n) or where a change came as a sample.
    """
    movements = [client_change for _, _, client_change in watched]
    weight_N = torch.tensor([weight for _, weight, _ in watched], dtype=torch.float64)
    p_N = weight_N / weight_N.sum() if weight_N.any() else torch.full_like(weight_N, 1 / len(weight_N))
    if any("rows" in client_change.tensors for client_change in movements):
        sample_Nx = torch.stack([rows(layer, client_change).flatten() for client_change in movements])
        pairs = _pairs(sample_Nx @ sample_Nx.T, p_N)
        clients = [_client(round, layer, pairs, k, one, None) for k, one in enumerate(watched)]
        return clients, _cohort(round, layer, pairs, clients, None)
    size, stack = max(layer.m, layer.n), _stacked(layer, movements)
    pairs = _pairs(stack.inner, p_N)
    sigma_NR, W_NRR = _directions(layer, stack)
    spectra_N = [spectrum(sigma_R, size) for sigma_R in sigma_NR]
    clients = [
        _client(round, layer, pairs, k, one, found)
        for k, (one, found) in enumerate(zip(watched, spectra_N, strict=True))
    ]
    sigma_K = _singular_values(layer, stack.changes, p_N)
    terms = _terms(layer, stack, p_N, sigma_K, cross=all(client_change.kind == "lora" for client_change in movements))
    mean = spectrum(sigma_K, size) if pairs.norm else spectrum(sigma_K[:0], size)
    overlap = _overlap(layer, stack, W_NRR, [found.rank for found in spectra_N])
    return clients, _cohort(round, layer, pairs, clients, (mean, *terms, overlap))


def _client(
    round: int, layer: Layer, pairs: _Pairs, k: int, watched: tuple[int, float, ClientChange], found: Spectrum | None
) -> ClientLayer:
    client, _, client_change = watched
    return ClientLayer(
        round=round,
        client=client,
        layer=layer.name,
        norm=client_change.norm if found is None else found.norm,
        rank=None if found is None else found.rank,
        stable_rank=None if found is None else found.stable_rank,
        effective_rank=None if found is None else found.effective_rank,
        cosine=pairs.cosines[k],
        distance=pairs.distances[k],
        turned=client_change.turned,
        gradient_energy=client_change.energy,
        gradient_rank=client_change.gradient_rank,
        spectrum=() if found is None else found.values[:CLIENT_VALUES],
    )


def _cohort(
    round: int,
    layer: Layer,
    pairs: _Pairs,
    clients: Sequence[ClientLayer],
    found: tuple[Spectrum, float | None, float | None, float | None] | None,
) -> CohortLayer:
    mean, truncated, cross_term, overlap = found or (None, None, None, None)
    return CohortLayer(
        round=round,
        layer=layer.name,
        clients=len(clients),
        norm=pairs.norm,
        rank=None if mean is None else mean.rank,
        rank_sum=None if mean is None else sum(client.rank or 0 for client in clients),
        stable_rank=None if mean is None else mean.stable_rank,
        effective_rank=None if mean is None else mean.effective_rank,
        truncated=truncated,
        cross_term=cross_term,
        overlap=overlap,
        agreement=pairs.agreement,
        drift=pairs.drift,
        accumulated=None,
        server_rank=None,
        spectrum=() if mean is None else mean.values[:COHORT_VALUES],
        full_rank=min(layer.m, layer.n),
    )


@dataclass(frozen=True)
class _Pairs:
    """Quantities from the inner products of the changes."""

    norm: float
    cosines: list[float | None]
    distances: list[float | None]
    agreement: float | None
    drift: float | None


def _pairs(inner_NN: Tensor, p_N: Tensor) -> _Pairs:
    """Figures from inner = <D_j, D_k>.  A mean below float32's rounding error of its terms counts as zero."""
    square_N, dot_N = inner_NN.diagonal().clamp_min(0), inner_NN @ p_N
    norm_N = square_N.sqrt()
    norm = float((p_N @ dot_N).clamp_min(0).sqrt())
    if norm <= EPS * float(p_N @ norm_N):
        norm = 0.0
    gap_N = (square_N - 2 * dot_N + norm**2).clamp_min(0)
    moved = norm_N.nonzero()[:, 0]
    j, k = moved[torch.triu_indices(len(moved), len(moved), 1)]
    cosine_q = inner_NN[j, k] / (norm_N[j] * norm_N[k])
    cosines = (dot_N / (norm_N * norm)).tolist()
    return _Pairs(
        norm=norm,
        cosines=[cosine if norm and own else None for cosine, own in zip(cosines, norm_N.tolist(), strict=True)],
        distances=[gap / norm if norm else None for gap in gap_N.sqrt().tolist()],
        agreement=float(cosine_q.mean()) if len(cosine_q) else None,
        drift=float((p_N @ gap_N).sqrt()) / norm if norm else None,
    )


@dataclass(frozen=True)
class _Products:
    """N products L_k R_k, padded with zeros to c columns, left factors as rows L_k^T, and the Grams of all, float64."""

    left_Ncm: Tensor
    right_Ncn: Tensor
    left_NcNc: Tensor
    right_NcNc: Tensor


@dataclass(frozen=True)
class _Stack:
    """The clients' changes, their terms (None: the changes themselves) and the columns of each client's term."""

    changes: _Products
    terms: _Products | None
    columns: tuple[int, ...]

    @property
    def inner(self) -> Tensor:
        """<D_j, D_k>, (N, N)."""
        return (self.changes.left_NcNc * self.changes.right_NcNc).sum((1, 3))


def _stacked(layer: Layer, movements: Sequence[ClientChange]) -> _Stack:
    """Left factors in halves h: `left`, and `before` where any client has one; right ones in halves i <= h: `right`,
    and `shift` likewise.  Changes are the products of the first i halves, terms those of the halves' sum with `right`.
    """
    N, (m, n) = len(movements), (layer.m, layer.n)
    columns = tuple(client_change.tensors["right"].shape[0] for client_change in movements)
    a = max(columns)
    left_Nham = _side(movements, ("left", "before"), a, m)
    right_Nian = _side(movements, ("right", "shift"), a, n)
    h, i = left_Nham.shape[1], right_Nian.shape[1]
    c = i * a
    left_NhaNha, right_NiaNia = _gram(left_Nham), _gram(right_Nian)
    changes = _Products(
        left_Nham[:, :i].reshape(N, c, m),
        right_Nian.reshape(N, c, n),
        left_NhaNha[:, :i, :, :, :i].reshape(N, c, N, c),
        right_NiaNia.reshape(N, c, N, c),
    )
    if h == 1:
        return _Stack(changes, None, columns)
    terms = _Products(left_Nham.sum(1), right_Nian[:, 0], left_NhaNha.sum((1, 4)), right_NiaNia[:, 0, :, :, 0])
    return _Stack(changes, terms, columns)


def _side(movements: Sequence[ClientChange], roles: tuple[str, str], a: int, length: int) -> Tensor:
    """(N, 1 or 2, a, length) float64: the factors of the first role, and of the second if any client has one, as rows,
    with zeros where there are none."""
    used = [role for role in roles if any(role in client_change.tensors for client_change in movements)]
    out = torch.zeros(len(movements), len(used), a, length, dtype=torch.float64)
    for k, client_change in enumerate(movements):
        for h, role in enumerate(used):
            if role in client_change.tensors:
                tensor = client_change.tensors[role]
                as_rows = tensor.T if roles[0] == "left" else tensor
                out[k, h, : len(as_rows)] = as_rows
    return out


def _gram(x_Nhax: Tensor) -> Tensor:
    """The inner products of all rows, (N, h, a, N, h, a)."""
    rows_Kx = x_Nhax.reshape(-1, x_Nhax.shape[-1])
    return (rows_Kx @ rows_Kx.T).reshape(x_Nhax.shape[:-1] * 2)


def _singular_values(layer: Layer, products: _Products, p_N: Tensor) -> Tensor:
    """Singular values of sum_k p_k L_k R_k, float64, largest first."""
    N, c, _ = products.left_Ncm.shape
    if N * c > min(layer.m, layer.n):  # the sum itself is smaller than the Grams
        left_Km = (products.left_Ncm * p_N[:, None, None]).reshape(N * c, layer.m)
        return singular_values(left_Km.T, products.right_Ncn.reshape(N * c, layer.n))
    left_NcNc = products.left_NcNc * p_N[:, None, None, None] * p_N[:, None]
    return from_grams(left_NcNc.reshape(N * c, N * c), products.right_NcNc.reshape(N * c, N * c))


def _terms(
    layer: Layer, stack: _Stack, p_N: Tensor, sigma_K: Tensor, *, cross: bool
) -> tuple[float | None, float | None]:
    """(truncated, cross_term, the latter if asked for); sigma: of the mean change."""
    terms = stack.terms or stack.changes
    if stack.terms is not None:
        sigma_K = _singular_values(layer, stack.terms, p_N)
    norm_N = torch.einsum("jajb,jajb->j", terms.left_NcNc, terms.right_NcNc).clamp_min(0).sqrt()
    norm = float(sigma_K.norm())
    if norm <= EPS * float(p_N @ norm_N):
        return None, None
    truncated = float(sigma_K[max(stack.columns) :].norm()) / norm
    if not cross:
        return truncated, None
    left_NcNc, right_NcNc = (_centred(gram, p_N) for gram in (terms.left_NcNc, terms.right_NcNc))
    missed = torch.einsum("j,k,jakb,jakb->", p_N, p_N, left_NcNc, right_NcNc)
    return truncated, float(missed.clamp_min(0).sqrt()) / norm


def _centred(gram_NcNc: Tensor, p_N: Tensor) -> Tensor:
    """The Gram of X_k - sum_k p_k X_k from that of X_k."""
    half = gram_NcNc - torch.einsum("j,jakb->akb", p_N, gram_NcNc)
    return half - torch.einsum("k,jakb->jab", p_N, half)[:, :, None]


def _directions(layer: Layer, stack: _Stack) -> tuple[Tensor, Tensor]:
    """Each client's `directions`, on the side that GaLore projects: sigma (N, c) and W (N, c, c)."""
    left_Ncc, right_Ncc = (
        torch.diagonal(gram, dim1=0, dim2=2).movedim(-1, 0)
        for gram in (stack.changes.left_NcNc, stack.changes.right_NcNc)
    )
    far, near = (left_Ncc, right_Ncc) if _right(layer) else (right_Ncc, left_Ncc)
    return directions(far, near, max(layer.m, layer.n))


def _right(layer: Layer) -> bool:
    return sides(layer)[0].endswith("/right")


def _overlap(layer: Layer, stack: _Stack, W_Ncc: Tensor, ranks: Sequence[int]) -> float | None:
    """Mean subspace overlap over pairs of clients with a change; None without a pair."""
    count_N = torch.tensor([min(pair) for pair in zip(ranks, stack.columns, strict=True)])
    moved = count_N.nonzero()[:, 0]
    j, k = moved[torch.triu_indices(len(moved), len(moved), 1)]
    if not len(j):
        return None
    q = max(stack.columns)
    W_Nqc = W_Ncc[:, :q] * (torch.arange(q) < count_N[:, None])[..., None]
    near_NcNc = stack.changes.right_NcNc if _right(layer) else stack.changes.left_NcNc
    N, c = W_Nqc.shape[0], W_Nqc.shape[2]
    turned_NqNc = (W_Nqc @ near_NcNc.reshape(N, c, N * c)).reshape(N, q, N, c)
    cosine_NNqq = turned_NqNc.transpose(1, 2) @ W_Nqc.mT
    shared_NN = cosine_NNqq.square().sum((2, 3))
    return float((shared_NN[j, k] / torch.minimum(count_N[j], count_N[k])).mean())
