"""FedFTG: federated fine-tuning in gradient subspaces (Mahla, Jadhav, Ramakrishnan, arXiv 2410.23111).

Rule: every client runs GaLore (arXiv 2403.03507) on the target weights for T_agg steps; W <- sum_k p_k W_k.
In dual form W_k = c_k W + sum of its periods' blocks, so the average is exact with low-rank uploads, and it keeps the
summed rank of the cohort.  An unchanged basis is sent again: a server need not remember who holds which.
Wire, numbers per layer: up k r (m + n) for k periods touched (never more than m n), down the blocks missed since the
client last synchronised (never more than m n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
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


@dataclass(frozen=True)
class FedFTG:
    name: ClassVar[str] = "fedftg"
    paper: ClassVar[str] = "arXiv 2410.23111"
    trained: ClassVar[str] = "GaLore coefficients in the client's own gradient subspace"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "k r (m + n) / min(m n, blocks missed)"
    departs: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True
    alerts: ClassVar[frozenset[str]] = frozenset({"full rank", "gradients"})

    rank: averaging.SubspaceRank = 8
    scale: averaging.Scale = 1.0
    refresh_every: Annotated[
        averaging.Rank, Field(description="A client's own optimizer steps between two bases, over all its rounds.")
    ] = 200
    projector: Annotated[
        Literal["exact", "svd", "randomized", "random"],
        Field(
            description="Basis of the subspace. exact: top right singular vectors of the gradient, without forming it; "
            "svd: torch's of the gradient, as galore-torch; randomized: subspace iteration; random: no data at all."
        ),
    ] = "exact"
    moments: Annotated[
        Literal["keep", "rotate", "reset"],
        Field(description="Adam's moments at a new basis: kept as they are, rotated into it, or reset."),
    ] = "keep"
    optimizer_state: Annotated[
        averaging.Memory,
        Field(
            description="Optimizer state and basis at the start of a round: keep the client's own, as the released "
            "code does, or reset them."
        ),
    ] = "keep"

    def check(self, shape: ModelShape) -> None:
        lora.check_fits(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, {**weights, **averaging.no_history(shape)})

    broadcast = averaging.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        return averaging.missed_bytes(server, shape, since) + wire_bytes(averaging.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        kept = state.tensors if state is not None and self.optimizer_state == "keep" else {}
        tensors = averaging.head(shape, broadcast.tensors)
        trained, device = list(tensors), averaging.device_of(broadcast)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            tensors[left] = torch.zeros(layer.m, self.rank, device=device)
            tensors[right] = torch.zeros(self.rank, layer.n, device=device)
            fixed, moving = sides(layer)
            tensors[fixed] = kept.get(fixed, tensors[fixed])
            trained.append(moving)
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        subspace = Subspace(self.rank, self.refresh_every, self.projector, self.moments)
        return Start(tensors, tuple(trained), self.scale, moments, step, subspace, decays_base=True)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            tensors |= averaging.compact(layer, *result.blocks[layer.name])
        return Update(result.client, weight, tensors | averaging.scales_to_send(result), result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        if self.optimizer_state == "reset":
            return {}
        bases = {name: result.tensors[name] for name, _ in map(sides, shape.targets)}
        return bases | averaging.moments_to_keep(self.optimizer_state, result)

    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        kept = averaging.sent_scales(update.tensors, shape)
        added = averaging.add(total, averaging.head(shape, update.tensors) | kept, update.weight)
        return averaging.add_changes(added, update, shape)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed = averaging.mean(total)
        kept = averaging.take_scales(changed, shape)
        for layer in shape.targets if changed else ():
            name = f"{layer.name}/weight"
            changed[name].add_(kept[layer.name] * server.tensors[name])
        changed |= averaging.shrunk(server, kept)
        return server.advance({**changed, **averaging.longer_history(server, total, shape)})

    model = averaging.dense_model
    personal_model = averaging.no_personal_model
    sent_values = averaging.head_values
