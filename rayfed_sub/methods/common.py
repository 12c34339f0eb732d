"""What several methods do alike: the weighted mean, the trained head, moments between rounds, LoRA's factors.

Plain functions.  Those whose first argument is `method` are whole answers to a question of the protocol: a method
takes one over by assigning it in its class body, as in `fold = common.fold`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rayfed_sub.errors import UserError
from rayfed_sub.records import (
    Block,
    Broadcast,
    Change,
    Client,
    ClientState,
    Fold,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.streams import stream

Rank = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Memory = Literal["keep", "reset"]
SharedMemory = Literal["keep", "reset", "average"]


def add(total: Fold, tensors: Tensors, weight: float) -> Fold:
    """The running sum with `weight * tensor` added under every name; sums are new tensors, float32 (float64 stays)."""
    sums = dict(total.tensors)
    for name, tensor in tensors.items():
        term = weight * tensor
        sums[name] = sums[name] + term if name in sums else term
    return Fold(total.weight + weight, sums, total.counts)


def mean(total: Fold) -> dict[str, Tensor]:
    """The weighted mean; empty when no update arrived (the server then stays as it is)."""
    return {name: tensor / total.weight for name, tensor in total.tensors.items()} if total.weight else {}


def head(shape: ModelShape, tensors: Tensors) -> dict[str, Tensor]:
    """The dense trained head's tensors; empty for language models."""
    return {name: tensors[name] for name in shape.head_names}


def check_fits(rank: int, shape: ModelShape) -> None:
    """UserError where the rank exceeds a target matrix."""
    smallest = min(shape.targets, key=lambda layer: min(layer.m, layer.n))
    most = min(smallest.m, smallest.n)
    if rank > most:
        where = f"{smallest.name} is {smallest.m} x {smallest.n}"
        raise UserError("method.rank", rank, f"1 to {most} ({where})", f"set method.rank={most} or less")


def moments_to_keep(memory: str, result: LocalResult) -> dict[str, Tensor]:
    """Adam's moments for the client's own store; none where they are reset or averaged."""
    return dict(result.moments) if memory == "keep" else {}


def moments_to_send(memory: str, result: LocalResult) -> dict[str, Tensor]:
    """Adam's moments and step count for the server, where they are averaged."""
    if memory != "average":
        return {}
    return {**result.moments, "step": torch.tensor(float(result.step), dtype=torch.float64)}


def moments_to_start(memory: str, received: Broadcast, state: ClientState | None) -> tuple[dict[str, Tensor], int]:
    """(moments, optimiser steps taken) with which a client begins; no moments stand for zeros."""
    if memory == "average":
        moments = _moments(received.tensors)
        return moments, round(float(received.tensors["step"])) if moments else 0
    if memory == "keep" and state is not None:
        return _moments(state.tensors), state.step
    return {}, 0


def _moments(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("/m1", "/m2"))}


def lora_right(layer: Layer, rank: int, seed: int) -> Tensor:
    """LoRA's initial A (r, n), uniform in +-1/sqrt(n) as peft draws it, from the run's seed, for all clients."""
    draw = stream(seed, "lora A", layer.name).uniform(-1, 1, (rank, layer.n)) / layer.n**0.5
    return torch.from_numpy(draw).float()


def tensor_names(shape: ModelShape, *roles: str) -> tuple[str, ...]:
    """Names of the given tensors of every target, and of the head.

    >>> tensor_names(ModelShape((Layer("a", 3, 2),)), "left", "right")
    ('a/left', 'a/right')
    """
    return (*(f"{layer.name}/{role}" for layer in shape.targets for role in roles), *shape.head_names)


class _Remembers(Protocol):
    """A method with a `state` field."""

    @property
    def state(self) -> str: ...


class _LoRA(_Remembers, Protocol):
    """A method with LoRA's fields; s = alpha / rank."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...


def check_rank(method: _LoRA, shape: ModelShape) -> None:
    """UserError where the rank exceeds a target matrix."""
    check_fits(method.rank, shape)


def init_factors(method: _LoRA, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
    """LoRA before round 0: left (B) zero, right (A) drawn, and the head."""
    tensors = head(shape, weights)
    for layer in shape.targets:
        tensors[f"{layer.name}/left"] = torch.zeros(layer.m, method.rank)
        tensors[f"{layer.name}/right"] = lora_right(layer, method.rank, seed)
    return ServerState(0, tensors)


def broadcast(method: object, server: ServerState) -> Broadcast:
    """All of the server's tensors."""
    return Broadcast(server.round, server.tensors)


def download_all(method: object, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
    """Bytes of all the server's tensors."""
    return wire_bytes(server.tensors)


def keep(method: _Remembers, result: LocalResult, shape: ModelShape) -> Tensors:
    """Adam's moments, where the client keeps them."""
    return moments_to_keep(method.state, result)


def zero(method: object, server: ServerState, shape: ModelShape) -> Fold:
    """The empty sum."""
    return Fold(0.0, {})


def fold(method: object, total: Fold, update: Update, shape: ModelShape) -> Fold:
    """Every tensor of the update into the sum of its name."""
    return add(total, update.tensors, update.weight)


def finish(method: object, server: ServerState, total: Fold, shape: ModelShape) -> ServerState:
    """The means in the place of the server's tensors of the same names."""
    return server.advance(mean(total))


def dense_model(method: object, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds `<target>/weight`."""
    return {t.name: Change(dense=server.tensors[f"{t.name}/weight"]) for t in shape.targets}


def lora_model(method: _LoRA, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds one left and one right factor per target."""
    tensors, scale = server.tensors, method.alpha / method.rank
    blocks = {t.name: Block(tensors[f"{t.name}/left"], tensors[f"{t.name}/right"], scale) for t in shape.targets}
    return {name: Change(blocks=(block,)) for name, block in blocks.items()}
