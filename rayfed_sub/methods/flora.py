"""FLoRA: federated LoRA by stacking (Wang et al., arXiv 2409.05976).

Rule: with the stacks B = [p_1 s_1 B_1, ..., p_N s_N B_N] and A = [A_1; ...; A_N], W <- W + B A.  Exact, for clients of
different ranks too: B A = sum_k p_k s_k B_k A_k, and s_k = alpha / r_k, or alpha / sqrt(r_k) with use_rslora.  The
server adds the products as they come.
Every round begins anew with B = 0 and an A of the client's own, drawn from (seed, round, client): nobody sends it.
Adam's moments of the last round's factors do not apply to the new ones: they are reset.
Wire, numbers per layer: up r_k (m + n), down the stacks missed since the client last synchronised, sum_k r_k (m + n) a
round; neither more than m n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FLoRA:
    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "arXiv 2409.05976"
    trained: ClassVar[str] = "LoRA's A and B, anew every round, r per client"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / min(m n, stacks missed)"
    departs: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True
    alerts: ClassVar[frozenset[str]] = frozenset({"full rank"})

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.OwnAlpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_ranks
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, {**weights, **averaging.no_history(shape)})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        return averaging.missed_bytes(server, shape, since) + wire_bytes(averaging.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        rank, tensors = lora.rank_of(self, client.id), averaging.head(shape, broadcast.tensors)
        device = averaging.device_of(broadcast)
        for layer in shape.targets:
            own = lora.layer_rank(self, layer, rank)
            tensors[f"{layer.name}/left"] = torch.zeros(layer.m, own, device=device)
            tensors[f"{layer.name}/right"] = lora.lora_right(layer, own, client.seed, broadcast.round, client.id)
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "left", "right"), rank=rank)

    upload = lora.upload_products
    client_state = averaging.no_client_state
    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        added = averaging.add(total, averaging.head(shape, update.tensors), update.weight)
        return averaging.add_changes(added, update, shape)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed = averaging.mean(total)
        for layer in shape.targets if changed else ():
            name = f"{layer.name}/weight"
            changed[name].add_(server.tensors[name])
        return server.advance({**changed, **averaging.longer_history(server, total, shape)})

    model = averaging.dense_model
    personal_model = averaging.no_personal_model
    sent_values = averaging.head_values
