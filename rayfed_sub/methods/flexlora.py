"""FlexLoRA: federated LoRA by truncating the mean product (Bai et al., arXiv 2402.11505).

Rule: the mean dW = sum_k p_k s_k B_k A_k is factorised, dW = U diag(sigma) V^T; the server keeps its r largest singular
values, client i receives its r_i largest: s_i B = U diag(sigma), with all of sigma in B, and A = V^T.  Not exact: the
server errs by sqrt(sum of the dropped sigma^2), a client of lower rank by what it does not receive; with unequal ranks
even a round that trains nothing loses the tail.  Where dW has less than r factors, the spare rows of A stay as they
were and their B is zero: they change nothing and can be trained.
The stacked factors grow with the cohort; beyond m n numbers their product takes their place.
Singular vectors are another basis every round, in which kept Adam moments would mean nothing: they are reset.
Wire, numbers per layer: up r_i (m + n), never more than m n; down r_i (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayfed_sub.core.lowrank import truncated
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


@dataclass(frozen=True)
class FlexLoRA:
    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "arXiv 2402.11505"
    trained: ClassVar[str] = "LoRA's A and B, r per client"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "Adam's moments are reset after the SVD, ranks follow client_ranks by turns"
    alerts: ClassVar[frozenset[str]] = frozenset({"truncation"})

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.OwnAlpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_ranks
    init_server = lora.init_factors
    broadcast = averaging.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        factors = lora.cut(self, server.tensors, shape, lora.rank_of(self, client.id))
        return wire_bytes({**factors, **averaging.head(shape, server.tensors)})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        rank = lora.rank_of(self, client.id)
        tensors = lora.cut(self, broadcast.tensors, shape, rank) | averaging.head(shape, broadcast.tensors)
        for layer in shape.targets:  # the server's B is for s = alpha / r
            name, shrunk = f"{layer.name}/left", lora.rescaling(self, layer, rank)
            tensors[name] = shrunk * tensors[name]
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "left", "right"), rank=rank)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        sent = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = result.tensors[f"{layer.name}/left"], result.tensors[f"{layer.name}/right"]
            sent |= averaging.compact(layer, lora.sent_scale(self, layer, left.shape[1]) * left, right)
        return Update(result.client, weight, sent, result.metrics)

    client_state = averaging.no_client_state
    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        heads = Accumulator(total.weight, {name: t for name, t in total.tensors.items() if name in shape.head_names})
        added = averaging.add(heads, averaging.head(shape, update.tensors), update.weight)
        sums = dict(added.tensors)
        for layer in shape.targets:
            sums |= _grown(_of(layer, total.tensors), _of(layer, update.tensors), update.weight, layer)
        return Accumulator(added.weight, sums)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        if not total.weight:
            return server.advance({})
        changed = {name: total.tensors[name] / total.weight for name in shape.head_names}
        for layer in shape.targets:
            rank, alpha = lora.layer_rank(self, layer), lora.layer_alpha(self, layer)
            left, right = truncated(*_factors(_of(layer, total.tensors), layer), rank)
            left = pad(left / (total.weight * alpha / lora.divisor(self, rank)), (0, rank - len(right)))
            spare = server.tensors[f"{layer.name}/right"][len(right) :]
            changed |= {f"{layer.name}/left": left, f"{layer.name}/right": torch.cat([right, spare])}
        return server.advance(changed)

    model = lora.lora_model
    personal_model = averaging.no_personal_model


def _of(layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
    """A layer's change in the form it has (see `averaging.compact`), by role."""
    roles = ("left", "right", "weight")
    return {role: tensors[f"{layer.name}/{role}"] for role in roles if f"{layer.name}/{role}" in tensors}


def _grown(total: Tensors, change: Tensors, weight: float, layer: Layer) -> dict[str, Tensor]:
    """total (empty at first) + weight * change by name, stacked as long as that is the smaller form."""
    if "weight" in total or "weight" in change:
        so_far = _dense(total) if total else torch.zeros(layer.m, layer.n)
        return {f"{layer.name}/weight": so_far + weight * _dense(change)}
    left, right = weight * change["left"], change["right"]
    if total:
        left, right = torch.cat([total["left"], left], dim=1), torch.cat([total["right"], right])
    return averaging.compact(layer, left, right)


def _dense(change: Tensors) -> Tensor:
    return change["weight"] if "weight" in change else change["left"] @ change["right"]


def _factors(change: Tensors, layer: Layer) -> tuple[Tensor, Tensor]:
    """left (m, R) and right (R, n); a matrix is its own product with a unit matrix."""
    if "weight" not in change:
        return change["left"], change["right"]
    unit, matrix = torch.eye(min(layer.m, layer.n)), change["weight"]
    return (matrix, unit) if layer.n <= layer.m else (unit, matrix)
