"""The fleet: the device of every client, its speed, and when it is available, from configuration, seed and trace."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.clock.device_presets import power_of
from rayfed_sub.config.checks import no_time
from rayfed_sub.config.schema import Config, Device
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream

TRACE = "devices.trace"
DAY = 86400.0
"""Seconds of a simulated day, which begins with the run."""
_HOUR = 3600.0
_DIGITS = 20  # of a client's number, at most
_SHORT = 1e-6  # seconds by which a sum of floats may fall short of a window's begin

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Windows:
    """Times of the day at which clients are available: client, begin and end (W,), the first in [0, DAY), the end less
    than a day after it; no two of a client touch.  Clients without one are always available: limited, bool
    (clients,), says who is not."""

    client: Ints
    begin: Floats
    end: Floats
    limited: Bools

    def until(self, now: float) -> Floats:
        """Simulated second up to which each client is available, (clients,): infinite for those that always are,
        negative for those that are not at `now`."""
        ends, since = np.where(self.limited, -1.0, math.inf), self._since(now)
        inside = np.flatnonzero(since < self.end - self.begin)
        ends[self.client[inside]] = now + (self.end - self.begin - since)[inside]
        return ends

    def next(self, now: float, among: Bools) -> float:
        """The first second after `now` at which another client of `among` becomes available; infinite for none."""
        waits = (DAY - self._since(now))[among[self.client]]
        return now + float(waits.min()) if len(waits) else math.inf

    def _since(self, now: float) -> Floats:
        """Seconds since the last begin of each window, (W,), less than a day."""
        since = now % DAY - self.begin
        since[since < 0] += DAY
        since[since > DAY - _SHORT] = 0.0
        return since


@dataclass(frozen=True, eq=False)
class Fleet:
    """names: of the classes; devices: their profiles; classes int64 (clients,): the class of each client; slowness
    float64 (clients,): factor on the seconds that it computes; seed: of its drop-outs."""

    names: tuple[str, ...]
    devices: tuple[Device, ...]
    classes: Ints
    slowness: Floats
    windows: Windows
    seed: int = 0

    @property
    def leaves(self) -> bool:
        """Whether clients may leave a round, by their hours or by drop-out."""
        return bool(self.windows.limited.any()) or any(device.dropout for device in self.devices)

    def stays(self, client: int, n: int, start: int = 0) -> float:
        """Share of its download and training after which the client breaks off what it begins with draw `start` of
        round n; infinite for one that does not."""
        chance = self.device_of(client).dropout
        if not chance:
            return math.inf
        draw = float(stream(self.seed, "client dropout", n, client, start).random())
        return draw / chance if draw < chance else math.inf

    def name_of(self, client: int) -> str:
        """Name of the client's class."""
        return self.names[int(self.classes[client])]

    def device_of(self, client: int) -> Device:
        """Profile of the client's class."""
        return self.devices[int(self.classes[client])]

    def download_seconds(self, client: int, size: int) -> float:
        """Seconds in which `size` bytes reach the client."""
        device = self.device_of(client)
        return _transfer(size, device.down_mbit, device.latency)

    def upload_seconds(self, client: int, size: int) -> float:
        """Seconds in which `size` bytes of the client reach the server."""
        device = self.device_of(client)
        return _transfer(size, device.up_mbit, device.latency)

    def compute_seconds(self, client: int, steps: float, tokens: float) -> float:
        """Seconds of so many local steps on so many tokens."""
        device, slowness = self.device_of(client), float(self.slowness[client])
        if device.seconds_per_step is not None:
            return steps * device.seconds_per_step * slowness
        assert device.tokens_per_second is not None, "checked: one of both is set"
        return tokens / device.tokens_per_second * slowness

    def joules(self, client: int, seconds: float) -> float | None:
        """Energy of so many seconds of training; None where the device's power is not known."""
        power = power_of(self.device_of(client))
        return None if power is None else power * seconds


def _transfer(size: int, mbit: float | None, latency: float) -> float:
    return latency + (0.0 if mbit is None else 8 * size / (mbit * 1e6))


def fleet_of(config: Config, client_names: Sequence[str] = ()) -> Fleet | None:
    """The fleet of a checked configuration; None without devices.  client_names: for a trace that names them.

    Raises UserError naming the line of a trace that does not fit.
    """
    settings, clients = config.devices, config.federation.clients
    if not settings.classes:
        return None
    names = tuple(settings.classes)
    devices = tuple(settings.classes.values())
    hours: dict[int, list[tuple[float, float]]] | None = None
    if settings.trace is None:
        classes = _shared_out(config, names)
    else:
        classes, hours = _traced(settings.trace, names, clients, client_names)
    draws = stream(config.seed, "device speed").standard_normal(clients)
    slowness = np.exp(settings.spread * draws) if settings.spread else np.ones(clients)
    if hours is None:
        hours = {client: list(devices[kind].hours) for client, kind in enumerate(classes) if devices[kind].hours}
    return Fleet(names, devices, classes, slowness, windows_of(hours, clients), config.seed)


def _shared_out(config: Config, names: Sequence[str]) -> Ints:
    """The class of each client: their counts are the shares, to a client, and who has which is drawn."""
    shares = [config.devices.shares[name] if config.devices.shares else 1.0 for name in names]
    clients = config.federation.clients
    ends = np.cumsum(shares) / sum(shares) * clients
    places = np.searchsorted(ends, np.arange(clients) + 0.5, side="right").clip(max=len(names) - 1)
    order = stream(config.seed, "devices").permutation(clients)
    classes = np.empty(clients, np.int64)
    classes[order] = places
    return classes


def _traced(
    path: str, names: Sequence[str], clients: int, client_names: Sequence[str]
) -> tuple[Ints, dict[int, list[tuple[float, float]]] | None]:
    """The class of each client, and its hours where the trace has them."""
    kinds = {name: number for number, name in enumerate(names)}
    numbers = {name: number for number, name in reversed(list(enumerate(client_names)))}
    classes, hours = np.full(clients, -1, np.int64), defaultdict[int, list[tuple[float, float]]](list)
    reader = csv.DictReader(_lines(path))
    columns = reader.fieldnames or []
    timed = "from" in columns or "to" in columns
    needed = ("client", "device", *(("from", "to") if timed else ()))
    if missing := [name for name in needed if name not in columns]:
        allowed = f"a CSV file with the columns {', '.join(needed)}; it lacks {', '.join(missing)}"
        raise UserError(TRACE, path, allowed, "add the column")
    for row in _rows(path, reader):
        where = f"line {reader.line_num}"
        client, kind = _client(path, where, row["client"], clients, numbers), kinds.get(row["device"])
        if client is None:
            continue
        if kind is None:
            allowed = f"a class of devices.classes ({', '.join(names)}) in {where}; there is {row['device']!r}"
            raise UserError(TRACE, path, allowed, "mend the line, or add the class")
        if classes[client] not in (-1, kind):
            allowed = f"one device for each client; {where} has another one for client {row['client']}"
            raise UserError(TRACE, path, allowed, "mend the line")
        classes[client] = kind
        if timed:
            begin, end = (_hour(path, where, row[name]) for name in ("from", "to"))
            if no_time(begin, end):
                raise UserError(TRACE, path, f"from and to that differ in {where}", "mend the line")
            hours[client].append((begin, end))
    gaps = np.flatnonzero(classes < 0)
    if len(gaps):
        shown = ", ".join(map(str, gaps[:3].tolist())) + (", ..." if len(gaps) > 3 else "")
        allowed = f"a line for each of the {clients} clients; {len(gaps)} have none: {shown}"
        raise UserError(TRACE, path, allowed, "add their lines")
    return classes, dict(hours) if timed else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(TRACE, path, f"a CSV file: {cause}", "check the path") from None


def _rows(path: str, reader: csv.DictReader[str]) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(TRACE, path, f"a CSV file: line {reader.line_num}: {error}", "mend the line") from None


def _client(path: str, where: str, text: str | None, clients: int, numbers: Mapping[str, int]) -> int | None:
    """A client by its name or its number; None for one beyond the run's clients, as a trace may hold more."""
    named = None if text is None else numbers.get(text)
    if named is not None:
        return named
    if text is None or not (text.strip().isascii() and text.strip().isdigit() and len(text) < _DIGITS):
        allowed = f"the number or the name of a client in {where}; there is {text!r}"
        raise UserError(TRACE, path, allowed, "mend the line")
    return int(text) if int(text) < clients else None


def _hour(path: str, where: str, text: str | None) -> float:
    try:
        hour = float(text or "")
    except ValueError:
        hour = math.nan
    if not 0 <= hour <= 24:
        allowed = f"hours from 0 to 24 in {where}; there is {text!r}"
        raise UserError(TRACE, path, allowed, "mend the line")
    return hour


def windows_of(hours: Mapping[int, Sequence[tuple[float, float]]], clients: int) -> Windows:
    """Windows from hours of the day by client; those that touch are one, and a whole day is always.

    >>> w = windows_of({0: [(22, 24), (0, 6)]}, 2)
    >>> w.begin.tolist(), w.end.tolist(), w.limited.tolist()
    ([79200.0], [108000.0], [True, False])
    """
    found: list[tuple[int, float, float]] = []
    limited = np.zeros(clients, np.bool_)
    for client, spans in sorted(hours.items()):
        merged = _merged(spans)
        if merged is not None:
            limited[client] = True
            found += [(client, begin, end) for begin, end in merged]
    who, begins, ends = zip(*found, strict=True) if found else ((), (), ())
    return Windows(np.array(who, np.int64), np.array(begins, float), np.array(ends, float), limited)


def _merged(hours: Sequence[tuple[float, float]]) -> list[tuple[float, float]] | None:
    """Spans in seconds, in order, none touching another, also over midnight; None: the whole day."""
    spans = sorted(
        (begin % 24 * _HOUR, (end if end > begin else end + 24) * _HOUR - begin // 24 * DAY) for begin, end in hours
    )
    merged: list[tuple[float, float]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    while len(merged) > 1 and merged[-1][1] >= merged[0][0] + DAY:  # the last one goes on after midnight
        (_, end), *merged = merged
        merged[-1] = (merged[-1][0], max(merged[-1][1], end + DAY))
    if merged and merged[0][1] - merged[0][0] >= DAY:
        return None
    return merged
