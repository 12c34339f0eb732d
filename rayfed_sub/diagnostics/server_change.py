"""The server's change in a round: its numerical rank (rank inflation: Prop. 1 of arXiv 2410.23111), and the distance
of the weight from the pretrained one.

Singular values up to the rounding noise of the weight W in float32 count as zero: noise of at most eps/2 * max|W| per
entry, whose spectral norm stays below eps/2 * max|W| * (sqrt m + sqrt n); four times that is the threshold.

Legend: m, n the weight's sizes, R summed rank of blocks, k columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed_sub.core.rng import stream
from rayfed_sub.core.side_by_side import side_by_side
from rayfed_sub.core.types import Change, Layer, Tensors

_SPARE = 16  # columns of a sketch beyond the expected rank
_WORTH = 4  # a sketch is used where it is at least so many times smaller than the matrix
_PART = 1.25  # rows and columns of a part, in multiples of the expected rank
_BANDS = 4  # of a triangle, which takes 10 of 16 blocks' products
_ROWS = 128  # of a chunk


def add_ranks(so_far: Mapping[str, int | None], update: Tensors) -> dict[str, int | None]:
    """Summed rank by layer of the updates so far and this one; None where one was not sent as factors."""
    new = {name: sent_rank(update, name) for name in so_far}
    return {
        name: None if total is None or (rank := new[name]) is None else total + rank for name, total in so_far.items()
    }


def sent_rank(tensors: Tensors, layer: str) -> int | None:
    """Rank of the factors, or of the single factor, that an update holds for the layer; None where it has none.

    >>> sent_rank({"up/left": torch.zeros(5, 2), "up/right": torch.zeros(2, 3)}, "up")
    2
    """
    left, right = tensors.get(f"{layer}/left"), tensors.get(f"{layer}/right")
    if left is not None:
        return left.shape[1]
    return None if right is None else right.shape[0]


@dataclass(frozen=True)
class ServerChange:
    """A layer's change at the server in a round.  rank: see `moved_rank`; accumulated: relative distance from the
    pretrained weight, ||W - W_0||_F / ||W_0||_F."""

    rank: int
    accumulated: float


def working(layers: Iterable[Layer]) -> int:
    """Bytes that the change of one of the layers takes while it is looked at, at most: three weights in float32, two in
    float64."""
    return max((28 * layer.m * layer.n for layer in layers), default=0)


def server_changes(
    before: Mapping[str, Change],
    after: Mapping[str, Change],
    pretrained: Callable[[str], Tensor],
    ranks: Mapping[str, int | None],
    *,
    dense: bool,
    sums: bool = False,
    each: int = 0,
) -> dict[str, ServerChange]:
    """The changes of the layers in `ranks` (layer -> `expected`), side by side; see `server_change`.

    pretrained: a layer's pretrained weight (m, n) float32.  each: see `working`."""

    def of(name: str) -> ServerChange | None:
        return server_change(before[name], after[name], pretrained(name), ranks[name], dense=dense, sums=sums)

    found = zip(ranks, side_by_side(of, ranks, each), strict=True)
    return {name: change for name, change in found if change is not None}


def server_change(
    before: Change, after: Change, W_mn: Tensor, expected: int | None, *, dense: bool, sums: bool = False
) -> ServerChange | None:
    """The layer's change from before a round to after it, both relative to the pretrained weight W (m, n).

    expected: summed rank of the round's updates, an upper bound if they were sent as factors and the change is their
    mean; sums: as in `change_rank`.  Returns None for a dense change without an expected rank, which takes seconds for
    a large layer, unless `dense` is set.
    """
    if after.dense is not None and expected is None and not dense:
        return None
    after_mn = after.apply(W_mn)
    far = _distance(after_mn, W_mn) / W_mn.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ServerChange(moved_rank(before, after, W_mn, after_mn, expected, sums=sums), float(far))


def change_rank(before_mn: Tensor, after_mn: Tensor, expected: int | None = None, *, sums: bool = False) -> int:
    """Rank of after - before, both (m, n) float32.

    expected: likely upper bound of the rank, such as the summed rank of the updates.  A sketch then replaces the Gram
    matrix of the short side, which is used after all where the rank exceeds the expected one (weight decay, momentum,
    noise).  sums: the change is a sum of products of that rank, and its rounding, so that nothing can exceed it; then a
    part of the matrix may do, whose singular values are no larger than the matrix's: where it has the expected rank, so
    has the matrix.

    >>> W = torch.zeros(4, 3)
    >>> change_rank(W, W + torch.ones(4, 1) @ torch.ones(1, 3))
    1
    """
    (m, n), noise = after_mn.shape, _noise(after_mn)
    part = 0 if not expected else int(_PART * expected) + _SPARE
    if expected and sums and 2 * part <= min(m, n) + part // 2:
        rows, columns = (torch.arange(part) * size // part for size in (m, n))
        after_kk, before_kk = (matrix[rows].index_select(1, columns) for matrix in (after_mn, before_mn))
        if _above(after_kk.double().sub_(before_kk), noise) == expected:
            return expected
    change_mn = after_mn.double().sub_(before_mn)
    if expected is not None and (expected + _SPARE) * _WORTH <= min(m, n):
        rank = int((_sketched(change_mn, expected + _SPARE) > noise).sum())
        if rank <= expected:
            return rank
    return _above(change_mn, noise)


def _above(matrix_mn: Tensor, noise: float) -> int:
    """How many singular values exceed `noise`, by Sylvester's law of inertia: as many as L D L^T = M^T M - noise^2 has
    positive eigenvalues in D.  It takes a sixth of the time of the eigenvalues."""
    gram_kk = _lower_gram(matrix_mn)
    gram_kk.diagonal().sub_(noise**2)
    factor_kk, pivot_k = torch.linalg.ldl_factor(gram_kk)
    single_k = pivot_k > 0  # a block of two, with an eigenvalue of either sign, has negative pivots
    return int((factor_kk.diagonal()[single_k] > 0).sum()) + int((~single_k).sum()) // 2


def _lower_gram(matrix_mn: Tensor) -> Tensor:
    """Lower triangle, in bands, of the Gram matrix of the short side, (k, k); the factorisation reads no more."""
    m, n = matrix_mn.shape
    tall = matrix_mn if n <= m else matrix_mn.T
    gram_kk = tall.new_zeros(k := tall.shape[1], k)
    for begin in range(0, k, band := -(-k // _BANDS)):
        end = min(begin + band, k)
        gram_kk[begin:end, :end] = tall[:, begin:end].T @ tall[:, :end]
    return gram_kk


def _distance(one_mn: Tensor, other_mn: Tensor) -> Tensor:
    """Frobenius norm of the difference, in chunks that stay in the cache: `torch.dist` makes the whole difference."""
    chunks = zip(one_mn.split(_ROWS), other_mn.split(_ROWS), strict=True)
    norms = torch.stack([(one - other).norm() for one, other in chunks])
    return norms.square().sum().sqrt()


def moved_rank(
    before: Change, after: Change, W_mn: Tensor, after_mn: Tensor, expected: int | None = None, *, sums: bool = False
) -> int:
    """Rank of the difference of two changes of the pretrained weight W; after_mn: `after.apply(W)`, all (m, n) float32.

    Computed from the factors alone where both are blocks over equal multiples of W; otherwise see `change_rank`.
    expected: of the updates alone; replaced blocks are added to it here.  sums: as in `change_rank`.
    """
    if expected is not None:
        expected += sum(block.right.shape[0] for block in before.blocks)
    if before.dense is not None or after.dense is not None or before.base_scale != after.base_scale:
        return change_rank(before.apply(W_mn), after_mn, expected, sums=sums)
    blocks = [*((block, 1.0) for block in after.blocks), *((block, -1.0) for block in before.blocks)]
    if not blocks:
        return 0
    lefts = [sign * block.scale * _left(block.left.double(), block.core) for block, sign in blocks]
    left_mR, right_Rn = torch.cat(lefts, dim=1), torch.cat([block.right.double() for block, _ in blocks])
    # With left = Q_L C_L and right^T = Q_R C_R the singular values are those of C_L C_R^T.
    core_qR, core_sR = (torch.linalg.qr(factor, mode="r").R for factor in (left_mR, right_Rn.T))
    return int((torch.linalg.svdvals(core_qR @ core_sR.T) > _noise(after_mn)).sum())


def _left(left_mr: Tensor, core_rr: Tensor | None) -> Tensor:
    return left_mr if core_rr is None else left_mr @ core_rr.double()


def _noise(after_mn: Tensor) -> float:
    """Threshold below which singular values count as zero."""
    low, high = torch.aminmax(after_mn)
    m, n = after_mn.shape
    cut: float = 2 * torch.finfo(torch.float32).eps * max(-float(low), float(high)) * (m**0.5 + n**0.5)
    return max(cut, 1e-30)  # all-zero weights have no rounding


def _sketched(change_mn: Tensor, k: int) -> Tensor:
    """The k largest singular values, (k,) float64, from k random directions after two turns of subspace iteration.

    They do not exceed the matrix's singular values.  The directions are found in float32, the values in float64.
    """
    float_mn = change_mn.float()
    draw_nk = stream(0, "rank sketch", *change_mn.shape).standard_normal((change_mn.shape[1], k))
    V_nk = torch.from_numpy(draw_nk).float()
    for _ in range(2):
        V_nk = torch.linalg.qr(float_mn.T @ torch.linalg.qr(float_mn @ V_nk).Q).Q
    core_kk = torch.linalg.qr(change_mn @ V_nk.double(), mode="r").R
    sigma_k: Tensor = torch.linalg.svdvals(core_kk)
    return sigma_k
