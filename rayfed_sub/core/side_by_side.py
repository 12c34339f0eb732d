"""Arithmetic on many layers at once: one thread a layer, so that no result depends on the number of processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST = 8  # threads
_MEMORY = 2**30  # bytes that several items may take at once
T = TypeVar("T")
R = TypeVar("R")


def at_once(items: int, each: int = 0, processors: int = _MOST) -> int:
    """Number of items that are worked on at a time: one for each processor, 8 at most, and as many of `each` bytes as
    fit into 1 GiB.

    >>> at_once(20), at_once(20, each=300 * 10**6), at_once(20, each=5 * 10**9)
    (8, 3, 1)
    """
    fit = _MEMORY // each if each else _MOST
    return max(1, min(_MOST, processors, items, fit))


def side_by_side(function: Callable[[T], R], items: Iterable[T], each: int = 0) -> list[R]:
    """The function's results in the order of the items, `at_once` of them on threads of their own, of as many
    processors as this process may use; each with the torch threads of the calling one.  Raises the first error of the
    items' order.

    >>> side_by_side(abs, [-2, 3])
    [2, 3]
    """
    waiting = list(items)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = at_once(len(waiting), each, processors)
    if threads < 2:
        return [function(item) for item in waiting]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return list(pool.map(function, waiting))
