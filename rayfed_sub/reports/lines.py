"""Curves of all runs in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayfed_sub.core.text import evenly, listed, rounded
from rayfed_sub.reports.page import Figure, line_style, plain

_POINTS = 300
"""Points of a curve; one with more is thinned."""
_MARKED = 40
"""A curve with more points has no marks on it but at its end."""


@dataclass(frozen=True)
class Curve:
    """A run's curve.  at: its place in the legend; said: what of it a label tells, in words and numbers."""

    at: int
    name: str
    x: Sequence[float]
    y: Sequence[float]
    said: str = ""


@dataclass(frozen=True)
class Axis:
    """title: what is on it, with its unit; layout: plotly's keys for the rest; whole: whether it counts."""

    title: str
    layout: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False


FRAME = {"margin": {"l": 60, "r": 20, "t": 30, "b": 50}}
"""Room for ticks.  A figure that finds out for itself how much they need, with "automargin", takes twice as long."""
FROM_ZERO = {"rangemode": "tozero"}

ROUNDS = Axis("finished rounds", whole=True)


def overlay(title: str, x: Axis, curves: Sequence[Curve], caption: str, y: Mapping[str, Any] | None = None) -> Figure:
    """The curves over one x-axis.  title: what is on the y-axis, with its unit; y: plotly's keys for it."""
    ticks = whole_ticks([value for curve in curves for value in curve.x]) if x.whole else {}
    spoken = [f"{curve.name}: {curve.said}" for curve in curves if curve.said]
    return Figure(
        title=title,
        label=f"{title} over {x.title}. {listed(spoken)}",
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
    """Ticks of an axis that counts: at whole numbers, none of which stands there twice."""
    return {"dtick": 1} if max(values) - min(values) < 8 else {"tickformat": ",d", "nticks": 8}


def log_where_wide(values: Sequence[float]) -> dict[str, Any]:
    """An axis of amounts: by their logarithm where they span more than a decade."""
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
