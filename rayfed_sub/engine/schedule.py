"""Work to workers: at most two pieces in flight each, again elsewhere after a loss, results in the order of the work.

A piece of work is a function of a worker that gives an object reference.  It must be repeatable without harm: after
a worker's death its pieces run again, in the same composition, so that the bits do not change.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from rayfed_sub.errors import RunError, UserError

_IN_FLIGHT = 2  # one computing, one waiting at the worker's door
_AHEAD = 4  # pieces per worker that may be done before their turn: bounds what the coordinator holds
_RETRY_SECONDS = 0.2
_RETURN_SECONDS = 300.0  # with nothing in flight: how long workers may take to come back
_LIVES = 3  # a piece that was lost this often is the likely cause
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


class Crew:
    """The workers of a run: who is up and how much each has in flight, who is coming back, and what flies.

    It outlives the stages, so that a worker that died in one gets no work in the next before it answers.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = workers
        self.load = dict.fromkeys(range(len(workers)), 0)
        self.returning: dict[ray.ObjectRef, int] = {}
        self.flying: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> piece, worker; oldest first
        self._heard, self._trouble = time.monotonic(), "none reported"

    def send(self, worker: int, index: int, piece: Piece) -> None:
        self.flying[piece.submit(self.workers[worker])] = (index, worker)
        self.load[worker] += 1

    def wait(self, stage: str) -> ray.ObjectRef | None:
        """The next reference that moved, None if that was only a resting worker's answer.

        Raises RunError when nothing has been heard of for too long, with the last trouble that was.
        """
        moved, _ = ray.wait([*self.flying, *self.returning], num_returns=1, timeout=_PATIENCE)
        if moved and moved[0] in self.flying:
            return moved[0]
        if moved:
            self._welcome(moved[0])
        patience = _PATIENCE if self.flying else _RETURN_SECONDS
        if not (self.load or self.returning) or time.monotonic() - self._heard > patience:
            raise RunError(stage, f"no worker is left or answers any more; the last trouble: {self._trouble}")
        return None

    def land(self, reference: ray.ObjectRef) -> tuple[int, int]:
        """A piece is over, one way or the other: its number and its worker."""
        index, worker = self.flying.pop(reference)
        if worker in self.load:
            self.load[worker] -= 1
        return index, worker

    def heard(self) -> None:
        """Something finished: whatever else is slow, the run is alive."""
        self._heard = time.monotonic()

    def rest(self, worker: int, error: Exception) -> None:
        """The worker died: Ray brings it back, empty; it gets no work until it answers."""
        self._trouble = _last_line(error)
        self.load.pop(worker, None)
        if worker not in self.returning.values():
            self.returning[self.workers[worker].ready.remote()] = worker

    def _welcome(self, reference: ray.ObjectRef) -> None:
        """A resting worker answered, or did not: it works again, is asked again, or is lost for good."""
        worker = self.returning.pop(reference)
        try:
            ray.get(reference, timeout=60)
            self.load[worker] = 0
            self.heard()
        except ActorDiedError as error:
            self._trouble = _last_line(error)
        except RayActorError as error:
            time.sleep(_RETRY_SECONDS)
            self.rest(worker, error)


def in_order(crew: Crew, pieces: Sequence[Piece], stage: str) -> Iterator[Done]:
    """Runs all pieces and yields them by number, each as soon as it and all before it are done.

    Raises the cause when a piece raises, RunError when a piece was lost `_LIVES` times or no worker answers any more.
    """
    waiting = deque(range(len(pieces)))  # a retry goes to the front
    losses = [0] * len(pieces)
    ready: dict[int, Done] = {}
    next_out = 0
    crew.heard()
    while next_out < len(pieces):
        _launch(crew, pieces, waiting, next_out + _AHEAD * len(crew.workers))
        moved = crew.wait(stage)
        if moved is None:
            continue
        index, worker = crew.land(moved)
        try:
            ready[index] = Done(index, ray.get(moved, timeout=60), worker)
            crew.heard()
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, RunError | UserError) else error from None
        except (RayActorError, NodeDiedError, OutOfMemoryError, ObjectLostError, GetTimeoutError) as error:
            # The first news of a death is of the piece that was at work; those that waited at the door lost nothing.
            losses[index] += worker in crew.load
            if isinstance(error, RayActorError | NodeDiedError | OutOfMemoryError):
                crew.rest(worker, error)
            if losses[index] == _LIVES:
                why = f"{pieces[index].label} lost {_LIVES} times, with its worker or its result: {_last_line(error)}"
                raise RunError(stage, why) from None
            waiting.appendleft(index)
        while next_out in ready:
            yield ready.pop(next_out)
            next_out += 1


def _launch(crew: Crew, pieces: Sequence[Piece], waiting: deque[int], horizon: int) -> None:
    """Fills free places with pieces below `horizon`: a worker takes those it is home to, then the first in line."""
    while (
        crew.load
        and min(crew.load.values()) < _IN_FLIGHT
        and (near := list(takewhile(lambda index: index < horizon, waiting)))
    ):
        homes = {pieces[index].home for index in near}
        worker = min(crew.load, key=lambda w: (crew.load[w], w not in homes, w))
        index = next((index for index in near if pieces[index].home == worker), near[0])
        waiting.remove(index)
        crew.send(worker, index, pieces[index])


def _last_line(error: Exception) -> str:
    """Ray puts the cause of a death at the end."""
    return str(error).strip().splitlines()[-1].strip()
