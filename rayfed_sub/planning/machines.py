"""Machine description, measured or from a table of GPUs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil
from pydantic import ByteSize, TypeAdapter, ValidationError

from rayfed_sub.core.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (*(f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")), "total_inactive_file"),
)
"""Of cgroups 2 and 1: the limit, what is used, and the figure of it that files were read into, which is given back."""

GPUS = {
    "t4": 15 * 2**30,
    "l4": 22 * 2**30,
    "a10g": 22 * 2**30,
    "rtx4090": 23 * 2**30,
    "a100-40gb": 39 * 2**30,
    "a100-80gb": 79 * 2**30,
    "h100": 79 * 2**30,
    "h200": 140 * 2**30,
}
"""Share of a GPU's memory that a process can have."""


def free_memory() -> int:
    """Bytes available to new processes: the machine's, or fewer under a container's limit."""
    free = psutil.virtual_memory().available
    for limit, used, stat, cached in _FILES:
        if (_CGROUPS / limit).exists() and (text := (_CGROUPS / limit).read_text().strip()).isdigit():
            figures = dict(line.split() for line in (_CGROUPS / stat).read_text().splitlines())
            taken = int((_CGROUPS / used).read_text()) - int(figures.get(cached, 0))
            free = min(free, max(0, int(text) - taken))
    return free


@cache
def gpu_here(per_worker: float) -> tuple[str, int] | None:
    """Name and bytes of this machine's GPU, the first where there are several; None without one.  per_worker: the
    GPUs that the configuration asks for, which are named where torch cannot use one.

    A child asks: torch opens a context on a GPU that it is asked about, half a gigabyte, and keeps it as long as the
    process lives, which here computes nothing.
    """
    import torch

    if not torch.cuda.device_count():  # which the driver answers without a context
        return None
    code = "from torch import cuda; print(cuda.get_device_name(), cuda.mem_get_info()[1], sep=chr(10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            "resources.gpus_per_worker",
            per_worker,
            "0, or a GPU whose driver fits torch",
            (done.stderr.strip().splitlines() or ["it says nothing"])[-1],
        )
    name, total = done.stdout.splitlines()
    return name, int(total)


@dataclass(frozen=True)
class Machine:
    """A machine: free memory in bytes, CPUs, memory of its GPU.  disk: free bytes for the run folder."""

    name: str
    memory: int
    cpus: float
    disk: int
    gpu: int | None = None


def machine_named(name: str, here: Machine) -> Machine:
    """A GPU of the table, or one with so much memory (`24GB`), in a machine like this.

    >>> machine_named("16GiB", Machine("here", 1, 2, 3)).gpu == 2**34
    True
    """
    known = GPUS.get(name.lower())
    if known is None:
        try:
            known = int(TypeAdapter(ByteSize).validate_python(name))
        except ValidationError:
            raise UserError("--on", name, f"{', '.join(GPUS)}, or a size", "e.g. --on 24GB") from None
    return replace(here, name=name.lower() if name.lower() in GPUS else f"a GPU of {name}", gpu=known)


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of a node."""

    cpus: float
    gpus: float = 0.0

    def places(self, cpus: float, gpus: float) -> int:
        """Number of workers of this shape that fit.

        >>> Node(8, 2).places(1, 0.3), Node(8, 2).places(1.5, 0), Node(2, 0).places(1, 1)
        (6, 5, 0)
        """
        by_cpu = _fit(self.cpus, cpus)
        return min(by_cpu, self.gpu_places(gpus)) if gpus else by_cpu

    def gpu_places(self, gpus: float) -> int:
        """Number that fits its GPUs.  A fraction lies on one GPU: 0.3 fits three times on each, and what is left adds
        up to nothing."""
        return _fit(1, gpus) * math.floor(self.gpus)


def _fit(there: float, each: float) -> int:
    return math.floor(there / each + 1e-9)  # 0.3 / 0.1 is a little below 3


def most_workers(there: Sequence[Node], cpus: float, gpus: float) -> int:
    """Number of workers of this shape that the nodes hold together."""
    return sum(node.places(cpus, gpus) for node in there)
