"""What several methods do alike: the weighted mean, the trained head, moments between rounds, LoRA's factors.

Plain functions; a method calls those that fit.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayfed_sub.errors import UserError
from rayfed_sub.records import (
    Block,
    Broadcast,
    Change,
    ClientState,
    Fold,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Tensors,
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


def check_rank(rank: int, shape: ModelShape) -> None:
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


def moments_to_start(memory: str, broadcast: Broadcast, state: ClientState | None) -> tuple[dict[str, Tensor], int]:
    """(moments, optimiser steps taken) with which a client begins; no moments stand for zeros."""
    if memory == "average":
        moments = _moments(broadcast.tensors)
        return moments, round(float(broadcast.tensors["step"])) if moments else 0
    if memory == "keep" and state is not None:
        return _moments(state.tensors), state.step
    return {}, 0


def _moments(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("/m1", "/m2"))}


def lora_right(layer: Layer, rank: int, seed: int) -> Tensor:
    """LoRA's initial A (r, n), uniform in +-1/sqrt(n) as peft draws it, from the run's seed, for all clients."""
    draw = stream(seed, "lora A", layer.name).uniform(-1, 1, (rank, layer.n)) / layer.n**0.5
    return torch.from_numpy(draw).float()


def lora_server(weights: Tensors, shape: ModelShape, rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA's factors before round 0, left (B) zero and right (A) drawn, and the head."""
    tensors = head(shape, weights)
    for layer in shape.targets:
        tensors[f"{layer.name}/left"] = torch.zeros(layer.m, rank)
        tensors[f"{layer.name}/right"] = lora_right(layer, rank, seed)
    return tensors


def lora_model(server: ServerState, shape: ModelShape, scale: float) -> dict[str, Change]:
    """The global model of a method whose server holds one left and one right factor per target."""
    tensors = server.tensors
    blocks = {t.name: Block(tensors[f"{t.name}/left"], tensors[f"{t.name}/right"], scale) for t in shape.targets}
    return {name: Change(blocks=(block,)) for name, block in blocks.items()}


def factors(shape: ModelShape, *roles: str) -> tuple[str, ...]:
    """Names of the given factors of every target, and of the head.

    >>> factors(ModelShape((Layer("a", 3, 2),)), "left", "right")
    ('a/left', 'a/right')
    """
    return (*(f"{layer.name}/{role}" for layer in shape.targets for role in roles), *shape.head_names)
