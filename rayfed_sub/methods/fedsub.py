"""FedSub: one random subspace for all, with dual variables against client drift in it (Zhang, Xu, Yuan, arXiv
2509.05213).

Rule: client i trains B (m, r), from zero, within W + B P, P (r, n) one for everybody; it steps along the gradient plus
its dual y_i, from y_i = 0.  W' = W + Bbar P with the mean Bbar = sum_k p_k B_k, and y_i' = (y_i + (B_i - Bbar) / (lr
tau)) P P'^T, where P' is the next basis (without the factor while it stays) and tau the number of local steps.  Exact.
Read in the paper's public code.  P: r signed rows of the unit matrix, or sqrt(n / r) times r orthonormal rows, from the
run's seed; it never travels.
Computed is y_i' = (c - c_i) P P'^T, with c_i the mean of the gradients of client i's round and c = sum_k p_k c_k.  With
plain SGD at one rate, equally many steps and all clients in every round that is the rule, for then B_i = -lr tau (c_i +
y_i) and the duals' mean is zero.  With AdamW, of which the paper says nothing, duals stay gradients.  A client that
missed rounds takes its c_i from the basis of its last one; a new one has y_i = 0.  Moments begin every round anew.
An expert without a token takes no step, so there c_i, a mean over all of the client's steps, is only near the rule.
Duals would be released without noise: privacy of clients and server optimisers are refused.
Wire, numbers per layer: 2 r m up (B_i, and c_i, which at the paper's conditions follows from it); down r m per period
missed, no more than m n, and r m for c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import orthonormal_rows
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    Layer,
    LocalResult,
    LocalStep,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora

_SEED = "history/seed"  # server tensor int64: the run's seed, for the coming bases
_ROUND = "dual_round"  # server tensor int64: the round of the gradients in `<layer>/dual`; -1: there are none


@dataclass(frozen=True)
class FedSub:
    name: ClassVar[str] = "fedsub"
    paper: ClassVar[str] = "arXiv 2509.05213"
    trained: ClassVar[str] = "B over one random projection for all, corrected by a dual of each client's own"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "2 r m / min(m n, r m per period missed) + r m"
    departs: ClassVar[str] = "duals from mean gradients, which travel; the same with plain SGD and all clients"
    layerwise: ClassVar[bool] = True
    alerts: ClassVar[frozenset[str]] = frozenset({"full rank"})

    rank: averaging.SubspaceRank = 8
    refresh_every: Annotated[averaging.Rank, Field(description="Rounds between two bases.")] = 1
    projector: Annotated[
        Literal["coordinate", "spherical"],
        Field(description="Basis: signed rows of the unit matrix, or scaled orthonormal rows."),
    ] = "coordinate"

    broadcast = averaging.broadcast
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    model = averaging.dense_model
    personal_model = averaging.no_personal_model

    def check(self, shape: ModelShape) -> None:
        lora.check_fits(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        duals = {f"{layer.name}/dual": torch.zeros(layer.m, self.rank) for layer in shape.targets}
        return ServerState(0, {**weights, **duals, _ROUND: torch.tensor(-1), _SEED: torch.tensor(seed)})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        missed = {done // self.refresh_every for done in averaging.rounds_with_clients(server, since)}
        if not missed:
            return 0
        numbers = sum(min(t.m * t.n, len(missed) * self.rank * t.m) + self.rank * t.m for t in shape.targets)
        return 4 * numbers + wire_bytes(averaging.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors, memory = averaging.head(shape, broadcast.tensors), dict[str, Tensor]()
        device = averaging.device_of(broadcast)
        for layer in shape.targets:
            left, P_rn = f"{layer.name}/left", self._basis(client.seed, broadcast.round, layer)
            tensors |= {left: torch.zeros(layer.m, self.rank, device=device), f"{layer.name}/right": P_rn}
            memory[f"{left}/dual"] = self._dual(broadcast, state, client.seed, layer)
            memory[f"{left}/sum"] = torch.zeros(layer.m, self.rank, device=device)
        return Start(tensors, averaging.tensor_names(shape, "left"), correct=corrected, memory=memory)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left")}
        return Update(result.client, weight, {**tensors, **self._gradients(result, shape)}, result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        return self._gradients(result, shape)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed, seed = averaging.mean(total), int(server.tensors[_SEED])
        if not changed:
            return server.advance(averaging.with_idle(server, {}))
        for layer in shape.targets:
            name, P_rn = f"{layer.name}/weight", self._basis(seed, server.round, layer)
            changed[name] = torch.addmm(server.tensors[name], changed.pop(f"{layer.name}/left"), P_rn)
        return server.advance({**changed, _ROUND: torch.tensor(server.round)})

    def _basis(self, seed: int, round: int, layer: Layer) -> Tensor:
        return basis(self.projector, seed, round // self.refresh_every, layer, self.rank)

    def _gradients(self, result: LocalResult, shape: ModelShape) -> dict[str, Tensor]:
        """The means of the round's gradients, (m, r) by `<layer>/dual`."""
        return {f"{t.name}/dual": result.memory[f"{t.name}/left/sum"] / result.step for t in shape.targets}

    def _dual(self, received: Broadcast, state: ClientState | None, seed: int, layer: Layer) -> Tensor:
        """y_i (m, r) in the round's basis."""
        name, made = f"{layer.name}/dual", int(received.tensors[_ROUND])
        if state is None or made < 0:
            return torch.zeros(layer.m, self.rank)
        common, own = received.tensors[name], state.tensors[name].to(received.tensors[name])
        if made == state.round - 1:
            return self._moved(common - own, made, received.round, seed, layer)
        return self._moved(common, made, received.round, seed, layer) - self._moved(
            own, state.round - 1, received.round, seed, layer
        )

    def _moved(self, dual_mr: Tensor, old: int, new: int, seed: int, layer: Layer) -> Tensor:
        """A dual of round `old` in the basis of round `new`."""
        if old // self.refresh_every == new // self.refresh_every:
            return dual_mr
        P_rn, Q_rn = (self._basis(seed, round, layer).to(dual_mr) for round in (old, new))
        return dual_mr @ (P_rn @ Q_rn.T)


def basis(kind: str, seed: int, period: int, layer: Layer, rank: int) -> Tensor:
    """P (r, n) of a period, float32."""
    draw = stream(seed, "fedsub", period, layer.name)
    if kind == "spherical":
        return orthonormal_rows(draw, rank, layer.n) * math.sqrt(layer.n / rank)
    rows = torch.from_numpy(draw.permutation(layer.n)[:rank])
    sign_r1 = torch.from_numpy(draw.integers(0, 2, (rank, 1)) * 2 - 1)
    P_rn: Tensor = sign_r1 * torch.eye(layer.n)[rows]
    return P_rn


def corrected(memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
    """The gradients plus the dual, and the sums of the gradients; a head's stay as they are."""
    gradients, after = dict(step.gradients), dict(memory)
    for name, gradient in step.gradients.items():
        if f"{name}/dual" in memory:
            gradients[name] = gradient + memory[f"{name}/dual"]
            after[f"{name}/sum"] = memory[f"{name}/sum"] + gradient
    return gradients, after
