"""FRLoRA: principal factors, anew every round, and averages added to the weight (Yan et al., ICLR 2025, e0rQRMUhs7).

Rule: with W0 = U diag(sigma) V^T the pretrained weight, sqrt(s) B0 = U_r diag(sqrt(sigma_r)), sqrt(s) A0 =
diag(sqrt(sigma_r)) V_r^T, every round begins with these factors over the weight less s B0 A0 (PiSSA's start); B' =
sum_k p_k B_k, A' = sum_k p_k A_k, and W <- W + s (B'A' - B0 A0).  Not exact: FedIT's cross term is missing, but W
gathers the rounds' changes, whose rank grows.  As in the authors' code (IAMJackYan/FRLoRA, label_skew_ours.py and
fed_global.py), which weighs all clients equally (federation.client_weighting=uniform).
Every client derives B0 and A0 from the backbone that it holds: they never travel.  All rounds begin in one basis, so
Adam's moments may stay as they are (`keep`).
Wire, numbers per layer: up r (m + n); down the averages missed since the client last synchronised, r (m + n) a round,
never more than m n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rayfed_sub.core.types import (
    Accumulator,
    Client,
    ModelShape,
    ServerState,
    Tensors,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora
from rayfed_sub.methods.fed_sb import outer_factors


@dataclass(frozen=True)
class FRLoRA:
    name: ClassVar[str] = "frlora"
    paper: ClassVar[str] = "ICLR 2025 e0rQRMUhs7"
    trained: ClassVar[str] = "LoRA's A and B from the pretrained weight's main components, anew every round"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / min(m n, averages missed)"
    departs: ClassVar[str] = "p_k in the means (uniform: as published)"
    layerwise: ClassVar[bool] = True

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: averaging.Memory = "keep"

    check = lora.check_rank
    broadcast = averaging.broadcast

    start_client = lora.start_unaligned

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        tensors = {**averaging.head(shape, weights), **averaging.no_history(shape)}
        for layer in shape.targets:
            W_mn, scale = weights[f"{layer.name}/weight"], lora.layer_scale(self, layer)
            left, right = outer_factors(W_mn, lora.layer_rank(self, layer))
            root_r = ((left.T @ W_mn) * right).sum(1).clamp_min(0).div(scale).sqrt()  # of sigma / s
            left, right = (left * root_r).contiguous(), root_r[:, None] * right
            tensors |= {f"{layer.name}/left": left, f"{layer.name}/right": right}
            tensors[f"{layer.name}/weight"] = W_mn - scale * left @ right
        return ServerState(0, tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        return averaging.missed_bytes(server, shape, since) + wire_bytes(averaging.head(shape, server.tensors))

    upload = lora.upload
    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        means, ranks = averaging.mean(total), {}
        changed = averaging.head(shape, means) if means else {}
        for layer in shape.targets if means else ():
            left, right, name = (f"{layer.name}/{role}" for role in ("left", "right", "weight"))
            moved_mn = means[left] @ means[right] - server.tensors[left] @ server.tensors[right]
            changed[name] = moved_mn.mul_(lora.layer_scale(self, layer)).add_(server.tensors[name])
            ranks[layer.name] = float(len(means[right]))
        history = averaging.longer_history(server, replace(total, counts=ranks), shape)
        return server.advance({**changed, **history})

    model = lora.model_over_weight
    personal_model = averaging.no_personal_model
