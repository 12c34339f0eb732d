"""The figures of a sweep's report: heat maps, one key at a time, all keys at once, quality against traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayfed_sub.core import text
from rayfed_sub.reports.page import Figure, plain
from rayfed_sub.sweeps.results import FEW, Swept, Trial, score, shades, short, worded


def heat_map(swept: Swept, across: str, up: str) -> Figure:
    """The best trial of every pair of values."""
    xs, ys = swept.values(across), swept.values(up)
    cells: dict[tuple[int, int], Trial] = {}
    for trial in swept.judged:
        cells.setdefault((ys.index(trial.values[up]), xs.index(trial.values[across])), trial)
    places = [(row, column) for row in range(len(ys)) for column in range(len(xs))]
    empty = [place for place in places if place not in cells]
    faint, strong = shades([trial.metric for trial in cells.values()], swept.mode)
    bold = {place for place, trial in cells.items() if abs(trial.metric - strong) < abs(strong - faint) / 2}
    top = next(trial for trial in swept.judged if trial in cells.values())
    x, y = swept.heads[across], swept.heads[up]
    said = f"{score(top.metric)} at {x}={worded(top.values[across])} {y}={worded(top.values[up])}"
    none = f" {len(empty)} of {len(places)} cells are empty." if empty else ""
    return Figure(
        label=f"Heat map of {swept.metric} over {x} and {y}. The best cell: {said}.{none}",
        caption=f"{y} over {x}: best {said}, trial {top.number}.",
        data=[
            {
                "type": "heatmap",
                "z": _grid({place: trial.metric for place, trial in cells.items()}, places, len(xs)),
                "hovertext": _grid({place: swept.hover(trial) for place, trial in cells.items()}, places, len(xs)),
                "hoverinfo": "text",
                "hoverongaps": False,
                "xgap": 2,
                "ygap": 2,
                "coloraxis": "coloraxis",
            },
            _words({place: score(cells[place].metric) for place in places if place in bold}, "--on-strong"),
            _words({place: score(cells[place].metric) for place in cells if place not in bold}, "--on-faint"),
            _words(dict.fromkeys(empty, "-"), "--dim"),
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


def points(swept: Swept, key: str) -> Figure:
    """Every trial over one key, and the best of each value."""
    values, head = swept.values(key), swept.heads[key]
    words = any(isinstance(value, str) for value in values)
    place = {value: at if words else value for at, value in enumerate(values)}
    tops: dict[Any, Trial] = {}
    for trial in swept.judged:
        tops.setdefault(trial.values[key], trial)
    reached = [value for value in values if value in tops]
    said = [f"{worded(value)}: {score(tops[value].metric)}" for value in reached[:FEW]]
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": [place[value] for value in reached],
        "y": [swept.drawn(tops[value]) for value in reached],
        "line": {"color": "--mark"},
        "hoverinfo": "skip",
    }
    few = len(reached) == len(said)
    return Figure(
        label=f"{swept.metric} of every trial over {head}. The best of each value: {', '.join(said)}"
        f"{'.' if few else ', and so on.'}",
        caption=f"{swept.metric} of every trial{'; the line joins the best of each value' if few else ''}."
        f"{_legend(swept)}",
        data=[
            *([line] if few else []),
            _marks(swept, swept.judged, [place[trial.values[key]] for trial in swept.judged]),
        ],
        layout={
            "height": 360,
            "showlegend": False,
            "xaxis": _categories(head, values) if words else _numbers(head, values, _is_log(swept, key)),
            "yaxis": {"title": {"text": plain(swept.metric)}},
        },
    )


def traffic(swept: Swept, sent: Sequence[tuple[Trial, int]]) -> Figure:
    """The metric over the bytes that were sent, for trials with their bytes, and those that none beats in both."""
    front: list[tuple[Trial, int]] = []
    sign = {"min": 1, "max": -1}[swept.mode]
    for trial, count in sorted(sent, key=lambda pair: (pair[1], sign * pair[0].metric)):
        if not front or sign * trial.metric < sign * front[-1][0].metric:
            front.append((trial, count))
    counts = [count for _, count in sent]
    said = "; ".join(f"trial {trial.number}, {text.megabytes(count)}: {score(trial.metric)}" for trial, count in front)
    return Figure(
        label=f"{swept.metric} of every trial over the bytes sent. No trial does better with fewer bytes than {said}.",
        caption="What all clients sent and were sent over the whole run. The line joins the trials that no other "
        f"beats with as few bytes; their numbers stand beside them.{_legend(swept)}",
        data=[
            {
                "type": "scatter",
                "mode": "lines+text",
                "x": [count / 1e6 for _, count in front],
                "y": [swept.drawn(trial) for trial, _ in front],
                "text": [f"{trial.number}" for trial, _ in front],
                "textposition": "bottom left" if swept.mode == "min" else "top left",
                "line": {"color": "--mark", "shape": "hv"},
                "hoverinfo": "skip",
            },
            _marks(swept, [trial for trial, _ in sent], [count / 1e6 for count in counts]),
        ],
        layout={
            "height": 400,
            "showlegend": False,
            "xaxis": {
                "title": {"text": "sent up and down (MB)"},
                "type": "log" if 0 < 10 * min(counts) <= max(counts) else "linear",
                "tickformat": ",~r",
                "nticks": 6,
            },
            "yaxis": {"title": {"text": plain(swept.metric)}},
        },
    )


def parallel(swept: Swept) -> Figure:
    """A line per trial through all keys to the metric."""
    trials = swept.judged[::-1]  # plotly draws the last on top
    drawn = [swept.drawn(trial) for trial in trials]
    keys = [key for key in swept.heads if len(swept.values(key)) > 1]
    faint, strong = swept.shades
    top = swept.judged[0]
    beyond = sum(value != trial.metric for value, trial in zip(drawn, trials, strict=True))
    cut = f" Trials beyond {score(faint)} ({beyond}) are drawn at its end." if beyond else ""
    return Figure(
        label=f"Parallel coordinates: a line per trial through {', '.join(swept.heads.values())} to {swept.metric}. "
        f"The best: {swept.said(top)}, {score(top.metric)}. The table of trials holds the same numbers.",
        caption="A line per trial; the best are strong, and on top of the last axis. Drag along an axis to keep only "
        f"the lines that pass there, click it to have all again; drag an axis by its name to move it.{cut}",
        data=[
            {
                "type": "parcoords",
                "dimensions": [
                    *(_dimension(swept, key, trials) for key in keys),
                    {"label": plain(swept.metric), "values": drawn, "range": [faint, strong], "tickformat": ".4~g"},
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
    """The cells in rows of `width`, None where there is none."""
    row = [cells.get(place) for place in places]
    return [row[start : start + width] for start in range(0, len(row), width)]


def _words(cells: Mapping[tuple[int, int], str], color: str) -> dict[str, Any]:
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


def _marks(swept: Swept, trials: Sequence[Trial], x: Sequence[Any]) -> dict[str, Any]:
    """A mark per trial at `x`."""
    edge = {"min": "triangle-up", "max": "triangle-down"}[swept.mode]
    shapes = [edge if swept.drawn(trial) != trial.metric else "circle" for trial in trials]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": [swept.drawn(trial) for trial in trials],
        "marker": {
            "color": "--accent",
            "size": 9,
            "symbol": [
                f"{shape}-open" if trial.status == "stopped" else shape
                for shape, trial in zip(shapes, trials, strict=True)
            ],
        },
        "hovertext": [swept.hover(trial) for trial in trials],
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _legend(swept: Swept) -> str:
    """Explanation of unusual marks."""
    beyond = sum(swept.drawn(trial) != trial.metric for trial in swept.judged)
    said = f" Triangles: {text.count('trial', beyond)} beyond {score(swept.shades[0])}." if beyond else ""
    return said + (" Hollow: stopped by the scheduler." if any(t.status == "stopped" for t in swept.judged) else "")


def _dimension(swept: Swept, key: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """One axis: categories by their place, numbers as they are or by their logarithm, with ticks that say the value."""
    values = swept.values(key)
    at: dict[Any, float]
    if any(isinstance(value, str) for value in values):
        at, ticks = {value: place for place, value in enumerate(values)}, values
    elif _is_log(swept, key):
        at = {value: math.log10(value) for value in values}
        ticks = values if len(values) <= FEW else _decades(values[0], values[-1])
    else:
        at, ticks = {value: value for value in values}, values if len(values) <= FEW else []
    found = {"label": plain(swept.heads[key]), "values": [at[trial.values[key]] for trial in trials]}
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
    return axis | ({"tickvals": ticks, "ticktext": [worded(tick) for tick in ticks]} if ticks else {})


def _coloraxis(faint: float, strong: float) -> dict[str, Any]:
    return {"cmin": min(faint, strong), "cmax": max(faint, strong), "reversescale": strong < faint}


def _is_log(swept: Swept, key: str) -> bool:
    """True where a key of numbers has a logarithmic axis: drawn so, or over a decade wide and not drawn evenly."""
    low, high = swept.values(key)[0], swept.values(key)[-1]
    kind = swept.kinds.get(key)
    return bool(low > 0 and (kind == "loguniform" or (kind != "uniform" and high >= 10 * low)))


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten within, and the ends where there are fewer than two.

    >>> _decades(2e-4, 0.05)
    [0.001, 0.01]
    """
    within = [float(f"1e{power}") for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return within if len(within) > 1 else [low, high]
