"""The virtual clock: what happens next, by simulated seconds, ties by client number.

Real training has no part in it: a flight's seconds follow from its device, its bytes and its steps.  Only the bytes of
an upload are not known before the client has trained, so nothing is decided while a client that has not trained could
be the next to end; whoever drives the clock then trains all that have not, in one go, on as many workers as there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayfed_sub.clock.fleet import Fleet


@dataclass(frozen=True)
class Flight:
    """A client under way; times in simulated seconds since the run's begin, spans in seconds.

    version: finished rounds of the server that it began from; began: start of its download; until: end of its
    availability, or its drop-out, which cuts it off; uplink_bytes, upload: None until it has trained; failed: its
    training did, so it sends nothing."""

    client: int
    version: int
    began: float
    download: float
    compute: float
    until: float
    downlink_bytes: int
    uplink_bytes: int | None = None
    upload: float | None = None
    failed: bool = False

    @property
    def known(self) -> bool:
        """Whether its end is: it has trained, or is cut off before its last step in any case."""
        return self.upload is not None or self.computed > self.until

    @property
    def computed(self) -> float:
        """End of its local steps."""
        return self.began + self.download + self.compute

    @property
    def end(self) -> float:
        """Arrival of its update, or the moment at which it was cut off; before it has trained a lower bound."""
        return min(self.computed + (self.upload or 0.0), self.until)

    @property
    def outcome(self) -> str:
        """Of a flight whose end is known: `failed`, `offline` (cut off before its update was there) or `counted`."""
        if self.failed:
            return "failed"
        return "offline" if self.computed + (self.upload or 0.0) > self.until else "counted"

    def sent(self, now: float) -> int:
        """Bytes of its upload that had left by `now`."""
        if not self.uplink_bytes or not self.upload:
            return self.uplink_bytes or 0 if now >= self.computed else 0
        share = (min(now, self.until) - self.computed) / self.upload
        return round(self.uplink_bytes * min(max(share, 0.0), 1.0))

    def downloaded(self, now: float) -> bool:
        """Whether all of its download had come by `now`."""
        return min(now, self.until) >= self.began + self.download

    def received(self, now: float) -> int:
        """Bytes of its download that had come by `now`."""
        if not self.download or now >= self.began + self.download:
            return self.downlink_bytes
        return round(self.downlink_bytes * max(min(now, self.until) - self.began, 0.0) / self.download)


def departure(
    fleet: Fleet, client: int, version: int, now: float, until: float, size: int, work: tuple[float, float], start: int
) -> Flight:
    """The client's flight from `now` on; size: bytes of its download; work: local steps and tokens; start: number of
    the draw within the round."""
    download, compute = fleet.download_seconds(client, size), fleet.compute_seconds(client, *work)
    leaving = now + fleet.stays(client, version, start) * (download + compute)
    return Flight(client, version, now, download, compute, min(until, leaving), size)


def in_order(flights: Iterable[Flight]) -> list[Flight]:
    """By their ends, ties by client number."""
    return sorted(flights, key=lambda flight: (flight.end, flight.client))


@dataclass(frozen=True)
class Clock:
    """The clock between two rounds.  flights: clients under way, in asynchronous runs alone; their ends are known."""

    now: float = 0.0
    flights: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Untrained:
    """The clock stands until these clients have trained."""

    clients: tuple[int, ...]


def next_end(first: Flight | None, waiting: Sequence[Flight], other: float = math.inf) -> Flight | Untrained | None:
    """The flight that ends next, or those that must train before that is known; None where none ends by `other`, a
    moment at which something else happens.  first: the next to end of those whose end is known; waiting: the others."""
    end = min(math.inf if first is None else first.end, other)
    if any(flight.end <= end for flight in waiting):
        return Untrained(tuple(flight.client for flight in waiting))
    return first if first is not None and first.end <= other else None


@dataclass(frozen=True)
class Close:
    """End of a synchronous round.  counted: the flights whose updates count, in order of arrival; dropped: others, each
    with its outcome: `late`, `offline` or `failed`."""

    now: float
    counted: tuple[Flight, ...]
    dropped: tuple[tuple[Flight, str], ...]


def closed(began: float, flights: Sequence[Flight], wanted: int, deadline: float | None) -> Close:
    """The round of these flights: it ends with the `wanted`-th update, at the deadline (seconds after `began`), or when
    nobody is under way any more.  Flights whose end is not known end after the deadline in any case."""
    limit = math.inf if deadline is None else began + deadline
    ordered = in_order(flights)
    arrivals = [flight for flight in ordered if flight.known and flight.outcome == "counted" and flight.end <= limit]
    counted = arrivals[:wanted]
    if len(counted) == wanted and counted:
        now = counted[-1].end
    else:
        now = min(max((flight.end for flight in flights), default=began), limit)
    left = [flight for flight in ordered if flight not in counted]
    ended = {f.client: f.outcome for f in left if f.known and f.end <= now and f.outcome != "counted"}
    return Close(now, tuple(counted), tuple((flight, ended.get(flight.client, "late")) for flight in left))
