"""Fed-PLoRA: parallel one-rank modules, some trained, the others folded (Zhang, Hu, Xu, ICLR 2026, arXiv 2602.16936).

Rule: LoRA of rank r is r modules b_j a_j.  In every round client k draws k_k of them; it trains these over the weight
into which the others are folded, W + s sum_(j not drawn) b_j a_j, so that it begins with the global model; then
b_j' = sum p_k b_j,k / sum p_k over the clients that drew j, and a_j alike.  A module that nobody drew stays.  Not
exact.  Read in two summaries of the paper's method and in its reviews, which agree; the public code was not to be had.
They leave open whether a draw holds for all layers: here every layer has its own.  federation.client_weighting=uniform
gives the paper's plain means.  With all ranks r it is FedIT.
Modules change every round, so Adam's moments are reset.
Wire, numbers per layer: k_k (m + n) up, r (m + n) down, since the folded modules have moved too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    ModelShape,
    ServerState,
    Start,
    wire_bytes,
)
from rayfed_sub.methods import averaging, components, lora


@dataclass(frozen=True)
class FedPLoRA:
    name: ClassVar[str] = "fed-plora"
    paper: ClassVar[str] = "arXiv 2602.16936"
    trained: ClassVar[str] = "LoRA's A and B, r of their components per client, over the others"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / largest r (m + n)"
    departs: ClassVar[str] = "p_k in the means (uniform: as published)"

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_ranks
    init_server = components.init_server
    broadcast = components.broadcast
    client_state = averaging.no_client_state
    accumulator = components.accumulator
    accumulate = components.accumulate
    model = lora.lora_model
    personal_model = averaging.no_personal_model

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        return wire_bytes(self.broadcast(server).tensors)

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        start, folded = components.start(self, broadcast, client, shape)
        for layer in shape.targets:
            folded[f"{layer.name}/left"] = lora.layer_scale(self, layer) * folded[f"{layer.name}/left"]
        return replace(start, frozen=folded)

    upload = components.upload

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        return server.advance(components.mean_over_owners(server, total, shape))
