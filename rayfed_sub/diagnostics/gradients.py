"""Low-rank share of the gradients of a round's first local step, from layers' inputs and output gradients.

A layer's gradient for one client is G = d^T x, (m, n).  Its squared singular values are the eigenvalues of
C^T (x x^T) C with d d^T = C C^T, a matrix of tokens by tokens; G itself is formed where that is smaller.

Legend: g clients of a part, N tokens of a client's batch (rows of x and d), m, n layer sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayfed_sub.core.lowrank import root
from rayfed_sub.training.layers import Capture, Part


@dataclass
class GradientWatch:
    """Gradients to measure, and the measurements.

    ranks: client -> rank r of the share; layers: names.  seen: (client, layer) -> (energy, effective rank).
    """

    ranks: dict[int, int]
    layers: frozenset[str]
    seen: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)

    def hooks(self, layer: str, clients: Sequence[int]) -> list[Capture]:
        """The layer's backward hooks for these clients; none for a layer or clients that are not watched."""
        if layer not in self.layers or not self.ranks.keys() & set(clients):
            return []

        def hook(parts: Sequence[Part]) -> None:
            for first, x_gNn, d_gNm in parts:
                for client, x_Nn, d_Nm in zip(clients[first:], x_gNn, d_gNm, strict=False):
                    if client in self.ranks:
                        found = energy(x_Nn, d_Nm, self.ranks[client])
                        if found is not None:
                            self.seen[client, layer] = found

        return [hook]


def energy(x_Nn: Tensor, d_Nm: Tensor, rank: int) -> tuple[float, float] | None:
    """(share of |G|_F^2 in the `rank` largest singular values of G = d^T x, from 0 to 1; G's effective rank, the
    exponential of the entropy of its normalised singular values).  None where G is zero or not finite.

    >>> x, d = torch.eye(3)[:2], torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]])   # G has singular values 3 and 1
    >>> share, effective = energy(x, d, 1)
    >>> round(share, 3), round(effective, 3)  # 9 / 10; exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
    (0.9, 1.755)
    """
    used_N = (d_Nm != 0).any(dim=1) & (x_Nn != 0).any(dim=1)
    x_Nn, d_Nm = x_Nn[used_N].float(), d_Nm[used_N].float()
    if not len(x_Nn) or not (torch.isfinite(x_Nn).all() and torch.isfinite(d_Nm).all()):
        return None
    x_Nn, d_Nm = x_Nn / x_Nn.abs().max(), d_Nm / d_Nm.abs().max()  # shares do not change, and nothing underflows
    if len(x_Nn) < min(x_Nn.shape[1], d_Nm.shape[1]):
        C_NN = root((d_Nm @ d_Nm.T).double())
        gram = C_NN.T @ (x_Nn @ x_Nn.T).double() @ C_NN
    else:
        G_mn = d_Nm.T @ x_Nn
        gram = (G_mn.T @ G_mn if G_mn.shape[1] <= G_mn.shape[0] else G_mn @ G_mn.T).double()
    squares_q = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
    total = float(squares_q.sum())
    if total == 0:
        return None
    values_q = squares_q.sqrt()
    shares_q = values_q / values_q.sum()
    return float(squares_q[:rank].sum()) / total, float(torch.special.entr(shares_q).sum().exp())
