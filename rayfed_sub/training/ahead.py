"""Things made one after the other, the next of them aside while the last is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_turn(make: Callable[[int], T], count: int, *, ahead: bool) -> Iterator[T]:
    """make(0), make(1), ..., `count` of them in this order, each when it is asked for; or, with `ahead`, in a thread
    while the one before is in use.  Raises what `make` raises, where that thing's turn comes.

    >>> list(in_turn(lambda n: n * n, 3, ahead=True))
    [0, 1, 4]
    """
    if not ahead:
        yield from map(make, range(count))
        return
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting = pool.submit(make, 0) if count else None
        for n in range(1, count + 1):
            assert waiting is not None
            made = waiting.result()
            waiting = pool.submit(make, n) if n < count else None
            yield made
