"""What a sweep's trials reach and what they cost, by the clock of their devices where they have one: the Pareto front
of score, hours and bytes, and the three questions of EdgeFlowerTune (arXiv 2605.08636): quality under a budget, cost to
a target, robustness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rayfed_sub.reports.page import Cell, Section, Table, cell
from rayfed_sub.sweeps.results import SweepTable
from rayfed_sub.sweeps.results import score as shown
from rayfed_sub.sweeps.space import COSTS, METRICS

_TARGET = 0.9
"""Of the gain that every trial reaches: the target of the table of costs."""
_AVAILABILITY = "federation.availability"


@dataclass(frozen=True)
class Resource:
    """Something that trials spend or lose.  column: of a curve, or of the trials; unit: of the tables, that many of the
    column's."""

    column: str
    name: str
    unit: float


_RESOURCES = (
    Resource("seconds", "simulated hours", 3600.0),
    Resource("bytes", "MB", 1e6),
    Resource("joules", "kJ", 1e3),
)
_LOST = (
    Resource("counted_share", "rounds that counted (%)", 0.01),
    Resource("wasted_bytes", "wasted (MB)", 1e6),
    Resource("wasted_share", "wasted bytes (%)", 0.01),
    Resource("idle_share", "idle (%)", 0.01),
)


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of points that no other dominates: none is as low in every coordinate and lower in one.

    >>> front([(2.0, 5.0), (1.0, 9.0), (2.0, 6.0), (3.0, 1.0)])
    [0, 1, 3]
    """

    def dominated(point: Sequence[float]) -> bool:
        return any(o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in map(tuple, points))

    return [at for at, point in enumerate(points) if not dominated(tuple(point))]


@dataclass(frozen=True)
class Finished:
    """The finished trials.  order: their numbers, best first; curves, points: of each its curve, and its values as
    text; spent: resources that are known of all; name: of the score; sign: 1 where less of it is better, else -1."""

    order: Sequence[int]
    curves: Mapping[int, pd.DataFrame]
    points: Mapping[int, str]
    spent: Sequence[Resource]
    name: str
    sign: float


def costs_section(table: SweepTable, frame: pd.DataFrame, curves: pd.DataFrame) -> Section | None:
    """The tables about what finished trials reach and cost; None where there is none.  curves: see
    `results.curves`."""
    name = "held_out_loss" if table.metric in COSTS else table.metric
    sign = 1.0 if METRICS[name] == "min" else -1.0
    known = curves[curves["score"].notna()]
    of_trial = {int(str(trial)): points.sort_values("rounds") for trial, points in known.groupby("trial")}
    if not of_trial:
        return None
    spent = [one for one in _RESOURCES if known[one.column].notna().all()]
    points = {trial.number: table.point_text(trial) for trial in table.ranked}
    order = [trial.number for trial in table.ranked if trial.number in of_trial]
    finished = Finished(order, of_trial, points, spent, name, sign)
    tables = [_front(finished), _under_budgets(finished), _to_target(finished), _robustness(table, frame, finished)]
    return Section("Quality and cost", [found for found in tables if found is not None])


def _front(f: Finished) -> Table:
    judged = [one for one in f.spent if one.column != "joules"]
    ends = {trial: f.curves[trial].iloc[-1] for trial in f.order}
    at = front([[f.sign * float(ends[k]["score"]), *(float(ends[k][one.column]) for one in judged)] for k in f.order])
    rows = [[*_named(k, f.points), *_state(ends[k], f.spent)] for k in (f.order[place] for place in at)]
    words = " and ".join(one.name for one in judged)
    caption = f"Pareto front of {f.name} and {words}: no other trial is as good in all of them and better in one."
    return Table(caption, ["trial", "values", f.name, *(one.name for one in f.spent)], rows)


def _named(trial: int, points: Mapping[int, str]) -> list[Cell | str]:
    return [Cell(f"{trial}", trial), points[trial]]


def _state(row: pd.Series[Any], spent: Sequence[Resource]) -> list[Cell]:
    value = float(row["score"])
    return [Cell(shown(value), value), *(cell(float(row[one.column]) / one.unit) for one in spent)]


def _under_budgets(f: Finished) -> Table | None:
    """Scores of all trials after half and all of what the thriftiest of them spends."""
    least = {one: min(float(f.curves[k][one.column].iloc[-1]) for k in f.order) for one in f.spent}
    budgets = [(one, part * most) for one, most in least.items() if most > 0 for part in (0.5, 1.0)]
    if not budgets:
        return None
    rows: list[list[Cell | str]] = []
    for trial in f.order:
        within = [f.curves[trial].loc[f.curves[trial][one.column] <= most, "score"] for one, most in budgets]
        best = [f.sign * float((f.sign * found).min()) if len(found) else None for found in within]
        rows.append([*_named(trial, f.points), *(Cell("-", None) if b is None else Cell(shown(b), b) for b in best)])
    heads = [f"{cell(most / one.unit).text} {one.name}" for one, most in budgets]
    caption = f"Quality under a budget: the best {f.name} at an evaluation within half and all of what the thriftiest "
    return Table(f"{caption}trial takes.", ["trial", "values", *heads], rows)


def _to_target(f: Finished) -> Table | None:
    """Costs up to the score that is nine tenths of the way from the worst beginning to the worst best score."""
    gaining = {k: f.sign * f.curves[k]["score"] for k in f.order if len(f.curves[k]) > 1}
    if not gaining:
        return None
    begin = max(float(found.iloc[0]) for found in gaining.values())
    end = max(float(found.min()) for found in gaining.values())
    target = begin + _TARGET * (end - begin)
    rows: list[list[Cell | str]] = []
    for trial, found in gaining.items():
        reached = f.curves[trial][found <= target].iloc[:1]
        state = [cell(None)] * (1 + len(f.spent))
        if len(reached):
            first = reached.iloc[0]
            state = [cell(float(first["rounds"])), *(cell(float(first[one.column]) / one.unit) for one in f.spent)]
        rows.append([*_named(trial, f.points), *state])
    caption = f"Cost to a target: up to the first evaluation with a {f.name} of {shown(f.sign * target)} or better, "
    caption += "nine tenths of the gain that every trial reaches."
    return Table(caption, ["trial", "values", "round", *(one.name for one in f.spent)], rows)


def _says_who_stays(key: str) -> bool:
    """Whether the key says how many clients take part, or stay.

    >>> _says_who_stays("devices.classes.phone.dropout"), _says_who_stays("method.dropout")
    (True, False)
    """
    return key == _AVAILABILITY or (key.startswith("devices.classes.") and key.endswith(".dropout"))


def _robustness(table: SweepTable, frame: pd.DataFrame, f: Finished) -> Table | None:
    """What was lost on the way; where the sweep varies how many clients stay, also what that does to the score."""
    clocked = all(one.column in frame for one in _LOST)
    leaving = [key for key in table.heads if _says_who_stays(key)]
    if not clocked and not leaving:
        return None
    of_frame: dict[int, dict[Any, Any]] = {int(row["trial"]): dict(row) for row in frame.to_dict("records")}
    values = {trial.number: trial.values for trial in table.ranked}

    def calm(trial: int) -> tuple[Any, ...]:
        """Low for the most clients: availability is a share that stays, drop-out one that leaves."""
        signs = [-1.0 if key == _AVAILABILITY else 1.0 for key in leaving]
        return tuple(s * float(values[trial][key]) for s, key in zip(signs, leaving, strict=True))

    rows: list[list[Cell | str]] = []
    for trial in f.order:
        row, cells = of_frame[trial], list[Cell]()
        if clocked:
            cells += [cell(float(row[one.column]) / one.unit) for one in _LOST]
        if leaving:
            others = values[trial].keys() - leaving
            alike = [k for k in f.order if all(values[k][key] == values[trial][key] for key in others)]
            own, base = (float(f.curves[k]["score"].iloc[-1]) for k in (trial, min(alike, key=calm)))
            cells.append(Cell(f"{own - base:+.4f}", own - base) if math.isfinite(own - base) else cell(None))
        rows.append([*_named(trial, f.points), *cells])
    heads = [one.name for one in _LOST] if clocked else []
    words = ["of the rounds that clients began those that counted, and what was of no use"] if clocked else []
    if leaving:
        heads.append(f"{f.name} against all that stay")
        words.append(f"{f.name} less that of the trial with the same other values where most clients stay")
    return Table(f"Robustness: {'; '.join(words)}.", ["trial", "values", *heads], rows)
