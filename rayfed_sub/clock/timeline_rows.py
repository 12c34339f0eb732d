"""Rows of the timeline, and those of a synchronous round that waited for all of its clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayfed_sub.clock.fleet import Fleet
from rayfed_sub.clock.virtual_clock import Flight, closed
from rayfed_sub.core.schemas import TimelineRow

Work = tuple[float, float]
"""Local steps, and the tokens of their rows."""
UNFINISHED = "unfinished"
"""Outcome of a client that is under way when an asynchronous run ends."""


@dataclass(frozen=True)
class ClientRound:
    """A client's round as it was: bytes, and the work that they belong to; failed: it sent nothing."""

    client: int
    downlink_bytes: int
    uplink_bytes: int
    failed: bool
    work: Work


def waited(fleet: Fleet, n: int, now: float, clients: Sequence[ClientRound]) -> tuple[float, tuple[TimelineRow, ...]]:
    """End and timeline of synchronous round n, which began at `now` and waited for all of these clients."""
    flights = [
        Flight(
            client=one.client,
            version=n,
            began=now,
            download=fleet.download_seconds(one.client, one.downlink_bytes),
            compute=fleet.compute_seconds(one.client, *one.work),
            until=math.inf,
            downlink_bytes=one.downlink_bytes,
            uplink_bytes=one.uplink_bytes,
            upload=0.0 if one.failed else fleet.upload_seconds(one.client, one.uplink_bytes),
            failed=one.failed,
        )
        for one in clients
    ]
    end, work = closed(now, flights, len(flights), None), {one.client: one.work for one in clients}
    outcomes = [*((flight, "counted") for flight in end.counted), *end.dropped]
    return end.now, tuple(timeline_row(fleet, n, *one, end.now, work[one[0].client]) for one in outcomes)


def timeline_row(
    fleet: Fleet, n: int, flight: Flight, outcome: str, now: float, work: Work, *, waits: bool = True
) -> TimelineRow:
    """The row of a flight whose outcome is known, in round n, which ends at `now`; waits: the client waits for that, as
    long as it is there: one that was cut off does not, nor one whose hours end after its update has come."""
    ended = now if outcome in ("late", "stale", UNFINISHED) else flight.end
    spent = min(max(ended - flight.began - flight.download, 0.0), flight.compute)
    steps, tokens = work
    return TimelineRow(
        round=n,
        client=flight.client,
        device=fleet.name_of(flight.client),
        version=flight.version,
        began=flight.began,
        download_seconds=flight.download,
        compute_seconds=flight.compute,
        upload_seconds=flight.upload or 0.0,
        ended=ended,
        round_ended=now,
        idle_seconds=min(now, flight.until) - ended if waits else 0.0,
        outcome=outcome,
        downlink_bytes=flight.received(ended),
        uplink_bytes=flight.sent(ended),
        steps=float(steps),
        tokens=float(tokens),
        joules=fleet.joules(flight.client, spent),
    )
