"""Devices of clients: shares, traces, speeds and hours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayfed_sub.clock.device_presets import memory_of, power_of
from rayfed_sub.clock.fleet import DAY, Fleet, fleet_of, windows_of
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config, Device
from rayfed_sub.core.errors import UserError

SLOW, FAST = {"seconds_per_step": 3.0}, {"tokens_per_second": 100.0}


def configured(clients: int = 10, **devices: Any) -> Config:
    classes = {"classes": {"slow": SLOW, "fast": FAST}}
    return load_config({"federation": {"clients": clients}, "devices": {**classes, **devices}})


def dealt(config: Config, names: tuple[str, ...] = ()) -> Fleet:
    fleet = fleet_of(config, names)
    assert fleet is not None
    return fleet


def test_without_classes_there_is_no_fleet() -> None:
    assert fleet_of(Config()) is None


def test_shares_are_counts_and_who_has_which_is_drawn() -> None:
    fleet = dealt(configured(shares={"slow": 30, "fast": 70}))
    assert np.bincount(fleet.classes).tolist() == [3, 7]
    assert np.bincount(dealt(configured()).classes).tolist() == [5, 5]
    other = configured(shares={"slow": 30, "fast": 70}).model_copy(update={"seed": 1})
    assert dealt(other).classes.tolist() != fleet.classes.tolist()


def test_spread_scales_the_speed_of_each_client_and_no_link() -> None:
    fleet = dealt(configured(1000, spread=0.5))
    assert np.log(fleet.slowness).std() == pytest.approx(0.5, rel=0.1)
    slow = next(client for client in range(1000) if fleet.name_of(client) == "slow")
    assert fleet.compute_seconds(slow, 2, 99) == pytest.approx(6.0 * fleet.slowness[slow])
    assert fleet.upload_seconds(slow, 10**6) == 0.0


def test_speed_is_by_step_or_by_token() -> None:
    fleet = dealt(configured())
    by_name = {fleet.name_of(client): client for client in range(10)}
    assert fleet.compute_seconds(by_name["slow"], 2, 50) == 6.0
    assert fleet.compute_seconds(by_name["fast"], 2, 50) == 0.5


def test_trace_names_clients_by_number_or_name_and_may_hold_more(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("client,device,from,to\n0,fast,22,6\nb,slow,8,12\nb,slow,13,14.5\n7,fast,1,2\n")
    fleet = dealt(configured(2, trace=str(tmp_path / "trace.csv")), ("a", "b"))
    assert [fleet.name_of(0), fleet.name_of(1)] == ["fast", "slow"]
    noon, night = fleet.windows.until(12.5 * 3600), fleet.windows.until(DAY + 3600)
    assert noon.tolist() == [-1.0, -1.0]
    assert night.tolist() == [DAY + 6 * 3600, -1.0]
    assert fleet.windows.next(12.5 * 3600, np.array([True, True])) == 13 * 3600
    assert fleet.windows.next(12.5 * 3600, np.array([True, False])) == 22 * 3600


@pytest.mark.parametrize(
    ("hours", "spans"),
    [
        ([(22, 6)], [(22, 30)]),
        ([(20, 24), (0, 6)], [(20, 30)]),
        ([(1, 3), (2, 5), (7, 8)], [(1, 5), (7, 8)]),
        ([(22, 6), (5, 7)], [(22, 31)]),
        ([(0, 24)], None),
        ([(6, 18), (18, 6)], None),
    ],
)
def test_hours_that_touch_are_one_span(hours: list[tuple[float, float]], spans: list[tuple[int, int]] | None) -> None:
    windows = windows_of({0: hours}, 1)
    found = [(int(b / 3600), int(e / 3600)) for b, e in zip(windows.begin, windows.end, strict=True)]
    assert (found or None) == spans
    assert windows.limited.tolist() == [spans is not None]
    assert spans is not None or windows.until(5.0).tolist() == [math.inf]


def test_hours_begin_with_their_first_second_and_end_before_their_last() -> None:
    windows = windows_of({0: [(1, 2)]}, 1)
    assert [windows.until(at)[0] for at in (3599.0, 3600.0, 7199.0, 7200.0)] == [-1.0, 7200.0, 7200.0, -1.0]
    assert windows.next(3600.0, np.array([True])) == 3600.0 + DAY


def test_wait_moves_the_clock_although_sums_of_floats_fall_short() -> None:
    """Otherwise an event loop would wait for the same moment again and again."""
    windows = windows_of({0: [(1, 2)]}, 1)
    for short in (math.nextafter(3600.0, 0.0), 3600.0, 3600.0 - 2e-6):
        opens = windows.next(short, np.array([True]))
        assert opens > short
        assert windows.until(opens)[0] > opens
    assert windows.until(math.nextafter(3600.0, 0.0))[0] == pytest.approx(7200.0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("client,device\n0,fast\n", "a line for each of the 2 clients; 1 have none: 1; add their lines"),
        ("client,device\n0,fast\n1,quick\n", "a class of devices.classes (slow, fast) in line 3; there is 'quick'"),
        ("client,device\n0,fast\n0,slow\n1,fast\n", "one device for each client; line 3 has another one for client 0"),
        ("client,device\n-1,fast\n", "the number or the name of a client in line 2; there is '-1'"),
        ("client,device,from,to\n0,fast,1,nan\n", "hours from 0 to 24 in line 2; there is 'nan'"),
        ("client,device,from,to\n0,fast,-1,2\n", "hours from 0 to 24 in line 2; there is '-1'"),
        ("client,device,from,to\n0,fast,2,2\n", "from and to that differ in line 2"),
        ("client,device,from,to\n0,fast,1\n", "hours from 0 to 24 in line 2; there is None"),
        ("client,device,from\n0,fast,1\n", "a CSV file with the columns client, device, from, to; it lacks to"),
        ("", "a CSV file with the columns client, device; it lacks client, device"),
        (None, "a CSV file: No such file or directory"),
    ],
)
def test_bad_traces_get_one_line(text: str | None, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        fleet_of(configured(2, trace=str(path)))
    assert fault in str(caught.value)
    assert str(caught.value).startswith(f"devices.trace: got '{path}'; allowed: ")


def test_own_figures_stand_before_those_of_a_preset() -> None:
    device = Device(preset="jetson-tx2", seconds_per_step=1.0)
    assert (memory_of(device), power_of(device)) == (8 * 10**9, 15.0)
    own = Device.model_validate({"preset": "jetson-tx2", "memory": "4GB", "power": 7.5})
    assert (memory_of(own), power_of(own)) == (4 * 10**9, 7.5)
    assert (memory_of(Device()), power_of(Device())) == (None, None)


def test_clients_drop_out_with_the_chance_of_their_class_at_any_moment() -> None:
    fleet = dealt(configured(2, classes={"a": {"seconds_per_step": 1.0, "dropout": 0.2}}))
    assert fleet.leaves
    assert not dealt(configured()).leaves
    shares = [fleet.stays(1, n) for n in range(1000)]
    left = [share for share in shares if share < math.inf]
    assert 160 <= len(left) <= 240  # 200 expected, deviation 13
    assert all(0 <= share < 1 for share in left)
    assert 0.45 < sum(left) / len(left) < 0.55
    assert shares[:100] == [fleet.stays(1, n) for n in range(100)]
    assert shares[:100] != [fleet.stays(1, n, start=1) for n in range(100)]
    assert shares[:100] != [fleet.stays(0, n) for n in range(100)]
