"""The clock by itself: which flight ends next, and which of a round's count."""

from __future__ import annotations

import math

from rayfed_sub.clock.virtual_clock import Flight, Untrained, closed, in_order, next_end


def flight(client: int, seconds: float, upload: float | None = 0.0, until: float = math.inf) -> Flight:
    return Flight(client, 0, 0.0, 0.0, seconds, until, 100, None if upload is None else 100, upload)


def test_nothing_is_decided_while_a_client_without_an_end_could_be_next() -> None:
    known, waiting = flight(1, 5.0), flight(0, 6.0, None)
    assert next_end(known, [waiting]) == known
    assert next_end(known, [flight(0, 5.0, None), flight(2, 9.0, None)]) == Untrained((0, 2))  # all that wait train
    assert next_end(known, [waiting], other=4.0) is None
    assert next_end(None, [waiting], other=5.0) is None
    assert next_end(None, []) is None


def test_ties_go_by_client_number() -> None:
    assert [f.client for f in in_order([flight(3, 5.0), flight(2, 5.0), flight(9, 4.0)])] == [9, 2, 3]


def test_client_whose_hours_end_before_its_last_step_need_not_train() -> None:
    cut = flight(0, 6.0, None, until=4.0)
    assert (cut.known, cut.outcome, cut.end) == (True, "offline", 4.0)
    assert flight(0, 3.0, 2.0, until=4.0).outcome == "offline"  # in its upload
    assert flight(0, 3.0, 1.0, until=4.0).outcome == "counted"


def test_bytes_that_have_crossed_grow_with_time() -> None:
    one = Flight(0, 0, 10.0, 4.0, 6.0, math.inf, 400, 1000, 2.0)
    assert [one.received(at) for at in (10.0, 11.0, 14.0, 99.0)] == [0, 100, 400, 400]
    assert [one.sent(at) for at in (19.0, 20.0, 20.5, 22.0, 99.0)] == [0, 0, 250, 1000, 1000]


def test_round_ends_with_the_last_wanted_update_the_deadline_or_the_last_client() -> None:
    flights = [flight(0, 9.0), flight(1, 2.0), flight(2, 3.0), flight(3, 3.0)]
    end = closed(0.0, flights, 2, None)
    assert (end.now, [f.client for f in end.counted]) == (3.0, [1, 2])
    assert [(f.client, outcome) for f, outcome in end.dropped] == [(3, "late"), (0, "late")]
    assert closed(0.0, flights, 4, 5.0).now == 5.0
    assert closed(0.0, flights, 4, None).now == 9.0
    assert closed(7.0, [], 4, None).now == 7.0
    gone = [flight(0, 9.0, until=4.0), flight(1, 2.0)]
    end = closed(0.0, gone, 2, None)
    assert (end.now, [(f.client, outcome) for f, outcome in end.dropped]) == (4.0, [(0, "offline")])
