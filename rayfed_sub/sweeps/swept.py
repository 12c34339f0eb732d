"""A sweep's trials as its report needs them: best first, each with its place in the space and what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from rayfed_sub.core import text
from rayfed_sub.reports.page import plain
from rayfed_sub.sweeps.labels import headings, score, short, worded
from rayfed_sub.sweeps.ranking import best_first, comparable

FEW = 12
"""More values than this are not shown one by one: a heat map's cells would be too small, and most of them empty."""


@dataclass(frozen=True)
class Trial:
    """A row of the table as the figures need it; metric: NaN where it cannot be compared; sent: bytes up and down, of a
    trial that was stopped unknown."""

    number: int
    values: Mapping[str, Any]
    status: str
    rounds: int
    metric: float
    before: float
    sent: int | None
    failure: str
    folder: str


@dataclass(frozen=True)
class Swept:
    """The trials, best first, and what they were about; kinds: how each key's values were drawn, where it is known."""

    ranked: Sequence[Trial]
    heads: Mapping[str, str]
    metric: str
    mode: str
    kinds: Mapping[str, str]

    @property
    def judged(self) -> list[Trial]:
        """The trials that can be compared, best first."""
        return [trial for trial in self.ranked if not math.isnan(trial.metric)]

    def values(self, key: str) -> list[Any]:
        """The key's values over all trials, in order."""
        return sorted({trial.values[key] for trial in self.ranked})

    @property
    def shades(self) -> tuple[float, float]:
        """The metrics that are drawn faintest and strongest."""
        return shades([trial.metric for trial in self.judged], self.mode)

    def drawn(self, trial: Trial) -> float:
        """The trial's metric, or the edge of the figures where it is beyond."""
        faint, _ = self.shades
        return {"min": min, "max": max}[self.mode](trial.metric, faint)

    def said(self, trial: Trial) -> str:
        """Where in the space the trial is: "rank=8 lr=1e-3"."""
        return " ".join(f"{head}={worded(trial.values[key])}" for key, head in self.heads.items())

    def hover(self, trial: Trial) -> str:
        """What a figure says of a trial under the pointer."""
        stopped = f"stopped after {text.count('round', trial.rounds)}<br>" if trial.status == "stopped" else ""
        said = "<br>".join(f"{plain(f'{head} {short(trial.values[key])}')}" for key, head in self.heads.items())
        return f"trial {trial.number}<br>{plain(self.metric)} {score(trial.metric)}<br>{stopped}{said}"


def gather(frame: pd.DataFrame, keys: Sequence[str], metric: str, mode: str, kinds: Mapping[str, str]) -> Swept:
    """The trials of `frame`, a sweep's trials.parquet, whose columns `keys` are those of the space."""
    ranked = best_first(frame, metric, mode)
    rows = zip(ranked.to_dict("records"), _places(ranked, keys), comparable(ranked, metric), strict=True)
    return Swept(
        ranked=[_trial(row, values, metric, value) for row, values, value in rows],
        heads=headings(keys),
        metric=metric,
        mode=mode,
        kinds=kinds,
    )


def _places(frame: pd.DataFrame, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Each trial's values: a column's are all numbers, or all words where any is none (true, null, a word)."""
    columns = []
    for key in keys:
        cells = [None if pd.isna(cell) else cell for cell in frame[key].tolist()]
        numbers = all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
        columns.append(cells if numbers else [worded(cell) for cell in cells])
    return [dict(zip(keys, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _trial(row: Mapping[Any, Any], values: Mapping[str, Any], metric: str, value: float) -> Trial:
    known = {name: cell for name, cell in row.items() if not pd.isna(cell)}
    return Trial(
        number=int(row["trial"]),
        values=values,
        status=str(row["status"]),
        rounds=int(known.get("rounds", 0)),
        metric=value,
        before=float(known.get(f"{metric}_before", math.nan)),
        sent=int(known["uplink_bytes"] + known["downlink_bytes"]) if "uplink_bytes" in known else None,
        failure=str(known.get("failure", "")),
        folder=str(known.get("folder", "")),
    )


def shades(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The metrics that get the faintest and the strongest colour.

    Strongest is the best.  Faintest is the worst, or what is four times as far from the best as the median: a trial
    that diverged would leave all others one colour.

    >>> shades([2.0, 2.1, 2.5, 9.0, 50.0], "min")  # 2.0 + 4 (2.5 - 2.0)
    (4.0, 2.0)
    """
    best, worst = (min(values), max(values)) if mode == "min" else (max(values), min(values))
    if best == worst:
        return best + {"min": 1.0, "max": -1.0}[mode], best
    reach = abs(4 * (median(values) - best)) or abs(worst - best)
    return best + math.copysign(min(reach, abs(worst - best)), worst - best), best
