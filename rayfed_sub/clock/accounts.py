"""What a run costs in simulated time, bytes and energy, in all, by class of devices, and up to a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayfed_sub.clock.timeline_rows import UNFINISHED

if TYPE_CHECKING:  # runs without devices need none
    import pandas as pd


@dataclass(frozen=True)
class Cost:
    """Cost up to the end of a round.  rounds: finished ones; seconds: simulated; bytes: up and down, those of dropped
    clients included; joules: of devices whose power is known, None without any."""

    rounds: int
    seconds: float
    bytes: int
    joules: float | None


def account(timeline: pd.DataFrame) -> dict[str, Any]:
    """Totals of a timeline (`TimelineRow`s) for summary.json, and the same of each class under `classes`.

    seconds: end of the last round.  idle_share: of the time from a client's start to the end of a synchronous round.
    counted_share: of the rounds that clients began and that have ended, those whose update counted.
    wasted_bytes, wasted_share, wasted_seconds: bytes, their share of all, and seconds of clients whose updates did not
    count.  joules: None where no power is known.  Of a class also: clients that took part, their rounds, those that
    counted, the share of all counted updates that is theirs (participation), and the mean staleness of these.
    """
    by_class = {str(name): _of_class(rows, timeline) for name, rows in timeline.groupby("device", sort=True)}
    seconds = float(timeline["round_ended"].max()) if len(timeline) else 0.0
    return {"seconds": seconds, **_totals(timeline), "classes": by_class}


def _of_class(rows: pd.DataFrame, timeline: pd.DataFrame) -> dict[str, Any]:
    counted = rows[rows["outcome"] == "counted"]
    of_all = int((timeline["outcome"] == "counted").sum())
    stale = (counted["round"] - counted["version"]).mean()
    return {
        "clients": int(rows["client"].nunique()),
        "rounds": len(rows),
        "counted": len(counted),
        "participation": len(counted) / of_all if of_all else 0.0,
        "staleness": float(stale) if len(counted) else 0.0,
        **_totals(rows),
    }


def _totals(rows: pd.DataFrame) -> dict[str, Any]:
    wasted, busy = rows[rows["outcome"] != "counted"], rows["ended"] - rows["began"]
    sent, idle = _bytes(rows), float(rows["idle_seconds"].sum())
    whole = float(busy.sum()) + idle
    joules, ended = rows["joules"].dropna(), rows[rows["outcome"] != UNFINISHED]
    return {
        "counted_share": float((ended["outcome"] == "counted").mean()) if len(ended) else 0.0,
        "idle_share": idle / whole if whole else 0.0,
        "wasted_bytes": _bytes(wasted),
        "wasted_share": _bytes(wasted) / sent if sent else 0.0,
        "wasted_seconds": float((wasted["ended"] - wasted["began"]).sum()),
        "joules": float(joules.sum()) if len(joules) else None,
    }


def _bytes(rows: pd.DataFrame) -> int:
    return int(rows["uplink_bytes"].sum() + rows["downlink_bytes"].sum())


def costs(timeline: pd.DataFrame) -> list[Cost]:
    """The cost up to the end of each round that has clients, in order; the last one's with what clients had sent that
    were under way when the run ended."""
    found, sent, joules = [], 0, 0.0
    last = timeline.loc[timeline["outcome"] != UNFINISHED, "round"].max()
    for n, rows in timeline.groupby(timeline["round"].clip(upper=last), sort=True):
        sent, joules = sent + _bytes(rows), joules + float(rows["joules"].fillna(0.0).sum())
        known = joules if timeline["joules"].notna().any() else None
        found.append(Cost(int(str(n)) + 1, float(rows["round_ended"].max()), sent, known))
    return found


def cost_at(found: Sequence[Cost], rounds: int) -> Cost:
    """The cost of so many finished rounds."""
    nothing = Cost(0, 0.0, 0, 0.0 if found and found[0].joules is not None else None)
    return max((cost for cost in found if cost.rounds <= rounds), key=lambda cost: cost.rounds, default=nothing)


def cost_to(found: Sequence[Cost], scores: pd.Series[float], target: float, *, lower: bool) -> Cost | None:
    """The cost up to the first evaluation whose score is `target` or better; None where none is.  scores: by finished
    rounds; lower: is better."""
    reached = scores[scores <= target] if lower else scores[scores >= target]
    return cost_at(found, int(reached.index.min())) if len(reached) else None
