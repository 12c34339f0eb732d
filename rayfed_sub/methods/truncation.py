"""The best approximation of a product of two factors by factors of lower rank (Eckart, Young, 1936).

By QR of both factors and an SVD of the small core between them: with L = Q_L C_L and R^T = Q_R C_R,
L R = Q_L (C_L C_R^T) Q_R^T, and the core's singular values are those of L R.  The (m, n) matrix is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfed_sub.training.projectors import signed


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
