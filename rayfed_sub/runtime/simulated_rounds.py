"""Rounds in simulated time: who begins when, whose update counts, and what the timeline says of it.

The clock decides (`clock/`), real workers train.  `Train` trains clients from the present server and gives their
results; which clients it is called with, and when, follows from simulated time alone, so bits depend neither on workers
nor on deaths.  All clients that begin from one version of the server train before it moves on: then one broadcast is in
memory at a time, however stale an update may be when it counts, and a checkpoint needs results, not earlier servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

import numpy as np

from rayfed_sub.clock.fleet import DAY, Bools, Fleet, Floats
from rayfed_sub.clock.staleness import discount, step_factor
from rayfed_sub.clock.timeline_rows import UNFINISHED, ClientRound, Work, timeline_row, waited
from rayfed_sub.clock.virtual_clock import Clock, Flight, Untrained, closed, departure, in_order, next_end
from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import settled
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.schemas import ClientRow, TimelineRow
from rayfed_sub.core.types import ClientState, Tensors, Update
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.planning import packs, sampling
from rayfed_sub.storage.landings import Landing
from rayfed_sub.storage.state_store import RoundState
from rayfed_sub.telemetry.events import PackDone

_DRY_DAYS = 30
"""Simulated days after which an asynchronous run ends that gets no update."""

Result = tuple[Update, ClientState | None]
Train = Callable[[Sequence[int]], Generator[PackDone, None, Mapping[int, Result]]]
Downloads = Callable[[Sequence[int], Mapping[int, int]], Mapping[int, int]]
"""Bytes that these clients download; the second: versions of the server that clients got in this very step."""


@dataclass(frozen=True)
class Gathered:
    """Results of a round.  results: in the order in which they are added, with the bytes of the client's download,
    failed clients among them; factor: on the server's step; clock, landings, received: see `RoundState`."""

    results: tuple[tuple[Update, ClientState | None, int], ...]
    clock: Clock
    timeline: tuple[TimelineRow, ...]
    received: Mapping[int, int]
    factor: float = 1.0
    landings: Mapping[int, Landing] = field(default_factory=dict)


class _Step:
    """An asynchronous server between two versions.

    flights: of the clients under way; waiting: those of them whose end is not known; landings: results of those that
    have trained; buffer, failed: flights that have ended, with an update and without; outcomes: of all that have ended;
    held: versions of the server that clients got whose updates do not count; filled_at: moment of the last update;
    starts: draws of clients so far; started_at: moment of the last one."""

    def __init__(self, state: RoundState) -> None:
        clock = state.clock or Clock()
        self.now = self.filled_at = clock.now
        self.flights: dict[int, Flight] = {}
        self.waiting: dict[int, Flight] = {}
        self._ends: list[tuple[float, int]] = []
        self.landings = dict(state.landings)
        self.buffer: list[Flight] = []
        self.failed: list[Flight] = []
        self.outcomes: list[tuple[Flight, str]] = []
        self.held: dict[int, int] = {}
        self.starts, self.started_at = 0, -1.0
        for flight in clock.flights:
            self.take(flight)

    @property
    def taken(self) -> list[int]:
        """Clients that cannot begin: under way, or with a result of this step."""
        return [*self.flights, *(flight.client for flight in (*self.buffer, *self.failed))]

    def take(self, flight: Flight) -> None:
        """A client begins, or has trained."""
        self.flights[flight.client] = flight
        self.waiting.pop(flight.client, None)
        if flight.known:
            heappush(self._ends, (flight.end, flight.client))
        else:
            self.waiting[flight.client] = flight

    def next(self, other: float) -> Flight | Untrained | None:
        """As `next_end`."""
        first = self.flights[self._ends[0][1]] if self._ends else None
        return next_end(first, list(self.waiting.values()), other)

    def end(self, flight: Flight) -> None:
        """The first client under way has ended, which moves the clock."""
        self.now = flight.end
        heappop(self._ends)
        del self.flights[flight.client]
        self.outcomes.append((flight, flight.outcome))
        if flight.outcome == "counted":
            self.buffer.append(flight)
            self.filled_at = self.now
            return
        if flight.downloaded(self.now):
            self.held[flight.client] = flight.version
        if flight.outcome == "failed":
            self.failed.append(flight)
        else:
            self.landings.pop(flight.client, None)


class SimulatedRounds:
    """The rounds of a run with devices.  values: names of the tensors in an update that are values of the server's, see
    `Method.sent_values`; asynchronous runs alone ask for them."""

    def __init__(self, config: Config, dataset: Dataset, fleet: Fleet, values: Sequence[str] = ()) -> None:
        self._config, self._dataset, self._fleet, self._values = config, dataset, fleet, values
        self._works = dict[int, Work]()

    @property
    def drops(self) -> bool:
        """Whether a synchronous round may end without some of its clients; if not it depends on no clock."""
        federation = self._config.federation
        timed = federation.round_deadline is not None or federation.over_selection > 1.0
        return timed or self._fleet.leaves

    def told(self, n: int, clock: Clock, rows: Sequence[ClientRow]) -> tuple[Clock, tuple[TimelineRow, ...]]:
        """The clock after a synchronous round that waited for all of its clients, and its timeline."""
        clients = [
            ClientRound(
                client=row.client,
                downlink_bytes=row.downlink_bytes,
                uplink_bytes=row.uplink_bytes,
                failed=row.failure is not None,
                work=self._work(row.client),
            )
            for row in rows
        ]
        end, timeline = waited(self._fleet, n, clock.now, clients)
        return Clock(end), timeline

    def collected(
        self, n: int, clock: Clock, train: Train, downloads: Downloads
    ) -> Generator[PackDone, None, Gathered]:
        """A synchronous round of those clients that are there in time."""
        federation = self._config.federation
        now, until = self._opened(clock.now)
        clients = sampling.drawn(self._config, n, np.flatnonzero(until > now), federation.drawn)
        clients = packs.ordered(self._config, self._dataset, clients)
        down = downloads(clients, {})
        flights = {k: self._departure(k, n, now, float(until[k]), down[k]) for k in clients}
        deadline = federation.round_deadline
        limit = math.inf if deadline is None else now + deadline
        results = yield from train([k for k, flight in flights.items() if flight.end <= limit and not flight.known])
        for k, (update, _) in results.items():
            flights[k] = self._landed(flights[k], update.wire_bytes, update.failure)
        end = closed(now, list(flights.values()), federation.cohort, deadline)
        outcomes = [*((flight, "counted") for flight in end.counted), *end.dropped]
        kept = {flight.client for flight, outcome in outcomes if outcome in ("counted", "failed")}
        added = tuple((*results[k], down[k]) for k in clients if k in kept)
        return Gathered(added, Clock(end.now), self._rows(n, outcomes, end.now), _received(outcomes, end.now))

    def buffered(
        self, n: int, state: RoundState, train: Train, downloads: Downloads
    ) -> Generator[PackDone, None, Gathered]:
        """A step of an asynchronous server: handles what ends, in order, until the buffer is full.

        What ends at one instant is handled before others begin; a client whose update waits in the buffer begins again
        only with a later version of the server.
        """
        wanted = self._config.federation.asynchronous.buffer or 1
        step = _Step(state)
        while len(step.buffer) < wanted:
            event = step.next(step.now)
            if event is None and step.started_at != step.now:
                self._begin(n, step, downloads)
                continue
            if event is None:
                opens = self._opens(step)
                event = step.next(opens)
                if event is None and opens == math.inf and step.failed and step.buffer:
                    break  # clients that failed leave the buffer short: nobody else is there to fill it
                if event is None and opens == math.inf:
                    raise _starved(n, step, "no client is left that could become available")
                step.now = opens if event is None else step.now
            if isinstance(event, Untrained):
                yield from self._train(event.clients, train, step)
            elif event is not None:
                step.end(event)
            if step.now > step.filled_at + _DRY_DAYS * DAY:
                cause = f"no update in {_DRY_DAYS} simulated days, {len(step.buffer)} of {wanted} before"
                raise _starved(n, step, cause)
        # The next version of the server takes the place of the one that these begin from.
        yield from self._train(list(step.waiting), train, step)
        return self._stepped(n, state.server.tensors, step)

    def under_way(self, rounds: int, clock: Clock) -> tuple[TimelineRow, ...]:
        """Rows of the clients that are under way when a run of so many rounds ends."""
        return self._rows(rounds, [(flight, UNFINISHED) for flight in clock.flights], clock.now, waits=False)

    def _begin(self, n: int, step: _Step, downloads: Downloads) -> None:
        """Lets clients begin from version n, now, as many as there are places and clients available."""
        step.started_at, until = step.now, self._fleet.windows.until(step.now)
        idle = np.flatnonzero(_without(until > step.now, step.taken))
        places = self._config.federation.cohort - len(step.flights)
        if not places or not len(idle):
            return
        begun = sampling.drawn(self._config, n, idle, places, step.starts)
        down = downloads(begun, step.held)
        for k in begun:
            step.take(self._departure(k, n, step.now, float(until[k]), down[k], step.starts))
        step.starts += 1

    def _opens(self, step: _Step) -> float:
        """The next moment at which a client becomes available for a place that is free; infinite for none."""
        if len(step.flights) == self._config.federation.cohort:
            return math.inf
        windows = self._fleet.windows
        return windows.next(step.now, _without(windows.limited, step.taken))

    def _stepped(self, n: int, server: Tensors, step: _Step) -> Gathered:
        """The server's step with the full buffer, before which it was at version n."""
        rule, dropped = self._config.federation.asynchronous, list[tuple[Flight, str]]()
        for flight in in_order(step.flights.values()):
            if rule.max_staleness is not None and n + 1 - flight.version > rule.max_staleness:
                dropped.append((flight, "stale"))
        gone = {flight.client for flight, _ in dropped}
        flying = {k: flight for k, flight in step.flights.items() if k not in gone}
        taken = {flight.client: flight for flight in (*step.buffer, *step.failed)}
        order = packs.ordered(self._config, self._dataset, list(taken))
        results = [(self._counted(n, taken[k], step.landings[k], server), step.landings[k].state) for k in order]
        weights = [step.landings[flight.client].update.weight for flight in step.buffer]
        outcomes = [*step.outcomes, *dropped]
        return Gathered(
            results=tuple((*result, taken[k].downlink_bytes) for k, result in zip(order, results, strict=True)),
            clock=Clock(step.now, tuple(flying.values())),
            timeline=self._rows(n, outcomes, step.now, waits=False),
            received={**step.held, **_received(dropped, step.now)},
            factor=step_factor(rule, weights, [n - flight.version for flight in step.buffer]),
            landings={
                k: _settled(self._relative(step.landings[k], server)) if flight.version == n else step.landings[k]
                for k, flight in flying.items()
                if k in step.landings
            },
        )

    def _opened(self, now: float) -> tuple[float, Floats]:
        """The first moment from `now` on at which a client is available, and until when each one is."""
        windows = self._fleet.windows
        until = windows.until(now)
        if not (until > now).any():
            now = windows.next(now, windows.limited)
            until = windows.until(now)
        return now, until

    def _train(self, clients: Sequence[int], train: Train, step: _Step) -> Generator[PackDone, None, None]:
        """Trains clients under way; notes their ends and their results."""
        if not clients:
            return
        results = yield from train(clients)
        for k, (update, state) in results.items():
            step.take(self._landed(step.flights[k], update.wire_bytes, update.failure))
            step.landings[k] = Landing(update, state)

    def _departure(self, client: int, version: int, now: float, until: float, size: int, start: int = 0) -> Flight:
        return departure(self._fleet, client, version, now, until, size, self._work(client), start)

    def _landed(self, flight: Flight, size: int, failure: str | None) -> Flight:
        """The flight of a client that has trained."""
        upload = 0.0 if failure is not None else self._fleet.upload_seconds(flight.client, size)
        return replace(flight, uplink_bytes=size, upload=upload, failed=failure is not None)

    def _counted(self, n: int, flight: Flight, landing: Landing, values: Tensors) -> Update:
        """The update as the server at version n adds it."""
        update = landing.update
        if flight.version == n:
            return update
        tensors = {
            name: x + values[name] if landing.relative and name in self._values else x
            for name, x in update.tensors.items()
        }
        weight = update.weight * discount(n - flight.version, self._config.federation.asynchronous.exponent)
        return replace(update, weight=weight, tensors=tensors)

    def _relative(self, landing: Landing, values: Tensors) -> Landing:
        """The landing with changes in place of values, while the server that its client began from is there.  FedAsync
        mixes models as they are."""
        if landing.relative or not self._values or self._config.federation.asynchronous.rule == "fedasync":
            return landing
        tensors = {name: x - values[name] if name in self._values else x for name, x in landing.update.tensors.items()}
        return Landing(replace(landing.update, tensors=tensors), landing.state, relative=True)

    def _rows(
        self, n: int, outcomes: Sequence[tuple[Flight, str]], now: float, *, waits: bool = True
    ) -> tuple[TimelineRow, ...]:
        """The timeline of round n, which ends at `now`; waits: its clients wait for that."""
        return tuple(
            timeline_row(self._fleet, n, flight, outcome, now, self._work(flight.client), waits=waits)
            for flight, outcome in outcomes
        )

    def _work(self, client: int) -> Work:
        if client not in self._works:
            self._works[client] = packs.round_work(self._config, self._dataset, client)
        return self._works[client]


def _starved(n: int, step: _Step, cause: str) -> RunError:
    """The end of a run whose step gets too few updates; from its checkpoint it would end in the same way."""
    advice = "devices are too slow, or too seldom there: lower federation.local_steps, or lengthen their hours"
    if step.failed:
        client = min(flight.client for flight in step.failed)
        failure = step.landings[client].update.failure
        cause = f"{cause}: {len(step.failed)} failed in this step, client {client} with {failure}"
        advice = "lower optimizer.lr, or look at their data"
    return RunError("simulated time", f"{cause}; {advice}, and begin anew in another folder", round=n, resume=None)


def _settled(landing: Landing) -> Landing:
    """The landing in the layout in which a checkpoint gives it back."""
    update, state = landing.update, landing.state
    kept = None if state is None else replace(state, tensors=settled(state.tensors))
    return replace(landing, update=replace(update, tensors=settled(update.tensors)), state=kept)


def _received(outcomes: Sequence[tuple[Flight, str]], now: float) -> dict[int, int]:
    """Versions of the server that clients hold whose updates did not count by `now`."""
    return {f.client: f.version for f, outcome in outcomes if outcome != "counted" and f.downloaded(now)}


def _without(available: Bools, taken: Sequence[int]) -> Bools:
    """Those of the available clients that are not taken."""
    left = available.copy()
    left[np.array(taken, np.int64)] = False
    return left
