"""Workers as Ray actors, which restart after a death, share memory through the object store, and may serve several runs
one after the other: those of a sweep's trials."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError

from rayfed_sub.config.schema import Resources
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import ClientState
from rayfed_sub.runtime import object_store
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.scheduler import Done, WorkerPool, WorkItem, in_order
from rayfed_sub.runtime.worker import Answer, Worker
from rayfed_sub.telemetry.process_memory import Sample, begin_gpu_anew, give_back

_RETRY_SECONDS = 0.2
_START_SECONDS = 1800.0  # long enough for a cluster to boot and install new machines


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run's workers, which go along with every call; name: of the run, in no other."""

    name: str
    shared: Shared
    gpus: float


class UnusableProcessError(ActorDiedError):  # type: ignore[misc]  # Ray's classes have no types here
    """A process that cannot make its run's worker is lost for good, as an actor whose constructor fails."""

    def __init__(self, cause: str) -> None:
        super().__init__()
        self.args, self.error_msg = (cause,), cause


class WorkerProcess:
    """A worker's process.  For a call of another run than the last one's it makes a worker, so also after a restart, of
    which nobody need know."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._run = ""

    def call(self, inputs: Inputs, name: str, *given: Any) -> Any:
        """Calls the method of this name of the run's worker.  Raises UnusableProcessError where that cannot be made."""
        if self._worker is None or self._run != inputs.name:
            if self._worker is not None:
                self._worker.close()
                self._worker = None  # frees its model before the next one's is made
                give_back()
                begin_gpu_anew()
            given_to_all = (inputs.shared.spec, inputs.shared.backbone, inputs.shared.dataset)
            spec, backbone, dataset = map(object_store.get, given_to_all)
            try:
                self._worker, self._run = Worker(spec, backbone, dataset, inputs.gpus), inputs.name
            except Exception as error:
                raise UnusableProcessError(f"{type(error).__name__}: {error}") from error
        return getattr(self._worker, name)(*given)


@dataclass(frozen=True)
class Seat:
    """A worker's process for one run: `seat.train.remote(...)` as an actor's."""

    process: Any
    inputs: Inputs

    def __getattr__(self, name: str) -> _Call:
        if name.startswith("_"):  # what copying and pickling look for
            raise AttributeError(name)
        return _Call(self, name)


@dataclass(frozen=True)
class _Call:
    seat: Seat
    name: str

    def remote(self, *given: Any) -> ray.ObjectRef:
        return self.seat.process.call.remote(self.seat.inputs, self.name, *given)


class RayWorkers:
    """`Workers` (`runtime/workers.py`) as actors: children of this process, which end with it.

    processes: of an earlier run with as many workers of the same resources, which serve this one; None: new ones."""

    processes: Sequence[Any]

    def __init__(self, resources: Resources, shared: Shared, processes: Sequence[Any] | None = None) -> None:
        actor = ray.remote(WorkerProcess).options(
            **worker_options(resources.cpus_per_worker, resources.gpus_per_worker)
        )
        self.processes = list(processes or [actor.remote() for _ in range(resources.workers)])
        inputs = Inputs(uuid4().hex, shared, resources.gpus_per_worker)
        self._seats = [Seat(process, inputs) for process in self.processes]
        self._pool = WorkerPool(self._seats, self.processes, resources.deadline)
        self.count = resources.workers

    def ready(self) -> list[Answer]:
        """Waits until every worker has mapped the backbone; returns their answers in the order in which they come.

        Raises RunError where one cannot start; Ray restarts one that is killed meanwhile."""
        answers: list[Answer] = []
        asked, until = {seat.ready.remote(): seat for seat in self._seats}, time.monotonic() + _START_SECONDS
        while asked:
            done, _ = ray.wait(list(asked), num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                late = f"{len(asked)} of {self.count} workers not ready"
                raise RunError("start", f"{late} in {_START_SECONDS:.0f} s")
            seat = asked.pop(done[0])
            try:
                answers.append(ray.get(done[0]))
            except ActorUnavailableError:
                time.sleep(_RETRY_SECONDS)
                asked[seat.ready.remote()] = seat
            except RayError as error:
                cause = getattr(error, "cause", None)
                why = str(cause if isinstance(cause, UnusableProcessError) else error).strip().splitlines()[-1]
                raise RunError("start", f"a worker could not start: {why}") from None
        return answers

    @property
    def whole(self) -> bool:
        """True where no worker is lost for good."""
        return len(self._pool.load) + len(self._pool.returning) == self.count

    def in_order(self, items: Iterable[WorkItem], stage: str) -> Iterator[Done]:
        """As `scheduler.in_order`."""
        return in_order(self._pool, items, stage)

    def memory(self, seconds: float) -> list[Sample]:
        """Memory of the workers that answer within so many seconds."""
        asked = [seat.memory.remote() for seat in self._seats]
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
