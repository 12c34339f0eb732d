"""The probe: the pack sizes that it times, when it stops, and the best one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Resources
from rayfed_sub.planning.fit import Fit, roomy_packs
from rayfed_sub.planning.job import prepare
from rayfed_sub.runtime.probe import PackSpeed, _round, even, probe, quickest, while_it_gains
from tests.end_to_end.test_runs import small


@pytest.mark.parametrize(
    ("seconds", "timed"),
    [
        ({1: 8.0, 2: 6.0, 4: 5.0, 8: 4.9, 16: 1.0}, [1, 2, 4, 8]),  # 4.9 is 2 % less than 5: no gain, 16 is not tried
        ({1: 8.0, 2: 6.0, 4: 5.0, 8: 4.8, 16: 4.5, 32: 9.0, 64: 1.0}, [1, 2, 4, 8, 16, 32]),  # 4 % is a gain
        ({1: 8.0, 2: 8.0, 4: 1.0}, [1, 2]),  # a large model: each further client costs as much as the first
        ({4: 1.0}, [4]),
        ({}, []),
    ],
)
def test_sizes_grow_while_they_gain(seconds: dict[int, float], timed: list[int]) -> None:
    asked: list[int] = []

    def clock(size: int) -> PackSpeed:
        asked.append(size)
        return PackSpeed(size, seconds[size], 0.0)

    found = while_it_gains(seconds, clock, lambda speed: speed.step)
    assert asked == timed
    assert [speed.pack_size for speed in found] == timed


@pytest.mark.parametrize("cohort", [1, 7, 8, 50, 200])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
def test_even_packs_add_no_pack(cohort: int, workers: int, size: int) -> None:
    """Not larger, and as many packs one after another; one client less would need more of them."""

    def turns(pack: int) -> int:
        return math.ceil(math.ceil(cohort / pack) / workers)

    found = even(size, cohort, workers)
    assert found <= size
    assert turns(found) == turns(size)
    assert found == 1 or turns(found - 1) > turns(size)


def test_times_within_the_noise_are_equally_good() -> None:
    """Within 3 % of the quickest: the configured size if it is one of them, else the smallest."""
    rounds = {1: 9.0, 4: 6.1, 8: 6.0, 16: 7.0}
    assert [quickest(rounds, now) for now in (1, 4, 8, 16)] == [4, 4, 8, 4]


def test_packs_that_would_idle_a_worker_are_not_timed() -> None:
    """Packs of 16 leave room for one worker alone."""
    found = [Fit(4, 10, 4), Fit(8, 20, 2), Fit(16, 40, 1), Fit(32, 80, 0)]
    assert roomy_packs(found, Resources(workers=2, pack_size=4)) == [4, 8]
    assert roomy_packs(found, Resources(workers=1, pack_size=4)) == [4, 8, 16]
    assert roomy_packs(found, Resources(workers=8, pack_size=8)) == [4, 8]  # for several nodes: as now
    assert roomy_packs(found, Resources(workers=8, pack_size=4, gpus_per_worker=1)) == [4, 8, 16]  # each has its GPU
    assert roomy_packs(found, Resources(workers=8, pack_size=4, gpus_per_worker=0.5)) == [4, 8]


@pytest.mark.parametrize(("rule", "turns"), [({"buffer": 5}, 2), ({"buffer": 3}, 1), ({"rule": "fedasync"}, 1)])
def test_round_of_an_asynchronous_run_takes_the_time_of_its_updates(rule: dict[str, Any], turns: int) -> None:
    """Of eight clients under way five, three or one: two workers with packs of two train five in two turns, fewer in
    one, of four steps of 1 s and a refresh of 0.5 s a client."""
    federation = {"mode": "async", "asynchronous": rule, "sampled": 8}
    devices = {"classes": {"a": {"seconds_per_step": 1}}}
    config = load_config({"federation": federation, "devices": devices, "resources": {"workers": 2}})
    assert _round(config, PackSpeed(2, 1.0, 0.5)) == turns * 2 * (4 * 1.0 + 0.5)


def test_probe_of_a_real_job() -> None:
    """Eight clients and two workers: packs of 8 would leave one worker idle, so packs of 4 are timed instead, which are
    those that a run with at most 8 makes."""
    speed = probe(prepare(small("resources.workers=2", "resources.pack_size=8", "federation.local_steps=2")), [8])
    (four,) = speed.packs
    assert (four.pack_size, speed.now, speed.best) == (4, 4, 4)
    assert speed.best_round == speed.round >= 4 * (2 * four.step + four.refresh)  # one pack of each worker
    assert speed.run >= 2 * 4 * (2 * four.step + four.refresh)
