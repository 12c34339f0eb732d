"""Rows of the timeline by hand: a round of 11 s."""

from __future__ import annotations

import math

import pytest

from rayfed_sub.clock.fleet import fleet_of
from rayfed_sub.clock.timeline_rows import timeline_row
from rayfed_sub.clock.virtual_clock import Flight
from rayfed_sub.config.loading import load_config

FLEET = fleet_of(load_config({"federation": {"clients": 1}, "devices": {"classes": {"a": {"seconds_per_step": 1.0}}}}))


@pytest.mark.parametrize(
    ("until", "failed", "outcome", "idle"),
    [
        (math.inf, False, "counted", 11 - 4),
        (math.inf, True, "failed", 11 - 4),
        (6.0, False, "counted", 6 - 4),  # its hours end while it waits
        (20.0, False, "counted", 11 - 4),
        (1.0, False, "offline", 0),
        (math.inf, False, "late", 0),
    ],
)
def test_who_has_left_does_not_wait(until: float, failed: bool, outcome: str, idle: float) -> None:
    assert FLEET is not None
    flight = Flight(0, 0, 0.0, 0.0, 4.0, until, 100, uplink_bytes=100, upload=0.0, failed=failed)
    assert timeline_row(FLEET, 0, flight, outcome, 11.0, (4.0, 1.0)).idle_seconds == idle
    assert timeline_row(FLEET, 0, flight, outcome, 11.0, (4.0, 1.0), waits=False).idle_seconds == 0
