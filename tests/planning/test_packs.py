"""The cohort's canonical order, and the cuts between packs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.data.rows import Rows
from rayfed_sub.planning.packs import any_pack, cuts, ordered


def dataset(*lengths: list[int]) -> Any:
    """One client for each list of its rows' lengths."""
    rows = Rows.of([[1] * length for own in lengths for length in own], prompts=[0] * sum(map(len, lengths)))
    begins = np.cumsum([0, *map(len, lengths)])
    return SimpleNamespace(train=rows, rows_of=lambda client: np.arange(begins[client], begins[client + 1]))


def test_clients_of_like_length_stand_together_whatever_the_cohort_s_order() -> None:
    config = load_config({"federation": {"clients": 5}})
    rows = dataset([100, 100], [9], [120], [12, 8], [70])
    assert ordered(config, rows, [4, 3, 2, 1, 0]) == ordered(config, rows, range(5)) == [1, 3, 0, 2, 4]


def test_clients_of_like_steps_come_before_that() -> None:
    config = load_config({"federation": {"clients": 4, "local_steps": [2, 1, 2, 1]}})
    assert ordered(config, dataset([9], [100], [90], [9]), range(4)) == [3, 1, 0, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize(("most", "workers"), [(1, 1), (4, 2), (8, 3), (100, 2)])
def test_packs_are_runs_of_the_order(count: int, most: int, workers: int) -> None:
    for free in (True, False):
        packs = cuts(range(count), most, workers, free=free)
        assert [client for pack in packs for client in pack] == list(range(count))
        assert all(1 <= len(pack) <= most for pack in packs)
        sizes = [len(pack) for pack in packs]
        if free:
            assert sizes == sorted(sizes, reverse=True)
            assert not sizes or sizes[0] - sizes[-1] <= 1
            assert len(packs) % workers == 0 or len(packs) == count


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
