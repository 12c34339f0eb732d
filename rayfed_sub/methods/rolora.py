"""RoLoRA: federated LoRA that trains one factor at a time (Chen et al., arXiv 2502.01755).

Rule: in even rounds all clients train and average B over one shared A, in odd rounds A over one shared B.  Exact, for
one factor is the same everywhere: sum_k p_k s B_k A = s B'A.  B goes first: it is zero, which kills A's gradient.
Adam's moments begin anew every round: the two factors have seen different numbers of steps, a Start has one count.
Wire, numbers per layer: up r m in even rounds, r n in odd ones; down the factors averaged since the client last
synchronised, one of them or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class RoLoRA:
    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "arXiv 2502.01755"
    trained: ClassVar[str] = "LoRA's B in even rounds, its A in odd ones"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r m, r n in turn / the factors averaged since"
    departs: ClassVar[str] = ""

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        # Before round 0 there is nothing to send: B is zero, and A comes from the run's shared seed.
        roles = sorted({_role(done) for done in averaging.rounds_with_clients(server, since)})
        names = averaging.tensor_names(shape, *roles) if roles else ()
        return wire_bytes({name: server.tensors[name] for name in names})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in averaging.tensor_names(shape, "left", "right")}
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, _role(broadcast.round)))

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in result.trained}
        return Update(result.client, weight, tensors, result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        return {}

    accumulator = averaging.accumulator
    accumulate = averaging.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        return server.advance(averaging.with_idle(server, averaging.mean(total)))

    model = lora.lora_model
    personal_model = averaging.no_personal_model


def _role(round: int) -> str:
    """The factor that round `round` trains."""
    return "right" if round % 2 else "left"
