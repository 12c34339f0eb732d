"""FedFTG: federated fine-tuning in gradient subspaces (Mahla, Jadhav, Ramakrishnan, arXiv 2410.23111).

Rule: every client runs GaLore (arXiv 2403.03507) on the target weights for T_agg steps; W <- sum_k p_k W_k.
In dual form W_k = c_k W + sum of its periods' blocks, so the average is exact with low-rank uploads, and it keeps the
summed rank of the cohort.  An unchanged basis is sent again: a server need not remember who holds which.
Wire, numbers per layer: up k r (m + n) for k periods touched (never more than m n), down the blocks missed since the
client last synchronised (never more than m n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rayfed_sub.methods import common
from rayfed_sub.records import (
    Broadcast,
    Client,
    ClientState,
    Fold,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Subspace,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.training.subspaces import sides

_RANKS = "history/ranks"  # server tensor (rounds, targets) int64: summed rank of the round's blocks per target


@dataclass(frozen=True)
class FedFTG:
    """rank r and scale as in GaLore; refresh_every counts a client's own optimiser steps; projector picks the basis;
    moments: what a refresh does to Adam's moments; state: what a new round does to the optimiser (released: `keep`)."""

    name: ClassVar[str] = "fedftg"
    paper: ClassVar[str] = "arXiv 2410.23111"
    trained: ClassVar[str] = "GaLore coefficients in the client's own gradient subspace"
    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "k r (m + n) / min(m n, blocks missed)"

    rank: common.Rank = 8
    scale: common.Positive = 1.0
    refresh_every: common.Rank = 200
    projector: Literal["exact", "svd", "randomized", "random"] = "exact"
    moments: Literal["keep", "rotate", "reset"] = "keep"
    state: common.Memory = "keep"

    def check(self, shape: ModelShape) -> None:
        common.check_fits(self.rank, shape)

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        return ServerState(0, {**weights, _RANKS: torch.zeros(0, len(shape.targets), dtype=torch.int64)})

    def broadcast(self, server: ServerState) -> Broadcast:
        return Broadcast(server.round, {n: t for n, t in server.tensors.items() if n != _RANKS})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        missed: list[int] = server.tensors[_RANKS][max(since, 0) :].sum(0).tolist()
        numbers = sum(min(t.m * t.n, rank * (t.m + t.n)) for t, rank in zip(shape.targets, missed, strict=True))
        return 4 * numbers + wire_bytes(common.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        kept = state.tensors if state is not None and self.state == "keep" else {}
        tensors = common.head(shape, broadcast.tensors)
        trained = list(tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            tensors[left], tensors[right] = torch.zeros(layer.m, self.rank), torch.zeros(self.rank, layer.n)
            fixed, moving = sides(layer)
            tensors[fixed] = kept.get(fixed, tensors[fixed])
            trained.append(moving)
        moments, step = common.moments_to_start(self.state, broadcast, state)
        subspace = Subspace(self.rank, self.refresh_every, self.projector, self.moments)
        return Start(tensors, tuple(trained), self.scale, moments, step, subspace, decays_base=True)

    def upload(self, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = common.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = result.blocks[layer.name]
            if left.shape[1] * (layer.m + layer.n) < layer.m * layer.n:
                tensors |= {f"{layer.name}/left": left, f"{layer.name}/right": right}
            else:  # so many periods that the matrix itself is smaller
                tensors[f"{layer.name}/weight"] = left @ right
        if result.base_scale != 1.0:
            tensors["base_scale"] = torch.tensor(result.base_scale, dtype=torch.float64)
        return Update(result.client, weight, tensors, result.metrics)

    def keep(self, result: LocalResult, shape: ModelShape) -> Tensors:
        if self.state == "reset":
            return {}
        bases = {name: result.tensors[name] for name, _ in map(sides, shape.targets)}
        return bases | common.moments_to_keep(self.state, result)

    def zero(self, server: ServerState, shape: ModelShape) -> Fold:
        return Fold(0.0, {}, {t.name: 0.0 for t in shape.targets})

    def fold(self, total: Fold, update: Update, shape: ModelShape) -> Fold:
        sent, ranks = update.tensors, dict(total.counts)
        kept = sent.get("base_scale", torch.tensor(1.0, dtype=torch.float64))
        added = common.add(total, {**common.head(shape, sent), "base_scale": kept}, update.weight)
        sums = dict(added.tensors)
        for layer in shape.targets:
            name, left = f"{layer.name}/weight", sent.get(f"{layer.name}/left")
            so_far = sums.get(name, torch.zeros(layer.m, layer.n))
            if left is None:
                sums[name] = so_far + update.weight * sent[name]
                ranks[layer.name] += min(layer.m, layer.n)
            else:
                sums[name] = torch.addmm(so_far, left, sent[f"{layer.name}/right"], alpha=update.weight)
                ranks[layer.name] += left.shape[1]
        return Fold(added.weight, sums, ranks)

    def finish(self, server: ServerState, total: Fold, shape: ModelShape) -> ServerState:
        changed = common.mean(total)
        ranks = torch.tensor([[int(total.counts[t.name]) for t in shape.targets]], dtype=torch.int64)
        if changed:
            kept = float(changed.pop("base_scale"))
            for layer in shape.targets:
                name = f"{layer.name}/weight"
                changed[name] = kept * server.tensors[name] + changed[name]
        return server.advance({**changed, _RANKS: torch.cat([server.tensors[_RANKS], ranks])})

    model = common.dense_model
    personal_model = common.no_personal_model
