"""A sweep as one HTML file: the best trial, heat maps, parallel coordinates, quality against bytes and simulated
hours, what quality costs, all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from rayfed_sub.core import text
from rayfed_sub.reports.page import Cell, Facts, Section, Table, Text, page
from rayfed_sub.storage import atomic_files
from rayfed_sub.sweeps.results import FEW, SweepTable, Trial, best_first, format_value, gather, score
from rayfed_sub.sweeps.space import COSTS
from rayfed_sub.sweeps.sweep_figures import SPENDING, against, heat_map, parallel, points, spends
from rayfed_sub.sweeps.trial_costs import costs_section

_MEGABYTES = {
    "uplink_bytes": "up (MB)",
    "downlink_bytes": "down (MB)",
    "sent_bytes": "sent (MB)",
    "wasted_bytes": "wasted (MB)",
}
"""Heads of the columns of bytes."""


def write_report(
    frame: pd.DataFrame,
    keys: Sequence[str],
    metric: str,
    mode: str,
    title: str,
    path: Path,
    settings: Mapping[str, Any],
    curves: pd.DataFrame | None = None,
) -> None:
    """Writes the page about `frame`, a sweep's trials.parquet, to `path`, some 5 MB, nearly all of it plotly.js.

    keys: the columns of the space.  mode: "min" or "max".  settings: settings of the sweep, shown as they are; its
    `space`, if it has one, maps each key to where its values come from, e.g. {"loguniform": [low, high]}.  curves: of
    the finished trials, see `results.curves`.
    """
    atomic_files.write(path, page(title, sections(frame, keys, metric, mode, settings, curves)).encode())


def sections(
    frame: pd.DataFrame,
    keys: Sequence[str],
    metric: str,
    mode: str,
    settings: Mapping[str, Any],
    curves: pd.DataFrame | None = None,
) -> list[Section]:
    """Sections of the report, arguments as `write_report`."""
    space: Mapping[str, Any] = settings.get("space", {})
    kinds = {key: kind for key in keys for kind in space.get(key, {})}
    table = gather(frame, keys, metric, mode, kinds)
    found = [Section("Result", _result(table)), Section("What was swept", _space(table, space, settings))]
    if table.judged:
        few = [key for key in keys if 2 <= len(table.values(key)) <= FEW]
        pairs = list(combinations(few, 2))
        if pairs:
            caption = f"Each cell: the {metric} of its best trial over all other keys; stronger is better."
            found.append(Section("Pairs of keys", [Text(caption), *(heat_map(table, *pair) for pair in pairs)]))
        alone = [key for key in keys if len(table.values(key)) > 1 and (key not in few or not pairs)]
        if alone:
            found.append(Section("One key at a time", [points(table, key) for key in alone]))
        if len(keys) > 1 and len(table.judged) > 1:
            found.append(Section("All keys at once", [parallel(table)]))
        spent = [] if metric in COSTS else [spending for spending in SPENDING if spends(table, spending)]
        figures = [against(table, spending) for spending in spent]
        if figures:
            found.append(Section("Quality against cost", figures))
    about = None if curves is None else costs_section(table, frame, curves)
    if about is not None:
        found.append(about)
    failed = [trial for trial in table.ranked if trial.status == "failed"]
    if failed:
        found.append(Section("Failures", [_failures(table, failed)]))
    return [*found, Section("Trials", [_table(table, best_first(frame, metric, mode))])]


def _result(table: SweepTable) -> list[Text | Facts]:
    """The best trial and how far ahead it is."""
    counts = pd.Series([trial.status for trial in table.ranked], dtype="object").value_counts()
    ended = ", ".join(f"{counts[status]} {status}" for status in ("finished", "stopped", "failed") if status in counts)
    summary = f"{text.count('trial', len(table.ranked))}: {ended}."
    if not table.judged:
        return [Text(f"{summary} None has a {table.metric}, so there is no best one.")]
    first, *others = table.judged
    facts = {"best trial": f"{first.number}", **{key: format_value(value) for key, value in first.values.items()}}
    facts[table.metric] = score(first.metric)
    if not math.isnan(first.before):
        facts["before training"] = score(first.before)
    if others:
        second, middle = others[0], median(trial.metric for trial in table.judged)
        facts["next"] = f"trial {second.number}, {table.point_text(second)}: {score(second.metric)}"
        facts["ahead of the next by"] = _lead(first.metric, second.metric)
        facts["ahead of the median by"] = f"{_lead(first.metric, middle)}; the median is {score(middle)}"
    if first.sent is not None:
        facts["sent up and down"] = text.megabytes(first.sent)
    facts["run folder"] = first.folder
    better = {"min": "lower", "max": "higher"}[table.mode]
    return [Text(f"{summary} {table.metric}: {better} is better."), Facts(facts)]


def _lead(value: float, other: float) -> str:
    lead = abs(other - value)
    return f"{score(lead)} ({lead / abs(other):.2%})" if other else score(lead)


def _space(table: SweepTable, space: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Table | Facts]:
    """The keys and their values, and the sweep's other settings."""
    rows: list[list[Cell | str]] = []
    for key, head in table.heads.items():
        values = table.values(key)
        given_values = "; ".join(f"{kind} {_listed(given)}" for kind, given in space.get(key, {}).items())
        few = len(values) <= FEW
        drawn = (
            ", ".join(map(format_value, values)) if few else f"{format_value(values[0])} to {format_value(values[-1])}"
        )
        rows.append([key, head, given_values, Cell(f"{len(values)}", len(values)), drawn])
    others = {name: _listed(value) for name, value in settings.items() if name != "space"}
    caption = "Keys of the space, what they are called below, and the values that trials had."
    return [Table(caption, ["key", "called", "drawn from", "different", "values of the trials"], rows), Facts(others)]


def _listed(value: object) -> str:
    return ", ".join(map(format_value, value)) if isinstance(value, list | tuple) else format_value(value)


def _failures(table: SweepTable, failed: Sequence[Trial]) -> Table:
    rows: list[list[Cell | str]] = [
        [Cell(f"{trial.number}", trial.number), table.point_text(trial), trial.failure, trial.folder]
        for trial in sorted(failed, key=lambda trial: trial.number)
    ]
    return Table("Trials that failed, and why.", ["trial", "values", "cause", "run folder"], rows)


def _table(table: SweepTable, ranked: pd.DataFrame) -> Table:
    """Every trial and column of the table but sums and folders."""
    first = ["trial", *table.heads, "status", "rounds", *([table.metric] if table.metric in ranked else [])]
    hidden = {"weights_sha256", "folder", "failure"}
    columns = [*first, *(name for name in ranked.columns if name not in {*first, *hidden})]
    heads = {**table.heads, **_MEGABYTES}
    rows = [[_cell(name, row[name]) for name in columns] for row in ranked.to_dict("records")]
    caption = "All trials, best first; their weights' sums and folders are in trials.parquet."
    return Table(caption, [heads.get(name, name) for name in columns], rows)


def _cell(column: str, value: Any) -> Cell | str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return Cell("-", None)
    if column in _MEGABYTES:
        return Cell(text.megabytes(value).removesuffix(" MB"), value)
    # Metrics keep their digits, which differ between trials; a key's values are few and round.
    metric = isinstance(value, float) and "." not in column
    return Cell(score(value) if metric else format_value(value), value if math.isfinite(value) else None)
