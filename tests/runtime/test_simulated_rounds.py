"""Timelines of every mode against the test's own arithmetic: three clients, a slow device and two fast ones.

A round of the slow client takes 2.5 s down, 6 s of training, 2.5 s up; of a fast one 0.2 s, 2 s and 0.1 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayfed_sub.clock.fleet import Fleet, fleet_of
from rayfed_sub.clock.virtual_clock import Clock
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.schemas import ClientRow, TimelineRow
from rayfed_sub.core.types import ClientState, ServerState, Update
from rayfed_sub.planning.packs import semi_synchronous_steps
from rayfed_sub.runtime.simulated_rounds import Gathered, Result, SimulatedRounds
from rayfed_sub.storage.state_store import RoundState

UP, DOWN = 100_000, 200_000
CLASSES = {
    "slow": {"seconds_per_step": 3.0, "down_mbit": 0.8, "up_mbit": 0.4, "latency": 0.5, "power": 5.0},
    "fast": {"seconds_per_step": 1.0, "down_mbit": 8.0, "up_mbit": 8.0},
}
ROWS: Any = SimpleNamespace(train=None, rows_of=lambda client: np.arange(8))  # images, so to speak


class Rounds:
    """The rounds of three clients without a model; `trained` has the calls to train."""

    def __init__(
        self, folder: Path, federation: Mapping[str, Any], failing: Sequence[int] = (), hours: str = ""
    ) -> None:
        trace = folder / "trace.csv"
        trace.write_text(hours or "client,device\n0,slow\n1,fast\n2,fast\n")
        keys = {"clients": 3, "local_steps": 2, "batch_size": 4, "on_client_failure": "skip", **federation}
        devices = {"classes": CLASSES, "trace": str(trace)}
        self.config: Config = load_config({"federation": keys, "devices": devices})
        self.fleet = fleet_of(self.config)
        assert self.fleet is not None
        steps = semi_synchronous_steps(self.config, ROWS, self.fleet)
        self.config = self.config.model_copy(update={"federation": self.config.federation.model_copy(update=steps)})
        self.rounds = SimulatedRounds(self.config, ROWS, self.fleet, ("x",))
        self.state, self.failing = RoundState(ServerState(0, {"x": torch.zeros(UP // 4)}), clock=Clock()), failing
        self.trained: list[list[int]] = []

    def train(self, clients: Sequence[int]) -> Generator[Any, None, dict[int, Result]]:
        self.trained.append(list(clients))
        yield None
        n = self.state.server.round
        return {k: self._result(k, n) for k in clients}

    def _result(self, client: int, n: int) -> Result:
        if client in self.failing:
            return Update(client, 0.0, {}, {}, "NaN"), None
        update = Update(client, 1.0, {"x": self.state.server.tensors["x"] + client + 1})
        return update, ClientState(n + 1, 2, 2, {})

    def downloads(self, clients: Sequence[int], held: Mapping[int, int]) -> dict[int, int]:
        """Nothing where the client has got this very version in this step."""
        return {k: 0 if held.get(k) == self.state.server.round else DOWN for k in clients}

    def step(self) -> Gathered:
        """The next round; the server moves to the factor times the weighted mean, as `aggregate` and `advance` do."""
        n, server = self.state.server.round, self.state.server.tensors["x"]
        asked = (self.train, self.downloads)
        if self.config.federation.mode == "async":
            going = self.rounds.buffered(n, self.state, *asked)
        else:
            going = self.rounds.collected(n, self.state.clock or Clock(), *asked)
        gathered = ended(going)
        good = [update for update, _, _ in gathered.results if update.failure is None]
        weight = sum(update.weight for update in good)
        mean = sum(update.weight * update.tensors["x"] for update in good) / weight if weight else server
        after = ServerState(n + 1, {"x": server + gathered.factor * (mean - server)})
        self.state = RoundState(after, clock=gathered.clock, landings=gathered.landings)
        return gathered


def ended(going: Generator[Any, None, Gathered]) -> Gathered:
    while True:
        try:
            next(going)
        except StopIteration as stop:
            found: Gathered = stop.value
            return found


def told(rows: Sequence[TimelineRow]) -> list[tuple[int, int, float, float, str]]:
    return [(row.client, row.version, round(row.began, 6), round(row.ended, 6), row.outcome) for row in rows]


@pytest.fixture
def rounds(tmp_path: Path) -> Callable[..., Rounds]:
    return lambda federation, *rest, **more: Rounds(tmp_path, federation, *rest, **more)


def client_row(client: int, n: int, failure: str | None = None) -> ClientRow:
    return ClientRow(n, client, 1.0, 0 if failure else UP, DOWN, failure=failure)


def test_sync_waits_for_the_slowest(rounds: Callable[..., Rounds]) -> None:
    three = rounds({})
    assert not three.rounds.drops
    clock, rows = three.rounds.told(4, Clock(100.0), [client_row(k, 4) for k in (0, 1, 2)])
    assert clock.now == pytest.approx(100 + 2.5 + 6 + 2.5)
    assert told(rows) == [
        (1, 4, 100.0, 102.3, "counted"),
        (2, 4, 100.0, 102.3, "counted"),
        (0, 4, 100.0, 111.0, "counted"),
    ]
    assert [row.idle_seconds for row in rows] == pytest.approx([8.7, 8.7, 0.0])
    assert [row.joules for row in rows] == [None, None, 5.0 * 6.0]
    assert [(row.steps, row.tokens, row.device) for row in rows[1:]] == [(2, 8, "fast"), (2, 8, "slow")]


def test_sync_waits_for_failed_clients_up_to_their_last_step(rounds: Callable[..., Rounds]) -> None:
    clock, rows = rounds({}).rounds.told(0, Clock(), [client_row(0, 0, "NaN"), client_row(1, 0)])
    assert clock.now == pytest.approx(2.5 + 6)
    assert [(row.client, row.outcome, row.uplink_bytes) for row in rows] == [(1, "counted", UP), (0, "failed", 0)]


def test_over_selection_ends_with_the_first_updates(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"sampled": 2, "over_selection": 1.5})
    first = three.step()
    assert told(first.timeline) == [(1, 0, 0, 2.3, "counted"), (2, 0, 0, 2.3, "counted"), (0, 0, 0, 2.3, "late")]
    late = first.timeline[2]
    assert (late.downlink_bytes, late.uplink_bytes, late.joules) == (
        round(DOWN * 1.8 / 2.0 * 0 + DOWN * 2.3 / 2.5),
        0,
        0,
    )
    assert [update.client for update, _, _ in first.results] == [1, 2]
    assert three.state.clock == Clock(first.timeline[0].ended)
    assert told(three.step().timeline)[0] == (1, 1, 2.3, 4.6, "counted")


def test_dropped_client_holds_a_download_that_was_there(rounds: Callable[..., Rounds]) -> None:
    """The slow client's takes 2.5 s: it has come by the deadline of the second run, not by that of the first."""
    assert rounds({"round_deadline": 2.4}).step().received == {}
    assert rounds({"round_deadline": 2.6}).step().received == {0: 0}
    stale = rounds({"mode": "async", "asynchronous": {"buffer": 2, "max_staleness": 2}})
    assert [stale.step().received for _ in range(3)] == [{}, {}, {0: 0}]


def test_clients_under_way_at_the_end_have_rows_of_their_own(rounds: Callable[..., Rounds]) -> None:
    """After 2.3 s the slow client, which began at 0, has computed nothing and got 1.8 of the 2 s of its download."""
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2}})
    three.step()
    assert three.state.clock is not None
    (left,) = three.rounds.under_way(1, three.state.clock)
    assert told([left]) == [(0, 0, 0, 2.3, "unfinished")]
    assert (left.round, left.uplink_bytes, left.joules, left.idle_seconds) == (1, 0, 0.0, 0.0)
    assert left.downlink_bytes == round(DOWN * 2.3 / 2.5)
    three.step()
    (left,) = three.rounds.under_way(2, three.state.clock)
    assert (left.downlink_bytes, left.joules) == (DOWN, pytest.approx(5.0 * (4.6 - 2.5)))


def test_deadline_drops_who_cannot_make_it_without_training_them(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"round_deadline": 8.0})
    assert told(three.step().timeline) == [(1, 0, 0, 2.3, "counted"), (2, 0, 0, 2.3, "counted"), (0, 0, 0, 8, "late")]
    assert three.trained == [[1, 2]]
    three = rounds({"round_deadline": 10.0})  # in its upload
    row = three.step().timeline[2]
    assert three.trained == [[0, 1, 2]]
    assert (row.outcome, row.uplink_bytes) == ("late", round(UP * 1.5 / 2.5))
    assert row.joules == 5.0 * 6.0


def test_deadline_before_everybody_leaves_the_server_as_it_is(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"round_deadline": 1.0})
    assert three.step().results == ()
    assert three.state.clock == Clock(1.0)


def test_semi_sync_trains_for_one_time(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"mode": "semi-sync", "local_seconds": 7.0})
    assert three.config.federation.local_steps == (2, 7, 7)
    clock, rows = three.rounds.told(0, Clock(), [client_row(k, 0) for k in (0, 1, 2)])
    assert told(rows) == [(1, 0, 0, 7.3, "counted"), (2, 0, 0, 7.3, "counted"), (0, 0, 0, 11, "counted")]
    assert clock.now == pytest.approx(11)
    assert rounds({"mode": "semi-sync", "local_seconds": 0.1}).config.federation.local_steps == (1, 1, 1)


def test_fedbuff(rounds: Callable[..., Rounds]) -> None:
    """The fast clients fill the buffer four times before the slow one is back; its update is worth 1 / sqrt(1 + 4)."""
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2}})
    found = [three.step() for _ in range(6)]
    assert [told(one.timeline) for one in found] == [
        [(1, 0, 0, 2.3, "counted"), (2, 0, 0, 2.3, "counted")],
        [(1, 1, 2.3, 4.6, "counted"), (2, 1, 2.3, 4.6, "counted")],
        [(1, 2, 4.6, 6.9, "counted"), (2, 2, 4.6, 6.9, "counted")],
        [(1, 3, 6.9, 9.2, "counted"), (2, 3, 6.9, 9.2, "counted")],
        [(0, 0, 0, 11.0, "counted"), (1, 4, 9.2, 11.5, "counted")],
        [(2, 4, 9.2, 11.5, "counted"), (1, 5, 11.5, 13.8, "counted")],
    ]
    assert {row.idle_seconds for one in found for row in one.timeline} == {0.0}
    # Changes are client + 1.  Four steps of (2 + 3) / 2, then of 1 / sqrt(5) and 2 over 2, then of 3 / sqrt(2) and 2.
    way = [2.5, 5.0, 7.5, 10.0, 10 + (1 / 5**0.5 + 2) / 2, 10 + (1 / 5**0.5 + 2) / 2 + (3 / 2**0.5 + 2) / 2]
    assert float(three.state.server.tensors["x"][0]) == pytest.approx(way[-1], rel=1e-6)
    assert three.trained[0] == [0, 1, 2]


def test_fedasync_mixes_every_model_as_it_comes(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"mode": "async", "asynchronous": {"rule": "fedasync", "mixing": 0.5, "exponent": 1.0}})
    assert told(three.step().timeline) == [(1, 0, 0, 2.3, "counted")]
    assert told(three.step().timeline) == [(2, 0, 0, 2.3, "counted")]
    # x_1 = 0.5 * 2; then the model 3 at staleness 1: x_2 = x_1 + 0.5 / 2 * (3 - x_1).
    assert float(three.state.server.tensors["x"][0]) == pytest.approx(1.0 + 0.25 * (3.0 - 1.0))


def test_client_that_is_too_stale_is_called_off(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2, "max_staleness": 2}})
    assert told([three.step() for _ in range(3)][-1].timeline)[-1] == (0, 0, 0, 6.9, "stale")
    assert {flight.client for flight in (three.state.clock or Clock()).flights} == set()
    assert told(three.step().timeline) == [(1, 3, 6.9, 9.2, "counted"), (2, 3, 6.9, 9.2, "counted")]


def test_failed_client_frees_its_place_and_fills_no_buffer(rounds: Callable[..., Rounds]) -> None:
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2}}, failing=[2])
    first = three.step()
    assert told(first.timeline) == [(2, 0, 0, 2.2, "failed"), (1, 0, 0, 2.3, "counted"), (0, 0, 0, 11, "counted")]
    assert [(update.client, update.failure) for update, _, _ in first.results] == [(0, None), (1, None), (2, "NaN")]


def test_hours_cut_off_work_and_nobody_waits_for_who_is_away(rounds: Callable[..., Rounds]) -> None:
    """The slow client leaves after 3.6 s, in its training; the others come at 1 o'clock."""
    hours = "client,device,from,to\n0,slow,0,0.001\n1,fast,1,2\n2,fast,1,3\n"
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2}}, hours=hours)
    assert told(three.step().timeline) == [
        (0, 0, 0, 3.6, "offline"),
        (1, 0, 3600, 3602.3, "counted"),
        (2, 0, 3600, 3602.3, "counted"),
    ]
    assert three.trained == [[1, 2]]
    again = rounds({}, hours=hours)
    assert again.rounds.drops
    first = again.step()
    assert (told(first.timeline), first.results) == ([(0, 0, 0, 3.6, "offline")], ())
    assert [row.began for row in again.step().timeline] == pytest.approx([3600.0, 3600.0])


def test_client_that_begins_again_in_one_step(rounds: Callable[..., Rounds]) -> None:
    """The fast ones leave after 3 s, with version 1 and without their updates, and come back at 20 s.  The slow one
    leaves after 10 s, in the upload of what it trained from version 0, and trains from version 1 from 12 s on."""
    second = 1 / 3600
    windows = {0: ("slow", 10, 12), 1: ("fast", 3, 20), 2: ("fast", 3, 20)}
    lines = [
        f"{k},{device},{begin},{end}\n"
        for k, (device, until, back) in windows.items()
        for begin, end in ((0, until * second), (back * second, 23))
    ]
    three = rounds({"mode": "async", "asynchronous": {"buffer": 2}}, hours="client,device,from,to\n" + "".join(lines))
    three.step()
    again = three.step()
    assert told(again.timeline) == [
        (1, 1, 2.3, 3.0, "offline"),
        (2, 1, 2.3, 3.0, "offline"),
        (0, 0, 0.0, 10.0, "offline"),
        (1, 1, 20.0, 22.1, "counted"),
        (2, 1, 20.0, 22.1, "counted"),
    ]
    assert [row.downlink_bytes for row in again.timeline] == [DOWN, DOWN, DOWN, 0, 0]
    assert again.received == {0: 0, 1: 1, 2: 1}
    # Changes are client + 1: twice (2 + 3) / 2, then the slow one's of version 1, at staleness 1, and 2 over 2.
    third = three.step()
    assert [(update.client, float(update.tensors["x"][0])) for update, _, _ in third.results] == [(0, 6.0), (1, 7.0)]
    assert float(three.state.server.tensors["x"][0]) == pytest.approx(5.0 + (1 / 2**0.5 + 2) / 2, rel=1e-6)


def test_step_may_take_longer_than_its_updates_may_be_apart(rounds: Callable[..., Rounds]) -> None:
    """Forty clients, one after another, 23,040 steps of 3 s each: 0.8 days."""
    hours = "client,device\n" + "".join(f"{k},slow\n" for k in range(40))
    buffer = {"mode": "async", "asynchronous": {"buffer": 40}}
    many = rounds({"clients": 40, "sampled": 1, "local_steps": 23_040, **buffer}, hours=hours)
    assert many.step().clock.now / 86_400 == pytest.approx(40 * 0.8, rel=1e-3)


def test_client_that_drops_out_is_not_trained_and_nobody_waits_for_it(
    rounds: Callable[..., Rounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow client breaks off after half of its 2.5 s of download and 6 s of training; its place is free again."""
    monkeypatch.setattr(Fleet, "stays", lambda fleet, client, n, start=0: math.inf if client or n else 0.5)
    monkeypatch.setattr(Fleet, "leaves", True)
    three = rounds({})
    assert three.rounds.drops
    first = three.step()
    assert told(first.timeline) == [
        (1, 0, 0, 2.3, "counted"),
        (2, 0, 0, 2.3, "counted"),
        (0, 0, 0, 4.25, "offline"),
    ]
    assert (first.clock.now, three.trained, first.received) == (4.25, [[1, 2]], {0: 0})
    assert (first.timeline[2].joules, first.timeline[2].uplink_bytes) == (5.0 * 1.75, 0)
    again = rounds({"mode": "async", "asynchronous": {"buffer": 2}})
    assert told([again.step() for _ in range(3)][1].timeline) == [
        (0, 0, 0, 4.25, "offline"),
        (1, 1, 2.3, 4.6, "counted"),
        (2, 1, 2.3, 4.6, "counted"),
    ]


def test_ten_thousand_clients_work_within_their_hours(rounds: Callable[..., Rounds]) -> None:
    """Each is there for two hours of the day, client k from the hour k modulo 24 on."""
    lines = [f"{k},{'slow' if k % 3 else 'fast'},{k % 24},{(k + 2) % 24}" for k in range(10_000)]
    many = rounds(
        {"clients": 10_000, "sampled": 500, "mode": "async", "local_steps": 600, "asynchronous": {"buffer": 250}},
        hours="\n".join(["client,device,from,to", *lines]) + "\n",
    )
    rows = [row for _ in range(12) for row in many.step().timeline]
    assert rows[-1].round_ended > 3600
    assert {"counted", "offline"} == {row.outcome for row in rows}
    for row in rows:
        opened = 3600 * (row.client % 24)
        assert (row.began + 1e-6 - opened) % 86400 < (row.ended - 1e-6 - opened) % 86400 < 7200
    assert len({row.client for row in rows}) > 1_000


def test_run_without_an_end_of_its_round_stops(rounds: Callable[..., Rounds]) -> None:
    hours = "client,device,from,to\n0,slow,0,0.001\n1,slow,0,0.001\n2,slow,0,0.001\n"
    with pytest.raises(RunError, match="no update in 30 simulated days, 0 of 1 before; devices are too slow") as short:
        rounds({"mode": "async", "asynchronous": {"buffer": 1}}, hours=hours).step()
    assert short.value.resume is None  # it would end in the same way


def test_run_whose_clients_all_fail_names_their_failure(rounds: Callable[..., Rounds]) -> None:
    cause = "available: 3 failed in this step, client 0 with NaN; lower optimizer.lr, or look at their data, and begin"
    with pytest.raises(RunError, match=cause) as failed:
        rounds({"mode": "async", "asynchronous": {"buffer": 1}}, failing=[0, 1, 2]).step()
    assert failed.value.resume is None
