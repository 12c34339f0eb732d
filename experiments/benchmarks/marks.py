"""Every contestant's command line and output: a reading between rounds, and its final weights.

A reading is the time and, where an engine is loaded, how many bytes have gone from process to process so far.  Two ways
lead from process to process on one machine: Ray's object store, and sockets, on which calls and small objects travel.
The store counts the bytes of all objects ever made in it.  Sockets are counted by the kernel where they go through the
loopback interface; that counter is the machine's, so nothing else should talk over it meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.cases import TRAIN, Case


def case_of(work: Path) -> Case:
    """The case whose work lies in the folder."""
    return Case(**json.loads((work / "case.json").read_text()))


ASKED = "RAYFED_RACE"
"""The environment variable with the words of the command line, for processes that others start with theirs."""


def asked() -> tuple[Case, Path, Path, int]:
    """The command line WORK OUT WORKERS: the case, the folder of its work, that of what is left, and the workers."""
    words = os.environ.setdefault(ASKED, os.pathsep.join(sys.argv[1:4]))
    work, out, workers = words.split(os.pathsep)
    return case_of(Path(work)), Path(work), Path(out), int(workers)


class Marks:
    """Readings: one when the first round begins, one after each."""

    def __init__(self, case: Case) -> None:
        self._counted, self._taken = case.does != TRAIN, list[dict[str, float]]()

    def mark(self) -> None:
        """A reading now: seconds since 1970, and bytes so far, in a process that is connected to Ray once it is up."""
        bytes_so_far = {"stored": _stored(), "loopback": _loopback()} if self._counted else {}
        self._taken.append({"seconds": time.time(), **bytes_so_far})

    def leave(self, out: Path, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Writes readings.json and weights.npz: by name of the module, (m, n) float32."""
        arrays: dict[str, Any] = dict(weights)
        np.savez(out / "weights.npz", **arrays)
        (out / "readings.json").write_text(json.dumps(self._taken))


def _stored() -> int:
    import ray
    from ray._private.internal_api import node_stats

    if not ray.is_initialized():
        return 0
    node = ray.nodes()[0]
    found = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(found.store_stats.cumulative_created_bytes)


def _loopback() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))
