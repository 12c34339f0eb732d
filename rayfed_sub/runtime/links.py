"""Link from session to coordinator: an actor, or with `resources.workers=0` an object of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rayfed_sub.config.schema import Resources
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.planning.job import Job
from rayfed_sub.runtime.coordinator import Coordinator
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.telemetry.events import PackDone, RoundDone

_ANSWER_SECONDS = 600.0  # for an answer that takes no work


class CoordinatorLink(Protocol):
    """Interface of a coordinator for the session."""

    def ask(self, name: str) -> Any:
        """Calls the coordinator's method of this name, without arguments, and returns its result."""

    def round(self, n: int, lr_factor: float) -> Iterator[PackDone | RoundDone]:
        """The records of round n as they come; lr_factor: on its learning rate.  Reading can go on after an
        interruption, unless that ended the round itself."""

    def release(self) -> None:
        """Ends the run, which is finished; a crew keeps its processes."""

    def close(self) -> None:
        """Ends the coordinator and its workers, unless they were released."""


@dataclass
class Crew:
    """Processes that go from run to run: a coordinator's actor, whose children the workers are, and the resources that
    both have; None where the next run is to start its own."""

    actor: Any = None
    resources: Resources | None = None

    def taken(self, resources: Resources) -> Any:
        """The actor for a run of these resources, which is no longer here; None where it would need another one."""
        actor, fits = self.actor, self.resources == resources
        self.actor = None
        if actor is not None and not fits:
            ray.kill(actor)
        return actor if fits else None


def coordinator_of(job: Job, folder: Path, shared: Shared, crew: Crew | None = None) -> CoordinatorLink:
    """The coordinator of a run in the folder; crew: whose processes it takes, where they fit, and leaves its own to."""
    parts = parts_of(job, folder, shared)
    return ActorLink(parts, job.config.resources, crew) if job.config.resources.workers else LocalLink(parts)


def parts_of(job: Job, folder: Path, shared: Shared) -> tuple[Any, ...]:
    """The arguments of `Coordinator` for a run in the folder."""
    server = (job.config, job.method, job.architecture.shape, job.architecture.transposed)
    return (*server, job.any_pack, shared, folder.absolute(), job.noise, job.begun, job.fleet)


class LocalLink:
    """A coordinator in this process.  It sets torch's threads and default dtype, as a process of its own would have
    them; `close` sets both back."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._threads, self._dtype = torch.get_num_threads(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            self._coordinator = Coordinator(*parts)
        except BaseException:
            self._restore()
            raise

    def ask(self, name: str) -> Any:
        """As in `CoordinatorLink`."""
        return getattr(self._coordinator, name)()

    def round(self, n: int, lr_factor: float) -> Iterator[PackDone | RoundDone]:
        return self._coordinator.run_round(n, lr_factor)

    def release(self) -> None:
        """As in `CoordinatorLink`."""

    def close(self) -> None:
        try:
            self._coordinator.close()
        finally:
            self._restore()

    def _restore(self) -> None:
        torch.set_num_threads(self._threads)
        torch.set_default_dtype(self._dtype)


class ActorLink:
    """A coordinator as an actor on this node, where the run folder is.  `ask` and `round` raise RayActorError where it
    is dead, and RunError where it hangs."""

    def __init__(self, parts: tuple[Any, ...], resources: Resources, crew: Crew | None = None) -> None:
        self._resources, self._crew, self._released = resources, crew, False
        self.actor = None if crew is None else crew.taken(resources)
        if self.actor is not None:
            try:
                answer(self.actor, self.actor.take_over.remote(*parts), "start")
                return
            except RayActorError:  # it has died since, or is lost to us
                ray.kill(self.actor)
            except BaseException:
                ray.kill(self.actor)
                raise
        actor = ray.remote(num_cpus=0, concurrency_groups={"aside": 1}, scheduling_strategy=_here())(Coordinator)
        self.actor = actor.remote(*parts)

    def ask(self, name: str) -> Any:
        """As in `CoordinatorLink`."""
        return answer(self.actor, getattr(self.actor, name).remote(), name)

    def round(self, n: int, lr_factor: float) -> Iterator[PackDone | RoundDone]:
        return RoundStream(self.actor, n, lr_factor)

    def release(self) -> None:
        """As in `CoordinatorLink`."""
        if self._crew is None:
            return
        with suppress(RayError, RunError):  # the run is finished, whatever its processes do
            self._released = self.ask("leave")
        if self._released:
            self._crew.actor, self._crew.resources = self.actor, self._resources

    def close(self) -> None:
        if not self._released:
            ray.kill(self.actor)  # its workers are its children and go with it


class RoundStream:
    """The records of a round as an actor yields them; reading can go on after an interruption."""

    def __init__(self, coordinator: Any, n: int, lr_factor: float) -> None:
        self._coordinator, self._stage = coordinator, f"round {n}"
        self._stream = coordinator.run_round.options(num_returns="streaming").remote(n, lr_factor)

    def __iter__(self) -> RoundStream:
        return self

    def __next__(self) -> PackDone | RoundDone:
        _wait(self._coordinator, self._stream, self._stage)
        record: PackDone | RoundDone = answer(self._coordinator, next(self._stream), self._stage)
        return record


def answer(coordinator: Any, reference: Any, stage: str) -> Any:
    """The coordinator's answer.  Raises the cause where the call failed."""
    _wait(coordinator, reference, stage)
    try:
        return ray.get(reference, timeout=_ANSWER_SECONDS)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None


def _wait(coordinator: Any, coming: Any, stage: str) -> None:
    """Waits for a reference, or for a stream's next record, while the coordinator's second thread answers.

    Raises RunError where it hangs.
    """
    while not ray.wait([coming], timeout=_ANSWER_SECONDS)[0]:
        if not ray.wait([coordinator.alive.remote()], timeout=_ANSWER_SECONDS)[0]:
            raise RunError(stage, f"the coordinator has not answered for {_ANSWER_SECONDS:.0f} s")


def _here() -> NodeAffinitySchedulingStrategy | PlacementGroupSchedulingStrategy:
    """Placement on this node: in a trial of a sweep in the first bundle of its placement group, which lies here; the
    workers then go into the other bundles."""
    group = get_current_placement_group()
    if group is None:
        return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
