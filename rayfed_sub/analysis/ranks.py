"""Numerical rank of what a round changed (rank inflation: Prop. 1 of arXiv 2410.23111)."""

from __future__ import annotations

import torch
from torch import Tensor


def change_rank(before_mn: Tensor, after_mn: Tensor) -> int:
    """Rank of after - before, both (m, n) float32: singular values above what rounding the weights itself makes up.

    Storing W in float32 adds noise of at most eps/2 * max|W| per entry, whose spectral norm stays below
    eps/2 * max|W| * (sqrt m + sqrt n); four times that is the cut.

    >>> W = torch.zeros(4, 3)
    >>> change_rank(W, W + torch.ones(4, 1) @ torch.ones(1, 3))
    1
    """
    change_mn = after_mn.double() - before_mn.double()
    m, n = change_mn.shape
    short = change_mn.T @ change_mn if n <= m else change_mn @ change_mn.T
    noise = 2 * torch.finfo(torch.float32).eps * float(after_mn.abs().max()) * (m**0.5 + n**0.5)
    noise = max(noise, 1e-30)  # all-zero weights have no rounding
    return int((torch.linalg.eigvalsh(short) > noise**2).sum())
