"""Facts by which a person chooses a method, each from the method's own code: bytes by a walk as for a plan, the rest
from its fields, its declarations and a client's start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.methods import build, class_of
from rayfed_sub.planning.traffic import first_start, traffic

SIDE, RANK, CLIENTS = 512, 8, 20
SHAPE = ModelShape((Layer("layer", SIDE, SIDE),))

COLUMNS = ("method", "up", "down", "kept", "exact", "ranks", "privacy", "server optimizer", "hooks", "own models")


def facts(names: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """A row of COLUMNS for each method, with its defaults at rank RANK.

    up, down: bytes of a client in the second round of CLIENTS, who all take part in both, in multiples of what FedIT
    sends, for a layer of SIDE x SIDE; kept: what a client stores between its rounds, likewise, with AdamW; `<`: as much
    as the data asks for, at most that.  ranks: whether clients may have ranks of their own.  privacy: of clients,
    of rows.  server optimizer: momentum, Adam and FedNova at the server.  hooks: SCAFFOLD and the like.
    """
    whole, *_ = _bytes("fedit")
    for name in names:
        cls: Any = class_of(name)
        bounds = ("<" if name == "hetlora" else "", "<" if name == "hetlora" or hasattr(cls, "at_most") else "", "")
        sizes = [f"{b}{_short(size / whole)}" if size else "0" for b, size in zip(bounds, _bytes(name), strict=True)]
        units = {"clients": cls.supports_server_optimizer, "rows": not _refreshed(name)}
        private = ", ".join(unit for unit, there in units.items() if there) or "no"
        ranks, hooks = "client_ranks" in cls.__dataclass_fields__, hasattr(cls, "shared_basis")
        yield name, *sizes, cls.exact, ranks, private, cls.supports_server_optimizer, hooks, cls.personal


@cache
def _bytes(name: str) -> tuple[int, int, int]:
    """Of a client in the second round: up, down, kept."""
    cohorts = [list(range(CLIENTS))] * 2
    last = traffic(_method(name), SHAPE, Config(), cohorts, lambda client: 10).rounds[-1][0]
    return last.up, last.down, last.state


def _refreshed(name: str) -> bool:
    subspace = first_start(_method(name), SHAPE, Config(), 0).subspace
    return subspace is not None and bool(subspace.refresh_every)


def _method(name: str) -> Any:
    return build({"name": name} if name == "fedavg" else {"name": name, "rank": RANK})


def _short(ratio: float) -> str:
    """A number of two digits.

    >>> _short(1.0), _short(0.0156), _short(16.0)
    ('1', '0.016', '16')
    """
    return f"{float(f'{ratio:.2g}'):g}"
