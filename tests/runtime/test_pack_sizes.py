"""Pack sizes that a run finds: growth, memory, losses; and the packs that are cut by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.runtime.pack_queue import PackQueue
from rayfed_sub.runtime.pack_sizes import PackSizes, Timing, lost, timed
from rayfed_sub.runtime.scheduler import Done
from rayfed_sub.telemetry.process_memory import Sample


def sizes_of(seconds: Callable[[int], float], packs: int = 60, most: int = 64, room: int = 1000) -> list[int]:
    """The size of each pack in one long round, and of the next one after it."""
    sizes, found = PackSizes(4), []
    for _ in range(packs):
        found.append(sizes.size)
        sizes = timed(sizes, Timing(0, sizes.size, seconds(sizes.size)), most, lambda size: size <= room)
    return [*found, sizes.size]


def test_packs_grow_while_that_is_quicker() -> None:
    found = sizes_of(lambda size: 1 / min(size, 16))
    assert found[:5] == [4, 8, 4, 8, 4]
    assert max(found) == 32
    assert found[-1] == 16


def test_likely_size_is_tried_before_those_in_between() -> None:
    sizes = PackSizes(4, likely=32)
    assert timed(sizes, Timing(0, 4, 1.0), 64, lambda size: True).tried == 32
    assert timed(sizes, Timing(0, 4, 1.0), 64, lambda size: size < 32).tried == 8
    assert timed(sizes, Timing(0, 4, 1.0), 3, lambda size: True).tried == 2


def test_likely_size_beyond_a_worker_s_share_is_that_share() -> None:
    assert timed(PackSizes(4, likely=64), Timing(0, 4, 1.0), 5, lambda size: True).tried == 5


def test_packs_shrink_where_that_is_quicker() -> None:
    assert sizes_of(float)[-1] == 1


def test_equal_times_keep_the_size() -> None:
    assert sizes_of(lambda size: 1.0)[-1] == 4
    assert sizes_of(lambda size: 0.99 if size == 8 else 1.0)[-1] == 4


@pytest.mark.parametrize(("limits", "largest"), [({"most": 12}, 12), ({"room": 8}, 8)])
def test_packs_grow_to_their_share_and_to_free_memory(limits: dict[str, int], largest: int) -> None:
    assert max(sizes_of(lambda size: 1 / size, **limits)) == largest


def test_size_that_was_slower_is_tried_again_after_some_rounds() -> None:
    """What is quickest may change in a run: here packs of 8, from round 12 on."""
    sizes, found = PackSizes(4), dict[int, int]()
    for n in range(40):
        for _ in range(9):
            rate = 0.5 if sizes.size == 8 and n >= 12 else 1.0
            sizes = timed(sizes, Timing(n, sizes.size, rate), 8, lambda size: True)
        found[n] = sizes.now
    assert [found[5], found[39]] == [4, 8]


@pytest.mark.parametrize("packs", [1, 2, 3, 4])
def test_rounds_with_other_work_change_nothing(packs: int) -> None:
    """Every fourth round computes new bases and takes twice as long; packs of eight take a tenth longer each."""
    sizes = PackSizes(4)
    for n in range(60):
        for _ in range(packs):
            rate = (1.0 if n % 4 else 2.0) * (1.1 if sizes.size > 4 else 1.0)
            sizes = timed(sizes, Timing(n, sizes.size, rate), 8, lambda size: True)
        assert sizes.now in (2, 4)


def test_lost_pack_makes_them_smaller() -> None:
    sizes = timed(PackSizes(16), Timing(3, 16, 1.0), 64, lambda size: True)
    smaller = lost(sizes, 16, n=3)
    assert smaller.now == smaller.size == 8
    for _ in range(24):
        smaller = timed(smaller, Timing(4, smaller.size, 1 / smaller.size), 64, lambda size: True)
    assert smaller.now == 8  # 16 is not tried again so soon


class Stage:
    """Workers that do nothing, with memory as given."""

    count = 2

    def __init__(self, *samples: Sample) -> None:
        self.samples = list(samples)

    def memory(self, seconds: float) -> list[Sample]:
        return self.samples


def queue(workers: Stage, **resources: Any) -> PackQueue:
    config = load_config({"federation": {"clients": 64, "rounds": 9}, "resources": resources})
    dataset = SimpleNamespace(train=None, rows_of=lambda client: np.arange(3))
    return PackQueue(config, cast(Any, dataset), cast(Any, workers), lambda client: None, free=True)


def a_round(packs: PackQueue, n: int, seconds: Callable[[int], float]) -> Iterator[int]:
    """Sizes of the packs of round n, which take so many seconds each on the two workers in turns."""
    now = [0.0, 0.0]
    for i, item in enumerate(packs.items(n, range(64), None, 1.0)):
        began, taken = now[i % 2], seconds(len(item.units))
        now[i % 2] += taken
        memory = cast(Stage, packs._workers).samples[i % 2]
        outcome = SimpleNamespace(seconds=(taken, taken), memory=memory)
        packs.done(n, Done(i, outcome, i % 2, began, began + taken, (), item.units))
        yield len(item.units)


def workers_with(free: int) -> Stage:
    bare = Stage(Sample(("a", 1), 100, 100, free), Sample(("a", 2), 100, 100, free))
    return bare


def test_packs_grow_in_a_run() -> None:
    packs = queue(workers_with(free=10**9))
    rounds = [list(a_round(packs, n, lambda clients: 1 + clients / 100)) for n in range(12)]
    assert rounds[0][:3] == [4, 4, 4]  # a worker's first pack of a size is not timed
    assert max(rounds[0]) > 4
    assert rounds[-1] == [32, 32]
    assert all(sum(sizes) == 64 for sizes in rounds)


def test_packs_do_not_grow_beyond_free_memory() -> None:
    """A pack of 4 takes 50 bytes above the bare worker: one of 8 is expected to take 50 more, twice that for safety, in
    both workers."""
    for free, largest in ((199, 4), (200, 8)):
        workers = workers_with(free)
        packs = queue(workers)
        workers.samples = [Sample(sample.process, 100, 150, sample.free) for sample in workers.samples]
        sizes = [size for n in range(3) for size in a_round(packs, n, lambda clients: 1 + clients / 100)]
        assert max(sizes) == largest


def test_round_ends_with_finer_packs_where_a_worker_waited_for_another() -> None:
    packs = queue(workers_with(free=10**9), pack_size=16)
    slow = iter([1.0, 2.0] * 99)
    assert list(a_round(packs, 0, lambda clients: clients * next(slow))) == [16, 16, 16, 16]
    assert list(a_round(packs, 1, float)) == [16, 16, 8, 8, 8, 8]
    assert list(a_round(packs, 2, float)) == [16, 16, 16, 16]  # nobody waited


def test_lost_pack_does_not_change_a_number_in_the_configuration() -> None:
    packs = queue(workers_with(free=10**9), pack_size=16)
    (first, *_) = packs.items(0, range(64), None, 1.0)
    assert [len(half.units) for half in first.halves()] == [8, 8]
    assert max(a_round(packs, 1, float)) == 16


def test_lost_rest_of_a_round_says_nothing_about_the_size() -> None:
    packs = queue(workers_with(free=10**9))
    for _ in range(12):
        list(a_round(packs, 0, lambda clients: 1 + clients / 100))
    now = packs._sizes.now
    (item,) = packs.items(12, range(2), None, 1.0) if now < 2 else list(packs.items(12, range(3), None, 1.0))[:1]
    item.halves()
    assert packs._sizes.now == now


def test_number_in_the_configuration_stays() -> None:
    packs = queue(workers_with(free=10**9), pack_size=5)
    assert {size for n in range(3) for size in a_round(packs, n, lambda clients: 1.0)} <= set(range(1, 6))
