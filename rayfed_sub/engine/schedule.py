"""Work to workers: at most two pieces in flight each, again elsewhere after a loss, results in the order of the work.

A piece of work is a function of a worker that gives an object reference.  It must be repeatable without harm: after
a worker's death its pieces run again, in the same composition, so that the bits do not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rayfed_sub.errors import RunError

_IN_FLIGHT = 2  # one computing, one waiting at the worker's door
_AHEAD = 4  # pieces per worker that may be done before their turn: bounds what the coordinator holds
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


def in_order(workers: Sequence[Any], pieces: Sequence[Piece], stage: str) -> Iterator[Done]:
    """Runs all pieces and yields them by number, each as soon as it and all before it are done.

    Raises the cause when a piece raises, RunError when a piece outlives `_LIVES` workers or nothing moves any more.
    """
    waiting = deque(range(len(pieces)))  # a retry goes to the front
    flying: dict[ray.ObjectRef, tuple[int, int]] = {}
    load = [0] * len(workers)
    deaths = [0] * len(pieces)
    ready: dict[int, Done] = {}
    next_out = 0
    while next_out < len(pieces):
        _launch(workers, pieces, waiting, flying, load, next_out + _AHEAD * len(workers))
        finished, _ = ray.wait(list(flying), num_returns=1, timeout=_PATIENCE)
        if not finished:
            raise RunError(stage, f"no result for {_PATIENCE:.0f} s; stuck: {_labels(pieces, flying)}")
        index, worker = flying.pop(finished[0])
        load[worker] -= 1
        try:
            ready[index] = Done(index, ray.get(finished[0], timeout=60), worker)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, RunError) else error from None
        except RayActorError as error:
            deaths[index] += 1
            if deaths[index] == _LIVES:
                why = f"{pieces[index].label} ended with its worker's death {_LIVES} times: {_first_line(error)}"
                raise RunError(stage, why) from None
            waiting.appendleft(index)
        while next_out in ready:
            yield ready.pop(next_out)
            next_out += 1


def _launch(
    workers: Sequence[Any],
    pieces: Sequence[Piece],
    waiting: deque[int],
    flying: dict[ray.ObjectRef, tuple[int, int]],
    load: list[int],
    horizon: int,
) -> None:
    """Fills free places with pieces below `horizon`: a worker takes those it is home to, then the first in line."""
    while min(load) < _IN_FLIGHT and (near := [index for index in waiting if index < horizon]):
        homes = {pieces[index].home for index in near}
        worker = min(range(len(workers)), key=lambda w: (load[w], w not in homes))
        index = next((index for index in near if pieces[index].home == worker), near[0])
        waiting.remove(index)
        flying[pieces[index].submit(workers[worker])] = (index, worker)
        load[worker] += 1


def _labels(pieces: Sequence[Piece], flying: dict[ray.ObjectRef, tuple[int, int]]) -> str:
    return ", ".join(pieces[index].label for index, _ in flying.values())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
