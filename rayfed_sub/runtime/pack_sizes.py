"""Pack sizes that a run finds while it goes on (`resources.pack_size=auto`): the quickest one of those tried.

What is learnt is a record (`PackSizes`), and functions return the next one.  It decides about cuts only, which change
no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

_GAIN = 0.97  # another size is taken where a unit of work takes less than this share: timings are not more precise
_TIMED = 2  # packs of each of two sizes, by the quickest of which they are compared
_AGAIN = 16  # rounds after which a size is tried again


@dataclass(frozen=True)
class Timing:
    """A finished pack, cut by a size: seconds per unit of work (`packs.work`)."""

    round: int
    size: int
    rate: float


@dataclass(frozen=True)
class PackSizes:
    """now: the quickest size that is known; tried: another one, which takes turns with it until they are compared:
    rounds differ, since some compute new bases; judged: size -> the round in which it was found slower, or too large;
    timings: of these two sizes, since they take turns; likely: a size that is tried before those in between."""

    now: int
    tried: int | None = None
    judged: Mapping[int, int] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    likely: int = 0

    @property
    def size(self) -> int:
        """Clients of the next pack at most."""
        if self.tried is None or len(_rates(self, self.tried)) > len(_rates(self, self.now)):
            return self.now
        return self.tried


def timed(sizes: PackSizes, timing: Timing, most: int, has_room: Callable[[int], bool]) -> PackSizes:
    """What is known after another finished pack.

    most: the largest size.  has_room: whether memory is free for packs of a size; asked only before a larger one is
    tried."""
    now, tried = sizes.now, sizes.tried
    if tried is not None:
        sizes = replace(sizes, timings=(*sizes.timings, timing))
        both = _rates(sizes, now), _rates(sizes, tried)
        if min(map(len, both)) < _TIMED:
            return sizes
        better, worse = (tried, now) if min(both[1]) < _GAIN * min(both[0]) else (now, tried)
        judged = {**sizes.judged, worse: timing.round}
        sizes = replace(sizes, now=better, tried=None, judged=judged, timings=())
    smaller = sizes.now // 2
    for larger in (min(sizes.likely, most), min(2 * sizes.now, most)):
        if sizes.now < larger and _unknown(sizes, larger, timing.round):
            if has_room(larger):
                return replace(sizes, tried=larger)
            sizes = replace(sizes, judged={**sizes.judged, larger: timing.round})
    if smaller and _unknown(sizes, smaller, timing.round):
        return replace(sizes, tried=smaller)
    return sizes


def lost(sizes: PackSizes, clients: int, n: int) -> PackSizes:
    """What is known after a pack of so many clients was lost in round n: it may have been too large."""
    known = (sizes.now, sizes.tried, 2 * sizes.now, sizes.likely)
    too_large = {size: n for size in known if size is not None and size >= clients}
    smaller = max(1, min(sizes.now, clients // 2))
    return replace(sizes, now=smaller, tried=None, judged={**sizes.judged, **too_large}, timings=())


def _rates(sizes: PackSizes, size: int) -> list[float]:
    return [timing.rate for timing in sizes.timings if timing.size == size]


def _unknown(sizes: PackSizes, size: int, n: int) -> bool:
    return n - sizes.judged.get(size, -_AGAIN) >= _AGAIN
