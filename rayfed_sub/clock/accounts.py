"""What a run costs in simulated time, bytes and energy, in all, by class of devices, and up to a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.clock.device_presets import power_of
from rayfed_sub.clock.timeline_rows import UNFINISHED

if TYPE_CHECKING:  # runs without devices need none
    import pandas as pd

    from rayfed_sub.config.schema import Device


@dataclass(frozen=True)
class Cost:
    """Cost up to the end of a round.  rounds: finished ones; seconds: simulated; bytes: up and down, those of dropped
    clients included; joules: of devices whose power is known, None without any."""

    rounds: int
    seconds: float
    bytes: int
    joules: float | None


def account(timeline: pd.DataFrame, classes: Mapping[str, Device] | None = None) -> dict[str, Any]:
    """Totals of a timeline (`TimelineRow`s) for summary.json, and the same of each class under `classes`.  classes: of
    the clients, by name, also those none of whose clients took part, which the timeline lacks.

    seconds: end of the last round.  idle_share: of the time from a client's start to the end of a synchronous round, or
    until it leaves.  counted_share: of the rounds that clients began and that have ended, those whose update counted.
    wasted_bytes, wasted_share, wasted_seconds: bytes, their share of all, and seconds of clients whose updates did not
    count.  joules: None where no power is known; 0 of a class whose power is, and whose clients took no part.  Of a
    class also: clients that took part, their rounds, those that counted, the share of all counted updates that is
    theirs (participation), and the mean staleness of these.
    """
    rows = _columns(timeline)
    known = {name: power_of(device) is not None for name, device in (classes or {}).items()}
    names = sorted({*rows["device"].tolist(), *known})
    everybody = np.ones(len(timeline), np.bool_)
    seconds = float(rows["round_ended"].max()) if len(timeline) else 0.0
    by_class = {str(name): _of_class(rows, rows["device"] == name, known.get(name, False)) for name in names}
    return {"seconds": seconds, **_totals(rows, everybody), "classes": by_class}


_Columns = Mapping[str, NDArray[Any]]


def _columns(timeline: pd.DataFrame) -> _Columns:
    """The timeline's columns as arrays: an account by pandas would take longer than a small run's clock."""
    return {str(name): timeline[name].to_numpy() for name in timeline.columns}


def _of_class(rows: _Columns, own: NDArray[np.bool_], known: bool) -> dict[str, Any]:
    counts = rows["outcome"] == "counted"
    counted, of_all = counts & own, int(counts.sum())
    updates = int(counted.sum())
    return {
        "clients": len(set(rows["client"][own].tolist())),
        "rounds": int(own.sum()),
        "counted": updates,
        "participation": updates / of_all if of_all else 0.0,
        "staleness": float((rows["round"] - rows["version"])[counted].mean()) if updates else 0.0,
        **_totals(rows, own, known),
    }


def _totals(rows: _Columns, own: NDArray[np.bool_], known: bool = False) -> dict[str, Any]:
    """known: whether a power is, if only of clients that took no part."""
    outcome, busy = rows["outcome"][own], (rows["ended"] - rows["began"])[own]
    wasted, ended = outcome != "counted", outcome != UNFINISHED
    sent, idle = _bytes(rows)[own], float(rows["idle_seconds"][own].sum())
    whole, lost = float(busy.sum()) + idle, int(sent[wasted].sum())
    joules = _joules(rows)[own]
    return {
        "counted_share": float(np.mean(outcome[ended] == "counted")) if ended.any() else 0.0,
        "idle_share": idle / whole if whole else 0.0,
        "wasted_bytes": lost,
        "wasted_share": lost / int(sent.sum()) if sent.any() else 0.0,
        "wasted_seconds": float(busy[wasted].sum()),
        "joules": float(np.nansum(joules)) if known or not np.isnan(joules).all() else None,
    }


def _bytes(rows: _Columns) -> NDArray[np.int64]:
    return (rows["uplink_bytes"] + rows["downlink_bytes"]).astype(np.int64)


def _joules(rows: _Columns) -> NDArray[np.float64]:
    """NaN where the power is not known, of no device too."""
    return rows["joules"].astype(np.float64)


def costs(timeline: pd.DataFrame) -> list[Cost]:
    """The cost up to the end of each round that has clients, in order; the last one's with what clients had sent that
    were under way when the run ended."""
    rows = _columns(timeline)
    finished = rows["round"][rows["outcome"] != UNFINISHED]
    if not len(finished):
        return []
    at = np.minimum(rows["round"], finished.max()).astype(np.int64)
    joules = _joules(rows)
    sent = np.bincount(at, _bytes(rows))  # sums of whole numbers below 2**53
    energy, ends = np.bincount(at, np.nan_to_num(joules)), np.zeros(len(sent))
    np.maximum.at(ends, at, rows["round_ended"])
    sent, energy = np.cumsum(sent), np.cumsum(energy)
    unknown = bool(np.isnan(joules).all())
    rounds = sorted(set(at.tolist()))
    return [Cost(n + 1, float(ends[n]), int(sent[n]), None if unknown else float(energy[n])) for n in rounds]


def cost_at(found: Sequence[Cost], rounds: int) -> Cost:
    """The cost of so many finished rounds."""
    nothing = Cost(0, 0.0, 0, 0.0 if found and found[0].joules is not None else None)
    return max((cost for cost in found if cost.rounds <= rounds), key=lambda cost: cost.rounds, default=nothing)


def cost_to(found: Sequence[Cost], scores: pd.Series[float], target: float, *, lower: bool) -> Cost | None:
    """The cost up to the first evaluation whose score is `target` or better; None where none is.  scores: by finished
    rounds; lower: is better."""
    reached = scores[scores <= target] if lower else scores[scores >= target]
    return cost_at(found, int(reached.index.min())) if len(reached) else None


def best_within(
    found: Sequence[Cost], scores: pd.Series[float], most: float, of: Callable[[Cost], float], *, lower: bool
) -> float | None:
    """The best score at an evaluation up to which a cost, `of` it, comes to `most`; None where there is none.  scores,
    lower: as in `cost_to`."""
    within = [float(score) for rounds, score in scores.items() if of(cost_at(found, int(str(rounds)))) <= most]
    return (min if lower else max)(within, default=None)
