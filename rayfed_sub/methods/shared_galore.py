"""GaLore in one subspace for all clients (FedLore; FedGaLore, arXiv 2602.01746, synchronises second moments too).

Rule: W_k = W + scale L_k Q with one orthonormal Q for everybody; W <- W + scale (sum_k p_k L_k) Q.  Exact, with one
side of each block.  Q is drawn from the run's seed, anew every `refresh_every` rounds: an average of coefficients never
leaves span(Q), so no basis can be learned from it.  GaLore's step on L: Adam on R = (1/scale) dLoss/dL.
`optimizer_state: average` synchronises Adam's moments, first and second.  (A simplification of FedGaLore, which keeps a
subspace per client and sends second moments only.) A new Q finds kept moments in a stale basis: `moments` selects what
becomes of them.  `reset`: zeros (the head's too, for there is one step count).  `rotate`, with C = Q_new Q_old^T: m <-
m C^T and v <- v (C*C)^T, LDAdam's rule (arXiv 2410.16103) without its mean term.  `keep`: they stay as they are. Wire,
numbers per layer: r max(m, n) up; down as much per period missed, for the rounds of one period add up in one L (never
more than m n).  Q never travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import orthonormal_rows, sides
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
    Subspace,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora

_SEED = "seed"  # server tensor int64: the run's seed, for the coming bases


@dataclass(frozen=True)
class SharedGaLore:
    name: ClassVar[str] = "shared-galore"
    paper: ClassVar[str] = "arXiv 2602.01746"
    trained: ClassVar[str] = "GaLore coefficients in one random subspace for all"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r max(m, n) / min(m n, r max(m, n) per period missed)"
    departs: ClassVar[str] = "a simplification of FedGaLore: one random basis for all, whole moments synchronised"
    layerwise: ClassVar[bool] = True

    rank: averaging.SubspaceRank = 8
    scale: averaging.Scale = 1.0
    refresh_every: Annotated[averaging.Rank, Field(description="Rounds between two bases.")] = 10
    moments: Annotated[
        Literal["reset", "rotate", "keep"],
        Field(description="Adam's moments at a new basis: reset, rotated into it, or kept as they are."),
    ] = "reset"
    optimizer_state: averaging.SharedMemory = "keep"

    def check(self, shape: ModelShape) -> None:
        lora.check_fits(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, {**weights, _SEED: torch.tensor(seed)})

    def broadcast(self, server: ServerState) -> Broadcast:
        sent = averaging.broadcast(self, server).tensors
        return Broadcast(server.round, {n: t for n, t in sent.items() if n != _SEED})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        missed = {done // self.refresh_every for done in averaging.rounds_with_clients(server, since)}
        if not missed:
            return 0
        numbers = [len(missed) * self.rank * max(t.m, t.n) for t in shape.targets]
        counted = {f"{t.name}/weight" for t in shape.targets}
        sent = self.broadcast(server).tensors
        blocks = averaging.block_bytes(server, numbers, shape, since)
        return blocks + wire_bytes({n: t for n, t in sent.items() if n not in counted})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        period = broadcast.round // self.refresh_every
        if self.optimizer_state == "keep" and state is not None:
            kept = (state.round - 1) // self.refresh_every
            moments, step = moved(self, moments, step, client.seed, shape, kept, period)
        tensors, device = averaging.head(shape, broadcast.tensors), averaging.device_of(broadcast)
        trained = list(tensors)
        for layer in shape.targets:
            fixed, moving = sides(layer)
            Q = basis(client.seed, period, layer, self.rank)
            right = fixed.endswith("/right")
            tensors[fixed] = Q if right else Q.T
            size = (layer.m, self.rank) if right else (self.rank, layer.n)
            tensors[moving] = torch.zeros(size, device=device)
            trained.append(moving)
        never = Subspace(self.rank, refresh_every=0)
        return Start(tensors, tuple(trained), self.scale, moments, step, never, decays_base=True)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in result.trained}
        tensors |= averaging.moments_to_send(self.optimizer_state, result)
        return Update(result.client, weight, tensors | averaging.scales_to_send(result), result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        return averaging.add(total, {**averaging.sent_scales({}, shape), **update.tensors}, update.weight)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed = averaging.mean(total)
        now, soon = (t // self.refresh_every for t in (server.round, server.round + 1))
        seed = int(server.tensors[_SEED])
        kept = averaging.take_scales(changed, shape)
        for layer in shape.targets if changed else ():
            name, moving = f"{layer.name}/weight", sides(layer)[1]
            L, Q = changed.pop(moving), basis(seed, now, layer, self.rank)
            change = L @ Q if moving.endswith("/left") else Q.T @ L
            changed[name] = kept[layer.name] * server.tensors[name] + self.scale * change
        held = changed or server.tensors  # a basis ends in a round without clients too
        changed = averaging.with_idle(server, changed) | averaging.shrunk(server, kept)
        if self.optimizer_state == "average" and "step" in held:
            moments = {n: t for n, t in held.items() if averaging.is_moment(n)}
            moments, step = moved(self, moments, round(float(held["step"])), seed, shape, now, soon)
            changed |= {**moments, "step": torch.tensor(float(step), dtype=torch.float64)}
        return server.advance(changed)

    model = averaging.dense_model
    personal_model = averaging.no_personal_model

    def shared_basis(self, round: int) -> int:
        return round // self.refresh_every


def basis(seed: int, period: int, layer: Layer, rank: int) -> Tensor:
    """The period's orthonormal rows (r, k) for the layer's shorter side k, float32, uniformly distributed."""
    return orthonormal_rows(stream(seed, "shared basis", period, layer.name), rank, min(layer.m, layer.n))


def moved(
    method: SharedGaLore, moments: Tensors, step: int, seed: int, shape: ModelShape, old: int, new: int
) -> tuple[dict[str, Tensor], int]:
    """Adam's moments and step count of period `old`, as period `new` begins with them."""
    if old == new or method.moments == "keep":
        return dict(moments), step
    if method.moments == "reset":
        return {name: torch.zeros_like(moment) for name, moment in moments.items()}, 0
    turned = dict(moments)  # the head's moments have no basis
    for layer in shape.targets:
        C_rr = basis(seed, new, layer, method.rank) @ basis(seed, old, layer, method.rank).T
        turned |= averaging.rotated_moments(moments, sides(layer)[1], C_rr)
    return turned, step
