"""FedIT: federated LoRA by averaging the factors apart (Zhang et al., arXiv 2305.05644).

Rule: B' = sum_k p_k B_k, A' = sum_k p_k A_k.  Not exact: s B'A' misses the cross term s sum_k p_k (B_k - B')(A_k - A').
Wire, numbers per layer: r (m + n) up, r (m + n) down.
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
class FedIT:
    """rank r, and alpha with s = alpha / r.
    state: what a new round does to Adam's moments (`average`: the server averages them too)."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "arXiv 2305.05644"
    trained: ClassVar[str] = "LoRA's A and B"
    exact: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"

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
        return wire_bytes(server.tensors)

    def start_client(self, broadcast: Broadcast, state: ClientState | None, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in common.factors(shape, "left", "right")}
        moments, step = common.moments_to_start(self.state, broadcast, state)
        return Start(tensors, common.factors(shape, "left", "right"), self.alpha / self.rank, moments, step)

    def upload(self, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in common.factors(shape, "left", "right")}
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
