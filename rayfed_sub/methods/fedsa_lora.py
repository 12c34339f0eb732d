"""FedSA-LoRA: A is shared, B stays with its client (Guo et al., ICLR 2025, arXiv 2410.01463).

Rule: every client trains both factors; A' = sum_k p_k A_k, and B_k never leaves client k, whose model is W + s B_k A'.
Not exact: after the averaging a client's own B meets an A that it was not trained with.  A client that never trained
has B = 0, the backbone, which is also the global model.  A trained head is averaged as always.
Kept Adam moments go on as in FedIT: no factor changes its basis.
Wire, numbers per layer: r n up, r n down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import (
    Block,
    Broadcast,
    Change,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FedSALoRA:
    name: ClassVar[str] = "fedsa-lora"
    paper: ClassVar[str] = "arXiv 2410.01463"
    trained: ClassVar[str] = "LoRA's A, shared, and a B of each client's own"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    wire: ClassVar[str] = "r n / r n"
    departs: ClassVar[str] = ""

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: Annotated[
        averaging.Memory,
        Field(
            description="Optimizer state at the start of a round: keep the client's own, or reset it. B always stays."
        ),
    ] = "keep"

    check = lora.check_rank
    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        tensors = lora.init_factors(self, weights, shape, seed).tensors
        return ServerState(0, {name: tensors[name] for name in averaging.tensor_names(shape, "right")})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in averaging.tensor_names(shape, "right")}
        for layer in shape.targets:
            name, rank = f"{layer.name}/left", lora.layer_rank(self, layer)
            tensors[name] = torch.zeros(layer.m, rank) if state is None else state.tensors[name]
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "left", "right"), moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "right")}
        return Update(result.client, weight, tensors, result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        lefts = {f"{layer.name}/left": result.tensors[f"{layer.name}/left"] for layer in shape.targets}
        return lefts | averaging.moments_to_keep(self.optimizer_state, result)

    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    sent_values = averaging.target_values("right")

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return self.personal_model(server, None, shape)

    def personal_model(self, server: ServerState, state: ClientState | None, shape: ModelShape) -> Mapping[str, Change]:
        if state is None:
            return {layer.name: Change() for layer in shape.targets}
        changes = {}
        for layer in shape.targets:
            right = server.tensors[f"{layer.name}/right"]
            left = state.tensors[f"{layer.name}/left"].to(right)
            changes[layer.name] = Change(blocks=(Block(left, right, lora.layer_scale(self, layer)),))
        return changes
