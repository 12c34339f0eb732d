"""FFA-LoRA: federated LoRA with one frozen A (Sun et al., arXiv 2403.12313).

Rule: all clients share one A, drawn once from the run's seed; B' = sum_k p_k B_k.  Exact: sum_k p_k s B_k A = s B'A.
Wire, numbers per layer: r m up, r m down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.methods import common
from rayfed_sub.records import (
    Broadcast,
    Change,
    ClientState,
    Fold,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)


@dataclass(frozen=True)
class FFALoRA:
    """rank r, and alpha with s = alpha / r.
    state: what a new round does to Adam's moments (`average`: all clients share A, so the server may)."""

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "arXiv 2403.12313"
    trained: ClassVar[str] = "LoRA's B, over one frozen A"
    exact: ClassVar[bool] = True
    wire: ClassVar[str] = "r m / r m"

    rank: common.Rank = 8
    alpha: common.Positive = 16.0
    state: common.SharedMemory = "keep"

    def check(self, shape: ModelShape) -> None:
        common.check_rank(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, common.lora_server(weights, shape, self.rank, seed))

    def broadcast(self, server: ServerState) -> Broadcast:
        return Broadcast(server.round, server.tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, since: int) -> int:
        # The frozen A comes from the run's shared seed: it never travels.
        return wire_bytes({n: t for n, t in server.tensors.items() if not n.endswith("/right")})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in common.factors(shape, "left", "right")}
        moments, step = common.moments_to_start(self.state, broadcast, state)
        return Start(tensors, common.factors(shape, "left"), self.alpha / self.rank, moments, step)

    def upload(self, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in common.factors(shape, "left")}
        return Update(result.client, weight, tensors | common.moments_to_send(self.state, result), result.metrics)

    def keep(self, result: LocalResult, shape: ModelShape) -> Tensors:
        return common.moments_to_keep(self.state, result)

    def zero(self, server: ServerState, shape: ModelShape) -> Fold:
        return Fold(0.0, {})

    def fold(self, total: Fold, update: Update, shape: ModelShape) -> Fold:
        return common.add(total, update.tensors, update.weight)

    def finish(self, server: ServerState, total: Fold, shape: ModelShape) -> ServerState:
        return server.advance(common.mean(total))

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return common.lora_model(server, shape, self.alpha / self.rank)
