"""FedKRSO: full fine-tuning in a round's K shared random subspaces (Yang et al., INFOCOM 2026, arXiv 2602.03019).

Rule: for every round P_1 ... P_K (r, n) are drawn, entries N(0, 1/r), so that E[P^T P] = I.  A client trains B (m, r),
from zero and without moments, within W + B P_j, j drawn from the K, and sends B; with A_j the sum of p_k B_k over the
clients of j, W' = W + sum_j A_j P_j.  Exact: it is the weighted mean of the clients' changes.  Read in a review of the
paper, in a description of its two algorithms, and in public third-party code (where it is a baseline), which agree.
There a client draws a new j after every interval of local steps and sends a sum for each j that it used: here an
interval is the whole round.  P_j and j follow from the run's seed: neither travels.
Subspaces change every round, so Adam's moments are reset.
Wire, numbers per layer: r m up; down r m for each j that had a client, in the rounds since the client last took part,
no more than m n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora

_SEED = "history/seed"  # server tensor int64: the run's seed, for the coming draws


@dataclass(frozen=True)
class FedKRSO:
    name: ClassVar[str] = "fedkrso"
    paper: ClassVar[str] = "arXiv 2602.03019"
    trained: ClassVar[str] = "B over one of the round's random projections, anew every round"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r m / min(m n, r m per subspace missed)"
    departs: ClassVar[str] = "a client stays in its subspace for the whole round"
    layerwise: ClassVar[bool] = True
    alerts: ClassVar[frozenset[str]] = frozenset({"full rank"})

    rank: averaging.SubspaceRank = 8
    subspaces: Annotated[averaging.Rank, Field(description="Number K of subspaces drawn for a round.")] = 4

    broadcast = averaging.broadcast
    client_state = averaging.no_client_state
    model = averaging.dense_model
    personal_model = averaging.no_personal_model

    def check(self, shape: ModelShape) -> None:
        lora.check_fits(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, {**weights, **averaging.no_history(shape), _SEED: torch.tensor(seed)})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        missed: list[int] = server.tensors[averaging.RANKS][max(since, 0) :].sum(0).tolist()
        numbers = sum(min(t.m * t.n, rank * t.m) for t, rank in zip(shape.targets, missed, strict=True))
        return 4 * numbers + wire_bytes(averaging.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        j = drawn(client.seed, broadcast.round, client.id, self.subspaces)
        tensors, device = averaging.head(shape, broadcast.tensors), averaging.device_of(broadcast)
        for layer in shape.targets:
            tensors[f"{layer.name}/left"] = torch.zeros(layer.m, self.rank, device=device)
            tensors[f"{layer.name}/right"] = projection(client.seed, broadcast.round, j, layer, self.rank)
        return Start(tensors, averaging.tensor_names(shape, "left"))

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left")}
        return Update(result.client, weight, tensors, result.metrics)

    def accumulator(self, server: ServerState, shape: ModelShape) -> Accumulator:
        return Accumulator(0.0, {_SEED: server.tensors[_SEED].clone()}, {"round": float(server.round)})

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        j = drawn(int(total.tensors[_SEED]), int(total.counts["round"]), update.client, self.subspaces)
        sums = {f"{layer.name}/{j}": update.tensors[f"{layer.name}/left"] for layer in shape.targets}
        return averaging.add(total, {**sums, **averaging.head(shape, update.tensors)}, update.weight)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        seed, sums = int(server.tensors[_SEED]), {n: t for n, t in total.tensors.items() if n != _SEED}
        means, ranks = averaging.mean(replace(total, tensors=sums)), dict[str, float]()
        changed = averaging.head(shape, means) if means else {}
        for layer in shape.targets if means else ():
            used = [j for j in range(self.subspaces) if f"{layer.name}/{j}" in means]
            left_mR = torch.cat([means[f"{layer.name}/{j}"] for j in used], dim=1)
            right_Rn = torch.cat([projection(seed, server.round, j, layer, self.rank) for j in used])
            name = f"{layer.name}/weight"
            changed[name] = torch.addmm(server.tensors[name], left_mR, right_Rn)
            ranks[layer.name] = float(left_mR.shape[1])
        return server.advance({**changed, **averaging.longer_history(server, replace(total, counts=ranks), shape)})


def drawn(seed: int, round: int, client: int, subspaces: int) -> int:
    """The number j of the subspace in which a client trains in a round."""
    return int(stream(seed, "krso client", round, client).integers(subspaces))


def projection(seed: int, round: int, number: int, layer: Layer, rank: int) -> Tensor:
    """P_j of a round at a layer, (r, n) float32, entries N(0, 1/r)."""
    draw = stream(seed, "krso", round, number, layer.name).standard_normal((rank, layer.n)) / rank**0.5
    return torch.from_numpy(draw).float()
