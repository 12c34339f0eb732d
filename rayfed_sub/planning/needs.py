"""Memory and disk of a run, for any number of workers and any pack size.

Bytes are those of the method's own tensors (`traffic.py`), a worker's memory that of its own code (`worker_memory.py`).
What a process holds before it does anything is measured: see the constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayfed_sub.config.schema import Config
from rayfed_sub.core.side_by_side import at_once
from rayfed_sub.diagnostics.client_diagnostics import spaced
from rayfed_sub.diagnostics.server_change import working
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.models.quantised import FOUR_BITS, GGUF_FORMS
from rayfed_sub.planning.sampling import drawn
from rayfed_sub.planning.traffic import ClientTraffic, Parts, Traffic, first_start
from rayfed_sub.planning.worker_memory import KERNELS, Lengths, Memory, backbone_bytes, dense_bytes, lengths, worker

# Private bytes (USS) of the processes of a run before they hold any tensor: Python 3.11, torch 2.13, Ray 2.60 on x86.
BARE_WORKER = 320_000_000
BARE_COORDINATOR = 330_000_000  # as a worker: Ray's processes import the same before their actor starts
DRIVER = 350_000_000
RAY = 330_000_000  # its own processes on a node
# Of a Ray of the run's own, where they are forks of one that holds the imported libraries (`Resources.forked`).
FORKED = 80_000_000
FORK_SERVER = 380_000_000  # with all that they share
BITSANDBYTES = 45_000_000  # imported by each process that dequantises its types
CUDA = 600_000_000  # a process's context on a GPU, and torch's kernels there
HOLES = 1.15  # the allocator's, where it is not modelled: on GPUs and in the coordinator

_WALKED = 3  # rounds whose bytes are worked out one by one
_LARGE = 16  # packs beyond this are worked out from smaller ones


@dataclass(frozen=True, eq=False)
class Need:
    """Needs of a run that depend on neither workers nor pack size."""

    config: Config
    method: Method
    architecture: Architecture
    traffic: Traffic
    size: Lengths
    widest: int  # the client that trains the most
    steps: int
    cohort: int  # or clients under way at a time
    trained: int
    backbone: int
    data: int
    recompute: bool = False  # whether blocks keep no activations

    def most(self, figure: Callable[[ClientTraffic], int]) -> int:
        """The largest figure of a walked client."""
        return max(map(figure, self.traffic.clients), default=0)

    @property
    def coordinator(self) -> int:
        """Bytes of the coordinator above its bare process: torch's kernels, at first pretrained weights, where those
        are not shared, later sums and diagnosed tensors."""
        return KERNELS + max(_pretrained(self.architecture, self.config), self._summed)

    @property
    def _summed(self) -> int:
        """Bytes of the coordinator's tensors in a round."""
        return self.traffic.coordinator + self.looked + self.compared + self.waiting

    @property
    def looked(self) -> int:
        """Bytes of the factors that diagnostics hold in a round: of a client's LoRA before and after it.  Dense changes
        send a few rows only."""
        asked, sent = self.config.diagnostics, self.most(lambda client: client.up)
        layers = self.architecture.shape.targets
        if not asked.every or sent >= sum(4 * layer.m * layer.n for layer in layers):
            return 0
        return 2 * sent * min(asked.clients, self.cohort) * min(asked.layers, len(layers)) // len(layers)

    @property
    def compared(self) -> int:
        """Bytes of the layers whose change at the server diagnostics work out side by side."""
        asked = self.config.diagnostics
        if not asked.every or self.method.personal:
            return 0
        layers = spaced(self.architecture.shape.targets, asked.layers)
        each = working(layers)
        return each * at_once(len(layers), each)

    @property
    def waiting(self) -> int:
        """Bytes of results that wait at the coordinator: of clients under way in an asynchronous run, whichever version
        of the server they began from, and of its buffer, or of a round that may drop some of its clients."""
        federation, devices = self.config.federation, self.config.devices
        timed = federation.round_deadline is not None or federation.over_selection > 1.0
        leaving = devices.trace is not None or any(one.hours or one.dropout for one in devices.classes.values())
        if not (timed or leaving or federation.mode == "async"):
            return 0
        results = self.cohort
        if federation.mode == "async":  # the update that fills the buffer has left its client's place
            results = min(federation.clients, self.cohort + federation.updates - 1)
        return results * self._result

    @property
    def _result(self) -> int:
        """Bytes of a client's result, its state with it."""
        return self.most(lambda client: client.up + client.state)

    @property
    def states(self) -> int:
        """Bytes of the stored states of all clients that train."""
        return self.trained * self.most(lambda client: client.state)

    @property
    def disk(self) -> int:
        """Bytes of a run folder at most: two checkpoints with their states, a third server while it is written, and
        where a best checkpoint is kept that one, with another while it is replaced."""
        best = 0 if self.config.early_stopping.metric is None else 1
        under_way = self.cohort * self._result if self.config.federation.mode == "async" else 0
        return (2 + best) * self.states + (3 + best) * (self.traffic.server[-1] + under_way)

    def store(self, workers: int, pack: int) -> int:
        """Bytes in the object store: backbone, data, two broadcasts, states, and two packs a worker on their way."""
        moving = 2 * workers * min(pack, self.cohort) * self._result
        kept = min(self.states, int(self.config.resources.state_memory))
        return self.backbone + self.data + 2 * self.traffic.broadcast + kept + moving

    def worker(self, pack: int) -> Memory:
        """A worker with packs of this size, above the bare process; no pack is larger than a cohort."""
        pack = min(pack, self.cohort)
        if pack > _LARGE:
            low, high = self._walked(_LARGE // 2), self._walked(_LARGE)
            return between(pack, (_LARGE // 2, low), (_LARGE, high))
        return self._walked(pack)

    @cached_property
    def _known(self) -> dict[int, Memory]:
        """Walked workers by pack size, as the search for one that fits asks for some again and again."""
        return {}

    def _walked(self, pack: int) -> Memory:
        if pack not in self._known:
            self._known[pack] = self._walk(pack)
        return self._known[pack]

    def _walk(self, pack: int) -> Memory:
        start = first_start(self.method, self.architecture.shape, self.config, self.widest)
        held = self.most(lambda client: client.held)
        rest = (self.size, pack, held, self.traffic.dense)
        return worker(self.config, self.architecture, start, self.steps, *rest, recompute=self.recompute)

    @property
    def bare(self) -> tuple[int, int, int]:
        """Bytes of Ray's own processes, of the bare coordinator and of a bare worker; 0 in a run of one process."""
        resources = self.config.resources
        coordinator, worker = (FORKED, FORKED) if resources.forked else (BARE_COORDINATOR, BARE_WORKER)
        own = BITSANDBYTES if FOUR_BITS.intersection(self.architecture.quantised.values()) else 0
        return (RAY, coordinator + own, worker + own) if resources.workers else (0, 0, 0)

    @cached_property
    def loading(self) -> int:
        """Bytes of a node while the driver loads a model that is quantised then, or in a GGUF file, from which
        transformers reads dense weights: it is dense at first.  0 where it never is."""
        forms = set(self.architecture.quantised.values())
        if not forms or (self.config.model.quantize == "stored" and not forms & GGUF_FORMS):
            return 0
        return self.bare[0] + DRIVER + BITSANDBYTES + dense_bytes(self.architecture)

    @property
    def libraries(self) -> int:
        """Bytes of imported libraries that forked processes share."""
        return FORK_SERVER if self.config.resources.forked else 0

    def least(self, workers: int, tensors: int) -> int:
        """Bytes of a node without which the run cannot go: no holes, and nothing that could lie on disk."""
        _, coordinator, worker = self.bare
        shared = self.backbone + self.data + self.traffic.broadcast + self.libraries
        later = shared + DRIVER + coordinator + self.coordinator + workers * (worker + tensors)
        return max(self.loading, later)

    def fixed(self, workers: int, pack: int) -> int:
        """Bytes of a node besides its workers, holes included."""
        ray, bare, _ = self.bare
        coordinator = bare + self.coordinator + round((HOLES - 1) * self._summed)
        return self.store(workers, pack) + DRIVER + ray + self.libraries + coordinator

    def node(self, pack: int, worker: int) -> int:
        """Bytes of a node that holds all processes of the run, with packs of this size; worker: bytes of each worker
        above the bare process."""
        workers = self.config.resources.trainers
        return max(self.loading, self.fixed(workers, pack) + workers * (self.bare[2] + worker))

    def on_gpu(self, tensors: int) -> int:
        """Bytes of a worker on a GPU, where backbone and broadcast are copied to."""
        return CUDA + self.allocated(round(HOLES * tensors))

    def allocated(self, tensors: int) -> int:
        """Bytes of all tensors that a worker has on its GPU."""
        return self.backbone + self.traffic.broadcast + tensors


def _widened(parts: Parts) -> int:
    """Bytes that weights take more because a start has made them float32."""
    return 0 if parts.start is None else 4 * parts.start.numbers - parts.start.replaced


def need(parts: Parts, rounds: int = _WALKED, most: int | None = None) -> Need:
    """The needs of a run, from so many rounds with at most so many clients in each."""
    found = parts.first(rounds, most).traffic()
    clients = {k: client for walked in found.rounds for k, client in walked.items()}
    federation, every = parts.config.federation, np.arange(parts.config.federation.clients)
    # A round of an asynchronous run has fewer updates than clients that train.
    under_way = drawn(parts.config, 0, every, parts.cohort) if federation.mode == "async" else []
    return Need(
        config=parts.config,
        method=parts.method,
        architecture=parts.architecture,
        traffic=found,
        size=lengths(parts.dataset, parts.config),
        widest=max(clients, key=lambda k: (clients[k].resident, parts.steps(k)), default=0),
        steps=max(map(parts.steps, [*clients, *under_way]), default=1),
        cohort=max(1, parts.cohort),
        trained=parts.trained,
        backbone=backbone_bytes(parts.architecture) + _widened(parts),
        data=parts.dataset.nbytes,
        recompute=parts.config.resources.activation_checkpointing == "blocks",
    )


def between(pack: int, low: tuple[int, Memory], high: tuple[int, Memory]) -> Memory:
    """A worker on the line through two pack sizes, because every client adds the same.

    >>> between(6, (1, Memory(10, 20)), (4, Memory(13, 26)))
    Memory(tensors=15, process=30)
    """
    (a, at_a), (b, at_b) = low, high

    def line(x: int, y: int) -> int:
        return x + (y - x) * (pack - a) // (b - a)

    return Memory(line(at_a.tensors, at_b.tensors), line(at_a.process, at_b.process))


def _pretrained(architecture: Architecture, config: Config) -> int:
    """Bytes of the pretrained weights from which the coordinator makes the first server, which is sent, and lies in
    shared memory, from then on; float32 weights that are not quantised are shared memory themselves."""
    shape, exact = architecture.shape, config.model.dtype == "float32"
    shared = [*shape.targets] if exact else []
    shared = [layer for layer in shared if f"{layer.name}.weight" not in architecture.quantised]
    copied = [layer for layer in shape.targets if layer not in shared or layer.name in architecture.transposed]
    return sum(4 * layer.m * layer.n for layer in (*copied, *(() if exact else shape.head)))
