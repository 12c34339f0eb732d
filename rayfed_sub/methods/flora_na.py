"""FLoRA-NA: factors averaged with weights that the server fits to the mean change (Nguyen et al., arXiv 2509.26399).

Rule: B' = sum_k P_k B_k and A' = sum_k Q_k A_k, with vectors P and Q that minimise |B'A' - dW|, dW = sum_k p_k B_k A_k
(1/N for p_k in the paper).  Not exact: B'A' has rank r.  With P = Q = p it is FedIT, where the search begins, so that
no layer's error is larger than FedIT's.
Read in the abstract (factors on the server minimise the distance to the mean, at FedIT's cost) and in the public
reviews of its submission (OpenReview 7n5eoDZdZ5), which state the objective over P and Q, one number a client, and that
the paper tells neither how it is minimised nor whether layers have P and Q of their own.  Here each layer has, and they
are found by least squares in turn, which P alone and Q alone allow, on Grams of the factors: dW is never formed.
A' and B' are sums in the clients' own coordinates, as in FedIT, so Adam's moments may stay as they are (`keep`).
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.types import Accumulator, ModelShape, ServerState
from rayfed_sub.methods import averaging, factor_stacks, lora

_STEPS = 100  # turns of either vector at most; tens suffice
_CUT = 1e-10  # eigenvalues below this share of the largest are rounding: clients that cannot be told apart


@dataclass(frozen=True)
class FLoRANA:
    name: ClassVar[str] = "flora-na"
    paper: ClassVar[str] = "arXiv 2509.26399"
    trained: ClassVar[str] = "LoRA's A and B, averaged with fitted weights"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "weights per layer, by a solver of ours; p_k in the mean (uniform: as published)"

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
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
            L_mR, R_Rn, p_K = factor_stacks.sent(total, layer)
            means[left], means[right] = fitted(L_mR, R_Rn, p_K)
        return server.advance(means)

    model = lora.lora_model
    personal_model = averaging.no_personal_model


def fitted(L_mR: Tensor, R_Rn: Tensor, p_K: Tensor) -> tuple[Tensor, Tensor]:
    """(B' (m, r), A' (r, n)), float32, from the clients' p_k B_k and A_k, side by side; R = K r.

    In terms of x_k = P_k / p_k and y_k = Q_k, |B'A' - L R|^2 is a square in either: K x = c, solved by its smallest
    change, so that what makes no difference stays as it was.
    """
    K, r = len(p_K), L_mR.shape[1] // len(p_K)
    L, R = L_mR.double().unflatten(1, (K, r)), R_Rn.double().unflatten(0, (K, r))
    left = torch.einsum("mui,mvj->uivj", L, L)  # L_u^T L_v
    right = torch.einsum("uin,vjn->uivj", R, R)  # A_u A_v^T
    x, y = torch.ones(K, dtype=torch.float64), p_K.double()
    for _ in range(_STEPS):
        cross = torch.einsum("v,wjvi->wji", y, right)  # A_w A'^T
        dx = _step(
            torch.einsum("uivj,ji->uv", left, torch.einsum("w,wji->ji", y, cross)),
            torch.einsum("uiwj,wji->u", left, cross),
            x,
        )
        x = x + dx
        cross = torch.einsum("v,viwj->iwj", x, left)  # B'^T L_w
        dy = _step(
            torch.einsum("uivj,ij->uv", right, torch.einsum("w,iwj->ij", x, cross)),
            torch.einsum("iwj,wjui->u", cross, right),
            y,
        )
        y = y + dy
        if dx.abs().max() < _CUT and dy.abs().max() < _CUT:
            break
    return torch.einsum("u,mui->mi", x, L).float(), torch.einsum("u,uin->in", y, R).float()


def _step(K_uv: Tensor, c_u: Tensor, x_u: Tensor) -> Tensor:
    """The smallest d with K (x + d) = c, in the directions that K tells apart."""
    found: Tensor = torch.linalg.pinv(K_uv, hermitian=True, rtol=_CUT) @ (c_u - K_uv @ x_u)
    return found
