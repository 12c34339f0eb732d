"""Plan of a run before it starts: bytes on the wire, memory by process, disk, and pack sizes that fit."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rayfed_sub.clock.device_presets import memory_of
from rayfed_sub.clock.fleet import fleet_of
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.text import count, megabytes
from rayfed_sub.planning.fit import Fit, check_fits, fits, roomy, settled
from rayfed_sub.planning.job import Job
from rayfed_sub.planning.machines import Machine, free_memory, gpu_here, machine_named
from rayfed_sub.planning.needs import Need, need
from rayfed_sub.planning.over_gpus import over_gpus
from rayfed_sub.planning.packs import any_pack, most_clients
from rayfed_sub.planning.sampling import cohort, draws, local_steps
from rayfed_sub.planning.traffic import FEW, ClientTraffic, MethodBytes, Parts, Traffic, by_method, by_rank
from rayfed_sub.planning.worker_memory import Lengths, Memory
from rayfed_sub.privacy.accountant import account

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundBytes:
    """Wire bytes of a round: of the client with the least and the most, and of the cohort.  down_counted: if pretrained
    weights and seed gave nothing for free, so that a client's first download were the whole broadcast."""

    round: int
    clients: int
    up: tuple[int, int]
    down: tuple[int, int]
    up_all: int
    down_all: int
    down_counted: tuple[int, int]
    down_counted_all: int


@dataclass(frozen=True)
class Plan:
    """All bytes.  clients: in all, per round, and that ever train; in an asynchronous run in all, under way at a time,
    and whose updates count, at most.  rows: longest rows, in tokens.  backbone, data,
    broadcast: once per node.  worker: above the bare process, `bare`.  one_more: bytes of another client in a pack.
    state: of the client with the least and the most.  server: at first and after the last walked round.  store: of the
    object store; node: all processes of a run on one node.  methods: at the same rank; ranks: per stored client.
    privacy: account of all rounds (`privacy.account`).  speed: filled in by a probe."""

    name: str
    method: str
    clients: tuple[int, int, int]
    rows: Lengths
    backbone: int
    data: int
    broadcast: int
    bare: int
    worker: Memory
    one_more: int
    resident: tuple[int, int]
    state: tuple[int, int]
    rounds: tuple[RoundBytes, ...]
    server: tuple[int, int]
    coordinator: int
    store: int
    node: int
    disk: int
    machine: Machine
    fits: tuple[Fit, ...]
    methods: tuple[MethodBytes, ...]
    ranks: tuple[MethodBytes, ...]
    notes: tuple[str, ...]
    privacy: dict[str, Any] | None = None
    speed: Any = None
    asynchronous: bool = False


def plan(parts: Parts, machine: Machine) -> Plan:
    """The whole plan, also of a run that does not fit."""
    needed, resources = settled(need(parts), machine), parts.config.resources
    pack, rounds = resources.first_pack, parts.config.federation.rounds or 0
    found, wide = needed.traffic, roomy(needed)
    one, four = wide.worker(1), wide.worker(4)
    worker = {1: one, 4: four}.get(min(pack, needed.cohort)) or needed.worker(pack)
    return Plan(
        name=parts.config.name,
        method=parts.name,
        clients=(parts.config.federation.clients, parts.cohort, needed.trained),
        rows=needed.size,
        backbone=needed.backbone,
        data=needed.data,
        broadcast=found.broadcast,
        bare=needed.bare[2],
        worker=worker,
        one_more=(four.process - one.process) // 3,
        resident=_span(client.resident for client in found.clients),
        state=_span(client.state for client in found.clients),
        rounds=tuple(_round(n, walked) for n, walked in enumerate(found.rounds)),
        server=(found.server[0], found.server[-1]),
        coordinator=needed.bare[1] + needed.coordinator,
        store=needed.store(resources.trainers, pack),
        node=needed.node(pack, 0 if machine.gpu else worker.process),
        disk=needed.disk,
        machine=machine,
        fits=tuple(fits(wide, one, four, machine)),
        methods=tuple(by_method(parts)),
        ranks=tuple(by_rank(parts, needed.widest)),
        notes=(
            *_notes(parts, found),
            *_checkpointing(needed),
            *_over_gpus(needed, one.tensors, machine),
            *_device_notes(parts, needed, one.tensors),
        ),
        privacy=account(parts.config, parts.noise, partial(draws, parts.config, parts.dataset, rounds)),
        asynchronous=parts.config.federation.mode == "async",
    )


def as_dict(record: Any) -> Any:
    """A plan as plain values for JSON."""
    if hasattr(record, "__dataclass_fields__"):
        return {field.name: as_dict(getattr(record, field.name)) for field in fields(cast(Any, record))}
    return [as_dict(item) for item in record] if isinstance(record, tuple | list) else record


def _round(n: int, walked: Mapping[int, ClientTraffic]) -> RoundBytes:
    ups, downs = [c.up for c in walked.values()], [c.down for c in walked.values()]
    counted = [c.down_counted for c in walked.values()]
    return RoundBytes(
        round=n,
        clients=len(walked),
        up=_span(ups),
        down=_span(downs),
        up_all=sum(ups),
        down_all=sum(downs),
        down_counted=_span(counted),
        down_counted_all=sum(counted),
    )


def _span(sizes: Iterable[int]) -> tuple[int, int]:
    found = list(sizes)
    return (min(found, default=0), max(found, default=0))


def _notes(parts: Parts, found: Traffic) -> Iterable[str]:
    """Notes beside the figures."""
    config = parts.config
    if (start := parts.start) is not None:
        size = megabytes(start.wire_bytes)
        yield f"Training begins from {start.place}, {start.what}: {size} to every client before its first round."
    if config.resources.pack_size == "auto":
        first = config.resources.first_pack
        if any_pack(config, parts.architecture):
            grow = "with which the run begins; they grow where that is quicker and memory is free"
        else:
            grow = "which stay so, for here weights would have other bits with packs of another size"
        yield f"Memory is that of packs of {first}, {grow}."
    if parts.stacked:
        yield "A download holds the changes of the whole cohort: it grows with the cohort's ranks, up to dense weights."
    if found.dense:
        yield "The server holds dense weights from the start: it does not grow with clients."
    if config.method.get("gamma", 1.0) != 1.0:
        yield "Clients prune themselves as they learn: bytes are at most these."
    if config.hook:
        yield f"The figures of {config.method['name']} hold the hook's tensors; those of other methods are without it."
    if config.resources.executor == "reference":
        yield "resources.executor=reference: each worker holds a float32 copy of the model besides."


def _checkpointing(needed: Need) -> Iterable[str]:
    if needed.recompute and needed.config.resources.activation_checkpointing == "auto":
        yield "Blocks are computed twice (activation checkpointing), for the first pack would not fit otherwise."


def _over_gpus(needed: Need, tensors: int, machine: Machine) -> Iterable[str]:
    """What a worker of one client would take of several GPUs, where one does not hold it."""
    if machine.gpu is None or not (parts := over_gpus(needed, tensors, machine.gpu)):
        return
    shares = ", ".join(f"blocks {one.first} to {one.last} with {megabytes(one.taken)}" for one in parts)
    yield (
        f"A worker of one client takes {megabytes(needed.on_gpu(tensors))}, more than {machine.name} has. Its layers "
        f"over {len(parts)} of them: {shares}. A run keeps a worker's model on one."
    )


def recomputes(job: Job) -> bool:
    """Whether the run's workers compute blocks twice, on a GPU such as this machine's."""
    asked = job.config.resources.activation_checkpointing
    if asked != "auto" or not job.config.resources.gpus_per_worker or job.architecture.module is not None:
        return asked == "blocks"
    machine = here(job)
    if machine.gpu is None:  # the workers' machines are others, of which nothing is known
        return True
    try:
        with walking():
            return settled(need(job_parts(job), rounds=2, most=FEW), machine).recompute
    except UnplannedError:
        return False


def _device_notes(parts: Parts, needed: Need, tensors: int) -> Iterable[str]:
    """Notes of a run with devices.  tensors: bytes of one client's training, besides the backbone."""
    fleet, federation = fleet_of(parts.config, parts.dataset.client_names), parts.config.federation
    if fleet is None:
        return
    least = needed.backbone + tensors
    for kind, (name, device) in enumerate(zip(fleet.names, fleet.devices, strict=True)):
        memory, clients = memory_of(device), int((fleet.classes == kind).sum())
        if clients and memory is not None and memory < least:
            held = f"the model and one client's training, which take {megabytes(least)}"
            who = f"{clients} of {federation.clients} clients ({name}, {megabytes(memory)})"
            yield f"{who} cannot hold {held} at least."
    if federation.mode == "async":
        updates = count("update", federation.updates)
        yield (
            f"A round is a step of the server, with {updates}. Whose, and from which version, follows from the clock: "
            "downloads are those of clients that are drawn for the step and begin with it. Bytes of clients that are "
            "under way at the end come on top."
        )
        yield (
            f"Up to {needed.cohort} clients are under way, of as many versions of the server at most; one version is "
            f"in memory at a time, and results that wait for their moment take up to {megabytes(needed.waiting)}."
        )


class UnplannedError(Exception):
    """The model's memory is not known before it trains; the text is the cause."""


@contextmanager
def walking() -> Iterator[None]:
    """Around a walk of the model: UnplannedError where it asks its tensors for numbers, as Longformer does: a plan's
    have none."""
    try:
        yield
    except RunError:  # a method's failure is none of the model
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise UnplannedError(" ".join(str(error).split())[:100]) from error


def plan_of(job: Job, on: str | None = None, folder: Path = Path()) -> Plan:
    """The plan of a job on this machine, or with the GPU `on` (see `machine_named`).

    Raises UserError for a GPU that it does not know, and for a model that cannot be planned; the plan shows what does
    not fit, and `check` refuses it.
    """
    machine = here(job, folder)
    there = machine if on is None else machine_named(on, machine)
    try:
        with walking():
            return plan(job_parts(job), there)
    except UnplannedError as error:
        allowed = f"a model whose memory follows from shapes alone; this one says: {error}"
        raise UserError("model.path", job.config.model.path, allowed, "run it without a plan") from error


def check(job: Job, folder: Path = Path(), on: str | None = None, free: int | None = None) -> None:
    """UserError where the job cannot fit this machine; folder: where the run's files will lie, or a parent of it; free:
    bytes of memory that it had before processes of the run came up.
    What a module of the caller's own takes is not known before it trains."""
    if job.architecture.module is not None:
        return
    machine = here(job, folder)
    machine = machine if free is None else replace(machine, memory=free)
    there = machine if on is None else machine_named(on, machine)
    try:
        with walking():
            check_fits(job_parts(job), there)
    except UnplannedError as error:
        log.warning("whether the run fits into memory is not known before it trains: %s", error)


@dataclass(frozen=True)
class Planned:
    """Bytes of a run on one machine: of all its processes (None: not planned), and of what a worker allocates on its
    GPU (None: there is none)."""

    processes: int | None
    on_gpu: int | None = None


def memory(job: Job) -> Planned | None:
    """Memory of the run on one machine with its largest packs; some seconds for a large model.  None with a module of
    the caller's own."""
    if job.architecture.module is not None:
        return None
    needed = need(job_parts(job), rounds=2, most=FEW)
    pack = most_clients(job.config, needed.cohort, free=job.any_pack)
    if job.config.resources.gpus_per_worker:
        return Planned(needed.node(pack, 0), needed.allocated(needed.worker(pack).tensors))
    return Planned(needed.node(pack, needed.worker(pack).process))


def here(job: Job, folder: Path = Path()) -> Machine:
    """This machine, with its GPU where the job uses one."""
    per_worker = job.config.resources.gpus_per_worker
    name, gpu = (gpu_here(per_worker) if per_worker else None) or ("this machine", None)
    while not folder.exists():
        folder = folder.parent
    return Machine(name, free_memory(), float(os.cpu_count() or 1), shutil.disk_usage(folder).free, gpu)


def job_parts(job: Job) -> Parts:
    """Inputs of a plan."""
    config = job.config
    cohorts = [cohort(config, n) for n in range(config.federation.rounds or 0)]
    steps = partial(local_steps, config)
    return Parts(config, job.method, job.architecture, job.dataset, cohorts, steps, job.noise, job.begun)
