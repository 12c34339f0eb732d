"""Work to workers: at most two items in flight each, again elsewhere after a loss, results in the order of the work.

An item of work is a function of a worker that gives an object reference.  It must be repeatable without harm: after
a worker's death its items run again, in the same composition, so that the bits do not change.  A worker that takes
longer over an item than the deadline is killed, and then it is as any other death.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayError, RayTaskError

from rayfed_sub.core.errors import RunError, UserError

_IN_FLIGHT = 2  # one computing, one waiting at the worker's door
_AHEAD = 4  # items per worker that may be done before their turn: bounds what the coordinator holds
_RETRY_SECONDS = 0.02  # Ray itself takes two seconds to say that a worker is still coming back
_RETURN_SECONDS = 1800.0  # with no worker up: how long one may take to come back, a new machine included
_FETCH_SECONDS = 60  # a result that is there but cannot be had
_LIVES = 3  # an item that was lost this often in a row is the likely cause
_GRACE = 1.0  # waited for at least: time for finished results to come over from another node
_LONGEST = 3600.0  # one wait; Ray counts milliseconds in 64 bits


def _always(result: Any) -> bool:
    return True


@dataclass(frozen=True)
class WorkItem:
    """submit: starts the work on the given actor; home: the worker preferred (it holds the clients' states); sound: an
    unsound result is thrown away, once, and the whole item runs again, on another worker where one is up."""

    submit: Callable[[Any], ray.ObjectRef]
    home: int
    label: str
    sound: Callable[[Any], bool] = _always


@dataclass(frozen=True)
class Done:
    """A finished item: its number, its result, the worker that did it.

    began, ended: when the worker set about it and when its result was there, `time.monotonic()`.  troubles: why it did
    not do at first, a line for each time that it was lost or unsound.
    """

    index: int
    result: Any
    worker: int
    began: float
    ended: float
    troubles: tuple[str, ...]


class WorkerPool:
    """The workers of a run: who is up and how much each has in flight, who is coming back, and what flies.

    It outlives the stages, so that a worker that died in one gets no work in the next before it answers.
    deadline: seconds that a worker may take over one item, from when it was sent to the idle worker or from when the
    worker's last item was done.
    """

    def __init__(self, workers: Sequence[Any], deadline: float) -> None:
        self.workers, self.deadline = workers, deadline
        self.load = dict.fromkeys(range(len(workers)), 0)
        self.returning: dict[ray.ObjectRef, int] = {}
        self.flying: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> item, worker; oldest first
        self._began: dict[int, float] = {}  # worker -> when the item that it is at began
        self._deserted, self._trouble = time.monotonic(), "none reported"  # since when nobody is up, where nobody is

    def begin(self) -> None:
        """A new stage: what still flies is of one that was given up, and nobody waits for it."""
        self.flying.clear()
        self._began.clear()
        self.load = dict.fromkeys(self.load, 0)
        self._deserted = time.monotonic()

    def send(self, worker: int, index: int, item: WorkItem) -> None:
        self.flying[item.submit(self.workers[worker])] = (index, worker)
        self.load[worker] += 1
        self._began.setdefault(worker, time.monotonic())

    def wait(self, stage: str) -> ray.ObjectRef | None:
        """The next reference that moved; None if that was only a resting worker's answer, or nothing moved in time.

        Raises RunError when no worker is up and none comes back, with the last trouble that was.
        """
        limit = min(self._began.values()) + self.deadline if self._began else self._deserted + _RETURN_SECONDS
        left = limit - time.monotonic()
        if not (self.load or self.returning) or (not self.load and left <= 0):
            raise RunError(stage, f"no worker is left or answers any more; the last trouble: {self._trouble}")
        timeout = min(max(left, _GRACE), _LONGEST)
        moved, _ = ray.wait([*self.flying, *self.returning], num_returns=1, timeout=timeout)
        if moved and moved[0] in self.flying:
            return moved[0]
        if moved:
            self._welcome(moved[0])
        return None

    def land(self, reference: ray.ObjectRef) -> tuple[int, float]:
        """An item is over, one way or the other, and its worker goes on to the next: the item's number, and when the
        worker set about it."""
        index, worker = self.flying.pop(reference)
        self.load[worker] -= 1
        began = self._began.pop(worker)
        if self.load[worker]:
            self._began[worker] = time.monotonic()
        return index, began

    def overdue(self) -> list[int]:
        """The workers that have taken longer than the deadline over one item."""
        now = time.monotonic()
        return [worker for worker, began in self._began.items() if now - began >= self.deadline]

    def rest(self, worker: int, trouble: str) -> list[int]:
        """The worker died: Ray brings it back, empty; it gets no work until it answers.

        Returns its items, oldest first: the first was at work, the others waited at its door.
        """
        lost = {reference: index for reference, (index, where) in self.flying.items() if where == worker}
        for reference in lost:
            del self.flying[reference]
        del self.load[worker], self._began[worker]
        self._deserted = time.monotonic()
        self._ask(worker, trouble)
        return list(lost.values())

    def _ask(self, worker: int, trouble: str) -> None:
        self._trouble = trouble
        self.returning[self.workers[worker].ready.remote()] = worker

    def _welcome(self, reference: ray.ObjectRef) -> None:
        """A resting worker answered, or did not: it works again, is asked again, or is lost for good."""
        worker = self.returning.pop(reference)
        try:
            ray.get(reference, timeout=_FETCH_SECONDS)
            self.load[worker] = 0
        except ActorDiedError as error:
            self._trouble = _last_line(error)
        except RayError as error:
            time.sleep(_RETRY_SECONDS)
            self._ask(worker, _last_line(error))


def in_order(pool: WorkerPool, items: Sequence[WorkItem], stage: str) -> Iterator[Done]:
    """Runs all items and yields them by number, each as soon as it and all before it are done.

    Raises the cause when an item raises; RunError when an item was lost `_LIVES` times in a row (with its worker, past
    the deadline, on its way back), and when no worker answers any more.
    """
    waiting = deque(range(len(items)))  # a retry goes to the front
    losses: list[list[str]] = [[] for _ in items]  # in a row
    troubles: list[list[str]] = [[] for _ in items]
    spoiled: dict[int, int] = {}  # item -> the worker that gave an unsound result
    ready: dict[int, Done] = {}
    next_out = 0

    def again(lost: Sequence[int], cause: str) -> None:
        """The first of the lost was at work, and may be the cause; those that waited at the door lost nothing."""
        causes = losses[lost[0]]
        causes.append(cause)
        troubles[lost[0]].append(cause)
        if len(causes) == _LIVES:
            why = "; ".join(dict.fromkeys(causes))
            raise RunError(stage, f"{items[lost[0]].label} lost {_LIVES} times in a row: {why}")
        waiting.extendleft(reversed(lost))

    pool.begin()
    while next_out < len(items):
        _launch(pool, items, waiting, spoiled, next_out + _AHEAD * len(pool.workers))
        moved = pool.wait(stage)
        if moved is None:
            for worker in pool.overdue():  # Ray kills a loop in C at once, a stopped process after five seconds
                ray.kill(pool.workers[worker], no_restart=False)
                late = f"past the deadline of {pool.deadline:g} s; raise resources.deadline"
                again(pool.rest(worker, late), late)
            continue
        worker = pool.flying[moved][1]
        try:
            result = ray.get(moved, timeout=_FETCH_SECONDS)
        except RayError as error:
            cause = _lost(error)
            died = not isinstance(error, ObjectLostError | GetTimeoutError)
            again(pool.rest(worker, cause) if died else [pool.land(moved)[0]], cause)
            continue
        index, began = pool.land(moved)
        if index in spoiled or items[index].sound(result):
            ready[index] = Done(index, result, worker, began, time.monotonic(), tuple(troubles[index]))
        else:
            spoiled[index] = worker
            losses[index].clear()
            troubles[index].append("a client failed")
            waiting.appendleft(index)
        while next_out in ready:
            yield ready.pop(next_out)
            next_out += 1


def _launch(
    pool: WorkerPool, items: Sequence[WorkItem], waiting: deque[int], spoiled: Mapping[int, int], horizon: int
) -> None:
    """Fills free places with items below `horizon`: a worker takes those it is home to, then the first in line."""
    while near := list(takewhile(lambda index: index < horizon, waiting)):
        homes = {items[index].home for index in near}
        free = [worker for worker, load in pool.load.items() if load < _IN_FLIGHT]
        for worker in sorted(free, key=lambda w: (pool.load[w], w not in homes, w)):
            fit = [index for index in near if len(pool.load) == 1 or spoiled.get(index) != worker]
            if fit:
                break
        else:
            return
        index = next((index for index in fit if items[index].home == worker), fit[0])
        waiting.remove(index)
        pool.send(worker, index, items[index])


def _lost(error: RayError) -> str:
    """Why a result was lost, in one line.  Raises what the work itself raised: that is no loss."""
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None
    return _last_line(error)


def _last_line(error: Exception) -> str:
    """Ray puts the cause of a death at the end."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
