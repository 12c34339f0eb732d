"""A method that trains nothing, so that a round is the engine's own work alone.

Its name is `experiments.benchmarks.idle:Idle`.  A client draws its batch and runs it through the model, because a local
step cannot be left out, and sends back its metrics.  The server's weights, which never change, are broadcast anew every
round, as a method's are that trains them.
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
class Idle:
    """Neither trains nor sends."""

    name: ClassVar[str] = "idle"
    paper: ClassVar[str] = "none"
    trained: ClassVar[str] = "nothing"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "0 / m n"
    departs: ClassVar[str] = ""

    def check(self, shape: ModelShape) -> None:
        """Every model fits."""

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, dict(weights))

    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        return Start({}, ())

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        return Update(result.client, weight, {}, result.metrics)

    client_state = averaging.no_client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = averaging.dense_model
    personal_model = averaging.no_personal_model
