"""Checks of the conformance suite as plain functions of a method, so that a method outside the table can use them. Each
raises AssertionError if the method fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from rayfed_sub.core.types import Broadcast, Client, LocalResult, Start, Tensors, Update
from rayfed_sub.methods.protocol import Method
from tests.helpers.tiny_models import Tiny, distance, product
from tests.methods.test_protocol import Round, clients_data, walk

ROUNDS = 4
"""Two even and two odd ones."""


def upload_numbers(wire: str, round: int, /, **sizes: int) -> int:
    """Numbers per layer that the uplink half of a `wire` formula gives in a round.

    >>> upload_numbers("k r (m + n) / m n", 0, k=2, r=3, m=4, n=5)  # 2 * 3 * 9
    54
    >>> [upload_numbers("r m, r n in turn / r m", t, r=2, m=4, n=5) for t in (0, 1, 2)]
    [8, 10, 8]
    >>> [upload_numbers("m n first, then r^2 / r^2", t, r=2, m=4, n=5) for t in (0, 1, 2)]
    [20, 4, 4]
    """
    up = wire.split(" / ", maxsplit=1)[0]
    if " first, then " in up:
        up = up.split(" first, then ")[min(round, 1)]
    if up.endswith(" in turn"):
        turns = up.removesuffix(" in turn").split(", ")
        up = turns[round % len(turns)]
    expression = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", up).replace("^", "**")
    return int(eval(expression, {"max": max, "min": min, "__builtins__": {}}, dict(sizes)))


@cache
def rounds_of(method: Method, tiny: Tiny, clients: int = 2) -> tuple[Round, ...]:
    """ROUNDS rounds from the beginning, the same for all checks; every client takes part in all of them."""
    server, walked = method.init_server(tiny.weights, tiny.shape, seed=0), list[Round]()
    for n in range(ROUNDS):
        states = walked[-1].states if walked else None
        data = clients_data(tiny, clients, seed=100 * n)
        walked.append(walk(method, tiny, server, data, weights=[1.0, 2.0][:clients], states=states))
        server = walked[-1].server
    return tuple(walked)


def check_server_names(method: Method, tiny: Tiny, *, fixed: bool = True) -> None:
    """Check that the server's tensors have the same names and shapes after every round, except its history, which
    grows, and, where `fixed` is not set, the rank of the factors, which the server chooses."""

    def shapes(tensors: Tensors) -> dict[str, tuple[int, ...] | None]:
        return {name: None if name.startswith("history/") else shape_of(name, x) for name, x in tensors.items()}

    def shape_of(name: str, tensor: Tensor) -> tuple[int, ...]:
        size = tuple(tensor.shape)
        return size if fixed else size[:1] if name.endswith("/left") else size[1:] if name.endswith("/right") else size

    first = shapes(method.init_server(tiny.weights, tiny.shape, seed=0).tensors)
    for n, done in enumerate(rounds_of(method, tiny)):
        assert shapes(done.server.tensors) == first, f"the server's tensors changed in round {n}"


def check_upload_bytes(method: Method, tiny: Tiny, rank: int) -> None:
    """Check that every upload has the bytes of the `wire` formula (and of the head, where the round trains it), in even
    and odd rounds."""
    for n, done in enumerate(rounds_of(method, tiny)):
        for result, update in zip(done.results, done.updates, strict=True):
            head = sum(tiny.weights[name].numel() for name in tiny.shape.head_names if name in result.trained)
            sizes = {"r": rank, "k": result.periods, "h": getattr(method, "heads", 1)}
            numbers = sum(upload_numbers(method.wire, n, m=t.m, n=t.n, **sizes) for t in tiny.shape.targets)
            assert update.wire_bytes == 4 * (head + numbers), f"round {n}: differs from wire={method.wire!r}"


def check_upload_represents_the_change(method: Method, tiny: Tiny) -> None:
    """Check that the upload represents the client's training: the product of the factors as sent, with the fixed ones,
    equals the product as trained, in even and odd rounds."""
    for n, done in enumerate(rounds_of(method, tiny)):
        for start, result, update in zip(done.starts, done.results, done.updates, strict=True):
            if not trains(start, update):
                continue
            for layer in tiny.shape.targets:
                weight = f"{layer.name}/weight"
                if weight in result.tensors:
                    assert torch.equal(update.tensors[weight], result.tensors[weight])
                    continue
                blocks = result.blocks.get(layer.name)
                scale = start.scale_of(layer.name)
                trained = scale * product(layer, result.tensors) if blocks is None else blocks[0] @ blocks[1]
                sent = (
                    update.tensors[weight]
                    if weight in update.tensors
                    else product(layer, {**start.tensors, **update.tensors})
                )
                gap = min(distance(sent, trained), distance(scale * sent, trained))
                assert gap < 1e-5, f"round {n}: the upload of {layer.name} differs from the client's training"


def trains(start: Start, update: Update) -> bool:
    """False in a round that a method spends on a pass over the data, which moves nothing, so that nothing is sent."""
    return start.correct is None or any(name in update.tensors for name in start.trained)


def check_aligned(method: Method, tiny: Tiny, aligned: Callable[[int], str]) -> None:
    """For methods that align factors before upload: check that a client whose `aligned(round)` factor is the
    broadcast's, rotated, uploads the broadcast's own; in rounds 1, 2, 3 and 4."""
    rng = torch.Generator().manual_seed(5)
    for n, done in enumerate(rounds_of(method, tiny)[:ROUNDS], start=1):
        broadcast = method.broadcast(done.server)
        assert broadcast.round == n
        start = method.start_client(broadcast, None, Client(0, 0), tiny.shape)
        tensors = dict(start.tensors)
        role = aligned(n)
        for layer in tiny.shape.targets:
            name = f"{layer.name}/{role}"
            other = f"{layer.name}/{'right' if role == 'left' else 'left'}"
            factor = tensors[name]
            rank = factor.shape[1 if role == "left" else 0]
            S = torch.randn(rank, rank, generator=rng)
            Q = torch.linalg.matrix_exp(S - S.T)  # a reflection could be its own inverse
            tensors[name] = factor @ Q if role == "left" else Q @ factor
            tensors[other] = torch.randn(tensors[other].shape, generator=rng)
        result = LocalResult(0, tensors, {}, 1, {}, 1.0, 1, {}, trained=start.trained)
        sent = method.upload(Broadcast(n, broadcast.tensors), result, 1.0, tiny.shape).tensors
        for layer in tiny.shape.targets:
            name = f"{layer.name}/{role}"
            assert distance(sent[name], broadcast.tensors[name]) < 1e-4, f"round {n}: {name} is not aligned"
