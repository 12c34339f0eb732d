"""LoRA-FAIR: factors averaged apart, and B' corrected towards the mean change (Bian et al., arXiv 2411.14961).

Rule: A' = sum_k p_k A_k, B' = sum_k p_k B_k, and the server hands out A' and X = B' + dB, where X minimises
1 - cos(dW, X A') + penalty |X - B'|^2, with dW = sum_k p_k B_k A_k.  Not exact: X A' stays in the row space of A'.
Of all multiples of a direction Z the penalty is smallest at X = t Z, t = <B', Z> / |Z|^2, and the cosine is the same
for all: what is left is a function of Z's direction alone, minimised by L-BFGS in float64 from Z = B'.
Where dW or B'A' is zero, or no direction is better than B', B' goes out as it is.
Adam's moments go on as in FedIT: dB moves B within the same basis.
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import (
    Accumulator,
    ModelShape,
    ServerState,
)
from rayfed_sub.methods import averaging, factor_stacks, lora

_STEPS = 200  # L-BFGS iterations at most; tens suffice
_ZERO = 1e-12  # a norm below this share of its factors' norms is rounding


@dataclass(frozen=True)
class LoRAFAIR:
    name: ClassVar[str] = "lora-fair"
    paper: ClassVar[str] = "arXiv 2411.14961"
    trained: ClassVar[str] = "LoRA's A and B, B corrected by the server"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "the objective is minimised by L-BFGS, a solver of ours"

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    penalty: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of |dB|^2 in the server's objective.")
    ] = 0.01
    optimizer_state: averaging.SharedMemory = "keep"

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    start_client = lora.start_client
    upload = lora.upload
    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = factor_stacks.accumulate_apart

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        means = averaging.mean(factor_stacks.sums(total))
        for layer in shape.targets if means else ():
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            L_mR, R_Rn, _ = factor_stacks.sent(total, layer)
            means[left] = corrected(means[left], means[right], L_mR, R_Rn, self.penalty)
        return server.advance(means)

    model = lora.lora_model
    personal_model = averaging.no_personal_model


def corrected(B_mr: Tensor, A_rn: Tensor, L_mR: Tensor, R_Rn: Tensor, penalty: float) -> Tensor:
    """The X (m, r), float32, that minimises 1 - cos(L R, X A) + penalty |X - B|^2, L R being (m, n) and never formed.

    All that enters is P = dW A^T with <dW, X A> = <P, X>, G = A A^T with |X A|^2 = <X G, X>, and |dW|; the minimum
    lies in the columns of B and P, 2 r numbers high, and the search takes place there.
    """
    B, A, L, R = (x.double() for x in (B_mr, A_rn, L_mR, R_Rn))
    P, G = L @ (R @ A.T), A @ A.T
    size = (L @ torch.linalg.qr(R.T).R.T).norm()  # |L R| = |L T^T| with R^T = Q T
    start = (B @ G * B).sum().clamp_min(0).sqrt()
    if size <= _ZERO * L.norm() * R.norm() or start <= _ZERO * B.norm() * A.norm():
        return B_mr
    Q = torch.linalg.qr(torch.cat([B, P], dim=1)).Q
    b, p = Q.T @ B, Q.T @ P / size

    def objective(Z: Tensor) -> Tensor:
        along, cosine = (b * Z).sum().clamp_min(0), (p * Z).sum() / (Z @ G * Z).sum().sqrt()
        value: Tensor = 1 - cosine + penalty * (b.square().sum() - along**2 / Z.square().sum())
        return value

    Z = (b / b.norm()).requires_grad_()
    search = torch.optim.LBFGS(
        [Z], max_iter=_STEPS, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = objective(Z)
        loss.backward()
        return loss

    search.step(closure)
    found, along = Z.detach(), (b * Z.detach()).sum()
    if not (objective(found) < objective(b) and along > 0):
        return B_mr
    X: Tensor = Q @ found * (along / found.square().sum())
    return X.float()
