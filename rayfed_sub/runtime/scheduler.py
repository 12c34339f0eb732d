"""Scheduler of work items: at most two in flight per worker, retried after a loss, results in the items' order.

A work item is a function from a worker to an object reference.  It must be safe to repeat: after a worker's death its
items run again, unchanged, or in halves where the bits are the same.  A worker that exceeds the deadline is killed,
which is then handled as any other death.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
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
    False for a result to discard: the whole item then runs once more, on another worker if there is one.  units: what
    the work is about; halves: the same work in two parts, which take the item's place once it is lost: what killed its
    worker may be its size.  Empty where it cannot be divided."""

    submit: Callable[[Any], ray.ObjectRef]
    home: int
    label: str
    sound: Callable[[Any], bool] = _always
    units: Sequence[int] = ()
    halves: Callable[[], Sequence[WorkItem]] = tuple


@dataclass(frozen=True)
class Done:
    """A finished item: its number, its result, its worker, its units.

    began, ended: start of the work and arrival of the result, `time.monotonic()`.  troubles: a line for each time that
    the item was lost or its result unsound.
    """

    index: int
    result: Any
    worker: int
    began: float
    ended: float
    troubles: tuple[str, ...]
    units: Sequence[int] = ()


class WorkerPool:
    """Workers of a run: the number of items in flight of each live one, the restarting ones, the items in flight.

    It outlives the stages, so that a worker that died in one stage gets no work in the next before it answers.
    workers: what takes their calls; processes: the actors themselves, which may be killed.
    deadline: seconds that a worker may take over one item, from the time when it was sent to the idle worker or when
    the worker's last item was done.
    """

    def __init__(self, workers: Sequence[Any], processes: Sequence[Any], deadline: float) -> None:
        self.workers, self.processes, self.deadline = workers, processes, deadline
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


class Backlog:
    """Items of a stage that are still to be yielded, and what has happened to them so far.

    items are taken from their source (`fill`) when they are needed, so that the source decides as late as it can.
    coming: numbers of the items whose results are still to be yielded, in order; waiting: of those that no worker has.
    spoiled: item -> the worker that gave an unsound result.
    """

    def __init__(self, items: Iterable[WorkItem], stage: str) -> None:
        self.items: dict[int, WorkItem] = {}
        self.coming, self.waiting = deque[int](), deque[int]()
        self.spoiled: dict[int, int] = {}
        self.troubles: dict[int, list[str]] = {}
        self._losses: dict[int, list[str]] = {}  # in a row
        self._stage, self._more = stage, iter(items)

    def fill(self, places: int, most: int) -> None:
        """Takes items while fewer than `places` wait for a worker, and fewer than `most` are still to be yielded."""
        while len(self.waiting) < places and len(self.coming) < most:
            item = next(self._more, None)
            if item is None:
                return
            number = self._numbered(item)
            self.coming.append(number)
            self.waiting.append(number)

    def unfinished(self) -> bool:
        """True while an item is still to be yielded."""
        if not self.coming:
            self.fill(1, 1)
        return bool(self.coming)

    def lost(self, numbers: Sequence[int], cause: str) -> None:
        """Puts lost items back, to the front; the first was running and may be the cause: it comes back in halves, or
        if it cannot be divided, the loss counts.

        Raises RunError at an item's third loss in a row."""
        first, *queued = numbers
        self.troubles[first].append(cause)
        parts = self._halved(first)
        if parts == [first]:
            self._losses[first].append(cause)
        if len(self._losses[first]) == _LIVES:
            why = "; ".join(dict.fromkeys(self._losses[first]))
            raise RunError(self._stage, f"{self.items[first].label} lost {_LIVES} times in a row: {why}")
        self.waiting.extendleft(reversed([*parts, *queued]))

    def unsound(self, number: int, worker: int) -> None:
        """Puts an item back whose result is to be discarded."""
        self.spoiled[number] = worker
        self._losses[number].clear()
        self.troubles[number].append("a client failed")
        self.waiting.appendleft(number)

    def soon(self, most: int) -> list[int]:
        """The waiting items among the next ones to be yielded."""
        waiting = set(self.waiting)
        return [number for number in islice(self.coming, most) if number in waiting]

    def _halved(self, number: int) -> list[int]:
        """The items that take this one's place: its halves, or itself."""
        halves = self.items[number].halves()
        if not halves:
            return [number]
        numbers, place = [self._numbered(half) for half in halves], self.coming.index(number)
        del self.coming[place]
        self.troubles[numbers[0]] = self.troubles[number]  # a trouble counts once
        for i, new in enumerate(numbers):
            if number in self.spoiled:
                self.spoiled[new] = self.spoiled[number]
            self.coming.insert(place + i, new)
        return numbers

    def _numbered(self, item: WorkItem) -> int:
        number = len(self.items)
        self.items[number], self._losses[number], self.troubles[number] = item, [], []
        return number


def in_order(pool: WorkerPool, items: Iterable[WorkItem], stage: str) -> Iterator[Done]:
    """Takes items when workers have a place for them, runs them and yields them in order, each as soon as it and all
    before it are done; halves in the place of a lost item, and numbered as they come.

    Raises an item's own error; RunError when an item was lost `_LIVES` times in a row (with its worker, past the
    deadline, as a result in transit), and when no worker answers any more.
    """
    work = Backlog(items, stage)
    ready: dict[int, Done] = {}
    yielded = 0
    pool.begin()
    while work.unfinished():
        _launch(pool, work)
        moved = pool.wait(stage)
        if moved is None:
            for worker in pool.overdue():  # Ray kills a loop in C at once, a stopped process after five seconds
                ray.kill(pool.processes[worker], no_restart=False)
                late = f"past the deadline of {pool.deadline:g} s; raise resources.deadline"
                work.lost(pool.rest(worker, late), late)
            continue
        worker = pool.in_flight[moved][1]
        try:
            result = ray.get(moved, timeout=_FETCH_SECONDS)
        except RayError as error:
            cause = _lost(error)
            died = not isinstance(error, ObjectLostError | GetTimeoutError)
            work.lost(pool.rest(worker, cause) if died else [pool.land(moved)[0]], cause)
            continue
        number, began = pool.land(moved)
        item, troubles = work.items[number], tuple(work.troubles[number])
        if number in work.spoiled or item.sound(result):
            ready[number] = Done(0, result, worker, began, time.monotonic(), troubles, item.units)
        else:
            work.unsound(number, worker)
        while work.coming and work.coming[0] in ready:
            yield replace(ready.pop(work.coming.popleft()), index=yielded)
            yielded += 1


def _launch(pool: WorkerPool, work: Backlog) -> None:
    """Sends items that are needed soon to workers with a free place: first items whose home they are, then the
    first."""
    ahead = _AHEAD * len(pool.workers)
    work.fill(sum(_IN_FLIGHT - load for load in pool.load.values()), ahead)
    while near := work.soon(ahead):
        homes = {work.items[number].home for number in near}
        free = [worker for worker, load in pool.load.items() if load < _IN_FLIGHT]
        for worker in sorted(free, key=lambda w: (pool.load[w], w not in homes, w)):
            fit = [number for number in near if len(pool.load) == 1 or work.spoiled.get(number) != worker]
            if fit:
                break
        else:
            return
        number = next((number for number in fit if work.items[number].home == worker), fit[0])
        work.waiting.remove(number)
        pool.send(worker, number, work.items[number])


def _lost(error: RayError) -> str:
    """Cause of a lost result, in one line.  Raises an error of the work itself, which is no loss."""
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        raise error.cause if isinstance(error.cause, RunError | UserError) else error from None
    return _last_line(error)


def _last_line(error: Exception) -> str:
    """Last line of an error, where Ray names the cause of a death."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
