"""Workers that fit a machine, by pack size, and the refusal of runs that cannot fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rayfed_sub.config.schema import Resources
from rayfed_sub.core.errors import UserError
from rayfed_sub.planning.machines import Machine
from rayfed_sub.planning.needs import HOLES, Need, between, need
from rayfed_sub.planning.traffic import FEW, Parts
from rayfed_sub.planning.worker_memory import Memory, activations

PACKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Fit:
    """Number of workers that fit with packs of this size, and the memory of one."""

    pack_size: int
    worker: int
    workers: int


def roomy(needed: Need) -> Need:
    """Memory of packs, for cohorts as large."""
    return replace(needed, cohort=max(PACKS))


def settled(needed: Need, machine: Machine) -> Need:
    """The need with what resources.activation_checkpointing=auto comes to on the machine."""
    resources = needed.config.resources
    if machine.gpu is None or resources.activation_checkpointing != "auto":
        return needed
    pack = min(resources.first_pack, needed.cohort)
    fit = needed.on_gpu(needed.worker(pack).tensors) <= _share(needed, machine.gpu)
    return needed if fit else replace(needed, recompute=True)


def fits(needed: Need, one: Memory, four: Memory, machine: Machine) -> Iterable[Fit]:
    """For each pack size the workers that fit, at most as many as there are CPUs for.

    needed: a roomy one, whose workers with packs of one and of four clients are given.
    """
    resources = needed.config.resources
    for pack in sorted({*PACKS, resources.first_pack}):
        memory = between(pack, (1, one), (4, four))
        if machine.gpu is not None:
            taken = needed.on_gpu(memory.tensors)
            yield Fit(pack, taken, machine.gpu // taken)
            continue
        taken, most = needed.bare[2] + memory.process, int(machine.cpus / resources.cpus_per_worker + 1e-9)
        yield Fit(pack, taken, most_workers(needed, pack, taken, most, machine.memory))


def roomy_packs(found: Iterable[Fit], resources: Resources) -> list[int]:
    """The pack sizes at which no worker is lost: as many fit as are asked for, or as do with the configured size."""
    fitting = {fit.pack_size: fit.workers for fit in found}
    share = resources.gpus_per_worker
    asked = int(1 / share) if 0 < share <= 1 else resources.trainers  # fits are those of one GPU
    least = max(1, min(asked, resources.trainers, fitting[resources.first_pack]))
    return [size for size, workers in fitting.items() if workers >= least]


def most_workers(needed: Need, pack: int, taken: int, most: int, memory: int) -> int:
    """The most workers, up to `most`, that fit with their two packs on the way; taken: bytes of one."""
    fitting = (w for w in range(most, 0, -1) if max(needed.loading, needed.fixed(w, pack) + w * taken) <= memory)
    return next(fitting, 0)


_Advice = tuple[str, object, str]
"""The field to change, its value, and how."""


def check_fits(parts: Parts, machine: Machine) -> None:
    """UserError, one line, where the run cannot fit: needed and available memory, and the nearest one that fits.

    A run that could fit is never refused: needs are lower bounds here, while the advice leaves room for the heap's
    holes.
    """
    needed = settled(need(parts, rounds=2, most=FEW), machine)
    _check_disk(needed, machine)
    resources = parts.config.resources
    workers, pack = resources.trainers, min(resources.first_pack, needed.cohort)
    passes = activations(parts.config, parts.architecture, needed.size, pack)
    wide = passes + 8 * pack * needed.most(lambda client: client.resident)
    if machine.gpu is None and needed.node(pack, wide) <= machine.memory:
        return  # plainly: even several times the activations would
    tensors = needed.worker(pack).tensors
    if machine.gpu is not None:
        share = _share(needed, machine.gpu)
        fits, taken, there = needed.on_gpu(tensors) <= share * HOLES, needed.on_gpu(tensors), round(share)
    else:
        taken, there = needed.least(workers, tensors), machine.memory
        fits = taken <= there
    if fits:
        return
    field, value, advice = _nearest(needed, machine)
    where = f"what fits into {_gb(there)} of memory on {machine.name}; this run needs {_gb(taken)} at least"
    raise UserError(field, value, where, advice)


def _check_disk(needed: Need, machine: Machine) -> None:
    """UserError where the last checkpoint alone would not fit."""
    server, state = needed.traffic.server[-1], needed.most(lambda client: client.state)
    taken, clients = needed.states + server, needed.config.federation.clients
    if taken <= machine.disk:
        return
    allowed = f"what fits into {_gb(machine.disk)} of disk; a checkpoint of {needed.trained} clients takes {_gb(taken)}"
    most = (machine.disk - server) // (2 * max(1, state))
    if most < 1:
        raise UserError("--out", machine.name, allowed, "choose a run folder on a larger disk")
    cohort = needed.config.federation.sampled
    sampled = f" federation.sampled={most}" if cohort is not None and cohort > most else ""
    advice = f"set federation.clients={most}{sampled}, or choose a method that stores less"
    raise UserError("federation.clients", clients, allowed, advice)


def _nearest(needed: Need, machine: Machine) -> _Advice:
    """Fewer workers before smaller packs, smaller packs before batches, those before another model."""
    config, resources = needed.config, needed.config.resources
    workers, pack = _widest(needed, machine)
    if workers and pack == resources.first_pack:
        return "resources.workers", resources.workers, f"set resources.workers={workers}"
    if workers:
        wanted = "" if workers == resources.trainers else f" resources.workers={workers}"
        return "resources.pack_size", resources.pack_size, f"set resources.pack_size={pack}{wanted}"
    model, path = "model.path", config.model.path
    if needed.loading > machine.memory:
        return model, path, "take a smaller model, or one that bitsandbytes has stored quantised"
    if needed.least(0, 0) > machine.memory and machine.gpu is None:
        return model, path, "take a smaller model, or a method whose server holds factors, e.g. method.name=fedit"
    if size := _batch_size(needed, machine):
        advice = f"set federation.batch_size={size} resources.pack_size=1 resources.workers=1"
        return "federation.batch_size", config.federation.batch_size, advice
    return model, path, "take a smaller model, a lower method.rank or task.max_length, or more memory"


def _widest(needed: Need, machine: Machine) -> tuple[int, int]:
    """Workers and pack size that train the most clients at once; no workers where not even packs of one fit."""
    resources = needed.config.resources
    best, pack = (0, 0), resources.first_pack
    while pack:
        workers = _workers(needed, machine, pack, resources.trainers)
        best = max(best, (workers, pack), key=lambda found: found[0] * found[1])
        pack //= 2
    return best


def _workers(needed: Need, machine: Machine, pack: int, most: int) -> int:
    """The workers, up to `most`, that fit with packs of this size: on GPUs all or none, as each has its share."""
    memory = needed.worker(pack)
    if machine.gpu is None:
        return most_workers(needed, pack, needed.bare[2] + memory.process, most, machine.memory)
    return most if needed.on_gpu(memory.tensors) <= _share(needed, machine.gpu) else 0


def _batch_size(needed: Need, machine: Machine) -> int:
    """The largest halved batch with which one worker fits that trains one client at a time; 0 where none does."""
    config = needed.config
    size = config.federation.batch_size // 2
    while size:
        smaller = config.model_copy(update={"federation": config.federation.model_copy(update={"batch_size": size})})
        if _workers(replace(needed, config=smaller), machine, 1, most=1):
            return size
        size //= 2
    return 0


def _share(needed: Need, gpu: int) -> float:
    """Bytes of a GPU's memory that a worker may have."""
    return gpu * (needed.config.resources.gpus_per_worker or 1.0)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
