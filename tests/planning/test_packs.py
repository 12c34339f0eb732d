"""The cohort's canonical order, and the cuts between packs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.data.rows import Rows
from rayfed_sub.planning.packs import any_pack, fixed_cuts, free_cuts, most_clients, ordered, work


def dataset(*lengths: list[int]) -> Any:
    """One client for each list of its rows' lengths."""
    rows = Rows.of([[1] * length for own in lengths for length in own], prompts=[0] * sum(map(len, lengths)))
    begins = np.cumsum([0, *map(len, lengths)])
    return SimpleNamespace(train=rows, rows_of=lambda client: np.arange(begins[client], begins[client + 1]))


def test_clients_of_like_length_stand_together_whatever_the_cohort_s_order() -> None:
    config = load_config({"federation": {"clients": 5}})
    rows = dataset([100, 100], [9], [120], [12, 8], [70])
    assert ordered(config, rows, [4, 3, 2, 1, 0]) == ordered(config, rows, range(5)) == [0, 2, 4, 1, 3]


def test_clients_of_like_steps_stand_together_before_that() -> None:
    config = load_config({"federation": {"clients": 4, "local_steps": [2, 1, 2, 1]}})
    assert ordered(config, dataset([9], [100], [90], [9]), range(4)) == [2, 0, 1, 3]


def sizes(work: list[float], most: int, workers: int, *, finer: bool = False) -> list[int]:
    """Sizes of a round's packs."""
    packs = list(free_cuts(work, workers, lambda: most, finer=finer))
    assert [client for pack in packs for client in pack] == list(range(len(work)))
    return [len(pack) for pack in packs]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize(("most", "workers"), [(1, 1), (4, 2), (8, 3), (100, 2)])
def test_packs_are_runs_of_the_order(count: int, most: int, workers: int) -> None:
    fixed = fixed_cuts(range(count), most)
    assert [client for pack in fixed for client in pack] == list(range(count))
    assert all(len(pack) == most for pack in fixed[:-1])
    found = sizes([1.0] * count, most, workers)
    assert all(1 <= size <= most for size in found)
    assert all(before + 1 >= after for before, after in pairwise(found))
    if 0 < count <= most * workers:  # one turn: as even as they go
        assert max(found) - min(found) <= 1
        assert len(found) == min(count, workers)


def test_packs_of_a_turn_have_equal_work() -> None:
    assert sizes([8.0, 1, 1, 1, 1, 1, 1, 1, 1], most=100, workers=2) == [1, 8]
    assert sizes([4.0, 4, 2, 2, 2, 2], most=100, workers=2) == [2, 4]
    assert sizes([4.0, 4, 2, 2, 2, 2], most=3, workers=2) == [2, 2, 2]  # room for three


def test_last_of_several_turns_may_be_cut_finer() -> None:
    assert sizes([1.0] * 24, most=8, workers=2) == [6, 6, 6, 6]
    assert sizes([1.0] * 24, most=8, workers=2, finer=True) == [6, 6, 3, 3, 3, 3]
    assert sizes([1.0] * 12, most=8, workers=2, finer=True) == [6, 6]  # one turn


def test_largest_pack_leaves_no_worker_idle() -> None:
    def most(cohort: int, free: bool = True, **resources: Any) -> int:
        return most_clients(load_config({"resources": resources}), cohort, free=free)

    assert [most(100), most(100, workers=4), most(3), most(5), most(100, free=False)] == [50, 25, 3, 4, 4]
    assert [most(100, pack_size=7), most(100, pack_size=7, free=False), most(3, pack_size=7)] == [7, 7, 3]


def test_work_is_steps_times_tokens() -> None:
    config = load_config({"federation": {"clients": 2, "local_steps": [2, 3]}})
    rows = dataset([9, 11], [100])
    assert [work(config, rows, client) for client in (0, 1)] == [20, 300]


@pytest.mark.parametrize(
    ("settings", "kind", "free"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"cpus_per_worker": 2}, True, False),
        ({"gpus_per_worker": 0.5}, True, False),
        ({"executor": "reference"}, False, False),  # its evaluation is the same
    ],
)
def test_cuts_are_free_where_the_bits_are_known_to_be_the_same(settings: Any, kind: bool, free: bool) -> None:
    config = load_config({"resources": settings})
    assert any_pack(config, cast(Any, SimpleNamespace(any_pack=kind))) is free
