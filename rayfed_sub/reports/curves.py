"""Curves of all runs in one figure: quality over rounds and against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from rayfed_sub.core.text import (
    LOWER,
    SCORES,
    UNDEFINED,
    count,
    evenly,
    is_named,
    listed,
    number,
    rounded,
    score,
    shown,
    unit,
)
from rayfed_sub.reports.page import Cell, Details, Figure, Legend, Section, Table, cell, line_style, plain
from rayfed_sub.reports.run_reader import Run, Runs

AGAINST_BYTES = (
    *("held_out_loss", "token_accuracy", "rouge_l", "rouge_l_unicode", "accuracy", "macro_f1", "matthews"),
    *("micro_f1", "subset_accuracy", "pearson", "spearman", "mean_absolute_error"),
)
"""Scores that are also drawn against the bytes sent."""


def quality(runs: Runs) -> Section | None:
    """Every score over all held-out rows, and the training loss, over rounds."""
    figures: list[Figure] = []
    for metric in all_scores(runs):
        figures += _scores(runs, metric)
    figures += _training_loss(runs)
    classes = _classes(runs)
    if not figures:
        return None
    return Section("Quality over rounds", [*legend(runs), *figures, *classes])


def traffic(runs: Runs) -> Section | None:
    """Scores against the bytes sent until then."""
    figures = [
        figure for metric in all_scores(runs) if metric in AGAINST_BYTES for figure in _against_bytes(runs, metric)
    ]
    return Section("Quality against traffic", [*legend(runs), *figures]) if figures else None


def legend(runs: Runs) -> list[Legend]:
    """The legend for figures of several runs."""
    return [Legend(list(runs))] if len(runs) > 1 else []


def overall(run: Run, metric: str) -> pd.Series[float]:
    """A score over all held-out rows by finished rounds, empty where there is none."""
    return run.overall.get(metric, pd.Series(dtype="float64"))


def shown_scores(runs: Runs) -> list[str]:
    """The scores of SCORES over all held-out rows that any run has, without duplicates of others in every run."""
    named = {metric for run in runs.values() for metric in run.scores["metric"].unique() if is_named(metric)}
    metrics = (*SCORES, *sorted(named))
    values = {metric: [overall(run, metric).tolist() for run in runs.values()] for metric in metrics}
    return shown({metric: found for metric, found in values.items() if any(found)})


def change(metric: str, values: Sequence[float], rounds: Sequence[int]) -> str:
    """A score's change over the run as text."""
    begun = f"after {count('round', rounds[0])}" if rounds[0] else "before training"
    before = f"{number(values[0])} {begun}"
    if len(values) == 1:
        return before
    if metric not in SCORES:  # of another metric nothing says which end is the better one
        return f"{before}, {number(values[-1])} after {count('round', rounds[-1])}"
    best = min(values) if metric in LOWER else max(values)
    top = "" if best == values[-1] else f", best {number(best)} after {rounds[list(values).index(best)]}"
    return f"{before}, {number(values[-1])} after {count('round', rounds[-1])}{top}"


def all_scores(runs: Runs) -> list[str]:
    """The scores that any run has, without scores of single classes."""
    found = {metric for run in runs.values() for metric in run.scores["metric"].dropna().unique() if "/" not in metric}
    return [*shown_scores(runs), *sorted(found - set(SCORES))]


def _scores(runs: Runs, metric: str) -> list[Figure]:
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        values = overall(run, metric)
        if len(values):
            x, y = values.index.tolist(), values.tolist()
            curves.append(Curve(at, name, x, y, change(metric, y, x)))
    caption = "Over all held-out rows."
    if metric in SCORES:
        caption = f"Over all held-out rows; {'lower' if metric in LOWER else 'higher'} is better."
    if metric in UNDEFINED and any(len(overall(run, metric)) < run.evaluations for run in runs.values()):
        caption += f" Missing where it is {UNDEFINED[metric]}."
    return [overlay(_title(metric, runs), ROUNDS, curves, caption)] if curves else []


def _training_loss(runs: Runs) -> list[Figure]:
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        rows = run.rounds[run.rounds["loss"].notna()]
        if len(rows):
            x, y = (rows["round"] + 1).tolist(), rows["loss"].tolist()
            curves.append(Curve(at, name, x, y, f"{number(y[0])} in the first round, {number(y[-1])} in the last"))
    caption = "Mean over the clients' local steps of a round, each on its own rows."
    return [overlay(f"Training loss ({unit(problem(runs))})", ROUNDS, curves, caption)] if curves else []


def _against_bytes(runs: Runs, metric: str) -> list[Figure]:
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        values, total = overall(run, metric), sent(run)
        known = [rounds for rounds in values.index if rounds == 0 or rounds in total.index]
        if any(known) and total.max():
            x = [total[rounds] / 1e6 if rounds else 0.0 for rounds in known]
            y = [values[rounds] for rounds in known]
            curves.append(Curve(at, name, x, y, f"{number(y[-1])} for {number(x[-1])} MB"))
    if not curves:
        return []
    layout = log_where_wide([curve.x[-1] for curve in curves])
    if layout.get("type") == "log":  # on which the state before training, at 0 bytes, has no place
        curves = [replace(curve, x=curve.x[not curve.x[0] :], y=curve.y[not curve.x[0] :]) for curve in curves]
    caption = "Wire bytes of all clients, up and down together, from the first round to that evaluation."
    return [overlay(_title(metric, runs), Axis("MB sent up and down", layout), curves, caption)]


def sent(run: Run) -> pd.Series[float]:
    """Bytes up and down by number of finished rounds, at the end with those of clients under way."""
    total = (run.rounds["uplink_bytes"] + run.rounds["downlink_bytes"]).astype("float64").cumsum().to_numpy(copy=True)
    total[-1:] = run.sent("uplink_bytes") + run.sent("downlink_bytes")
    return pd.Series(total, index=run.rounds["round"].to_numpy("int64") + 1)


def _classes(runs: Runs) -> list[Details]:
    """F1 of every class at the end."""
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        for metric in sorted(metric for metric in run.scores["metric"].unique() if metric.startswith("f1/")):
            values = overall(run, metric)
            first = values.get(0)
            rows.append([name, metric.removeprefix("f1/"), cell(first), cell(values.iloc[-1]), cell(values.max())])
    columns = ["run", "class", "before training", "last", "best"]
    table = Table("F1 of each class over all held-out rows.", columns, rows)
    return [Details("F1 of each class", [table])] if rows else []


def problem(runs: Runs) -> str:
    """The kind of labels of all runs; of different ones that of the first."""
    return next((run.problem for run in runs.values()), "causal-lm")


def _title(metric: str, runs: Runs) -> str:
    text = score(metric, problem(runs))
    return text[0].upper() + text[1:]


_POINTS = 300
"""Most points of a curve; curves with more are thinned."""

_MARKED = 40
"""Most points with a mark each; curves with more have one at their end only."""


@dataclass(frozen=True)
class Curve:
    """A run's curve.  at: its place in the legend; summary: its phrase in a label."""

    at: int
    name: str
    x: Sequence[float]
    y: Sequence[float]
    summary: str = ""


@dataclass(frozen=True)
class Axis:
    """An x-axis.  title: quantity and unit; layout: other keys of plotly; whole: True for whole numbers only."""

    title: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False


FRAME = {"margin": {"l": 60, "r": 20, "t": 30, "b": 50}}
"""Room for ticks.  With plotly's "automargin" a figure takes twice as long."""

FROM_ZERO = {"rangemode": "tozero"}

ROUNDS = Axis("finished rounds", whole=True)


def overlay(title: str, x: Axis, curves: Sequence[Curve], caption: str, y: Mapping[str, Any] | None = None) -> Figure:
    """The curves over one x-axis.  title: quantity and unit of the y-axis; y: plotly's keys for it."""
    ticks = whole_ticks([value for curve in curves for value in curve.x]) if x.whole else {}
    summaries = [f"{curve.name}: {curve.summary}" for curve in curves if curve.summary]
    return Figure(
        title=title,
        label=f"{title} over {x.title}. {listed(summaries)}",
        caption=caption,
        data=[_trace(curve) for curve in curves],
        layout={
            "height": 300,
            "showlegend": False,
            **FRAME,
            "xaxis": {"title": {"text": plain(x.title)}, "automargin": False, **ticks, **x.layout},
            "yaxis": {"automargin": False, "nticks": 6, **(y or {})},
        },
    )


def whole_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of an axis of whole numbers, each at most once."""
    return {"dtick": 1} if max(values) - min(values) < 8 else {"tickformat": ",d", "nticks": 8}


def log_where_wide(values: Sequence[float]) -> dict[str, Any]:
    """Axis of positive amounts: logarithmic where they span more than a decade."""
    amounts = [value for value in values if value > 0]
    wide = amounts and max(amounts) >= 10 * min(amounts)
    return {"type": "log", "dtick": 1} if wide else {"nticks": 6}


def _trace(curve: Curve) -> dict[str, Any]:
    kept = evenly(range(len(curve.x)), _POINTS)
    style = line_style(curve.at)
    marked = len(kept) <= _MARKED
    size: int | list[int] = 7 if marked else [0] * (len(kept) - 1) + [8]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "meta": curve.at,
        "name": plain(curve.name),
        "x": [rounded(curve.x[at], 7) for at in kept],
        "y": [rounded(curve.y[at]) for at in kept],
        "line": {"width": 2, **style["line"]},
        "marker": {"size": size, **style["marker"]},
        "hovertemplate": f"{plain(curve.name)}<br>%{{x}}: %{{y}}<extra></extra>",
    }
