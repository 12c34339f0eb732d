"""How many workers fit a machine, by pack size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rayfed_sub.config.schema import Resources
from rayfed_sub.planning.machines import Machine
from rayfed_sub.planning.needs import BARE_WORKER, Need, between
from rayfed_sub.planning.worker_memory import Memory

PACKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Fit:
    """How many workers with packs of this size fit, and what one of them takes."""

    pack_size: int
    worker: int
    workers: int


def roomy(needed: Need) -> Need:
    """What packs would take, if cohorts were as large."""
    return replace(needed, cohort=max(PACKS))


def fits(needed: Need, one: Memory, four: Memory, machine: Machine) -> Iterable[Fit]:
    """For each pack size the workers that fit, at most as many as there are CPUs for.

    needed: a roomy one, whose workers with packs of one and of four clients are given.
    """
    resources = needed.config.resources
    for pack in sorted({*PACKS, resources.pack_size}):
        memory = between(pack, (1, one), (4, four))
        if machine.gpu is not None:
            taken = needed.on_gpu(memory.tensors)
            yield Fit(pack, taken, machine.gpu // taken)
            continue
        taken, most = BARE_WORKER + memory.process, int(machine.cpus / resources.cpus_per_worker + 1e-9)
        yield Fit(pack, taken, most_workers(needed, pack, taken, most, machine.memory))


def roomy_packs(found: Iterable[Fit], resources: Resources) -> list[int]:
    """The pack sizes at which no worker is lost: as many fit as are asked for, or as do with the configured size."""
    fitting = {fit.pack_size: fit.workers for fit in found}
    share = resources.gpus_per_worker
    asked = int(1 / share) if 0 < share <= 1 else resources.workers  # fits are those of one GPU
    least = max(1, min(asked, resources.workers, fitting[resources.pack_size]))
    return [size for size, workers in fitting.items() if workers >= least]


def most_workers(needed: Need, pack: int, taken: int, most: int, memory: int) -> int:
    """The most workers, up to `most`, that fit with their two packs on the way; taken: bytes of one."""
    fitting = (w for w in range(most, 0, -1) if needed.fixed(w, pack) + w * taken <= memory)
    return next(fitting, 0)
