"""FFA-LoRA: federated LoRA with one frozen A (Sun et al., arXiv 2403.12313).

Rule: all clients share one A, drawn once from the run's seed; B' = sum_k p_k B_k.  Exact: sum_k p_k s B_k A = s B'A.
Wire, numbers per layer: r m up, r m down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.core.types import (
    Broadcast,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FFALoRA:
    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "arXiv 2403.12313"
    trained: ClassVar[str] = "LoRA's B, over one frozen A"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r m / r m"
    departs: ClassVar[str] = ""

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

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        # The frozen A comes from the run's shared seed: it never travels.
        return wire_bytes({name: t for name, t in server.tensors.items() if not name.endswith("/right")})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in averaging.tensor_names(shape, "left", "right")}
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "left"), moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left")}
        tensors |= averaging.moments_to_send(self.optimizer_state, result)
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = lora.lora_model
    personal_model = averaging.no_personal_model
    shared_basis = averaging.one_basis
    sent_values = averaging.target_values("left")
