"""FedEx-LoRA: federated LoRA with the averages' error put into the frozen weight (Singhal et al., arXiv 2410.09432).

Rule: B' = sum_k p_k B_k, A' = sum_k p_k A_k, and W <- W + s (sum_k p_k B_k A_k - B'A').  Exact: W + s B'A' has moved by
sum_k p_k dW_k.  The residual is sum_k p_k (B_k - B')(A_k - A'), of rank (N - 1) r or less for N clients.
A' and B' are means in the clients' own coordinates, as in FedIT, so Adam's moments may stay as they are (`keep`).
Wire, numbers per layer: up r (m + n); down r (m + n), and the residuals missed since the client last synchronised, in
factors of rank (N - 1) r, together never more than m n.  The average's factors are trained on, so they always travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.core.types import (
    Accumulator,
    ModelShape,
    ServerState,
    Tensors,
    Update,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FedExLoRA:
    name: ClassVar[str] = "fedex-lora"
    paper: ClassVar[str] = "arXiv 2410.09432"
    trained: ClassVar[str] = "LoRA's A and B, over a weight that takes up the averages' error"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n) + min(m n, residuals missed)"
    departs: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: averaging.SharedMemory = "keep"

    check = lora.check_rank
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        factors = lora.init_factors(self, weights, shape, seed).tensors
        return ServerState(0, {**weights, **factors, **averaging.no_history(shape)})

    download_bytes = averaging.download_factors_and_missed
    start_client = lora.start_client
    upload = lora.upload
    client_state = averaging.client_state
    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        """The factors' sums beside the sums of their products, under `<layer>/weight`."""
        return averaging.add_changes(averaging.add(total, update.tensors, update.weight), update, shape)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed, ranks = averaging.mean(total), [lora.layer_rank(self, layer) for layer in shape.targets]
        for layer in shape.targets if changed else ():
            name, product = f"{layer.name}/weight", changed[f"{layer.name}/left"] @ changed[f"{layer.name}/right"]
            changed[name].sub_(product).mul_(lora.layer_scale(self, layer)).add_(server.tensors[name])
        return server.advance({**changed, **averaging.longer_history(server, total, shape, less=ranks)})

    model = lora.model_over_weight
    personal_model = averaging.no_personal_model
