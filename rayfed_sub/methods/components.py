"""Clients that train some of the global factors' components, other ones every round: which, drawn by server and client
alike so that no index travels, and two means over clients with different ones.

Functions whose first argument is `method` answer one question of the protocol, as in `lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
)
from rayfed_sub.methods import averaging, lora

_SEED = "seed"  # server tensor int64: the run's seed, for the coming draws


def init_server(method: lora.Ranks, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
    """LoRA before round 0, and the seed."""
    return ServerState(0, {**lora.init_factors(method, weights, shape, seed).tensors, _SEED: torch.tensor(seed)})


def broadcast(method: object, server: ServerState) -> Broadcast:
    """The factors and the head."""
    return Broadcast(server.round, {n: t for n, t in server.tensors.items() if n != _SEED})


def chosen(seed: int, round: int, client: int, layer: Layer, count: int, of: int) -> Tensor:
    """The components, ascending (count,) int64, that a client trains at a layer in a round.

    >>> chosen(0, 0, 0, Layer("a", 4, 4), 2, 2)
    tensor([0, 1])
    """
    draw = stream(seed, "components", round, client, layer.name).permutation(of)[:count]
    return torch.from_numpy(draw).sort().values


def _parted(
    method: lora.Ranks, received: Broadcast, client: Client, shape: ModelShape
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The client's components of every target's factors by name, and the others."""
    own, others = dict[str, Tensor](), dict[str, Tensor]()
    for layer in shape.targets:
        left, right = f"{layer.name}/left", f"{layer.name}/right"
        rank, whole = (lora.layer_rank(method, layer, r) for r in (lora.rank_of(method, client.id), None))
        index = chosen(client.seed, received.round, client.id, layer, rank, whole)
        rest = torch.tensor([i for i in range(whole) if i not in set(index.tolist())], dtype=torch.int64)
        device = received.tensors[left].device
        for part, at in ((own, index.to(device)), (others, rest.to(device))):
            part[left], part[right] = received.tensors[left][:, at], received.tensors[right][at]
    return own, others


def start(
    method: lora.Ranks, received: Broadcast, client: Client, shape: ModelShape
) -> tuple[Start, dict[str, Tensor]]:
    """The start of a client that trains its components and the head, without moments, and the other components."""
    own, others = _parted(method, received, client, shape)
    tensors = {**own, **averaging.head(shape, received.tensors)}
    begun = lora.start(method, shape, tensors, averaging.tensor_names(shape, "left", "right"))
    return replace(begun, aligned=False), others


def upload(method: object, received: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
    """The client's components and the head."""
    tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left", "right")}
    return Update(result.client, weight, tensors, result.metrics)


def accumulator(method: object, server: ServerState, shape: ModelShape) -> Accumulator:
    """The empty sum, with the seed and the round of the clients' draws."""
    return Accumulator(0.0, {_SEED: server.tensors[_SEED].clone()}, {"round": float(server.round)})


def accumulate(method: lora.Ranks, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
    """The client's components at their places, and by target the weight of all that sent one, `<layer>/owned` (r,)."""
    seed, n = int(total.tensors[_SEED]), int(total.counts["round"])
    tensors = averaging.head(shape, update.tensors)
    for layer in shape.targets:
        left_mk, right_kn = update.tensors[f"{layer.name}/left"], update.tensors[f"{layer.name}/right"]
        whole = lora.layer_rank(method, layer)
        index = chosen(seed, n, update.client, layer, len(right_kn), whole)
        tensors[f"{layer.name}/left"] = torch.zeros(layer.m, whole).index_copy(1, index, left_mk)
        tensors[f"{layer.name}/right"] = torch.zeros(whole, layer.n).index_copy(0, index, right_kn)
        tensors[f"{layer.name}/owned"] = torch.zeros(whole, dtype=torch.float64).index_fill(0, index, 1.0)
    return averaging.add(total, tensors, update.weight)


def mean_over_all(server: ServerState, total: Accumulator, shape: ModelShape) -> dict[str, Tensor]:
    """Mean over all clients, of whom those without a component count with the server's own."""
    changed = _head_mean(total, shape)
    for name, sums, owned, old in _factors(server, total, shape):
        changed[name] = ((sums + (total.weight - owned) * old) / total.weight).float()
    return changed


def mean_over_owners(server: ServerState, total: Accumulator, shape: ModelShape) -> dict[str, Tensor]:
    """Mean over the clients that sent the component; one that nobody sent stays."""
    changed = _head_mean(total, shape)
    for name, sums, owned, old in _factors(server, total, shape):
        changed[name] = torch.where(owned > 0, sums / owned.clamp_min(torch.finfo(owned.dtype).tiny), old).float()
    return changed


def _head_mean(total: Accumulator, shape: ModelShape) -> dict[str, Tensor]:
    heads = {name: tensor for name, tensor in total.tensors.items() if name in shape.head_names}
    return averaging.mean(replace(total, tensors=heads))


def _factors(
    server: ServerState, total: Accumulator, shape: ModelShape
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Of every factor: name, weighted sum, weights of its components along its axis, and the server's own."""
    for layer in shape.targets if total.weight else ():
        owned_r = total.tensors[f"{layer.name}/owned"]
        for role, owned in (("left", owned_r[None]), ("right", owned_r[:, None])):
            name = f"{layer.name}/{role}"
            yield name, total.tensors[name], owned, server.tensors[name]
