"""Square roots of Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


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
