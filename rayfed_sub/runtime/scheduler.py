"""Scheduler of work items: at most two in flight per worker, retried after a loss, results in the items' order.

A work item is a function from a worker to an object reference.  It must be safe to repeat: after a worker's death its
items run again unchanged, so that the bits do not change.  A worker that exceeds the deadline is killed, which is then
handled as any other death.
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

_IN_FLIGHT = 2  # one running, one queued
_AHEAD = 4  # items per worker that may end before their turn: bounds the results that the coordinator holds
_RETRY_SECONDS = 0.02  # Ray itself takes two seconds to report that a worker is still restarting
_RETURN_SECONDS = 1800.0  # without any worker: time for one to restart, a new machine included
_FETCH_SECONDS = 60  # for a finished result that cannot be fetched
_LIVES = 3  # losses in a row after which the item is the likely cause
_GRACE = 1.0  # shortest wait: time for finished results to arrive from another node
_LONGEST = 3600.0  # one wait; Ray counts milliseconds in 64 bits


def _always(result: Any) -> bool:
    return True


@dataclass(frozen=True)
class WorkItem:
    """submit: starts the work on the given actor; home: the preferred worker (it holds the clients' states); sound:
    False for a result to discard: the whole item then runs once more, on another worker if there is one."""

    submit: Callable[[Any], ray.ObjectRef]
    home: int
    label: str
    sound: Callable[[Any], bool] = _always


@dataclass(frozen=True)
class Done:
    """A finished item: its number, its result, its worker.

    began, ended: start of the work and arrival of the result, `time.monotonic()`.  troubles: a line for each time that
    the item was lost or its result unsound.
    """

    index: int
    result: Any
    worker: int
    began: float
    ended: float
    troubles: tuple[str, ...]


class WorkerPool:
    """Workers of a run: the number of items in flight of each live one, the restarting ones, the items in flight.

    It outlives the stages, so that a worker that died in one stage gets no work in the next before it answers.
    deadline: seconds that a worker may take over one item, from the time when it was sent to the idle worker or when
    the worker's last item was done.
    """

    def __init__(self, workers: Sequence[Any], deadline: float) -> None:
        self.workers, self.deadline = workers, deadline
        self.load = dict.fromkeys(range(len(workers)), 0)
        self.returning: dict[ray.ObjectRef, int] = {}
        self.in_flight: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> item, worker; oldest first
        self._began: dict[int, float] = {}  # worker -> start of its running item
        self._idle_since, self._trouble = time.monotonic(), "none reported"  # since when no worker is up

    def begin(self) -> None:
        """Begins a stage; forgets items in flight of a stage that was given up."""
        self.in_flight.clear()
        self._began.clear()
        self.load = dict.fromkeys(self.load, 0)
        self._idle_since = time.monotonic()

    def send(self, worker: int, index: int, item: WorkItem) -> None:
        self.in_flight[item.submit(self.workers[worker])] = (index, worker)
        self.load[worker] += 1
        self._began.setdefault(worker, time.monotonic())

    def wait(self, stage: str) -> ray.ObjectRef | None:
        """The next finished item's reference; None after a restarted worker's answer, or where nothing ended in time.

        Raises RunError, naming the last trouble, when no worker is up and none comes back.
        """
        limit = min(self._began.values()) + self.deadline if self._began else self._idle_since + _RETURN_SECONDS
        left = limit - time.monotonic()
        if not (self.load or self.returning) or (not self.load and left <= 0):
            raise RunError(stage, f"no worker is left or answers any more; the last trouble: {self._trouble}")
        timeout = min(max(left, _GRACE), _LONGEST)
        moved, _ = ray.wait([*self.in_flight, *self.returning], num_returns=1, timeout=timeout)
        if moved and moved[0] in self.in_flight:
            return moved[0]
        if moved:
            self._restarted(moved[0])
        return None

    def land(self, reference: ray.ObjectRef) -> tuple[int, float]:
        """Removes an item that has ended or failed; its worker goes on to the next.  Returns its number and start."""
        index, worker = self.in_flight.pop(reference)
        self.load[worker] -= 1
        began = self._began.pop(worker)
        if self.load[worker]:
            self._began[worker] = time.monotonic()
        return index, began

    def overdue(self) -> list[int]:
        """The workers whose running item has exceeded the deadline."""
        now = time.monotonic()
        return [worker for worker, began in self._began.items() if now - began >= self.deadline]

    def rest(self, worker: int, trouble: str) -> list[int]:
        """Takes a dead worker out until Ray has restarted it, without its state, and it answers.

        Returns its lost items, oldest first: the first was running, the others were queued.
        """
        lost = {reference: index for reference, (index, where) in self.in_flight.items() if where == worker}
        for reference in lost:
            del self.in_flight[reference]
        del self.load[worker], self._began[worker]
        self._idle_since = time.monotonic()
        self._ask(worker, trouble)
        return list(lost.values())

    def _ask(self, worker: int, trouble: str) -> None:
        self._trouble = trouble
        self.returning[self.workers[worker].ready.remote()] = worker

    def _restarted(self, reference: ray.ObjectRef) -> None:
        """Handles the answer of a restarting worker: it works again, is asked again, or is lost for good."""
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
    """Runs all items and yields them in order, each as soon as it and all before it are done.

    Raises an item's own error; RunError when an item was lost `_LIVES` times in a row (with its worker, past the
    deadline, as a result in transit), and when no worker answers any more.
    """
    waiting = deque(range(len(items)))  # a retry goes to the front
    losses: list[list[str]] = [[] for _ in items]  # in a row
    troubles: list[list[str]] = [[] for _ in items]
    spoiled: dict[int, int] = {}  # item -> the worker that gave an unsound result
    ready: dict[int, Done] = {}
    next_out = 0

    def again(lost: Sequence[int], cause: str) -> None:
        """Puts lost items back; the loss counts for the first, which was running and may be the cause."""
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
        worker = pool.in_flight[moved][1]
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
    """Sends items below `horizon` to workers with a free place: first items whose home they are, then the first."""
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
    """Cause of a lost result, in one line.  Raises an error of the work itself, which is no loss."""
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None
    return _last_line(error)


def _last_line(error: Exception) -> str:
    """Last line of an error, where Ray names the cause of a death."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
