"""FedAvg with dense AdamW on the target weights (McMahan et al., arXiv 1602.05629).

Rule: W <- sum_k p_k W_k, every W_k trained in full.  This is what the public code of FedFTG runs: it never sets
galore-torch's `rank`, so nothing is projected.  Wire, numbers per layer: m n up, m n down.
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
class FedAvg:
    """state: what a new round does to Adam's moments (`average`: the server averages them too)."""

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "arXiv 1602.05629"
    trained: ClassVar[str] = "the dense target weights"
    exact: ClassVar[bool] = True
    wire: ClassVar[str] = "m n / m n"

    state: common.SharedMemory = "keep"

    def check(self, shape: ModelShape) -> None:
        """Every model fits."""

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, dict(weights))

    def broadcast(self, server: ServerState) -> Broadcast:
        return Broadcast(server.round, server.tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, since: int) -> int:
        return wire_bytes(server.tensors)

    def start_client(self, broadcast: Broadcast, state: ClientState | None, shape: ModelShape) -> Start:
        names = (*(f"{layer.name}/weight" for layer in shape.targets), *shape.head_names)
        moments, step = common.moments_to_start(self.state, broadcast, state)
        return Start({name: broadcast.tensors[name] for name in names}, names, moments=moments, step=step)

    def upload(self, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {**result.tensors, **common.moments_to_send(self.state, result)}
        return Update(result.client, weight, tensors, result.metrics)

    def keep(self, result: LocalResult, shape: ModelShape) -> Tensors:
        return common.moments_to_keep(self.state, result)

    def zero(self, server: ServerState, shape: ModelShape) -> Fold:
        return Fold(0.0, {})

    def fold(self, total: Fold, update: Update, shape: ModelShape) -> Fold:
        return common.add(total, update.tensors, update.weight)

    def finish(self, server: ServerState, total: Fold, shape: ModelShape) -> ServerState:
        return server.advance(common.mean(total))

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return {t.name: Change(dense=server.tensors[f"{t.name}/weight"]) for t in shape.targets}
