"""What a run needs before anything starts: bytes on the wire, memory by process, disk, and what of it fits.

Bytes are those of the method's own tensors (`traffic.py`), a worker's memory that of its own code (`footprint.py`).
What a process holds before it does anything is measured: see the constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, cast

from pydantic import ByteSize, TypeAdapter, ValidationError

from rayfed_sub.analysis.footprint import Lengths, Memory, activations, backbone_bytes, lengths, worker
from rayfed_sub.analysis.traffic import ClientTraffic, Traffic, first_start, traffic
from rayfed_sub.config import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.errors import UserError
from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.skeleton import Skeleton
from rayfed_sub.records import ModelShape

# Private bytes (USS) of the processes of a run before they hold any tensor: Python 3.11, torch 2.13, Ray 2.60 on x86.
BARE_WORKER = 320_000_000
BARE_COORDINATOR = 190_000_000
DRIVER = 350_000_000
RAY = 330_000_000  # its own processes on a node
CUDA = 600_000_000  # a process's context on a GPU, and torch's kernels there
_HOLES = 1.15  # the allocator's, where it is not modelled: on GPUs and in the coordinator

_WALKED = 3  # rounds whose bytes are worked out one by one
_COMPARED = 64  # clients of a cohort that the other methods are walked with
_LARGE = 16  # packs beyond this are worked out from smaller ones
RANKS = (4, 8, 16, 64)
PACKS = (1, 2, 4, 8, 16, 32, 64)
MANY = 10_000

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
"""What a process can have of a GPU's memory."""


@dataclass(frozen=True)
class Machine:
    """What there is: bytes of memory that are free, CPUs; of a GPU its memory.  disk: free bytes for the run folder."""

    name: str
    memory: int
    cpus: float
    disk: int
    gpu: int | None = None


@dataclass(frozen=True)
class RoundBytes:
    """Wire bytes of a round: of the client with the least and the most, and of the cohort."""

    round: int
    clients: int
    up: tuple[int, int]
    down: tuple[int, int]
    up_all: int
    down_all: int


@dataclass(frozen=True)
class MethodBytes:
    """A method at a rank: bytes per client up and down in the first and the second round, stored and in training; the
    server after two rounds, and at most at the coordinator."""

    method: str
    rank: int | None
    up: tuple[int, int]
    down: tuple[int, int]
    state: int
    resident: int
    server: int
    coordinator: int


@dataclass(frozen=True)
class Fit:
    """How many workers with packs of this size fit, and what one of them takes."""

    pack_size: int
    worker: int
    workers: int


@dataclass(frozen=True)
class Plan:
    """All bytes.  clients: in all, per round, and that ever train.  rows: longest rows, in tokens.  backbone, data,
    broadcast: once per node.  worker: above the bare process, `bare`.  one_more: what another client in a pack adds.
    state: of the client with the least and the most.  server: at first and after the last walked round.  store: of the
    object store; node: all processes of a run on one node.  methods: at the same rank; ranks: per stored client.
    speed: filled in by a probe."""

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
    speed: Any = None


@dataclass(frozen=True, eq=False)
class Need:
    """What of a run's needs depends on neither workers nor pack size."""

    config: Config
    skeleton: Skeleton
    traffic: Traffic
    size: Lengths
    widest: int  # the client that trains the most
    steps: int
    cohort: int
    trained: int
    backbone: int
    data: int
    method: Method

    def most(self, figure: Callable[[ClientTraffic], int]) -> int:
        """The largest figure of a walked client."""
        return max(map(figure, self.traffic.clients), default=0)

    @property
    def coordinator(self) -> int:
        """Bytes of the coordinator's process: server, sums, and pretrained weights where those are not shared."""
        return BARE_COORDINATOR + _pretrained(self.skeleton, self.config) + self.traffic.coordinator

    @property
    def states(self) -> int:
        """Bytes of the stored states of all clients that train."""
        return self.trained * self.most(lambda client: client.state)

    def store(self, workers: int, pack: int) -> int:
        """Bytes in the object store: backbone, data, two broadcasts, states, and two packs a worker on their way."""
        moving = 2 * workers * min(pack, self.cohort) * self.most(lambda client: client.up + client.state)
        kept = min(self.states, int(self.config.resources.state_memory))
        return self.backbone + self.data + 2 * self.traffic.broadcast + kept + moving

    def worker(self, pack: int) -> Memory:
        """A worker with packs of this size, above the bare process; no pack is larger than a cohort."""
        pack = min(pack, self.cohort)
        if pack > _LARGE:
            low, high = self._walked(_LARGE // 2), self._walked(_LARGE)
            return _between(pack, (_LARGE // 2, low), (_LARGE, high))
        return self._walked(pack)

    def _walked(self, pack: int) -> Memory:
        start = first_start(self.method, self.skeleton.shape, self.config, self.widest)
        held = self.most(lambda client: client.held)
        rest = (self.size, pack, held, self.traffic.dense)
        return worker(self.config, self.skeleton, start, self.steps, *rest)

    def least(self, workers: int, tensors: int) -> int:
        """Bytes of a node without which the run cannot go: no holes, and nothing that could lie on disk."""
        shared = self.backbone + self.data + self.traffic.broadcast
        return shared + DRIVER + self.coordinator + workers * (BARE_WORKER + tensors)

    def fixed(self, workers: int, pack: int) -> int:
        """Bytes of a node besides its workers, holes included."""
        coordinator = self.coordinator + round((_HOLES - 1) * self.traffic.coordinator)
        return self.store(workers, pack) + DRIVER + RAY + coordinator

    def on_gpu(self, tensors: int) -> int:
        """Bytes of a worker on a GPU, where backbone and broadcast are copied to."""
        return CUDA + self.backbone + self.traffic.broadcast + round(_HOLES * tensors)


def need(
    config: Config,
    method: Method,
    skeleton: Skeleton,
    dataset: Dataset,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
    walked: int = _WALKED,
) -> Need:
    """The needs of a run.  config: resolved.  cohorts: the clients of every round; steps: a client's local steps."""
    met = [cohort for cohort in cohorts if cohort] or [[0]]
    found = traffic(method, skeleton.shape, config, met[:walked], steps)
    each = {k: client for walked_round in found.rounds for k, client in walked_round.items()}
    widest = max(each, key=lambda k: (each[k].resident, steps(k)), default=0)
    longest = max(map(steps, each), default=1)
    data = sum(
        rows.tokens.nbytes + rows.offsets.nbytes + rows.prompts.nbytes for rows in (dataset.train, dataset.held_out)
    )
    data += dataset.client_rows.nbytes + dataset.client_offsets.nbytes
    data += sum(len(text) for texts in (dataset.questions, dataset.references) for text in texts)
    trained = len(set().union(*map(set, cohorts)))
    largest, backbone = max(map(len, met)), backbone_bytes(skeleton)
    size = lengths(dataset, config)
    return Need(config, skeleton, found, size, widest, longest, largest, trained, backbone, data, method)


def plan(
    config: Config,
    method: Method,
    skeleton: Skeleton,
    dataset: Dataset,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
    machine: Machine,
) -> Plan:
    """The whole plan; arguments as in `need`."""
    needed = need(config, method, skeleton, dataset, cohorts, steps)
    found, resources = needed.traffic, config.resources
    roomy = replace(needed, cohort=max(PACKS))  # what packs would take, if cohorts were as large
    measured = {pack: roomy.worker(pack) for pack in (1, 4)}
    now = measured.get(min(resources.pack_size, needed.cohort)) or needed.worker(resources.pack_size)
    clients = found.clients
    fixed, workers = needed.fixed(resources.workers, resources.pack_size), resources.workers
    shape, compared = skeleton.shape, [list(cohort)[:_COMPARED] for cohort in cohorts if cohort][:2] or [[0]]
    rank = getattr(method, "rank", None)
    names = list(dict.fromkeys([*METHODS, str(config.method["name"])]))  # a method of the user's own is in no table
    others = tuple(_compared(n, _method(n, rank, config, method), shape, config, compared, steps) for n in names)
    lone = [[needed.widest]]
    return Plan(
        name=config.name,
        method=str(config.method["name"]),
        clients=(config.federation.clients, max(map(len, cohorts), default=0), needed.trained),
        rows=needed.size,
        backbone=needed.backbone,
        data=needed.data,
        broadcast=found.broadcast,
        bare=BARE_WORKER,
        worker=now,
        one_more=(measured[4].process - measured[1].process) // 3,
        resident=_span(client.resident for client in clients),
        state=_span(client.state for client in clients),
        rounds=tuple(_round(n, walked) for n, walked in enumerate(found.rounds)),
        server=(found.server[0], found.server[-1]),
        coordinator=needed.coordinator,
        store=needed.store(workers, resources.pack_size),
        node=fixed + workers * (BARE_WORKER + (0 if machine.gpu else now.process)),
        disk=_disk(needed),
        machine=machine,
        fits=tuple(_fits(roomy, measured, machine)),
        methods=others,
        ranks=tuple(_by_rank(names, config, method, shape, lone, steps)),
        notes=tuple(_notes(config, found)),
    )


def check_fits(
    config: Config,
    method: Method,
    skeleton: Skeleton,
    dataset: Dataset,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
    machine: Machine,
) -> None:
    """UserError, one line, where the run cannot fit: what is needed, what is there, and the nearest that fits.

    What could fit is never refused: needs are lower bounds here, while what is advised has room for the heap's holes.
    """
    needed = need(config, method, skeleton, dataset, [list(c)[:_COMPARED] for c in cohorts], steps, walked=2)
    everyone, largest = len(set().union(*map(set, cohorts))), max(map(len, cohorts), default=1)
    needed = replace(needed, trained=everyone, cohort=largest)
    _check_disk(needed, machine)
    workers, pack = config.resources.workers, min(config.resources.pack_size, largest)
    wide = activations(config, skeleton, needed.size, pack) + 8 * pack * needed.most(lambda client: client.resident)
    if machine.gpu is None and needed.fixed(workers, pack) + workers * (BARE_WORKER + wide) <= machine.memory:
        return  # plainly: even several times the activations would
    tensors = needed.worker(pack).tensors
    if machine.gpu is not None:
        share = machine.gpu * (config.resources.gpus_per_worker or 1.0)
        fits, taken, there = needed.on_gpu(tensors) <= share * _HOLES, needed.on_gpu(tensors), round(share)
    else:
        taken, there = needed.least(workers, tensors), machine.memory
        fits = taken <= there
    if fits:
        return
    field, value, advice = _nearest(needed, machine)
    where = f"what fits into {_gb(there)} of memory on {machine.name}; this run needs {_gb(taken)} at least"
    raise UserError(field, value, where, advice)


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


def _pretrained(skeleton: Skeleton, config: Config) -> int:
    """Bytes of the pretrained target weights at the coordinator: float32 ones are the shared memory itself."""
    shape, exact = skeleton.shape, config.model.dtype == "float32"
    copied = [layer for layer in shape.targets if not exact or layer.name in skeleton.transposed]
    return sum(4 * layer.m * layer.n for layer in (*copied, *(() if exact else shape.head)))


def _fits(needed: Need, measured: dict[int, Memory], machine: Machine) -> Iterable[Fit]:
    """For each pack size the workers that fit, at most as many as there are CPUs for."""
    resources = needed.config.resources
    for pack in sorted({*PACKS, resources.pack_size}):
        memory = _at(measured, pack)
        if machine.gpu is not None:
            taken = needed.on_gpu(memory.tensors)
            yield Fit(pack, taken, machine.gpu // taken)
            continue
        taken, most = BARE_WORKER + memory.process, int(machine.cpus / resources.cpus_per_worker + 1e-9)
        yield Fit(pack, taken, _most_workers(needed, pack, taken, most, machine.memory))


def _most_workers(needed: Need, pack: int, taken: int, most: int, memory: int) -> int:
    """The most workers, up to `most`, that fit with their two packs on the way."""
    fitting = (w for w in range(most, 0, -1) if needed.fixed(w, pack) + w * taken <= memory)
    return next(fitting, 0)


def _at(measured: dict[int, Memory], pack: int) -> Memory:
    """A worker's memory at a pack size between or beyond those measured."""
    if pack in measured:
        return measured[pack]
    known = sorted(measured)
    low, high = next(((a, b) for a, b in pairwise(known) if pack < b), (known[-2], known[-1]))
    return _between(pack, (low, measured[low]), (high, measured[high]))


def _between(pack: int, low: tuple[int, Memory], high: tuple[int, Memory]) -> Memory:
    """On the line through two pack sizes, for what a client adds is always the same."""
    (a, at_a), (b, at_b) = low, high

    def line(x: int, y: int) -> int:
        return x + (y - x) * (pack - a) // (b - a)

    return Memory(line(at_a.tensors, at_b.tensors), line(at_a.process, at_b.process))


def _nearest(needed: Need, machine: Machine) -> tuple[str, object, str]:
    """The field to change, its value, and how: fewer workers before smaller packs, smaller packs before batches."""
    config = needed.config
    resources, size = config.resources, config.federation.batch_size
    packs = [resources.pack_size]
    while packs[-1] > 1:
        packs.append(packs[-1] // 2)
    best: tuple[int, int] = (0, 0)
    for pack in packs:
        memory = needed.worker(pack)
        if machine.gpu is not None:
            fits = needed.on_gpu(memory.tensors) <= machine.gpu * (resources.gpus_per_worker or 1.0)
            workers = resources.workers if fits else 0
        else:
            workers = _most_workers(needed, pack, BARE_WORKER + memory.process, resources.workers, machine.memory)
        if workers * pack > best[0] * best[1]:
            best = (workers, pack)
    if best[0]:
        if best[1] == resources.pack_size:
            return "resources.workers", resources.workers, f"set resources.workers={best[0]}"
        wanted = "" if best[0] == resources.workers else f" resources.workers={best[0]}"
        return "resources.pack_size", resources.pack_size, f"set resources.pack_size={best[1]}{wanted}"
    if needed.least(0, 0) > machine.memory and machine.gpu is None:
        advice = "take a smaller model, or a method whose server holds factors, e.g. method.name=fedit"
        return "model.path", config.model.path, advice
    while size > 1:
        size //= 2
        smaller = config.model_copy(update={"federation": config.federation.model_copy(update={"batch_size": size})})
        memory = replace(needed, config=smaller).worker(1)
        taken = needed.on_gpu(memory.tensors) if machine.gpu else needed.fixed(1, 1) + BARE_WORKER + memory.process
        if taken <= (machine.gpu or machine.memory):
            advice = f"set federation.batch_size={size} resources.pack_size=1 resources.workers=1"
            return "federation.batch_size", config.federation.batch_size, advice
    return (
        "model.path",
        config.model.path,
        "take a smaller model, a lower method.rank or task.max_length, or more memory",
    )


def _disk(needed: Need) -> int:
    """Bytes of a run folder at most: two checkpoints with their states, a third server while it is written."""
    return 2 * needed.states + 3 * needed.traffic.server[-1]


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


def _compared(
    name: str,
    method: Method,
    shape: ModelShape,
    config: Config,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
) -> MethodBytes:
    found = traffic(method, shape, config, cohorts, steps)
    first, last = found.rounds[0], found.rounds[-1]

    def most(figure: Callable[[ClientTraffic], int]) -> tuple[int, int]:
        return max(map(figure, first.values())), max(map(figure, last.values()))

    return MethodBytes(
        name,
        getattr(method, "rank", None),
        most(lambda client: client.up),
        most(lambda client: client.down),
        max(client.state for client in found.clients),
        max(client.resident for client in found.clients),
        found.server[-1],
        found.coordinator,
    )


def _method(name: str, rank: int | None, config: Config, chosen: Method) -> Method:
    """A method at the rank; the chosen one as it is configured."""
    configured = name == config.method["name"]
    if configured and rank == getattr(chosen, "rank", None):
        return chosen
    own: dict[str, Any] = dict(config.method) if configured else {"name": name}
    if rank is None:
        return build(own)
    if max(own.get("client_ranks") or (0,)) > rank:
        own["client_ranks"] = None
    return build({**own, "rank": rank, "inherited": ["rank"]})


def _by_rank(
    names: Sequence[str],
    config: Config,
    chosen: Method,
    shape: ModelShape,
    cohorts: Sequence[Sequence[int]],
    steps: Callable[[int], int],
) -> Iterable[MethodBytes]:
    """Every method with every rank that the targets allow."""
    most = min(min(layer.m, layer.n) for layer in shape.targets)
    for name in names:
        for rank in RANKS:
            if rank <= most:
                found = _compared(name, _method(name, rank, config, chosen), shape, config, cohorts, steps)
                yield replace(found, rank=rank)


def _round(n: int, walked: Any) -> RoundBytes:
    ups, downs = [c.up for c in walked.values()], [c.down for c in walked.values()]
    return RoundBytes(n, len(walked), _span(ups), _span(downs), sum(ups), sum(downs))


def _span(sizes: Iterable[int]) -> tuple[int, int]:
    found = list(sizes)
    return (min(found, default=0), max(found, default=0))


def _notes(config: Config, found: Traffic) -> Iterable[str]:
    """What the figures alone do not say."""
    downs = [max((client.down for client in walked.values()), default=0) for walked in found.rounds]
    if len(downs) > 1 and downs[-1] > max(client.up for client in found.clients):
        yield "A download holds the changes of the whole cohort: it grows with the cohort's ranks, up to dense weights."
    if found.dense:
        yield "The server holds dense weights from the start: it does not grow with clients."
    if config.method.get("gamma", 1.0) != 1.0:
        yield "Clients prune themselves as they learn: bytes are at most these."
    if config.resources.executor == "reference":
        yield "resources.executor=reference: each worker holds a float32 copy of the model besides."


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def as_dict(record: Any) -> Any:
    """A plan as plain values for JSON."""
    if hasattr(record, "__dataclass_fields__"):
        return {field.name: as_dict(getattr(record, field.name)) for field in fields(cast(Any, record))}
    return [as_dict(item) for item in record] if isinstance(record, tuple | list) else record
