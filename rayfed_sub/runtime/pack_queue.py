"""A round's packs as work items: cut one by one, each when a worker has a place for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.rows import Rows
from rayfed_sub.diagnostics import client_diagnostics
from rayfed_sub.planning import packs, sampling
from rayfed_sub.runtime import pack_sizes
from rayfed_sub.runtime.pack_sizes import PackSizes, Timing
from rayfed_sub.runtime.scheduler import Done, WorkItem
from rayfed_sub.runtime.worker import PackOutcome
from rayfed_sub.runtime.workers import Workers
from rayfed_sub.telemetry.process_memory import Sample

_TOKENS = 1024  # of a step, with which products are efficient
_MARGIN = 2  # times the memory that larger packs are expected to take
_LIKE = 0.5  # of a size: a pack of more is timed as one of it


class PackQueue:
    """Packs of a run's rounds.  It remembers which worker trained a client last and what sizes have cost.

    state_of: the client's stored state, for `Worker.train`.  free: whether cuts change no bits; else all packs of a
    round have `resources.first_pack` clients, the last one the rest.
    """

    def __init__(
        self, config: Config, dataset: Dataset, workers: Workers, state_of: Callable[[int], Any], *, free: bool
    ) -> None:
        self._config, self._dataset, self._workers, self._state_of = config, dataset, workers, state_of
        self._free, self._sizes = free, PackSizes(config.resources.first_pack)
        self._home: dict[int, int] = {}  # client -> the worker that trained it last
        self._warm: set[tuple[int, int]] = set()  # worker and size of packs so far
        self._cut_by: dict[int, tuple[int, float]] = {}  # a pack's first client -> the size it was cut by, its work
        self._most = 1  # clients of a pack in this round
        self._lr_factor = 1.0  # of this round
        self._ended: dict[int, float] = {}  # worker -> the end of its last pack in this round
        self._shortest, self._finer = inf, False  # seconds of this round's shortest pack; how its last turn is cut
        self._bare = {sample.process: sample.last for sample in workers.memory(1)}  # before the first pack
        self._samples: dict[int, Sample] = {}  # worker -> its memory after its last pack

    def items(self, n: int, cohort: Sequence[int], broadcast: Any, lr_factor: float) -> Iterator[WorkItem]:
        """The packs of round n, whose cohort stands in its canonical order."""
        self._lr_factor = lr_factor
        rounds = self._config.federation.rounds or 0
        watched = client_diagnostics.watched(self._config.diagnostics, n, rounds, cohort)
        self._most = packs.most_clients(self._config, len(cohort), free=self._free)
        if not self._sizes.likely and cohort:
            self._sizes = replace(self._sizes, likely=self._likely(cohort))
        # Half a pack's time was waited for at the end of the last round: finer packs there would have been even.
        waited = max(self._ended.values(), default=0.0) - min(self._ended.values(), default=0.0)
        self._finer, self._shortest = waited > self._shortest / 2, inf
        self._ended.clear()
        self._cut_by.clear()
        for i, clients in enumerate(self._cuts(cohort)):
            yield self._item(n, clients, i % self._workers.count, broadcast, watched)

    def done(self, n: int, done: Done) -> None:
        """Takes note of a finished pack of round n."""
        self._home.update(dict.fromkeys(done.units, done.worker))
        self._samples[done.worker] = done.result.memory
        self._ended[done.worker] = done.ended
        self._shortest = min(self._shortest, done.ended - done.began)
        size, work = self._cut_by.pop(done.units[0], (0, 0.0))
        fixed = self._config.resources.pack_size != "auto"
        if fixed or not size or done.troubles or len(done.units) <= _LIKE * size:
            return
        first = (done.worker, size) not in self._warm
        self._warm.add((done.worker, size))
        if first or len(self._samples) < self._workers.count:  # kernels are made; what packs take is not known
            return
        # Computed ones (cuts are free with one thread alone): other work on the machine adds to those that pass.
        timing = Timing(n, size, done.result.seconds[1] / work)
        self._sizes = pack_sizes.timed(self._sizes, timing, self._most, self._has_room)

    def _likely(self, cohort: Sequence[int]) -> int:
        """Clients of a pack whose steps have enough tokens; 0 where rows are images."""
        if not isinstance(self._dataset.train, Rows):
            return 0
        tokens = [packs.tokens(self._dataset, client) for client in cohort]
        return ceil(_TOKENS * len(cohort) / (self._config.federation.batch_size * sum(tokens)))

    def _cuts(self, cohort: Sequence[int]) -> Iterator[Sequence[int]]:
        if not self._free:
            yield from packs.fixed_cuts(cohort, self._config.resources.first_pack)
            return
        work = [packs.work(self._config, self._dataset, client) for client in cohort]
        count = self._workers.count
        for places in packs.free_cuts(work, count, lambda: min(self._sizes.size, self._most), finer=self._finer):
            clients = cohort[places.start : places.stop]
            self._cut_by[clients[0]] = self._sizes.size, sum(work[places.start : places.stop])
            yield clients

    def _item(self, n: int, clients: Sequence[int], worker: int, broadcast: Any, watched: Sequence[int]) -> WorkItem:
        """worker: the one to prefer while none has trained the first client."""
        home = self._home.get(clients[0], worker)
        examined = client_diagnostics.examined(watched)
        work = sampling.pack_work(self._config, self._dataset, n, clients, watched, examined, self._lr_factor)

        def submit(worker: Any) -> Any:  # states are read into memory as late as this
            return worker.train.remote(work, [self._state_of(client) for client in clients], broadcast)

        def halves() -> list[WorkItem]:
            middle = len(clients) // 2
            if not self._free or not middle:
                return []
            if self._config.resources.pack_size == "auto" and len(clients) > _LIKE * self._sizes.now:
                self._sizes = pack_sizes.lost(self._sizes, len(clients), n)
            return [self._item(n, part, worker, broadcast, watched) for part in (clients[:middle], clients[middle:])]

        label = f"client {clients[0]}"
        if len(clients) > 1:
            label = f"{len(clients)} clients from {clients[0]} to {clients[-1]} in the cohort's order"
        return WorkItem(submit, home, label, _sound, clients, halves)

    def _has_room(self, size: int) -> bool:
        """Whether every node has memory for packs of this size, by what the packs so far have taken."""
        by_node: dict[str, list[Sample]] = {}
        for sample in self._samples.values():
            by_node.setdefault(sample.process[0], []).append(sample)
        return all(
            _MARGIN
            * sum(sample.peak - self._bare.get(sample.process, 0) for sample in node)
            * (size / self._sizes.now - 1)
            <= min(sample.free for sample in node)
            for node in by_node.values()
        )


def _sound(outcome: PackOutcome) -> bool:
    return all(update.failure is None for update in outcome.updates)
