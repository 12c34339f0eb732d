"""HetLoRA: federated LoRA with clients of different ranks that prune themselves (Cho et al., arXiv 2401.06432).

Rule: factors are padded with zeros to rank r and averaged apart, B' = sum_k q_k B_k, A' = sum_k q_k A_k, with weights
q_k ~ p_k ||dW_k||_F, dW_k = B_k A_k over all layers; a client receives the first r_k components of both.  Not exact.
Pruning: a client's tail are its components from floor(gamma r_k) on.  Its loss grows by penalty * tail, where tail is
sum over layers of ||B_tail||_F ||A_tail||_F; where the round made the tail smaller, the client drops it before it
sends, and its rank stays lower.  At least one component remains; B = 0 in round 0 prunes nobody. The paper leaves open,
or we chose: it has no p_k (set federation.client_weighting=uniform for its rule), no trained head (averaged by p_k
here) and no alpha (s = alpha / r for all, as a padded client is one of rank r; with use_rslora alpha / sqrt(r_k), B
being rescaled on its way to a client and back); all norms zero: q = p; gamma is what public implementations use, the
penalty's weight is ours. Components change length, weight and number between rounds, so Adam's moments are reset.
Wire, numbers per layer: r_k (m + n) up, r_k (m + n) down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
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

_PRUNED = "history/pruned"  # server tensor (clients seen, 2) int64: a client's number and the rank it last sent
_ROUNDING = 1e-6  # a tail that differs by less, relatively, has not moved


@dataclass(frozen=True)
class HetLoRA:
    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "arXiv 2401.06432"
    trained: ClassVar[str] = "LoRA's A and B, r per client, pruned by the client"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = (
        "p_k in the weights (uniform: as published); s = alpha / r for all ranks; the penalty's weight is ours"
    )

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    gamma: Annotated[
        float, Field(gt=0, le=1, description="Share of its rank that a pruning client keeps; 1: no pruning.")
    ] = 0.99
    penalty: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of the tail's norm in a client's loss.")
    ] = 0.001

    check = lora.check_ranks
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        factors = lora.init_factors(self, weights, shape, seed).tensors
        return ServerState(0, {**factors, _PRUNED: torch.zeros(0, 2, dtype=torch.int64)})

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        rank = dict(server.tensors[_PRUNED].tolist()).get(client.id, lora.rank_of(self, client.id))
        return wire_bytes({**lora.cut(self, server.tensors, shape, rank), **averaging.head(shape, server.tensors)})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        rank = lora.rank_of(self, client.id) if state is None else int(state.tensors["rank"])
        cut = lora.cut(self, broadcast.tensors, shape, rank)
        rank = lora.client_rank(self, cut, shape)
        tensors = {**self._rescaled(cut, shape, rank), **averaging.head(shape, broadcast.tensors)}
        trained = averaging.tensor_names(shape, "left", "right")
        kept = self._kept(rank)
        penalty = partial(_penalty, self, shape, rank, kept) if self.penalty and kept < rank else None
        own = rank if self.use_rslora else None
        return lora.start(self, shape, tensors, trained, rank=own, penalty=penalty)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        trained = self._rescaled(result.tensors, shape, lora.client_rank(self, result.tensors, shape), back=True)
        sent = lora.cut(self, trained, shape, self._pruned(broadcast, result, shape))
        return Update(result.client, weight, sent | averaging.head(shape, result.tensors), result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        return {"rank": torch.tensor(self._pruned(broadcast, result, shape))}

    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        sent, sums, so_far = update.tensors, total.tensors, total.counts.get("strength", 0.0)
        strength = update.weight * lora.change_norm(sent, shape)
        if strength and not so_far:  # beside a client with a change, those without count for nothing
            sums = {name: tensor for name, tensor in sums.items() if name in shape.head_names}
        added = averaging.add(Accumulator(total.weight, sums), averaging.head(shape, sent), update.weight)
        share = strength if strength or so_far else update.weight
        factors = averaging.add(added, lora.padded_factors(self, sent, shape), share).tensors
        rank = lora.client_rank(self, sent, shape)
        counts = {**total.counts, "strength": so_far + strength, f"rank/{update.client}": float(rank)}
        return Accumulator(added.weight, factors, counts)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        shares = total.counts.get("strength", 0.0) or total.weight
        heads = {name: tensor for name, tensor in total.tensors.items() if name in shape.head_names}
        factors = {name: tensor for name, tensor in total.tensors.items() if name not in heads}
        changed = averaging.mean(Accumulator(shares, factors)) | averaging.mean(Accumulator(total.weight, heads))
        ranks = {int(name[len("rank/") :]): int(r) for name, r in total.counts.items() if name.startswith("rank/")}
        pruned = sorted({**dict(server.tensors[_PRUNED].tolist()), **ranks}.items())
        return server.advance({**changed, _PRUNED: torch.tensor(pruned, dtype=torch.int64).reshape(-1, 2)})

    model = lora.lora_model
    personal_model = averaging.no_personal_model

    def _kept(self, rank: int) -> int:
        return max(1, math.floor(self.gamma * rank))

    def _rescaled(self, tensors: Tensors, shape: ModelShape, rank: int, *, back: bool = False) -> Tensors:
        """The server's factors as those of a client of rank `rank`, whose scale may be its own; back: the other way."""
        if not self.use_rslora:
            return tensors
        by = {f"{t.name}/left": lora.rescaling(self, t, rank) for t in shape.targets}
        scaled = {name: tensors[name] * (1 / factor if back else factor) for name, factor in by.items()}
        return {**tensors, **scaled}

    def _pruned(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> int:
        """The client's rank after the round, of those with the same components the least: any below has fewer."""
        rank = lora.client_rank(self, result.tensors, shape)
        kept = self._kept(rank)
        before = float(tail(self, lora.cut(self, broadcast.tensors, shape, rank), shape, kept))
        after = float(tail(self, self._rescaled(result.tensors, shape, rank, back=True), shape, kept))
        return kept if after < (1 - _ROUNDING) * before else rank


def tail(method: HetLoRA, tensors: Tensors, shape: ModelShape, kept: int) -> Tensor:
    """Sum over layers of ||B_tail||_F ||A_tail||_F, (1,) float32, of the components that a client of rank `kept` has
    not; 0 if there are none."""
    norms = []
    for layer in shape.targets:
        left_mr, right_rn = tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"]
        begin = lora.layer_rank(method, layer, kept)
        norms.append(torch.linalg.vector_norm(left_mr[:, begin:]) * torch.linalg.vector_norm(right_rn[begin:]))
    return torch.stack(norms).sum()[None]


def _penalty(method: HetLoRA, shape: ModelShape, rank: int, kept: int, tensors: Tensors) -> Tensor:
    factors = method._rescaled(tensors, shape, rank, back=True)
    return method.penalty * tail(method, factors, shape, kept)[0]
