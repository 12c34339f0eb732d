"""Work to workers: at most two pieces in flight each, again elsewhere after a loss, results in the order of the work.

A piece of work is a function of a worker that gives an object reference.  It must be repeatable without harm: after
a worker's death its pieces run again, in the same composition, so that the bits do not change.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from rayfed_sub.errors import RunError

_IN_FLIGHT = 2  # one computing, one waiting at the worker's door
_AHEAD = 4  # pieces per worker that may be done before their turn: bounds what the coordinator holds
_RETRY_SECONDS = 0.2
_LIVES = 3  # a piece that saw this many workers die is the likely cause
_PATIENCE = 3600.0  # seconds without any result before the run is called stuck


@dataclass(frozen=True)
class Piece:
    """submit: starts the work on the given actor; home: the worker preferred (it holds the clients' states)."""

    submit: Callable[[Any], ray.ObjectRef]
    home: int
    label: str


@dataclass(frozen=True)
class Done:
    """A finished piece: its number, its result, the worker that did it."""

    index: int
    result: Any
    worker: int


@dataclass
class Crew:
    """The workers during one stage: who is up and how much each has in flight, who is coming back, and what flies."""

    workers: Sequence[Any]
    load: dict[int, int]
    returning: dict[ray.ObjectRef, int] = field(default_factory=dict)
    flying: dict[ray.ObjectRef, tuple[int, int]] = field(default_factory=dict)  # -> piece, worker; oldest first

    def send(self, worker: int, index: int, piece: Piece) -> None:
        self.flying[piece.submit(self.workers[worker])] = (index, worker)
        self.load[worker] += 1

    def land(self, reference: ray.ObjectRef) -> tuple[int, int]:
        """A piece is over, one way or the other: its number and its worker."""
        index, worker = self.flying.pop(reference)
        if worker in self.load:
            self.load[worker] -= 1
        return index, worker

    def rest(self, worker: int) -> None:
        """The worker died: Ray brings it back, empty; it gets no work until it answers."""
        self.load.pop(worker, None)
        if worker not in self.returning.values():
            self.returning[self.workers[worker].ready.remote()] = worker

    def welcome(self, reference: ray.ObjectRef, stage: str) -> None:
        """A resting worker answered, or did not: it works again, is asked again, or is lost for good."""
        worker = self.returning.pop(reference)
        try:
            ray.get(reference, timeout=60)
            self.load[worker] = 0
        except ActorDiedError as error:
            if not self.load and not self.returning:
                raise RunError(stage, f"the last worker is lost: {_first_line(error)}") from None
        except RayActorError:
            time.sleep(_RETRY_SECONDS)
            self.rest(worker)


def in_order(workers: Sequence[Any], pieces: Sequence[Piece], stage: str) -> Iterator[Done]:
    """Runs all pieces and yields them by number, each as soon as it and all before it are done.

    Raises the cause when a piece raises, RunError when a piece outlives `_LIVES` workers or nothing moves any more.
    """
    crew = Crew(workers, dict.fromkeys(range(len(workers)), 0))
    waiting = deque(range(len(pieces)))  # a retry goes to the front
    deaths = [0] * len(pieces)
    ready: dict[int, Done] = {}
    next_out = 0
    while next_out < len(pieces):
        _launch(crew, pieces, waiting, next_out + _AHEAD * len(workers))
        moved, _ = ray.wait([*crew.flying, *crew.returning], num_returns=1, timeout=_PATIENCE)
        if not moved:
            stuck = ", ".join(pieces[index].label for index, _ in crew.flying.values()) or "all workers are gone"
            raise RunError(stage, f"no result for {_PATIENCE:.0f} s; stuck: {stuck}")
        if moved[0] in crew.returning:
            crew.welcome(moved[0], stage)
            continue
        index, worker = crew.land(moved[0])
        try:
            ready[index] = Done(index, ray.get(moved[0], timeout=60), worker)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, RunError) else error from None
        except RayActorError as error:
            if worker in crew.load:  # the first news of this death is of the piece that was at work
                deaths[index] += 1
            crew.rest(worker)
            if deaths[index] == _LIVES:
                why = f"{pieces[index].label} ended with its worker's death {_LIVES} times: {_first_line(error)}"
                raise RunError(stage, why) from None
            waiting.appendleft(index)
        while next_out in ready:
            yield ready.pop(next_out)
            next_out += 1


def _launch(crew: Crew, pieces: Sequence[Piece], waiting: deque[int], horizon: int) -> None:
    """Fills free places with pieces below `horizon`: a worker takes those it is home to, then the first in line."""
    while (
        crew.load and min(crew.load.values()) < _IN_FLIGHT and (near := [index for index in waiting if index < horizon])
    ):
        homes = {pieces[index].home for index in near}
        worker = min(crew.load, key=lambda w: (crew.load[w], w not in homes, w))
        index = next((index for index in near if pieces[index].home == worker), near[0])
        waiting.remove(index)
        crew.send(worker, index, pieces[index])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
