"""The figures of a sweep's report: heat maps, one key at a time, all keys at once, quality against what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_sub.core import text
from rayfed_sub.reports.page import Figure, plain
from rayfed_sub.sweeps.results import FEW, SweepTable, Trial, format_value, score, shades, short


def heat_map(table: SweepTable, across: str, up: str) -> Figure:
    """Heat map of two keys: the best trial of every pair of values."""
    xs, ys = table.values(across), table.values(up)
    cells: dict[tuple[int, int], Trial] = {}
    for trial in table.judged:
        cells.setdefault((ys.index(trial.values[up]), xs.index(trial.values[across])), trial)
    places = [(row, column) for row in range(len(ys)) for column in range(len(xs))]
    empty = [place for place in places if place not in cells]
    faint, strong = shades([trial.metric for trial in cells.values()], table.mode)
    bold = {place for place, trial in cells.items() if abs(trial.metric - strong) < abs(strong - faint) / 2}
    top = next(trial for trial in table.judged if trial in cells.values())
    x, y = table.heads[across], table.heads[up]
    summary = f"{score(top.metric)} at {x}={format_value(top.values[across])} {y}={format_value(top.values[up])}"
    none = f" {len(empty)} of {len(places)} cells are empty." if empty else ""
    return Figure(
        label=f"Heat map of {table.metric} over {x} and {y}. The best cell: {summary}.{none}",
        caption=f"{y} over {x}: best {summary}, trial {top.number}.",
        data=[
            {
                "type": "heatmap",
                "z": _grid({place: trial.metric for place, trial in cells.items()}, places, len(xs)),
                "hovertext": _grid({place: table.hover(trial) for place, trial in cells.items()}, places, len(xs)),
                "hoverinfo": "text",
                "hoverongaps": False,
                "xgap": 2,
                "ygap": 2,
                "coloraxis": "coloraxis",
            },
            _cell_texts({place: score(cells[place].metric) for place in places if place in bold}, "--on-strong"),
            _cell_texts({place: score(cells[place].metric) for place in cells if place not in bold}, "--on-faint"),
            _cell_texts(dict.fromkeys(empty, "-"), "--dim"),
        ],
        layout={
            "height": 130 + max(44 * len(ys), 110),
            "showlegend": False,
            "xaxis": {**_categories(x, xs), "showgrid": False, "fixedrange": True},
            "yaxis": {**_categories(y, ys), "showgrid": False, "fixedrange": True},
            "coloraxis": {**_coloraxis(faint, strong), "showscale": False},
        },
        width=110 + 56 * len(xs),
    )


def points(table: SweepTable, key: str) -> Figure:
    """Scatter plot of the metric over one key, with the best trial of each value."""
    values, head = table.values(key), table.heads[key]
    words = any(isinstance(value, str) for value in values)
    place = {value: at if words else value for at, value in enumerate(values)}
    tops: dict[Any, Trial] = {}
    for trial in table.judged:
        tops.setdefault(trial.values[key], trial)
    reached = [value for value in values if value in tops]
    bests = [f"{format_value(value)}: {score(tops[value].metric)}" for value in reached[:FEW]]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [place[value] for value in reached],
        "y": [table.drawn(tops[value]) for value in reached],
        "line": {"color": "--mark"},
        "hoverinfo": "skip",
    }
    few = len(reached) == len(bests)
    return Figure(
        label=f"{table.metric} of every trial over {head}. The best of each value: {', '.join(bests)}"
        f"{'.' if few else ', and so on.'}",
        caption=f"{table.metric} of every trial{'; the line joins the best of each value' if few else ''}."
        f"{_legend(table)}",
        data=[
            *([line] if few else []),
            _marks(table, table.judged, [place[trial.values[key]] for trial in table.judged]),
        ],
        layout={
            "height": 360,
            "showlegend": False,
            "xaxis": _categories(head, values) if words else _numbers(head, values, _is_log(table, key)),
            "yaxis": {"title": {"text": plain(table.metric)}},
        },
    )


@dataclass(frozen=True)
class Spending:
    """Something that trials spend: how to say it, and how much of it a trial took, None where that is not known."""

    axis: str
    words: str
    less: str
    caption: str
    unit: float
    text: Callable[[float], str]
    of: Callable[[Trial], float | None]


SPENDING = (
    Spending(
        axis="sent up and down (MB)",
        words="the bytes sent",
        less="with fewer bytes",
        caption="What all clients sent and were sent over the whole run",
        unit=1e6,
        text=text.megabytes,
        of=lambda trial: trial.sent,
    ),
    Spending(
        axis="simulated hours",
        words="simulated hours",
        less="in fewer hours",
        caption="Hours of the whole run by the virtual clock of its devices",
        unit=1.0,
        text=lambda hours: f"{text.number(hours)} h",
        of=lambda trial: trial.hours,
    ),
    Spending(
        axis="energy (kJ)",
        words="energy",
        less="with less energy",
        caption="Energy of training over the whole run, of devices whose power is known",
        unit=1e3,
        text=lambda joules: f"{text.number(joules / 1e3)} kJ",
        of=lambda trial: trial.joules,
    ),
)


def spends(table: SweepTable, spending: Spending) -> bool:
    """Whether any trial that can be compared is known to have spent some of it."""
    return any(spending.of(trial) for trial in table.judged)


def against(table: SweepTable, spending: Spending) -> Figure:
    """Scatter plot of the metric over what trials spent, with the Pareto front."""
    spent = [(trial, amount) for trial in table.judged if (amount := spending.of(trial)) is not None]
    front: list[tuple[Trial, float]] = []
    sign = {"min": 1, "max": -1}[table.mode]
    for trial, amount in sorted(spent, key=lambda pair: (pair[1], sign * pair[0].metric)):
        if not front or sign * trial.metric < sign * front[-1][0].metric:
            front.append((trial, amount))
    amounts = [amount for _, amount in spent]
    summary = "; ".join(
        f"trial {trial.number}, {spending.text(amount)}: {score(trial.metric)}" for trial, amount in front
    )
    return Figure(
        label=f"{table.metric} of every trial over {spending.words}. "
        f"No trial does better {spending.less} than {summary}.",
        caption=f"{spending.caption}. The line joins the trials that no other beats with as little; "
        f"their numbers stand beside them.{_legend(table)}",
        data=[
            {
                "type": "scatter",
                "mode": "lines+text",
                "x": [amount / spending.unit for _, amount in front],
                "y": [table.drawn(trial) for trial, _ in front],
                "text": [f"{trial.number}" for trial, _ in front],
                "textposition": "bottom left" if table.mode == "min" else "top left",
                "line": {"color": "--mark", "shape": "hv"},
                "hoverinfo": "skip",
            },
            _marks(table, [trial for trial, _ in spent], [amount / spending.unit for amount in amounts]),
        ],
        layout={
            "height": 400,
            "showlegend": False,
            "xaxis": {
                "title": {"text": spending.axis},
                "type": "log" if 0 < 10 * min(amounts) <= max(amounts) else "linear",
                "tickformat": ",~r",
                "nticks": 6,
            },
            "yaxis": {"title": {"text": plain(table.metric)}},
        },
    )


def parallel(table: SweepTable) -> Figure:
    """Parallel coordinates: a line per trial through all keys to the metric."""
    trials = table.judged[::-1]  # plotly draws the last on top
    drawn = [table.drawn(trial) for trial in trials]
    keys = [key for key in table.heads if len(table.values(key)) > 1]
    faint, strong = table.shades
    top = table.judged[0]
    beyond = sum(value != trial.metric for value, trial in zip(drawn, trials, strict=True))
    cut = f" Trials beyond {score(faint)} ({beyond}) are drawn at its end." if beyond else ""
    return Figure(
        label=f"Parallel coordinates: a line per trial through {', '.join(table.heads.values())} to {table.metric}. "
        f"The best: {table.point_text(top)}, {score(top.metric)}. The table of trials holds the same numbers.",
        caption="A line per trial; the best are strong, and on top of the last axis. Drag along an axis to keep only "
        f"the lines that pass there, click it to have all again; drag an axis by its name to move it.{cut}",
        data=[
            {
                "type": "parcoords",
                "dimensions": [
                    *(_dimension(table, key, trials) for key in keys),
                    {"label": plain(table.metric), "values": drawn, "range": [faint, strong], "tickformat": ".4~g"},
                ],
                "line": {"color": drawn, "coloraxis": "coloraxis"},
            }
        ],
        layout={
            "height": 440,
            "margin": {"l": 80, "r": 80, "t": 80, "b": 30},
            "coloraxis": {**_coloraxis(faint, strong), "showscale": False},
        },
        width=200 + 110 * len(keys),
    )


def _grid(cells: Mapping[tuple[int, int], Any], places: Sequence[tuple[int, int]], width: int) -> list[list[Any]]:
    """The cells in rows of `width`, None for an empty cell."""
    row = [cells.get(place) for place in places]
    return [row[start : start + width] for start in range(0, len(row), width)]


def _cell_texts(cells: Mapping[tuple[int, int], str], color: str) -> dict[str, Any]:
    """Text in cells of a heat map."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": [column for _, column in cells],
        "y": [row for row, _ in cells],
        "text": list(cells.values()),
        "textfont": {"color": color},
        "hoverinfo": "skip",
    }


def _marks(table: SweepTable, trials: Sequence[Trial], x: Sequence[Any]) -> dict[str, Any]:
    """A mark per trial at `x`."""
    edge = {"min": "triangle-up", "max": "triangle-down"}[table.mode]
    shapes = [edge if table.drawn(trial) != trial.metric else "circle" for trial in trials]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": [table.drawn(trial) for trial in trials],
        "marker": {
            "color": "--accent",
            "size": 9,
            "symbol": [
                f"{shape}-open" if trial.status == "stopped" else shape
                for shape, trial in zip(shapes, trials, strict=True)
            ],
        },
        "hovertext": [table.hover(trial) for trial in trials],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _legend(table: SweepTable) -> str:
    """Explanation of unusual marks."""
    beyond = sum(table.drawn(trial) != trial.metric for trial in table.judged)
    summary = f" Triangles: {text.count('trial', beyond)} beyond {score(table.shades[0])}." if beyond else ""
    return summary + (" Hollow: stopped by the scheduler." if any(t.status == "stopped" for t in table.judged) else "")


def _dimension(table: SweepTable, key: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Axis of a key in parallel coordinates: categories by place, numbers linear or logarithmic, ticks as values."""
    values = table.values(key)
    at: dict[Any, float]
    if any(isinstance(value, str) for value in values):
        at, ticks = {value: place for place, value in enumerate(values)}, values
    elif _is_log(table, key):
        at = {value: math.log10(value) for value in values}
        ticks = values if len(values) <= FEW else _decades(values[0], values[-1])
    else:
        at, ticks = {value: value for value in values}, values if len(values) <= FEW else []
    found = {"label": plain(table.heads[key]), "values": [at[trial.values[key]] for trial in trials]}
    found["range"] = [min(at.values()), max(at.values())]
    if ticks:
        found["tickvals"] = [at[tick] if tick in at else math.log10(tick) for tick in ticks]
        found["ticktext"] = [short(tick) for tick in ticks]  # not `plain`: here plotly takes text as it is
    return found


def _categories(title: str, values: Sequence[Any]) -> dict[str, Any]:
    """An axis of values by their place, evenly spaced."""
    return {
        "title": {"text": plain(title)},
        "tickvals": list(range(len(values))),
        "ticktext": [plain(short(value)) for value in values],
        "range": [-0.5, len(values) - 0.5],
        "zeroline": False,
    }


def _numbers(title: str, values: Sequence[Any], log: bool) -> dict[str, Any]:
    """An axis of numbers, with a tick at each value while they are few."""
    axis: dict[str, Any] = {"title": {"text": plain(title)}, "type": "log" if log else "linear"}
    ticks = values if len(values) <= FEW else _decades(values[0], values[-1]) if log else []
    return axis | ({"tickvals": ticks, "ticktext": [format_value(tick) for tick in ticks]} if ticks else {})


def _coloraxis(faint: float, strong: float) -> dict[str, Any]:
    return {"cmin": min(faint, strong), "cmax": max(faint, strong), "reversescale": strong < faint}


def _is_log(table: SweepTable, key: str) -> bool:
    """True for a logarithmic axis: a key drawn from loguniform, or wider than a decade and not from uniform."""
    low, high = table.values(key)[0], table.values(key)[-1]
    kind = table.kinds.get(key)
    return bool(low > 0 and (kind == "loguniform" or (kind != "uniform" and high >= 10 * low)))


def _decades(low: float, high: float) -> list[float]:
    """Ticks: the powers of ten in the range, and its ends where there are fewer than two.

    >>> _decades(2e-4, 0.05)
    [0.001, 0.01]
    """
    within = [float(f"1e{power}") for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return within if len(within) > 1 else [low, high]
