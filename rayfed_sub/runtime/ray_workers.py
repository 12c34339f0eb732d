"""Workers as Ray actors, which restart after a death and share memory through the object store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from rayfed_sub.config.schema import Resources
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import ClientState
from rayfed_sub.runtime import object_store
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.scheduler import Done, WorkerPool, WorkItem, in_order
from rayfed_sub.runtime.worker import Answer, Worker
from rayfed_sub.telemetry.process_memory import Sample

_RETRY_SECONDS = 0.2
_START_SECONDS = 1800.0  # long enough for a cluster to boot and install new machines


class RayWorkers:
    """`Workers` (`runtime/workers.py`) as actors: children of this process, which end with it."""

    def __init__(self, resources: Resources, shared: Shared) -> None:
        actor = ray.remote(Worker).options(**worker_options(resources.cpus_per_worker, resources.gpus_per_worker))
        parts = (shared.spec, shared.backbone, shared.dataset, resources.gpus_per_worker)
        self._actors = [actor.remote(*parts) for _ in range(resources.workers)]
        self._pool = WorkerPool(self._actors, resources.deadline)
        self.count = resources.workers

    def ready(self) -> list[Answer]:
        """Waits until every worker has mapped the backbone; returns their answers in the order in which they come.

        Raises RunError where one cannot start; Ray restarts one that is killed meanwhile."""
        answers: list[Answer] = []
        asked, until = {worker.ready.remote(): worker for worker in self._actors}, time.monotonic() + _START_SECONDS
        while asked:
            done, _ = ray.wait(list(asked), num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                late = f"{len(asked)} of {self.count} workers not ready"
                raise RunError("start", f"{late} in {_START_SECONDS:.0f} s")
            worker = asked.pop(done[0])
            try:
                answers.append(ray.get(done[0]))
            except ActorUnavailableError:
                time.sleep(_RETRY_SECONDS)
                asked[worker.ready.remote()] = worker
            except RayError as error:
                raise RunError("start", f"a worker could not start: {str(error).strip().splitlines()[-1]}") from None
        return answers

    def in_order(self, items: Iterable[WorkItem], stage: str) -> Iterator[Done]:
        """As `scheduler.in_order`."""
        return in_order(self._pool, items, stage)

    def memory(self, seconds: float) -> list[Sample]:
        """Memory of the workers that answer within so many seconds."""
        asked = [worker.memory.remote() for worker in self._actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=seconds)
        return [sample for reference in answered if (sample := _answer_of(reference)) is not None]

    def share(self, value: Any) -> Any:
        """Puts the value into the object store, where all processes of a node read the same memory."""
        return ray.put(value)

    def close(self) -> None:
        """Does nothing: the actors end with the process that made them."""

    def put(self, state: ClientState) -> Any:
        """As `object_store.put`."""
        return object_store.put(state)


def worker_options(cpus: float, gpus: float) -> dict[str, Any]:
    """Ray's options of a worker: it restarts without its state, and only the coordinator retries work."""
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}


def _answer_of(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=30)
    except RayActorError:  # a worker that died at the very end must not cost the finished run
        return None
