"""Shared parts of the LoRA methods: peft's settings, initial factors, ranks per client and per layer, and clients that
train and send both factors.

Functions whose first argument is `method` answer one question of the protocol: a method takes one over by assignment
in its class body, as in `start_client = lora.start_client`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Protocol, TypeVar

import torch
from torch import Tensor

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import padded
from rayfed_sub.core.patterns import pattern_key
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
from rayfed_sub.methods.averaging import (
    Positive,
    Rank,
    compact,
    dense_model,
    head,
    moments_to_send,
    moments_to_start,
    tensor_names,
)

FactorRank = Annotated[Rank, Field(description="Rank r of the factors.")]
LargestRank = Annotated[Rank, Field(description="Largest rank r of a client.")]
ClientRanks = Annotated[
    Annotated[tuple[Rank, ...], Field(min_length=1)] | None,
    Field(description="Ranks of the clients: client i has entry i modulo the list's length; null: all have rank."),
]
Alpha = Annotated[Positive, Field(description="Scale of the factors' product, as alpha / rank.")]
OwnAlpha = Annotated[Positive, Field(description="Scale of a client's product, as alpha / its own rank.")]
Dropout = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        description="Share of the numbers in the factors' input that is dropped in training (peft's lora_dropout); the "
        "same ones in any pack.",
    ),
]
UseRslora = Annotated[
    bool, Field(description="true: scales are alpha / sqrt(rank) in place of alpha / rank (rsLoRA, arXiv 2312.03732).")
]
RankPattern = Annotated[
    Mapping[str, Rank] | None,
    Field(
        description="Ranks of layers, as in peft: regular expressions over the end of a layer's name, of which the "
        "first that matches counts, e.g. {q_proj: 16}; null: all have rank. A client of a lower rank has as much less."
    ),
]
AlphaPattern = Annotated[
    Mapping[str, Positive] | None,
    Field(description="Alphas of layers, as rank_pattern has ranks; null: all have alpha."),
]


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
    """A method with LoRA's fields.  It may have peft's settings too, `dropout`, `use_rslora`, `rank_pattern` and
    `alpha_pattern`; a method of another package that has none of them is plain LoRA."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...


def layer_rank(method: _LoRA, layer: Layer, rank: int | None = None) -> int:
    """The rank at a layer, of a client of rank `rank` (None: of the largest).  Where the pattern gives a layer another
    rank than the method's, a client of a lower rank has as much less there, and one at least."""
    whole: int = _matched(_patterns(method, "rank_pattern"), layer, method.rank)
    if rank is None or rank == method.rank:
        return whole
    return rank if whole == method.rank else max(1, whole * rank // method.rank)


def divisor(method: _LoRA, rank: int) -> float:
    """What alpha is divided by at this rank."""
    return math.sqrt(rank) if getattr(method, "use_rslora", False) else rank


def layer_alpha(method: _LoRA, layer: Layer) -> float:
    """The alpha of a layer."""
    alpha: float = _matched(_patterns(method, "alpha_pattern"), layer, method.alpha)
    return alpha


def layer_scale(method: _LoRA, layer: Layer, rank: int | None = None) -> float:
    """The scale of a layer's product, of a client as in `layer_rank`."""
    return layer_alpha(method, layer) / divisor(method, layer_rank(method, layer, rank))


def sent_scale(method: _LoRA, layer: Layer, rank: int) -> float:
    """The scale of factors of so many components at a layer."""
    return layer_alpha(method, layer) / divisor(method, rank)


def rescaling(method: _LoRA, layer: Layer, rank: int) -> float:
    """What B is multiplied by on its way from the server, with its scale, to a client of rank `rank` with its own."""
    return divisor(method, layer_rank(method, layer, rank)) / divisor(method, layer_rank(method, layer))


def client_rank(method: _LoRA, tensors: Tensors, shape: ModelShape) -> int:
    """The rank of the client that has these factors; the least, where several ranks have them."""
    first = shape.targets[0]
    if not _patterns(method, "rank_pattern"):
        return tensors[f"{first.name}/left"].shape[1]
    has = [tensors[f"{layer.name}/left"].shape[1] for layer in shape.targets]
    ranks = range(1, method.rank + 1)
    return ranks[bisect_left(ranks, has, key=lambda r: [layer_rank(method, layer, r) for layer in shape.targets])]


N = TypeVar("N", int, float)


def _patterns(method: _LoRA, field: str) -> Mapping[str, Any]:
    return getattr(method, field, None) or {}


def _matched(patterns: Mapping[str, N], layer: Layer, usual: N) -> N:
    key = _key(tuple(patterns), layer)
    return usual if key is None else patterns[key]


@lru_cache(maxsize=8192)
def _key(patterns: tuple[str, ...], layer: Layer) -> str | None:
    """The pattern for a layer; that for an expert's matrix names the parameter that holds those of all experts."""
    found = pattern_key(patterns, layer.name)
    return pattern_key(patterns, layer.name.rpartition(".")[0]) if found is None and layer.expert else found


def start(
    method: _LoRA,
    shape: ModelShape,
    tensors: Tensors,
    trained: tuple[str, ...],
    moments: Tensors | None = None,
    step: int = 0,
    *,
    rank: int | None = None,
    penalty: Callable[[Tensors], Tensor] | None = None,
) -> Start:
    """A client's start with the method's scales and dropout; rank: the client's (None: the largest)."""
    own = bool(_patterns(method, "rank_pattern") or _patterns(method, "alpha_pattern"))
    return Start(
        tensors,
        trained,
        method.alpha / divisor(method, method.rank if rank is None else rank),
        {} if moments is None else moments,
        step,
        penalty=penalty,
        scales={layer.name: layer_scale(method, layer, rank) for layer in shape.targets} if own else {},
        dropout=getattr(method, "dropout", 0.0),
    )


class Ranks(_LoRA, Protocol):
    """A method with a largest rank and, where client_ranks is set, a rank for each client."""

    @property
    def client_ranks(self) -> tuple[int, ...] | None: ...


def check_rank(method: _LoRA, shape: ModelShape) -> None:
    """UserError where a rank exceeds its target matrix, for a pattern that no target matches, and for dropout where
    experts are targets."""
    if shape.experts and (rate := getattr(method, "dropout", 0.0)):
        allowed = "0 where experts are targets, for whose adapters peft has no dropout"
        raise UserError("method.dropout", rate, allowed, "remove it, or set model.targets=attention")
    for field in ("rank_pattern", "alpha_pattern"):
        for key, value in _patterns(method, field).items():
            _check_pattern(f"method.{field}", key, value, shape.targets)
    matched = {layer.name: _key(tuple(_patterns(method, "rank_pattern")), layer) for layer in shape.targets}
    if others := tuple(layer for layer in shape.targets if matched[layer.name] is None):
        check_fits(method.rank, replace(shape, targets=others))
    for layer in shape.targets:
        rank, most, whose = layer_rank(method, layer), min(layer.m, layer.n), matched[layer.name]
        if rank > most:
            allowed = f"ranks of 1 to {most} for {layer.name}, which is {layer.m} x {layer.n}"
            raise UserError(f"method.rank_pattern.{whose}", rank, allowed, "lower it")


def _check_pattern(field: str, key: str, value: float, targets: Sequence[Layer]) -> None:
    try:
        found = any(_key((key,), layer) for layer in targets)
    except re.error as error:
        raise UserError(field, key, f"regular expressions over layers' names: {error}", "mend it") from None
    if not found:
        shown = ", ".join(layer.name for layer in targets[:2]) + (", ..." if len(targets) > 2 else "")
        allowed = f"patterns that match the end of a target's name, from its beginning or after a dot: {shown}"
        raise UserError(field, key, allowed, "mend it or remove it")


def check_ranks(method: Ranks, shape: ModelShape) -> None:
    """UserError as `check_rank`, and where a client's rank exceeds `rank`."""
    check_rank(method, shape)
    if max(method.client_ranks or (1,)) > method.rank:
        allowed = f"ranks from 1 to method.rank={method.rank}"
        raise UserError("method.client_ranks", method.client_ranks, allowed, "raise method.rank or lower them")


def rank_of(method: Ranks, client: int) -> int:
    """The rank of a client: entry `client` of client_ranks, modulo its length, or the rank of all."""
    return method.client_ranks[client % len(method.client_ranks)] if method.client_ranks else method.rank


def cut(method: _LoRA, tensors: Tensors, shape: ModelShape, rank: int) -> dict[str, Tensor]:
    """The first components of every target's two factors, as many as a client of rank `rank` has there: left (m, r),
    right (r, n), views."""
    factors = {}
    for layer in shape.targets:
        own = layer_rank(method, layer, rank)
        factors[f"{layer.name}/left"] = tensors[f"{layer.name}/left"][:, :own]
        factors[f"{layer.name}/right"] = tensors[f"{layer.name}/right"][:own]
    return factors


def received_cut(method: Ranks, tensors: Tensors, shape: ModelShape, client: Client) -> dict[str, Tensor]:
    """The components that a client of its rank reads of the server's factors, and the head."""
    return cut(method, tensors, shape, rank_of(method, client.id)) | head(shape, tensors)


def download_cut(method: Ranks, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
    """Bytes of what `received_cut` gives the client."""
    return wire_bytes(received_cut(method, server.tensors, shape, client))


def start_cut(
    method: Ranks, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape
) -> Start:
    """Both factors and the head, all trained, without moments: the first components, as many as the client's rank; B is
    rescaled, for the server's has the scale of the largest rank."""
    rank = rank_of(method, client.id)
    tensors = received_cut(method, broadcast.tensors, shape, client)
    for layer in shape.targets:
        name, shrunk = f"{layer.name}/left", rescaling(method, layer, rank)
        tensors[name] = shrunk * tensors[name]
    return start(method, shape, tensors, tensor_names(shape, "left", "right"), rank=rank)


def init_factors(method: _LoRA, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
    """LoRA before round 0: left (B) zero, right (A) drawn, and the head."""
    tensors = head(shape, weights)
    for layer in shape.targets:
        rank = layer_rank(method, layer)
        tensors[f"{layer.name}/left"] = torch.zeros(layer.m, rank)
        tensors[f"{layer.name}/right"] = lora_right(layer, rank, seed)
    return ServerState(0, tensors)


def lora_model(method: _LoRA, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds one left and one right factor per target."""
    changes = {}
    for layer in shape.targets:
        left, right = (server.tensors[f"{layer.name}/{role}"] for role in ("left", "right"))
        changes[layer.name] = Change(blocks=(Block(left, right, layer_scale(method, layer)),))
    return changes


def model_over_weight(method: _LoRA, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds a dense weight too, under the factors."""
    adapted, based = lora_model(method, server, shape), dense_model(method, server, shape)
    return {name: Change(dense=based[name].dense, blocks=adapted[name].blocks) for name in adapted}


class Trains(_LoRA, Protocol):
    """A method with LoRA's fields and an optimizer's state."""

    @property
    def optimizer_state(self) -> str: ...


def start_client(
    method: Trains, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape
) -> Start:
    """Both factors and the head, all trained, from the broadcast; Adam's moments by `optimizer_state`."""
    names = tensor_names(shape, "left", "right")
    moments, step = moments_to_start(method.optimizer_state, broadcast, state)
    return start(method, shape, {name: broadcast.tensors[name] for name in names}, names, moments, step)


def start_unaligned(
    method: Trains, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape
) -> Start:
    """As `start_client`, where the factors are not what the server averages one by one."""
    return replace(start_client(method, broadcast, state, client, shape), aligned=False)


def upload(method: Trains, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
    """Both factors and the head, and Adam's moments where the server averages them."""
    tensors = {name: result.tensors[name] for name in tensor_names(shape, "left", "right")}
    tensors |= moments_to_send(method.optimizer_state, result)
    return Update(result.client, weight, tensors, result.metrics)


def upload_products(
    method: _LoRA, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape
) -> Update:
    """Every target's change s B A, in its smaller form (see `averaging.compact`), and the head."""
    sent = head(shape, result.tensors)
    for layer in shape.targets:
        left, right = result.tensors[f"{layer.name}/left"], result.tensors[f"{layer.name}/right"]
        sent |= compact(layer, sent_scale(method, layer, left.shape[1]) * left, right)
    return Update(result.client, weight, sent, result.metrics)


def change_norm(tensors: Tensors, shape: ModelShape) -> float:
    """||B A||_F over all layers: its square is the sum over them of tr(B^T B A A^T)."""
    square = 0.0
    for layer in shape.targets:
        left_mr, right_rn = tensors[f"{layer.name}/left"].double(), tensors[f"{layer.name}/right"].double()
        square += float(((left_mr.T @ left_mr) * (right_rn @ right_rn.T)).sum())
    return math.sqrt(max(0.0, square))


def padded_factors(method: _LoRA, tensors: Tensors, shape: ModelShape) -> dict[str, Tensor]:
    """Every target's factors with zeros appended up to the largest rank there."""
    factors: dict[str, Tensor] = {}
    for layer in shape.targets:
        rank, left, right = layer_rank(method, layer), f"{layer.name}/left", f"{layer.name}/right"
        factors |= {left: padded(tensors[left], (layer.m, rank)), right: padded(tensors[right], (rank, layer.n))}
    return factors
