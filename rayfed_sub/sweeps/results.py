"""Results of a sweep: the table of trials (without times, so that tables can be compared), and the best trial."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from rayfed_sub.core import text
from rayfed_sub.reports.page import plain
from rayfed_sub.storage import atomic_files

SENT = ("uplink_bytes", "downlink_bytes")
"""Columns of the total traffic, named as in a run's summary."""

CLOCKED = ("simulated_hours", "joules", "wasted_bytes", "wasted_share", "idle_share", "counted_share")
"""Columns of trials with devices, from the account of their virtual clock."""

_BEFORE = "_before"
"""The end of a score's name where it is the untrained model's."""

CURVE = "curve"
"""The key of a trial's curve in its last report: JSON, the cells of `CURVE_COLUMNS` at every evaluation."""

CURVE_COLUMNS = ("rounds", "score", "bytes", "seconds", "joules")


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.  reported: its last report to Tune; failure: the cause in one line."""

    number: int
    values: Mapping[str, Any]
    reported: Mapping[str, Any]
    failure: str | None

    @property
    def status(self) -> str:
        """finished, stopped by the scheduler, or failed."""
        return "failed" if self.failure else "finished" if self.reported.get("finished") else "stopped"


def table(ended: Sequence[Ended], metrics: Sequence[str]) -> pd.DataFrame:
    """A row per trial, in order: trial, the space's keys, status, rounds, metrics, uplink_bytes,
    downlink_bytes, with devices those of `CLOCKED`, weights_sha256, failure, folder.  A key's column has one type, see
    `_column`."""
    rows = []
    clocked = [name for name in CLOCKED if any(trial.reported.get(name) is not None for trial in ended)]
    in_order = sorted(ended, key=lambda trial: trial.number)
    columns = {key: _column([trial.values[key] for trial in in_order]) for key in in_order[0].values}
    for at, trial in enumerate(in_order):
        reported, values = trial.reported, {key: column[at] for key, column in columns.items()}
        row = {"trial": trial.number, **values, "status": trial.status, "rounds": reported.get("rounds", 0)}
        row |= {name: _score_of(reported, name) for name in metrics}
        row |= {name: reported.get(name) for name in (*SENT, *clocked, "weights_sha256")}
        rows.append({**row, "failure": trial.failure, "folder": f"trials/{trial.number:05d}"})
    whole = dict.fromkeys(SENT, "Int64") | dict.fromkeys((*metrics, *clocked), "float64")
    return pd.DataFrame(rows).astype({**whole, "weights_sha256": "string", "failure": "string"})


def _score_of(reported: Mapping[str, Any], name: str) -> Any:
    """A score of the last report: before the first round it is the untrained model's.

    >>> early = {"rounds": 0, "held_out_loss": 4.0}
    >>> _score_of(early, "held_out_loss"), _score_of(early, "held_out_loss_before")
    (None, 4.0)
    """
    if reported.get("rounds"):
        return reported.get(name)
    return reported.get(name.removesuffix(_BEFORE)) if name.endswith(_BEFORE) else None


def curves(ended: Sequence[Ended]) -> pd.DataFrame:
    """A row per finished trial and evaluation: trial and `CURVE_COLUMNS`; without devices those of the clock are
    missing."""
    rows = [
        (trial.number, *point)
        for trial in sorted(ended, key=lambda trial: trial.number)
        if trial.status == "finished"
        for point in json.loads(trial.reported.get(CURVE, "[]"))
    ]
    numbers = dict.fromkeys(("score", "seconds", "joules"), "float64")
    return pd.DataFrame(rows, columns=["trial", *CURVE_COLUMNS]).astype(numbers)


def write(frame: pd.DataFrame, path: Path) -> None:
    """A table as Parquet.  Raises RunError where the disk is full."""
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    atomic_files.write(path, content.getvalue())


def _column(values: Sequence[Any]) -> list[Any]:
    """A key's values as they are where all are numbers, all bools or all strings, but for null; else text, JSON where
    a value is no string: Parquet has one type per column.

    >>> _column([8, 0.5, None]), _column([8, [4, 8], None]), _column([True, "x"])
    ([8, 0.5, None], ['8', '[4, 8]', None], ['true', 'x'])
    """
    known = [value for value in values if value is not None]
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in known]
    if all(numbers) or any(all(isinstance(value, kind) for value in known) for kind in (bool, str)):
        return list(values)
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


_WORD = 24
"""Most characters of a value in a figure."""


def headings(keys: Sequence[str]) -> dict[str, str]:
    """The shortest unique ending of every dotted key.

    >>> headings(["method.rank", "optimizer.lr", "server.lr"])
    {'method.rank': 'rank', 'optimizer.lr': 'optimizer.lr', 'server.lr': 'server.lr'}
    """
    alone = {key: (tail for tail in _tails(key) if sum(_ends(other, tail) for other in keys) == 1) for key in keys}
    return {key: next(tails, key) for key, tails in alone.items()}


def format_value(value: object) -> str:
    """A value as short text: four digits, with a power of ten where the number is small or large.

    >>> [format_value(value) for value in (8, 0.003, 0.01, 0.25, 2.5e7, 1.0, "fedit", None)]
    ['8', '3e-3', '1e-2', '0.25', '2.5e7', '1', 'fedit', '-']
    """
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if math.isnan(value):
        return "-"
    if value and not 0.01 < abs(value) < 1e5:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if power else digits
    return f"{value:.4g}"


def score(value: float) -> str:
    """A metric with four decimals, or with four significant digits where it is small or large.

    >>> score(2.73051), score(0.00002), score(123456.0)
    ('2.7305', '2e-5', '1.235e5')
    """
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else format_value(value)


def short(value: object) -> str:
    """A value as text for a figure, cut to `_WORD` characters."""
    text = format_value(value)
    return text if len(text) <= _WORD else f"{text[: _WORD - 1]}…"


def _tails(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _ends(key: str, tail: str) -> bool:
    return key == tail or key.endswith(f".{tail}")


def best(frame: pd.DataFrame, metric: str, mode: str) -> int | None:
    """Number of the best trial; None where no trial has a comparable metric."""
    if comparable(frame, metric).isna().all():
        return None
    return int(best_first(frame, metric, mode)["trial"].iloc[0])


def best_first(frame: pd.DataFrame, metric: str, mode: str) -> pd.DataFrame:
    """The trials, best first: finished ones by the metric, then those that the scheduler stopped, then the rest.

    A stopped trial comes after every finished one, because its metric is of an earlier round.  The rest are trials that
    failed or whose metric is missing or not finite.  Ties go to the lower number.
    """
    value = comparable(frame, metric)
    rank = (frame["status"] == "stopped").astype("int64").where(value.notna(), 2)
    merit = pd.DataFrame({"rank": rank, "value": {"min": 1, "max": -1}[mode] * value, "trial": frame["trial"]})
    return frame.loc[merit.sort_values(["rank", "value", "trial"]).index]


def comparable(frame: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Each trial's metric as float64, NaN where it cannot be compared: it failed, or its metric is not finite."""
    if metric not in frame:
        return pd.Series(math.nan, index=frame.index)
    value = pd.to_numeric(frame[metric], errors="coerce").astype("float64")
    return value.where(frame["status"].isin(["finished", "stopped"]) & (value.abs() < math.inf))


FEW = 12
"""Most values to show one by one: with more, a heat map's cells would be small and mostly empty."""


@dataclass(frozen=True)
class Trial:
    """A row of the table for the figures.  metric: NaN where it cannot be compared; sent: bytes up and down, hours:
    simulated, joules: all None for a stopped trial, and the last two where they are not known."""

    number: int
    values: Mapping[str, Any]
    status: str
    rounds: int
    metric: float
    before: float
    sent: int | None
    failure: str
    folder: str
    hours: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class SweepTable:
    """Table of a sweep's trials for its report.  ranked: best first; heads: short names by key; kinds: the kind of each
    key's values (grid, loguniform, ...), where it is known."""

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
        """The metrics with the faintest and the strongest colour."""
        return shades([trial.metric for trial in self.judged], self.mode)

    def drawn(self, trial: Trial) -> float:
        """The trial's metric for a figure, cut at the end of the axis."""
        faint, _ = self.shades
        return {"min": min, "max": max}[self.mode](trial.metric, faint)

    def point_text(self, trial: Trial) -> str:
        """The trial's point in the space: "rank=8 lr=1e-3"."""
        return " ".join(f"{head}={format_value(trial.values[key])}" for key, head in self.heads.items())

    def hover(self, trial: Trial) -> str:
        """Hover text of a trial."""
        stopped = f"stopped after {text.count('round', trial.rounds)}<br>" if trial.status == "stopped" else ""
        values = "<br>".join(f"{plain(f'{head} {short(trial.values[key])}')}" for key, head in self.heads.items())
        return f"trial {trial.number}<br>{plain(self.metric)} {score(trial.metric)}<br>{stopped}{values}"


def gather(frame: pd.DataFrame, keys: Sequence[str], metric: str, mode: str, kinds: Mapping[str, str]) -> SweepTable:
    """The trials of `frame`, a sweep's trials.parquet, whose columns `keys` are those of the space."""
    ranked = best_first(frame, metric, mode)
    rows = zip(ranked.to_dict("records"), _places(ranked, keys), comparable(ranked, metric), strict=True)
    return SweepTable(
        ranked=[_trial(row, values, metric, value) for row, values, value in rows],
        heads=headings(keys),
        metric=metric,
        mode=mode,
        kinds=kinds,
    )


def _places(frame: pd.DataFrame, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Each trial's values; a key's values are all numbers, or all text where any is not a number (true, null, text)."""
    columns = []
    for key in keys:
        cells = [None if pd.isna(cell) else cell for cell in frame[key].tolist()]
        numbers = all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)
        columns.append(cells if numbers else [format_value(cell) for cell in cells])
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
        hours=known.get("simulated_hours"),
        joules=known.get("joules"),
    )


def shades(values: Sequence[float], mode: str) -> tuple[float, float]:
    """The metrics with the faintest and the strongest colour.

    The strongest is the best.  The faintest is the worst, but at most four times as far from the best as the median: a
    diverged trial would give all others one colour.

    >>> shades([2.0, 2.1, 2.5, 9.0, 50.0], "min")  # 2.0 + 4 (2.5 - 2.0)
    (4.0, 2.0)
    """
    best, worst = (min(values), max(values)) if mode == "min" else (max(values), min(values))
    if best == worst:
        return best + {"min": 1.0, "max": -1.0}[mode], best
    reach = abs(4 * (median(values) - best)) or abs(worst - best)
    return best + math.copysign(min(reach, abs(worst - best)), worst - best), best
