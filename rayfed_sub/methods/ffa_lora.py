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
from rayfed_sub.methods import common


@dataclass(frozen=True)
class FFALoRA:
    """rank r, and alpha with s = alpha / r.
    optimizer_state: what a new round does to Adam's moments (`average`: all clients share A, so the server may)."""

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "arXiv 2403.12313"
    trained: ClassVar[str] = "LoRA's B, over one frozen A"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r m / r m"
    departs: ClassVar[str] = ""

    rank: common.Rank = 8
    alpha: common.Positive = 16.0
    optimizer_state: common.SharedMemory = "keep"

    check = common.check_rank
    init_server = common.init_factors
    broadcast = common.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        # The frozen A comes from the run's shared seed: it never travels.
        return wire_bytes({name: t for name, t in server.tensors.items() if not name.endswith("/right")})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in common.tensor_names(shape, "left", "right")}
        moments, step = common.moments_to_start(self.optimizer_state, broadcast, state)
        return Start(tensors, common.tensor_names(shape, "left"), self.alpha / self.rank, moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in common.tensor_names(shape, "left")}
        tensors |= common.moments_to_send(self.optimizer_state, result)
        return Update(result.client, weight, tensors, result.metrics)

    client_state = common.client_state
    accumulator = common.accumulator
    accumulate = common.accumulate
    aggregate = common.aggregate
    model = common.lora_model
    personal_model = common.no_personal_model
