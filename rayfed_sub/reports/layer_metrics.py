"""Ranks, drift and all else that is known of every layer in every round: curves of all runs, heat maps of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rayfed_sub.core.text import count, evenly, listed, number, rounded, short_names
from rayfed_sub.reports.curves import legend
from rayfed_sub.reports.lines import FRAME, FROM_ZERO, ROUNDS, Axis, Curve, overlay, whole_ticks
from rayfed_sub.reports.page import Details, Figure, Section, Text, line_style, plain
from rayfed_sub.reports.quantities import QUANTITIES, Quantity, figures
from rayfed_sub.reports.run_reader import Run, Runs

DETAILED = 6
"""Runs that have heat maps and a table of clients of their own."""
_ROUNDS, _LAYERS = 80, 64
"""Columns and rows of a heat map; of more, evenly spaced ones are shown."""
_NAMED = 20
"""Layers that are named beside a heat map."""
_NAME = 22
"""Characters of a layer's name there."""
_WIDE = 8
"""Pixels of a character there."""
_SPECTRA = 3
"""Layers whose spectrum is drawn."""


def layers(runs: Runs) -> Section | None:
    """Every quantity, as its median over layers and layer by layer."""
    known = {name: figures(run) for name, run in runs.items()}
    medians = [figure for quantity in QUANTITIES if (figure := _median(known, quantity)) is not None]
    if not medians:
        return None
    steps = _against_steps(runs, known)
    shown = [name for name in runs if not known[name].empty][:DETAILED]
    ends = {quantity.name: _ends([known[name] for name in shown], quantity.name) for quantity in QUANTITIES}
    said = "Of the clients whose round was looked at, at most as many as diagnostics.clients says."
    if len([name for name in runs if not known[name].empty]) > DETAILED:
        said += f" Layer by layer only for the first {DETAILED} runs."
    details = [
        Details(
            "Layer by layer" if len(runs) == 1 else f"{name}, layer by layer",
            _pictures(runs[name], known[name], ends),
            opened=len(runs) == 1,
        )
        for name in shown
    ]
    return Section("Ranks, drift and subspaces", [Text(said), *legend(runs), *medians, *steps, *details])


def _median(known: Mapping[str, pd.DataFrame], quantity: Quantity) -> Figure | None:
    curves = []
    for at, (name, frame) in enumerate(known.items()):
        values = frame.groupby("round")[quantity.name].median().dropna()
        if len(values):
            y = values.tolist()
            first, last = values.index[0] + 1, values.index[-1] + 1
            said = f"{number(y[0])} in round {first}, {number(y[-1])} in round {last}"
            curves.append(Curve(at, name, (values.index + 1).tolist(), y, said))
            if quantity.name == "rank" and len(known) == 1:
                bounds = frame.groupby("round")["bound"].median().dropna()
                said = f"{number(bounds.iloc[-1])} in round {last}" if len(bounds) else ""
                curves += [Curve(1, "bound", (bounds.index + 1).tolist(), bounds.tolist(), said)] if said else []
    if not curves:
        return None
    caption = f"Median over layers. {quantity.meaning}"
    if len(curves) > len(known):
        caption += " The dashed line: its bound, the sum of the clients' ranks or the full rank."
    return overlay(quantity.title, ROUNDS, curves, caption, FROM_ZERO)


def _against_steps(runs: Runs, known: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """How far the weights have moved for the steps that a client took."""
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        values = known[name].groupby("round")["accumulated"].median().dropna()
        steps = steps_until(run)
        at_hand = [round for round in values.index if round in steps.index]
        if at_hand:
            x, y = [steps[round] for round in at_hand], [values[round] for round in at_hand]
            curves.append(Curve(at, name, x, y, f"{number(y[-1])} after {number(x[-1])} steps"))
    axis = Axis("local steps of a client", {"nticks": 6})
    caption = "Median over layers of how far the weights have moved, against a client's optimiser steps until then: "
    caption += "mean over the round's clients, added up."
    title = "Accumulated change against local steps"
    return [overlay(title, axis, curves, caption, FROM_ZERO)] if curves else []


def steps_until(run: Run) -> pd.Series[float]:
    """Local steps until the end of each round: the mean over its clients that were not skipped, added up."""
    trained = run.clients[run.clients["failure"].isna()]
    return trained.groupby("round")["steps"].mean().astype("float64").cumsum()


def _ends(frames: Sequence[pd.DataFrame], name: str) -> tuple[float, float]:
    """The values that are drawn faintest and strongest in all runs: from 0, so that colours compare."""
    values = pd.concat([frame[name] for frame in frames]).dropna() if frames else pd.Series(dtype="float64")
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return min(low, 0.0), max(high, 1e-12)


def _pictures(run: Run, frame: pd.DataFrame, ends: Mapping[str, tuple[float, float]]) -> list[Text | Figure]:
    names = list(dict.fromkeys(frame["layer"]))
    short = short_names(names)
    shown = evenly(range(len(names)), _LAYERS)
    called = {names[at]: short[names[at]] for at in shown}
    maps = [_heat_map(frame, quantity, called, ends[quantity.name]) for quantity in QUANTITIES if quantity.mapped]
    found: list[Text | Figure] = [picture for picture in maps if picture is not None]
    found += _spectra(run, names, short)
    if len(shown) < len(names):
        return [Text(f"{len(shown)} of {len(names)} layers, evenly spaced."), *found]
    return found


def _heat_map(
    frame: pd.DataFrame, quantity: Quantity, called: Mapping[str, str], ends: tuple[float, float]
) -> Figure | None:
    """layer x round."""
    known = frame[frame[quantity.name].notna() & frame["layer"].isin(list(called))]
    if known.empty:
        return None
    grid = known.pivot_table(index="layer", columns="round", values=quantity.name)
    grid = grid.reindex([name for name in called if name in grid.index])
    grid = grid[evenly(grid.columns.tolist(), _ROUNDS)]
    rows, rounds = [called[name] for name in grid.index], [int(round) + 1 for round in grid.columns]
    low, high = ends
    named = list(range(0, len(rows), -(-len(rows) // _NAMED)))
    ticks = [rows[at][-_NAME:] for at in named]
    top = known.iloc[int(known[quantity.name].to_numpy().argmax())]
    last = known[known["round"] == known["round"].max()][quantity.name]
    return Figure(
        title=quantity.title,
        label=f"{quantity.title}: heat map of {count('layer', len(rows))} over rounds {rounds[0]} to {rounds[-1]}. "
        f"From {number(known[quantity.name].min())} to {number(known[quantity.name].max())}, the highest in layer "
        f"{called[top['layer']]}, round {int(top['round']) + 1}; in the last round from {number(last.min())} to "
        f"{number(last.max())}.",
        caption=quantity.meaning,
        data=[
            {
                "type": "heatmap",
                "x": rounds,
                "y": [plain(name) for name in rows],
                "z": [[rounded(value) for value in row] for row in grid.to_numpy().tolist()],
                "hovertemplate": "layer %{y}<br>round %{x}: %{z}<extra></extra>",
                "coloraxis": "coloraxis",
                "hoverongaps": False,
            }
        ],
        layout={
            "height": 120 + max(16 * len(rows), 90),
            "margin": {**FRAME["margin"], "l": 24 + _WIDE * max(map(len, ticks)), "r": 70, "b": 60},
            "xaxis": {
                "title": {"text": "round"},
                "automargin": False,
                **whole_ticks(rounds),
                "showgrid": False,
            },
            "yaxis": {
                "type": "category",
                "tickvals": named,
                "ticktext": [plain(tick) for tick in ticks],
                "automargin": False,
                "range": [len(rows) - 0.5, -0.5],
                "showgrid": False,
            },
            "coloraxis": {"cmin": rounded(low), "cmax": rounded(high), "colorbar": {"nticks": 5}},
        },
    )


def _spectra(run: Run, names: Sequence[str], short: Mapping[str, str]) -> list[Figure]:
    """Singular values of the aggregate in a few layers, in the first and the last round that was looked at."""
    rows = run.layers[[len(values) > 0 for values in run.layers["spectrum"].map(_values)]]
    rounds = sorted({*rows["round"].head(1), *rows["round"].tail(1)})
    chosen = [names[at] for at in evenly(range(len(names)), _SPECTRA)]
    data: list[dict[str, Any]] = []
    spoken = []
    for at, name in enumerate(chosen):
        for round in rounds:
            found = rows[(rows["layer"] == name) & (rows["round"] == round)]["spectrum"].map(_values)
            values = [value for value in (found.iloc[0] if len(found) else []) if value > 0]
            if values:
                said = f"layer {short[name]}, round {round + 1}"
                data.append(_spectrum(at, said, values, "dot" if round == rounds[0] != rounds[-1] else "solid"))
                spoken.append(f"{said}: {number(values[0])} falling to {number(values[-1])} over {len(values)}")
    if not data:
        return []
    drawn, places = ([value for trace in data for value in trace[axis]] for axis in ("y", "x"))
    decades = math.log10(max(drawn) / min(drawn))
    ticks = {"dtick": math.ceil(decades / 6)} if decades > 1 else {"nticks": 6}
    return [
        Figure(
            title="Spectrum of the aggregate",
            label=f"Singular values of the clients' mean change, largest first. {listed(spoken)}",
            caption="The largest singular values of the clients' mean change; a steep fall means that few directions "
            "carry it.",
            data=data,
            layout={
                "height": 380,
                "margin": {**FRAME["margin"], "b": 130},
                "xaxis": {"title": {"text": "singular value"}, "automargin": False, **whole_ticks(places)},
                "yaxis": {"type": "log", "automargin": False, "exponentformat": "power", **ticks},
                "legend": {"orientation": "h", "y": -0.25, "yanchor": "top"},
            },
        )
    ]


def _values(spectrum: Any) -> list[float]:
    """A table's list, which may be missing."""
    return [] if spectrum is None or isinstance(spectrum, float) else [float(value) for value in spectrum]


def _spectrum(at: int, name: str, values: Sequence[float], dash: str) -> dict[str, Any]:
    style = line_style(at)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(name),
        "x": list(range(1, len(values) + 1)),
        "y": [rounded(value) for value in values],
        "line": {**style["line"], "dash": dash},
        "marker": {"size": 5, **style["marker"]},
        "hovertemplate": f"{plain(name)}<br>%{{x}}: %{{y}}<extra></extra>",
    }
