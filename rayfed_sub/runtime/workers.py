"""The coordinator's view of its workers, and a worker in the coordinator's own process.

`RayWorkers` (`ray_workers.py`) are processes; `LocalWorker` serves `resources.workers=0`: no process besides this one
and no Ray, so that a debugger stops in a method of the user's own, and a small run starts at once.  Both give the same
bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
    """Workers of a run, and the memory that they share with the coordinator."""

    count: int

    def ready(self) -> list[Answer]:
        """What each worker answers once it has the backbone."""

    def in_order(self, items: Sequence[WorkItem], stage: str) -> Iterator[Done]:
        """Runs all items and yields them in their order."""

    def memory(self, seconds: float) -> list[Sample]:
        """Memory of the workers' processes, of those that answer within so many seconds."""

    def share(self, value: Any) -> Any:
        """A handle of a value for all workers, for `object_store.get`; it is not written to from then on."""

    def put(self, state: ClientState) -> Any:
        """A handle of a client's state, for `object_store.get`."""

    def close(self) -> None:
        """Ends what would outlive the run in this process."""


def workers_of(resources: Resources, shared: Shared) -> Workers:
    """Processes, or with `resources.workers=0` this one."""
    if resources.workers:
        return RayWorkers(resources, shared)
    spec, backbone, dataset = map(object_store.get, (shared.spec, shared.backbone, shared.dataset))
    return LocalWorker(Worker(spec, backbone, dataset, resources.gpus_per_worker))


class LocalWorker:
    """One worker, called in this process.  An unsound result is thrown away, once, as by the scheduler."""

    count = 1

    def __init__(self, worker: Worker) -> None:
        self._worker, self._remote = worker, _Remote(worker)

    def ready(self) -> list[Answer]:
        """See `Workers`, as for all the others."""
        return [self._worker.ready()]

    def in_order(self, items: Sequence[WorkItem], stage: str) -> Iterator[Done]:
        for index, item in enumerate(items):
            began, troubles = time.monotonic(), list[str]()
            result = item.submit(self._remote)
            if not item.sound(result):
                troubles.append("a client failed")
                result = item.submit(self._remote)
            yield Done(index, result, 0, began, time.monotonic(), tuple(troubles))

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
    """A worker of this process behind the calls of an actor: `worker.train.remote(...)` is the result itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self._worker, name))


class _Call:
    def __init__(self, function: Any) -> None:
        self.remote = function
