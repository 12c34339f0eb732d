"""Arithmetic on many layers at once: one thread a layer, so that no result depends on the number of processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 8
"""Threads at most."""
MEMORY = 2**30
"""Bytes that several items may take at once."""
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Iterable[T], each: int = 0) -> list[R]:
    """The function's results in the order of the items, on as many threads as this process may use processors, `MOST`
    at most, and as items of `each` bytes fit into `MEMORY`; each with the torch threads of the calling one.  Raises the
    first error of the items' order.

    >>> side_by_side(abs, [-2, 3])
    [2, 3]
    """
    waiting, fit = list(items), max(1, MEMORY // each) if each else MOST
    cores = min(
        MOST,
        fit,
        len(waiting),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    if cores < 2:
        return [function(item) for item in waiting]
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return list(pool.map(function, waiting))
