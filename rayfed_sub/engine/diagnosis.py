"""Diagnostics on their way through a round: whom workers look at, what they send, what the coordinator makes of it.

Nothing here touches what is learned: with and without diagnostics a run has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayfed_sub.analysis.diagnostics import ClientLayer, CohortLayer, diagnose
from rayfed_sub.analysis.movements import Movement, movement
from rayfed_sub.config import Diagnostics
from rayfed_sub.engine.exchange import Packed, packed, unpacked
from rayfed_sub.records import LocalResult, ModelShape, Start
from rayfed_sub.training.gradients import GradientWatch

_DENSE_RANK = 8  # whose share of a gradient's energy is told for methods that train whole matrices


@dataclass(frozen=True)
class Looked:
    """What a worker saw of one client's round: by layer a movement without its tensors, and these, packed."""

    client: int
    weight: float
    layers: Mapping[str, tuple[Movement, Packed]]


def watched(asked: Diagnostics, n: int, cohort: Sequence[int]) -> list[int]:
    """The clients of round n that are looked at, evenly spaced.

    >>> watched(Diagnostics(clients=3), 0, [10, 11, 12, 13, 14, 15]), watched(Diagnostics(every=2), 1, [10, 11])
    ([10, 12, 14], [])
    """
    if not asked.every or n % asked.every or not cohort:
        return []
    few = min(asked.clients, len(cohort))
    return [cohort[i * len(cohort) // few] for i in range(few)]


def gradient_watch(
    asked: Diagnostics, shape: ModelShape, clients: Sequence[int], starts: Sequence[Start], chosen: Sequence[int]
) -> GradientWatch:
    """Looks at the first chosen client of a pack, in evenly spaced layers."""
    few = min(asked.gradient_layers, len(shape.targets))
    layers = frozenset(shape.targets[i * len(shape.targets) // few].name for i in range(few))
    left = f"{shape.targets[0].name}/left"
    ranks = {
        client: start.tensors[left].shape[1] if left in start.tensors else _DENSE_RANK
        for client, start in zip(clients, starts, strict=True)
        if client in chosen
    }
    return GradientWatch(dict(list(ranks.items())[:1]), layers)


def looked(shape: ModelShape, start: Start, result: LocalResult, weight: float, watch: GradientWatch) -> Looked:
    """One client's round as it is sent."""
    layers = {}
    for layer in shape.targets:
        moved = movement(layer, start, result, watch.seen.get((result.client, layer.name)))
        if moved is not None:
            layers[layer.name] = replace(moved, tensors={}), packed(moved.tensors)
    return Looked(result.client, weight, layers)


def rows(
    n: int, shape: ModelShape, looks: Sequence[Looked], server: Mapping[str, tuple[int, float]]
) -> tuple[tuple[CohortLayer, ...], tuple[ClientLayer, ...]]:
    """A round's rows, layer by layer; server: by layer its rank and how far it has come, where that was asked for."""
    cohort: list[CohortLayer] = []
    clients: list[ClientLayer] = []
    for layer in shape.targets:
        seen = [
            (look.client, look.weight, replace(found, tensors=unpacked(tensors)))
            for look in looks
            if layer.name in look.layers
            for found, tensors in [look.layers[layer.name]]
        ]
        if not seen:
            continue
        own, together = diagnose(n, layer, seen)
        if layer.name in server:
            rank, accumulated = server[layer.name]
            together = replace(together, server_rank=rank, accumulated=accumulated)
        cohort.append(together)
        clients += own
    return tuple(cohort), tuple(clients)
