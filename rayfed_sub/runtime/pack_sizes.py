"""Pack sizes that a run finds while it goes on (`resources.pack_size=auto`): the quickest one of those tried.

What is learnt is a record (`PackSizes`), and functions return the next one.  It decides about cuts only, which change
no bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

_GAIN = 0.97  # another size is taken where a unit of work takes less than this share: timings are not more precise
_TIMED = 2  # packs of a size before it is judged
_KEPT = 64  # newest timings that are kept
_AGAIN = 16  # rounds after which a size is tried again


@dataclass(frozen=True)
class Timing:
    """A finished pack, cut by a size: seconds per unit of work (`packs.work`)."""

    round: int
    size: int
    rate: float


@dataclass(frozen=True)
class PackSizes:
    """now: the quickest size that is known; tried: another one, which the next packs have until it is judged; judged:
    size -> the round in which it was found slower, or too large; timings: the newest ones."""

    now: int
    tried: int | None = None
    judged: Mapping[int, int] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()

    @property
    def size(self) -> int:
        """Clients of the next pack at most."""
        return self.tried or self.now


def timed(sizes: PackSizes, timing: Timing, most: int, has_room: Callable[[int], bool]) -> PackSizes:
    """What is known after another finished pack.

    most: clients of a pack at most, however large the size.  has_room: whether memory is free for packs of a size;
    asked only before a larger one is tried."""
    sizes = replace(sizes, timings=(*sizes.timings, timing)[-_KEPT:])
    if sizes.tried is not None:
        quicker = _quicker(sizes.timings, sizes.tried, sizes.now)
        if quicker is None:
            return sizes
        now, slower = (sizes.tried, sizes.now) if quicker else (sizes.now, sizes.tried)
        sizes = replace(sizes, now=now, tried=None, judged={**sizes.judged, slower: timing.round})
    if not _enough(sizes.timings, sizes.now):
        return sizes
    larger, smaller = 2 * sizes.now, sizes.now // 2
    if sizes.now < most and _unknown(sizes, larger, timing.round):
        if has_room(larger):
            return replace(sizes, tried=larger)
        sizes = replace(sizes, judged={**sizes.judged, larger: timing.round})
    if smaller and _unknown(sizes, smaller, timing.round):
        return replace(sizes, tried=smaller)
    return sizes


def lost(sizes: PackSizes, clients: int, n: int) -> PackSizes:
    """What is known after a pack of so many clients was lost in round n: it may have been too large."""
    too_large = {size: n for size in (sizes.now, sizes.tried, 2 * sizes.now) if size is not None and size >= clients}
    return PackSizes(max(1, min(sizes.now, clients // 2)), None, {**sizes.judged, **too_large}, sizes.timings)


def _unknown(sizes: PackSizes, size: int, n: int) -> bool:
    return n - sizes.judged.get(size, -_AGAIN) >= _AGAIN


def _enough(timings: Sequence[Timing], size: int) -> bool:
    return sum(timing.size == size for timing in timings) >= _TIMED


def _quicker(timings: Sequence[Timing], size: int, other: int) -> bool | None:
    """True where packs of `size` take less time than those of `other`; None while that cannot be said.

    Packs of one round are compared where it has enough of both: another round may compute new bases, or none.  Of
    packs of different rounds the quickest count, without those of a run's first round, in which kernels are made."""
    newest = max(timing.round for timing in timings)
    both = [timing for timing in timings if timing.round == newest]
    if not (_enough(both, size) and _enough(both, other)):
        both = [timing for timing in timings if timing.round]
    if not (_enough(both, size) and _enough(both, other)):
        return None
    mine, others = (min(timing.rate for timing in both if timing.size == one) for one in (size, other))
    return mine < _GAIN * others
