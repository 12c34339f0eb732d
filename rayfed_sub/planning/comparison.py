"""All methods beside the one of a run: the same clients, the same model, the same rank or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.protocol import Method
from rayfed_sub.planning.parts import FEW, Parts
from rayfed_sub.planning.traffic import ClientTraffic

RANKS = (4, 8, 16, 64)


@dataclass(frozen=True)
class MethodBytes:
    """A method at a rank: bytes per client up and down in the first and the second round (down_counted: if pretrained
    weights and seed gave nothing for free), stored and in training; the server after two rounds, and at most at the
    coordinator."""

    method: str
    rank: int | None
    up: tuple[int, int]
    down: tuple[int, int]
    down_counted: tuple[int, int]
    state: int
    resident: int
    server: int
    coordinator: int


def by_method(parts: Parts) -> Iterable[MethodBytes]:
    """Every method at the run's rank, over its first two rounds."""
    two, rank = parts.first(2, FEW), getattr(parts.method, "rank", None)
    for name in _names(parts):
        yield _bytes(name, replace(two, method=_method(name, rank, parts)))


def by_rank(parts: Parts, client: int) -> Iterable[MethodBytes]:
    """Every method with every rank that the targets allow, over one round of one client."""
    lone = replace(parts, cohorts=[[client]])
    most = min(min(layer.m, layer.n) for layer in parts.architecture.shape.targets)
    for name in _names(parts):
        for rank in RANKS:
            if rank <= most:
                yield replace(_bytes(name, replace(lone, method=_method(name, rank, parts))), rank=rank)


def _names(parts: Parts) -> list[str]:
    """A method of the user's own is in no table."""
    return list(dict.fromkeys([*METHODS, parts.name]))


def _method(name: str, rank: int | None, parts: Parts) -> Method:
    """A method at the rank; the run's own as it is configured."""
    if name == parts.name and rank == getattr(parts.method, "rank", None):
        return parts.method
    own: dict[str, Any] = dict(parts.config.method) if name == parts.name else {"name": name}
    if rank is None:
        return build(own)
    if max(own.get("client_ranks") or (0,)) > rank:
        own["client_ranks"] = None
    return build({**own, "rank": rank, "inherited": ["rank"]})


def _bytes(name: str, parts: Parts) -> MethodBytes:
    """The bytes of the rounds of `parts`, whose method has this name."""
    found = parts.traffic()
    first, last = found.rounds[0], found.rounds[-1]

    def most(figure: Callable[[ClientTraffic], int]) -> tuple[int, int]:
        return max(map(figure, first.values())), max(map(figure, last.values()))

    return MethodBytes(
        method=name,
        rank=getattr(parts.method, "rank", None),
        up=most(lambda client: client.up),
        down=most(lambda client: client.down),
        down_counted=most(lambda client: client.down_counted),
        state=max(client.state for client in found.clients),
        resident=max(client.resident for client in found.clients),
        server=found.server[-1],
        coordinator=found.coordinator,
    )
