"""Shared parts of the LoRA methods: initial factors, ranks per client, and clients that train and send both factors.

Functions whose first argument is `method` answer one question of the protocol: a method takes one over by assignment
in its class body, as in `start_client = lora.start_client`.
"""

from __future__ import annotations

import math
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.lowrank import padded
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
)
from rayfed_sub.methods.averaging import Positive, Rank, head, moments_to_send, moments_to_start, tensor_names

FactorRank = Annotated[Rank, Field(description="Rank r of the factors.")]
LargestRank = Annotated[Rank, Field(description="Largest rank r of a client.")]
ClientRanks = Annotated[
    Annotated[tuple[Rank, ...], Field(min_length=1)] | None,
    Field(description="Ranks of the clients: client i has entry i modulo the list's length; null: all have rank."),
]
Alpha = Annotated[Positive, Field(description="Scale of the factors' product, as alpha / rank.")]
OwnAlpha = Annotated[Positive, Field(description="Scale of a client's product, as alpha / its own rank.")]


def check_fits(rank: int, shape: ModelShape) -> None:
    """UserError where the rank exceeds a target matrix."""
    smallest = min(shape.targets, key=lambda layer: min(layer.m, layer.n))
    most = min(smallest.m, smallest.n)
    if rank > most:
        where = f"{smallest.name} is {smallest.m} x {smallest.n}"
        raise UserError("method.rank", rank, f"1 to {most} ({where})", f"set method.rank={most} or less")


def lora_right(layer: Layer, rank: int, seed: int, *whose: int | str) -> Tensor:
    """LoRA's initial A (r, n), uniform in +-1/sqrt(n) as peft draws it, from the run's seed: one for all clients, or
    one for each `whose`."""
    draw = stream(seed, "lora A", layer.name, *whose).uniform(-1, 1, (rank, layer.n)) / layer.n**0.5
    return torch.from_numpy(draw).float()


class _LoRA(Protocol):
    """A method with LoRA's fields; s = alpha / rank."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...


class _Ranks(Protocol):
    """A method with a largest rank and, where client_ranks is set, a rank for each client."""

    @property
    def rank(self) -> int: ...
    @property
    def client_ranks(self) -> tuple[int, ...] | None: ...


def check_rank(method: _LoRA, shape: ModelShape) -> None:
    """UserError where the rank exceeds a target matrix."""
    check_fits(method.rank, shape)


def check_ranks(method: _Ranks, shape: ModelShape) -> None:
    """UserError where `rank` exceeds a target matrix, or a client's rank exceeds `rank`."""
    check_fits(method.rank, shape)
    if max(method.client_ranks or (1,)) > method.rank:
        allowed = f"ranks from 1 to method.rank={method.rank}"
        raise UserError("method.client_ranks", method.client_ranks, allowed, "raise method.rank or lower them")


def rank_of(method: _Ranks, client: int) -> int:
    """The rank of a client: entry `client` of client_ranks, modulo its length, or the rank of all."""
    return method.client_ranks[client % len(method.client_ranks)] if method.client_ranks else method.rank


def cut(tensors: Tensors, shape: ModelShape, rank: int) -> dict[str, Tensor]:
    """The first `rank` components of every target's two factors: left (m, rank), right (rank, n), views."""
    factors = {}
    for layer in shape.targets:
        factors[f"{layer.name}/left"] = tensors[f"{layer.name}/left"][:, :rank]
        factors[f"{layer.name}/right"] = tensors[f"{layer.name}/right"][:rank]
    return factors


def init_factors(method: _LoRA, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
    """LoRA before round 0: left (B) zero, right (A) drawn, and the head."""
    tensors = head(shape, weights)
    for layer in shape.targets:
        tensors[f"{layer.name}/left"] = torch.zeros(layer.m, method.rank)
        tensors[f"{layer.name}/right"] = lora_right(layer, method.rank, seed)
    return ServerState(0, tensors)


def lora_model(method: _LoRA, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds one left and one right factor per target."""
    tensors, scale = server.tensors, method.alpha / method.rank
    blocks = {t.name: Block(tensors[f"{t.name}/left"], tensors[f"{t.name}/right"], scale) for t in shape.targets}
    return {name: Change(blocks=(block,)) for name, block in blocks.items()}


class _BothFactors(_LoRA, Protocol):
    """A method whose clients train both of LoRA's factors."""

    @property
    def optimizer_state(self) -> str: ...


def start_client(
    method: _BothFactors, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape
) -> Start:
    """Both factors and the head, all trained, from the broadcast; Adam's moments by `optimizer_state`."""
    names = tensor_names(shape, "left", "right")
    moments, step = moments_to_start(method.optimizer_state, broadcast, state)
    return Start({name: broadcast.tensors[name] for name in names}, names, method.alpha / method.rank, moments, step)


def upload(method: _BothFactors, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
    """Both factors and the head, and Adam's moments where the server averages them."""
    tensors = {name: result.tensors[name] for name in tensor_names(shape, "left", "right")}
    tensors |= moments_to_send(method.optimizer_state, result)
    return Update(result.client, weight, tensors, result.metrics)


def change_norm(tensors: Tensors, shape: ModelShape) -> float:
    """||B A||_F over all layers: its square is the sum over them of tr(B^T B A A^T)."""
    square = 0.0
    for layer in shape.targets:
        left_mr, right_rn = tensors[f"{layer.name}/left"].double(), tensors[f"{layer.name}/right"].double()
        square += float(((left_mr.T @ left_mr) * (right_rn @ right_rn.T)).sum())
    return math.sqrt(max(0.0, square))


def padded_factors(tensors: Tensors, shape: ModelShape, rank: int) -> dict[str, Tensor]:
    """Every target's factors with zeros appended up to `rank`."""
    factors: dict[str, Tensor] = {}
    for layer in shape.targets:
        left, right = f"{layer.name}/left", f"{layer.name}/right"
        factors |= {left: padded(tensors[left], (layer.m, rank)), right: padded(tensors[right], (rank, layer.n))}
    return factors
