"""What is read off between rounds: the time, and how many bytes have gone from process to process so far.

Two ways lead from process to process on one machine: Ray's object store, and sockets, on which calls and small objects
travel.  The store counts the bytes of all objects ever made in it.  Sockets are counted by the kernel where they go
through the loopback interface; that counter is the machine's, so nothing else should talk over it meanwhile.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import ray


@dataclass(frozen=True)
class Reading:
    """seconds since 1970; stored: bytes of objects made in the store so far, 0 before Ray is up; loopback: bytes so
    far."""

    seconds: float
    stored: int
    loopback: int


class Readings:
    """One before the first round, one after each."""

    def __init__(self) -> None:
        self._taken: list[Reading] = []

    def take(self) -> None:
        """Now.  In a process that is connected to Ray."""
        self._taken.append(Reading(time.time(), _stored(), _loopback()))

    def leave(self, out: Path) -> None:
        """Writes readings.json."""
        (out / "readings.json").write_text(json.dumps([asdict(reading) for reading in self._taken]))


def _stored() -> int:
    if not ray.is_initialized():
        return 0
    from ray._private.internal_api import node_stats

    node = ray.nodes()[0]
    told = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(told.store_stats.cumulative_created_bytes)


def _loopback() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))
