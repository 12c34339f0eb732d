"""FedAvg with dense AdamW on the target weights (McMahan et al., arXiv 1602.05629).

Rule: W <- sum_k p_k W_k, every W_k trained in full, by AdamW where the paper has SGD.  This is what the public code of
FedFTG runs: it never sets galore-torch's `rank`, so nothing is projected.  Wire, numbers per layer: m n up, m n down.
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
    Tensors,
    Update,
)
from rayfed_sub.methods import averaging


@dataclass(frozen=True)
class FedAvg:
    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "arXiv 1602.05629"
    trained: ClassVar[str] = "the dense target weights"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "m n / m n"
    departs: ClassVar[str] = "local AdamW in place of SGD: what FedFTG's release runs"

    optimizer_state: averaging.SharedMemory = "keep"

    def check(self, shape: ModelShape) -> None:
        """Every model fits."""

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, dict(weights))

    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        names = averaging.tensor_names(shape, "weight")
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        return Start({name: broadcast.tensors[name] for name in names}, names, moments=moments, step=step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {**result.tensors, **averaging.moments_to_send(self.optimizer_state, result)}
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = averaging.dense_model
    personal_model = averaging.no_personal_model
    shared_basis = averaging.one_basis
    sent_values = averaging.target_values("weight")
