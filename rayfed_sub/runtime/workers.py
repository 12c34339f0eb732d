"""Interface of a run's workers for the coordinator, and a worker in the coordinator's own process.

`RayWorkers` (`ray_workers.py`) are processes; `LocalWorker` serves `resources.workers=0`: one process without Ray, in
which a debugger stops in a user's method and a small run starts at once.  Both give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rayfed_sub.config.schema import Resources
from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import Broadcast, ClientState
from rayfed_sub.runtime import object_store
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.ray_workers import RayWorkers
from rayfed_sub.runtime.scheduler import Done, WorkItem
from rayfed_sub.runtime.worker import Answer, Worker
from rayfed_sub.telemetry.process_memory import Sample


class Workers(Protocol):
    """Workers of a run, and the memory that they share with the coordinator.  processes: what a next run may take
    over; whole: whether none of them is lost for good."""

    count: int
    processes: Sequence[Any]

    @property
    def whole(self) -> bool: ...

    def ready(self) -> list[Answer]:
        """Waits until every worker has mapped the backbone; returns their answers."""

    def in_order(self, items: Iterable[WorkItem], stage: str) -> Iterator[Done]:
        """Runs all items and yields their results in order."""

    def memory(self, seconds: float) -> list[Sample]:
        """Memory of the worker processes that answer within so many seconds."""

    def share(self, value: Any) -> Any:
        """Handle of a value for all workers, for `object_store.get`; nobody may change the value afterwards."""

    def put(self, state: ClientState) -> Any:
        """Handle of a client's state, for `object_store.get`."""

    def close(self) -> None:
        """Ends threads that would outlive the run in this process."""


def workers_of(resources: Resources, shared: Shared, processes: Sequence[Any] | None = None) -> Workers:
    """Worker processes, or with `resources.workers=0` a worker in this process.  processes: see `RayWorkers`."""
    if resources.workers:
        return RayWorkers(resources, shared, processes)
    spec, backbone, dataset = map(object_store.get, (shared.spec, shared.backbone, shared.dataset))
    return LocalWorker(Worker(spec, backbone, dataset, resources.gpus_per_worker))


class LocalWorker:
    """A worker in this process.  As with the scheduler, an item with an unsound result runs once more."""

    count = 1
    processes: Sequence[Any] = ()
    whole = True

    def __init__(self, worker: Worker) -> None:
        self._worker, self._remote = worker, _Remote(worker)

    def ready(self) -> list[Answer]:
        """As in `Workers`."""
        return [self._worker.ready()]

    def in_order(self, items: Iterable[WorkItem], stage: str) -> Iterator[Done]:
        for index, item in enumerate(items):
            began, troubles = time.monotonic(), list[str]()
            result = item.submit(self._remote)
            if not item.sound(result):
                troubles.append("a client failed")
                result = item.submit(self._remote)
            yield Done(index, result, 0, began, time.monotonic(), tuple(troubles), item.units)

    def memory(self, seconds: float) -> list[Sample]:
        return [self._worker.memory()]

    def close(self) -> None:
        """Ends the worker's thread."""
        self._worker.close()

    def share(self, value: Broadcast) -> Broadcast:
        return replace(value, tensors=settled(value.tensors))

    def put(self, state: ClientState) -> ClientState:
        return replace(state, tensors=settled(state.tensors))


class _Remote:
    """A worker of this process with an actor's interface: `worker.train.remote(...)` returns the result itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self._worker, name))


class _Call:
    def __init__(self, function: Any) -> None:
        self.remote = function
