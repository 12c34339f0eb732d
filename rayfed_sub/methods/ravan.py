"""Ravan: several cores a layer, each with a scale, between frozen factors (Raje et al., arXiv 2506.05568).

Rule: dW = s sum_i s_i B_i H_i A_i over h heads.  B_i and A_i are drawn once and never change; clients train the cores
H_i (r, r), from the server's, and the scales s_i, from 1; they send s_i H_i, and H_i' = sum_k p_k s_i,k H_i,k.  Exact,
for the outer factors are one and the same; Fed-SB is one head without a scale.  Read in the paper's abstract, in a
summary of its method, and in the public code of FedLLM-Factory, which agree; H_i begin at zero.
B_i and A_i are orthonormal, over heads too while h r fits the layer (the paper's Gram-Schmidt; it has normal numbers as
well), and come from the run's seed: they never travel.  Every client trains all heads: the paper lets weak clients
choose some.  s = alpha / r is ours, as for Fed-SB; the paper has none.
s_i begins every round at 1, so kept Adam moments of it and of H_i belong to another scale: `reset` is the default.
Wire, numbers per layer: h r^2 up, h r^2 down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import inner_core, orthonormal_rows
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Block,
    Broadcast,
    Change,
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
class Ravan:
    name: ClassVar[str] = "ravan"
    paper: ClassVar[str] = "arXiv 2506.05568"
    trained: ClassVar[str] = "h cores of r x r between frozen factors, and a scale of each"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "h r^2 / h r^2"
    departs: ClassVar[str] = "every client trains all heads; s = alpha / r is ours"

    rank: Annotated[averaging.Rank, Field(description="Side r of each trained core.")] = 8
    heads: Annotated[averaging.Rank, Field(description="Number h of cores at a layer.")] = 4
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: averaging.Memory = "reset"

    check = lora.check_rank
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        tensors = averaging.head(shape, weights)
        for layer in shape.targets:
            rank = lora.layer_rank(self, layer)
            tensors[f"{layer.name}/left"] = bases(seed, "B", layer, rank, self.heads, layer.m).T.contiguous()
            tensors[f"{layer.name}/core"] = torch.zeros(self.heads, rank, rank)
            tensors[f"{layer.name}/right"] = bases(seed, "A", layer, rank, self.heads, layer.n)
        return ServerState(0, tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        return wire_bytes({n: t for n, t in server.tensors.items() if not n.endswith(("/left", "/right"))})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        names = averaging.tensor_names(shape, "left", "core", "right")
        scales = {f"{layer.name}/heads": torch.ones(self.heads) for layer in shape.targets}
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        tensors = {**{name: broadcast.tensors[name] for name in names}, **scales}
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "core", "heads"), moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        sent = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            scale_h, core_hrr = (result.tensors[f"{layer.name}/{role}"] for role in ("heads", "core"))
            sent[f"{layer.name}/core"] = scale_h[:, None, None] * core_hrr
        return Update(result.client, weight, sent, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        changes = {}
        for layer in shape.targets:
            left, core, right = (server.tensors[f"{layer.name}/{role}"] for role in ("left", "core", "right"))
            own = {f"{layer.name}/core": core, f"{layer.name}/heads": core.new_ones(self.heads)}
            block = Block(left, right, lora.layer_scale(self, layer), inner_core(own, layer.name))
            changes[layer.name] = Change(blocks=(block,))
        return changes

    personal_model = averaging.no_personal_model
    sent_values = averaging.target_values("core")


def bases(seed: int, which: str, layer: Layer, rank: int, heads: int, size: int) -> Tensor:
    """The heads' orthonormal rows (h r, size), float32, below one another.  Heads are orthogonal to each other in
    groups of as many as fit."""
    fit = size // rank
    groups = [
        orthonormal_rows(stream(seed, "ravan", which, layer.name, first), rank * min(fit, heads - first), size)
        for first in range(0, heads, fit)
    ]
    return torch.cat(groups)
