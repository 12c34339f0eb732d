"""Accounts of a timeline, by hand: two rounds, two classes of devices."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
import pytest

from rayfed_sub.clock.accounts import Cost, account, best_within, cost_at, cost_to, costs
from rayfed_sub.config.schema import Device
from rayfed_sub.core.schemas import TimelineRow


def row(round: int, client: int, device: str, began: float, ended: float, **more: Any) -> TimelineRow:
    known = {"version": round, "outcome": "counted", "uplink_bytes": 10, "downlink_bytes": 20, "joules": None, **more}
    end = 10.0 * (round + 1)
    times = {"download_seconds": 0.0, "compute_seconds": 1.0, "upload_seconds": 0.0, "ended": ended}
    rest = {"round_ended": end, "idle_seconds": end - ended, "steps": 1.0, "tokens": 1.0}
    return TimelineRow(round=round, client=client, device=device, began=began, **{**times, **rest, **known})


TIMELINE = pd.DataFrame(
    asdict(one)
    for one in [
        row(0, 0, "slow", 0.0, 10.0, joules=50.0),
        row(0, 1, "fast", 0.0, 4.0),
        row(1, 1, "fast", 10.0, 14.0, version=0),
        row(1, 0, "slow", 10.0, 20.0, outcome="late", uplink_bytes=5, joules=30.0),
    ]
)


def test_account_by_hand() -> None:
    found = account(TIMELINE)
    assert found["seconds"] == 20.0
    assert found["idle_share"] == pytest.approx(12 / (28 + 12))  # of 10 + 4 + 4 + 10 s at work
    assert (found["wasted_bytes"], found["wasted_share"], found["wasted_seconds"]) == (25, 25 / 115, 10.0)
    assert (found["joules"], found["counted_share"]) == (80.0, 3 / 4)
    slow, fast = found["classes"]["slow"], found["classes"]["fast"]
    assert (slow["clients"], slow["rounds"], slow["counted"], slow["participation"]) == (1, 2, 1, 1 / 3)
    assert (fast["participation"], fast["staleness"], fast["idle_share"], fast["joules"]) == (2 / 3, 0.5, 12 / 20, None)
    assert (slow["wasted_bytes"], fast["wasted_bytes"]) == (25, 0)


def test_clients_under_way_at_the_end_count_in_the_last_round() -> None:
    left = row(
        2, 2, "slow", 15.0, 20.0, version=1, outcome="unfinished", joules=5.0, round_ended=20.0, idle_seconds=0.0
    )
    whole = pd.concat([TIMELINE, pd.DataFrame([asdict(left)])])
    assert costs(whole) == [Cost(1, 10.0, 60, 50.0), Cost(2, 20.0, 145, 85.0)]
    found = account(whole)
    assert (found["seconds"], found["wasted_bytes"], found["wasted_seconds"]) == (20.0, 25 + 30, 10.0 + 5.0)
    assert found["counted_share"] == 3 / 4


def test_class_whose_clients_took_no_part_has_a_row() -> None:
    """It has used 0 J where its power is known."""
    fast, preset = Device(seconds_per_step=1.0), Device(seconds_per_step=1.0, preset="a100")
    found = account(TIMELINE, {"fast": fast, "idle": fast, "spare": preset})
    assert list(found["classes"]) == ["fast", "idle", "slow", "spare"]
    idle = found["classes"]["idle"]
    assert {idle[name] for name in ("clients", "rounds", "counted", "participation", "staleness", "idle_share")} == {0}
    assert (idle["joules"], found["classes"]["spare"]["joules"]) == (None, 0.0)
    assert {**found, "classes": None} == {**account(TIMELINE), "classes": None}


def test_account_of_nothing() -> None:
    assert account(TIMELINE[:0])["seconds"] == 0.0


def test_cost_to_a_score_is_that_of_the_first_evaluation_that_reaches_it() -> None:
    spent = costs(TIMELINE)
    assert spent == [Cost(1, 10.0, 60, 50.0), Cost(2, 20.0, 115, 80.0)]
    losses = pd.Series([3.0, 2.0, 2.5], index=[0, 1, 2])
    assert cost_to(spent, losses, 2.6, lower=True) == spent[0]
    assert cost_to(spent, losses, 1.9, lower=True) is None
    assert cost_to(spent, losses, 3.0, lower=True) == Cost(0, 0.0, 0, 0.0)
    assert cost_to(spent, pd.Series([0.1, 0.6], index=[1, 2]), 0.5, lower=False) == spent[1]
    assert cost_at(spent, 7) == spent[1]
    assert best_within(spent, losses, 59, lambda cost: cost.bytes, lower=True) == 3.0
    assert best_within(spent, losses, 115, lambda cost: cost.bytes, lower=True) == 2.0
    assert best_within(spent, losses[1:], 5.0, lambda cost: cost.seconds, lower=True) is None
