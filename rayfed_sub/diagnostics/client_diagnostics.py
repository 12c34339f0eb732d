"""Diagnostics of a round: the watched clients, the measurements that workers send, the coordinator's rows.

Diagnostics only read: a run has the same bits with and without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rayfed_sub.config.schema import Diagnostics
from rayfed_sub.core.schemas import ClientLayer, CohortLayer
from rayfed_sub.core.types import LocalResult, ModelShape, Start
from rayfed_sub.diagnostics.client_change import WIDEST, ClientChange, client_change
from rayfed_sub.diagnostics.cohort import diagnose
from rayfed_sub.diagnostics.gradients import GradientWatch
from rayfed_sub.diagnostics.server_change import ServerChange

T = TypeVar("T")

_DENSE_RANK = 8  # the rank whose share of a gradient's energy is measured for methods that train whole matrices


@dataclass(frozen=True)
class ClientDiagnostics:
    """Diagnostics of one client's round, by layer."""

    client: int
    weight: float
    layers: Mapping[str, ClientChange]


def watched(asked: Diagnostics, n: int, rounds: int, cohort: Sequence[int]) -> list[int]:
    """The watched clients of round n, counted from 0; none unless diagnostics are due.

    >>> cohort = [10, 11, 12, 13, 14, 15]
    >>> [watched(Diagnostics(clients=3, every=2), n, 3, cohort) for n in range(3)]
    [[], [10, 12, 14], [10, 12, 14]]
    """
    return spaced(cohort, asked.clients) if due(asked, n, rounds) else []


def examined(watched: Sequence[int]) -> list[int]:
    """The watched clients whose gradients are examined, one of four: it takes as long as a refresh.

    >>> examined([10, 12, 14, 20, 21])
    [10, 21]
    """
    return list(watched[::4])


def due(asked: Diagnostics, n: int, rounds: int) -> bool:
    """True where diagnostics are due in round n, counted from 0: as an evaluation with the same `every`."""
    return asked.every > 0 and ((n + 1) % asked.every == 0 or n + 1 == rounds)


def spaced(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced.

    >>> spaced("abcdef", 4), spaced("ab", 4), spaced("ab", 0)
    (['a', 'b', 'd', 'e'], ['a', 'b'], [])
    """
    few = min(most, len(items))
    return [items[i * len(items) // few] for i in range(few)]


def gradient_watch(asked: Diagnostics, shape: ModelShape, starts: Mapping[int, Start]) -> GradientWatch:
    """Gradient watch of a pack's examined clients, with their starts."""
    layers = frozenset(layer.name for layer in spaced(spaced(shape.targets, asked.layers), asked.gradient_layers))
    left = f"{shape.targets[0].name}/left"
    columns = {client: start.tensors[left].shape[1] if left in start.tensors else 0 for client, start in starts.items()}
    ranks = {client: rank if 0 < rank <= WIDEST else _DENSE_RANK for client, rank in columns.items()}
    return GradientWatch(ranks, layers)


def measured(
    asked: Diagnostics, shape: ModelShape, start: Start, result: LocalResult, weight: float, watch: GradientWatch
) -> ClientDiagnostics:
    """Diagnostics of a client's round, as workers send them."""
    layers, targets = {}, spaced(shape.targets, asked.layers)
    wanted = tuple(f"{layer.name}/" for layer in targets)
    # The start's tensors are on the worker's device, the result's are not.
    start = replace(start, tensors={name: x.cpu() for name, x in start.tensors.items() if name.startswith(wanted)})
    for layer in targets:
        moved = client_change(layer, start, result, watch.seen.get((result.client, layer.name)))
        if moved is not None:
            layers[layer.name] = moved
    return ClientDiagnostics(result.client, weight, layers)


def kept(client: ClientDiagnostics) -> ClientDiagnostics:
    """A copy: views into the object store would keep the whole pack's results in memory."""
    layers = {
        name: replace(found, tensors={role: tensor.clone() for role, tensor in found.tensors.items()})
        for name, found in client.layers.items()
    }
    return replace(client, layers=layers)


def rows(
    n: int, shape: ModelShape, watched: Sequence[ClientDiagnostics], server: Mapping[str, ServerChange]
) -> tuple[tuple[CohortLayer, ...], tuple[ClientLayer, ...]]:
    """Rows of a round, layer by layer; server: the server's changes by layer."""
    cohort: list[CohortLayer] = []
    clients: list[ClientLayer] = []
    for layer in shape.targets:
        seen = [(one.client, one.weight, one.layers[layer.name]) for one in watched if layer.name in one.layers]
        if not seen:
            continue
        client_rows, cohort_row = diagnose(n, layer, seen)
        if layer.name in server:
            change = server[layer.name]
            cohort_row = replace(cohort_row, server_rank=change.rank, accumulated=change.accumulated)
        cohort.append(cohort_row)
        clients += client_rows
    return tuple(cohort), tuple(clients)
