"""The weighted mean and its companions: the trained head, Adam's moments between rounds, changes that travel as
blocks, and the blocks that a returning client has missed.

Functions whose first argument is `method` answer one question of the protocol: a method takes one over by assignment
in its class body, as in `accumulate = averaging.accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.side_by_side import side_by_side
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    Layer,
    LocalResult,
    ModelShape,
    ServerState,
    Tensors,
    Update,
    wire_bytes,
)

Rank = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SubspaceRank = Annotated[Rank, Field(description="Rank r of the subspace.")]
Scale = Annotated[Positive, Field(description="GaLore's scale of a step.")]
Memory = Annotated[
    Literal["keep", "reset"],
    Field(description="Optimizer state at the start of a round: keep the client's own, or reset it."),
]
SharedMemory = Annotated[
    Literal["keep", "reset", "average"],
    Field(
        description="Optimizer state at the start of a round: keep the client's own, reset it, or average that of all "
        "clients at the server."
    ),
]
STACKED = 128
"""Summed rank from which factors are multiplied and added to a dense sum at once, or before, where they take half of
that sum's memory."""
_SCALE = "base_scale"
RANKS = "history/ranks"
"""Server tensor (rounds, targets) int64: summed rank of the blocks that a round added to each target's weight."""
IDLE = "history/idle"
"""Server tensor (i,) int64: rounds without clients, of methods that count by rounds; absent while there are none."""
_SHRUNK = "history/shrunk"
"""Server tensor int64: the last round whose clients sent scales of weight decay; absent while there was none."""


def add(total: Accumulator, tensors: Tensors, weight: float) -> Accumulator:
    """The running sum with `weight * tensor` added under every name, in place; float32 (float64 stays)."""
    sums = dict(total.tensors)
    for name, tensor in tensors.items():
        term = weight * tensor
        sums[name] = sums[name].add_(term) if name in sums else term
    return replace(total, weight=total.weight + weight, tensors=sums)


def mean(total: Accumulator) -> dict[str, Tensor]:
    """The weighted mean, in the sums' own memory; empty when no update arrived (the server then stays as it is)."""
    if not total.weight:
        return {}
    return {name: tensor.div_(total.weight) for name, tensor in _folded(total, total.waiting).tensors.items()}


def device_of(broadcast: Broadcast) -> torch.device:
    """Where the broadcast lies, a worker's device: zeros that are made there need not be sent."""
    return next((tensor.device for tensor in broadcast.tensors.values()), torch.device("cpu"))


def head(shape: ModelShape, tensors: Tensors) -> dict[str, Tensor]:
    """The dense trained head's tensors; empty for language models."""
    return {name: tensors[name] for name in shape.head_names}


def moments_to_keep(memory: str, result: LocalResult) -> dict[str, Tensor]:
    """Adam's moments for the client's own store; none where they are reset or averaged."""
    return dict(result.moments) if memory == "keep" else {}


def moments_to_send(memory: str, result: LocalResult) -> dict[str, Tensor]:
    """Adam's moments and step counts for the server, where they are averaged."""
    if memory != "average":
        return {}
    return {**result.moments, "step": torch.tensor(float(result.step), dtype=torch.float64)}


def scales_to_send(result: LocalResult) -> dict[str, Tensor]:
    """What weight decay left of the weights that a client began with, float64, where it left less than all:
    `base_scale`, and `<layer>/base_scale` of experts' matrices, which have their own."""
    own = {f"{name}/{_SCALE}": scale for name, scale in result.base_scales.items()}
    return {name: _scale(scale) for name, scale in {_SCALE: result.base_scale, **own}.items() if scale != 1.0}


def sent_scales(sent: Tensors, shape: ModelShape) -> dict[str, Tensor]:
    """The scales of `scales_to_send` by name, 1 where none was sent."""
    names = (_SCALE, *(f"{layer.name}/{_SCALE}" for layer in shape.experts))
    return {name: sent.get(name, _scale(1.0)) for name in names}


def take_scales(tensors: dict[str, Tensor], shape: ModelShape) -> dict[str, float]:
    """Takes the scales away from the tensors; by target layer."""
    found = {name: float(tensors.pop(name, 1.0)) for name in sent_scales({}, shape)}
    return {layer.name: found[f"{layer.name}/{_SCALE}" if layer.expert else _SCALE] for layer in shape.targets}


def shrunk(server: ServerState, kept: Mapping[str, float]) -> dict[str, Tensor]:
    """The note that the round's scales by layer, `kept`, have left less of weights than all."""
    return {} if all(scale == 1.0 for scale in kept.values()) else {_SHRUNK: torch.tensor(server.round)}


def scale_bytes(server: ServerState, layers: Iterable[Layer], since: int) -> int:
    """Bytes of the scales, one for all layers but experts' matrices and one for each of these, with which these layers'
    blocks since the start of round `since` make a weight; 0 where no round has shrunk it."""
    last = int(server.tensors[_SHRUNK]) if _SHRUNK in server.tensors else -1
    if last < max(since, 0):
        return 0
    return _scale(1.0).nbytes * len({layer.name if layer.expert else None for layer in layers})


def _scale(scale: float) -> Tensor:
    return torch.tensor(scale, dtype=torch.float64)


def moments_to_start(memory: str, received: Broadcast, state: ClientState | None) -> tuple[dict[str, Tensor], int]:
    """(moments, optimiser steps taken) with which a client begins; no moments stand for zeros."""
    if memory == "average":
        moments = _moments(received.tensors)
        return moments, round(float(received.tensors["step"])) if moments else 0
    if memory == "keep" and state is not None:
        return _moments(state.tensors), state.step
    return {}, 0


def _moments(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if is_moment(name)}


def is_moment(name: str) -> bool:
    """True for the names of moments, and of the counts of experts' steps that stand among them."""
    return name.endswith(("/m1", "/m2", "/step"))


def tensor_names(shape: ModelShape, *roles: str) -> tuple[str, ...]:
    """Names of the given tensors of every target, and of the head.

    >>> tensor_names(ModelShape((Layer("a", 3, 2),)), "left", "right")
    ('a/left', 'a/right')
    """
    return (*(f"{layer.name}/{role}" for layer in shape.targets for role in roles), *shape.head_names)


class _Remembers(Protocol):
    """A method with an `optimizer_state` field."""

    @property
    def optimizer_state(self) -> str: ...


def compact(layer: Layer, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The change left @ right by name in the smaller form: its factors, or the matrix as `<layer>/weight`."""
    if left.shape[1] * (layer.m + layer.n) < layer.m * layer.n:
        return {f"{layer.name}/left": left, f"{layer.name}/right": right}
    return {f"{layer.name}/weight": left @ right}


def add_changes(total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
    """The running sum with the update's changes (in either form of `compact`) added in place to the dense sums
    `<layer>/weight`, and their ranks in `counts` by layer; the total weight is left to `add`.

    Factors wait for those of the next clients, up to `STACKED`: adding a product to the (m, n) sum is bound by memory
    where its rank is small.  `mean` adds what still waits."""
    sent, sums, ranks, waiting = update.tensors, dict(total.tensors), dict(total.counts), dict(total.waiting)
    for layer in shape.targets:
        name, left = f"{layer.name}/weight", sent.get(f"{layer.name}/left")
        if left is None:
            term = update.weight * sent[name]
            sums[name] = sums[name].add_(term) if name in sums else term
        else:
            factors = (update.weight * left, sent[f"{layer.name}/right"])
            waiting[name] = (*waiting.get(name, ()), factors)
        ranks[layer.name] = ranks.get(layer.name, 0.0) + (min(layer.m, layer.n) if left is None else left.shape[1])
    full = {name: terms for name, terms in waiting.items() if _enough(terms)}
    return _folded(Accumulator(total.weight, sums, ranks, waiting), full)


def _enough(terms: Sequence[tuple[Tensor, Tensor]]) -> bool:
    (m, _), n, rank = terms[0][0].shape, terms[0][1].shape[1], sum(left_mr.shape[1] for left_mr, _ in terms)
    return rank >= STACKED or 2 * rank * (m + n) >= m * n


def _folded(total: Accumulator, waiting: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> Accumulator:
    """The sum with these of its waiting terms added, layers side by side."""

    def added(name: str) -> Tensor:
        left_mR, right_Rn = (torch.cat(side, dim=1 - i) for i, side in enumerate(zip(*waiting[name], strict=True)))
        return total.tensors[name].addmm_(left_mR, right_Rn) if name in total.tensors else left_mR @ right_Rn

    sums = {**total.tensors, **dict(zip(waiting, side_by_side(added, waiting), strict=True))}
    left = {name: terms for name, terms in total.waiting.items() if name not in waiting}
    return replace(total, tensors=sums, waiting=left)


def no_history(shape: ModelShape) -> dict[str, Tensor]:
    """The history before round 0."""
    return {RANKS: torch.zeros(0, len(shape.targets), dtype=torch.int64)}


def longer_history(
    server: ServerState, total: Accumulator, shape: ModelShape, less: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The history with the round that `total` is the sum of; `less`: known deficit of each target's summed rank."""
    missing = [0] * len(shape.targets) if less is None else less
    sums = [int(total.counts.get(layer.name, 0)) for layer in shape.targets]
    ranks = [max(0, rank - fewer) for rank, fewer in zip(sums, missing, strict=True)]
    return {RANKS: torch.cat([server.tensors[RANKS], torch.tensor([ranks], dtype=torch.int64)])}


def missed_bytes(server: ServerState, shape: ModelShape, since: int) -> int:
    """Bytes of the blocks added since the start of round `since`, and of the scales that go with them; never more than
    the matrix."""
    missed: list[int] = server.tensors[RANKS][max(since, 0) :].sum(0).tolist()
    numbers = [rank * (t.m + t.n) for t, rank in zip(shape.targets, missed, strict=True)]
    return block_bytes(server, numbers, shape, since)


def block_bytes(server: ServerState, numbers: Sequence[int], shape: ModelShape, since: int) -> int:
    """As `missed_bytes`, of blocks of so many numbers for each target."""
    smaller = [layer for layer, size in zip(shape.targets, numbers, strict=True) if size < layer.m * layer.n]
    sizes = (min(t.m * t.n, size) for t, size in zip(shape.targets, numbers, strict=True))
    return 4 * sum(sizes) + scale_bytes(server, smaller, since)


def with_idle(server: ServerState, changed: Tensors) -> dict[str, Tensor]:
    """The changed tensors of a round; of one without clients, where there are none, the longer list of such rounds."""
    if changed:
        return dict(changed)
    idle = server.tensors.get(IDLE, torch.zeros(0, dtype=torch.int64))
    return {IDLE: torch.cat([idle, torch.tensor([server.round])])}


def rounds_with_clients(server: ServerState, since: int) -> list[int]:
    """The rounds since the start of round `since` that are not among those in `IDLE`."""
    idle = set(server.tensors[IDLE].tolist()) if IDLE in server.tensors else set()
    return [done for done in range(max(since, 0), server.round) if done not in idle]


def broadcast(method: object, server: ServerState) -> Broadcast:
    """All of the server's tensors but those of the past, `history/...`."""
    return Broadcast(server.round, {n: t for n, t in server.tensors.items() if not n.startswith("history/")})


def download_all(method: object, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
    """Bytes of all the server's tensors."""
    return wire_bytes(server.tensors)


def download_factors_and_missed(
    method: object, server: ServerState, shape: ModelShape, client: Client, since: int
) -> int:
    """Bytes of the factors and the head, and of the blocks that were added to the weights since round `since`."""
    known = {RANKS, *(f"{layer.name}/weight" for layer in shape.targets)}
    factors = {name: tensor for name, tensor in server.tensors.items() if name not in known}
    return missed_bytes(server, shape, since) + wire_bytes(factors)


def client_state(method: _Remembers, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
    """Adam's moments, where the client keeps them."""
    return moments_to_keep(method.optimizer_state, result)


def no_client_state(method: object, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
    """For clients that begin every round anew."""
    return {}


def one_basis(method: object, round: int) -> int:
    """For methods whose clients all train in one basis, the same in every round."""
    return 0


def head_values(method: object, shape: ModelShape) -> tuple[str, ...]:
    """Of an update that holds changes of the targets: the head, which travels as it is."""
    return shape.head_names


def target_values(*roles: str) -> Callable[[object, ModelShape], tuple[str, ...]]:
    """Of an update that holds the targets' tensors of these roles as they are, and the head."""

    def sent_values(method: object, shape: ModelShape) -> tuple[str, ...]:
        return tensor_names(shape, *roles)

    return sent_values


def accumulator(method: object, server: ServerState, shape: ModelShape) -> Accumulator:
    """The empty sum."""
    return Accumulator(0.0, {})


def accumulate(method: object, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
    """Every tensor of the update into the sum of its name."""
    return add(total, update.tensors, update.weight)


def aggregate(method: object, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
    """The means in the place of the server's tensors of the same names."""
    return server.advance(mean(total))


def dense_model(method: object, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds `<target>/weight`."""
    return {t.name: Change(dense=server.tensors[f"{t.name}/weight"]) for t in shape.targets}


def no_personal_model(
    method: object, server: ServerState, state: ClientState | None, shape: ModelShape
) -> dict[str, Change]:
    """For methods with one model for all."""
    raise AssertionError(f"{type(method).__name__} has one model for all clients")


def rotated_moments(moments: Tensors, name: str, C_rr: Tensor) -> dict[str, Tensor]:
    """Adam's moments of the factor `name` in another basis, with C = Q_new Q_old^T (LDAdam's rule, arXiv 2410.16103,
    without its mean term); empty where there are none."""
    turned = {}
    for role, turn_rr in (("m1", C_rr), ("m2", C_rr.square())):
        if f"{name}/{role}" in moments:
            moment = moments[f"{name}/{role}"]
            turned[f"{name}/{role}"] = moment @ turn_rr.T if name.endswith("/left") else turn_rr @ moment
    return turned
