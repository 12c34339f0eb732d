"""Diagnostics by layer and round: their meanings, curves of all runs, heat maps of each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rayfed_sub.core.text import count, evenly, listed, number, rounded, short_names
from rayfed_sub.reports.curves import FRAME, FROM_ZERO, ROUNDS, Axis, Curve, legend, overlay, whole_ticks
from rayfed_sub.reports.page import Details, Figure, Section, Text, line_style, plain
from rayfed_sub.reports.run_reader import Run, Runs

DETAILED = 6
"""Most runs with heat maps and a table of clients."""
_ROUNDS, _LAYERS = 80, 64
"""Most columns and rows of a heat map; of more, evenly spaced ones are shown."""
_NAMED = 20
"""Most layers to name beside a heat map."""
_NAME = 22
"""Most characters of a layer's name there."""
_WIDE = 8
"""Pixels of a character there."""
_SPECTRA = 3
"""Most layers with a spectrum."""


def layers(runs: Runs) -> Section | None:
    """Every quantity, as its median over layers and layer by layer."""
    known = {name: figures(run) for name, run in runs.items()}
    medians = [figure for quantity in QUANTITIES if (figure := _median(known, quantity)) is not None]
    if not medians:
        return None
    steps = _against_steps(runs, known)
    shown = [name for name in runs if not known[name].empty][:DETAILED]
    ends = {quantity.name: _ends([known[name] for name in shown], quantity.name) for quantity in QUANTITIES}
    caption = "Of the clients whose round was looked at, at most as many as diagnostics.clients says."
    if len([name for name in runs if not known[name].empty]) > DETAILED:
        caption += f" Layer by layer only for the first {DETAILED} runs."
    details = [
        Details(
            "Layer by layer" if len(runs) == 1 else f"{name}, layer by layer",
            _pictures(runs[name], known[name], ends),
            opened=len(runs) == 1,
        )
        for name in shown
    ]
    return Section("Ranks, drift and subspaces", [Text(caption), *legend(runs), *medians, *steps, *details])


def _median(known: Mapping[str, pd.DataFrame], quantity: Quantity) -> Figure | None:
    curves = []
    for at, (name, frame) in enumerate(known.items()):
        values = frame.groupby("round")[quantity.name].median().dropna()
        if len(values):
            y = values.tolist()
            first, last = values.index[0] + 1, values.index[-1] + 1
            summary = f"{number(y[0])} in round {first}, {number(y[-1])} in round {last}"
            curves.append(Curve(at, name, (values.index + 1).tolist(), y, summary))
            if quantity.name == "rank" and len(known) == 1:
                bounds = frame.groupby("round")["bound"].median().dropna()
                summary = f"{number(bounds.iloc[-1])} in round {last}" if len(bounds) else ""
                curves += [Curve(1, "bound", (bounds.index + 1).tolist(), bounds.tolist(), summary)] if summary else []
    if not curves:
        return None
    caption = f"Median over layers. {quantity.meaning}"
    if len(curves) > len(known):
        caption += " The dashed line: its bound, the sum of the clients' ranks or the full rank."
    return overlay(quantity.title, ROUNDS, curves, caption, FROM_ZERO)


def _against_steps(runs: Runs, known: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """Distance of the weights over a client's local steps."""
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        values = known[name].groupby("round")["accumulated"].median().dropna()
        steps = steps_until(run)
        measured = [round for round in values.index if round in steps.index]
        if measured:
            x, y = [steps[round] for round in measured], [values[round] for round in measured]
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
    """Values of the faintest and the strongest colour in all runs, from 0, so that colours can be compared."""
    values = pd.concat([frame[name] for frame in frames]).dropna() if frames else pd.Series(dtype="float64")
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return min(low, 0.0), max(high, 1e-12)


def _pictures(run: Run, frame: pd.DataFrame, ends: Mapping[str, tuple[float, float]]) -> list[Text | Figure]:
    names = list(dict.fromkeys(frame["layer"]))
    short = short_names(names)
    shown = evenly(range(len(names)), _LAYERS)
    labels = {names[at]: short[names[at]] for at in shown}
    # In one pass: pandas takes ten times as long for each quantity by itself.
    mapped = [quantity for quantity in QUANTITIES if quantity.mapped]
    values = [quantity.name for quantity in mapped if frame[quantity.name].notna().any()]
    known = frame[frame["layer"].isin(list(labels))]
    grids = known.pivot_table(index="layer", columns="round", values=values).reindex(list(labels)) if values else known
    maps = [
        _heat_map(pd.DataFrame(grids[each.name]), each, labels, ends[each.name])
        for each in mapped
        if each.name in values
    ]
    found: list[Text | Figure] = [picture for picture in maps if picture is not None]
    found += _spectra(run, names, short)
    if len(shown) < len(names):
        return [Text(f"{len(shown)} of {len(names)} layers, evenly spaced."), *found]
    return found


def _heat_map(
    values: pd.DataFrame, quantity: Quantity, labels: Mapping[str, str], ends: tuple[float, float]
) -> Figure | None:
    """Heat map of a quantity; values: layer x round, NaN where unknown."""
    known = values.dropna(how="all").dropna(how="all", axis="columns")
    if known.empty:
        return None
    grid = known[evenly(known.columns.tolist(), _ROUNDS)]
    rows, rounds = [labels[name] for name in grid.index], [int(round) + 1 for round in grid.columns]
    low, high = ends
    named = list(range(0, len(rows), -(-len(rows) // _NAMED)))
    ticks = [rows[at][-_NAME:] for at in named]
    every_RL = known.to_numpy().T
    at_round, at_layer = np.unravel_index(np.nanargmax(every_RL), every_RL.shape)
    last = every_RL[-1]
    return Figure(
        title=quantity.title,
        label=f"{quantity.title}: heat map of {count('layer', len(rows))} over rounds {rounds[0]} to {rounds[-1]}. "
        f"From {number(np.nanmin(every_RL))} to {number(np.nanmax(every_RL))}, the highest in layer "
        f"{rows[at_layer]}, round {int(known.columns[int(at_round)]) + 1}; in the last round from "
        f"{number(np.nanmin(last))} to {number(np.nanmax(last))}.",
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
    """Singular values of the aggregate in a few layers, in the first and the last diagnosed round."""
    rows = run.layers[[len(values) > 0 for values in run.layers["spectrum"].map(_values)]]
    rounds = sorted({*rows["round"].head(1), *rows["round"].tail(1)})
    chosen = [names[at] for at in evenly(range(len(names)), _SPECTRA)]
    data: list[dict[str, Any]] = []
    summaries = []
    for at, name in enumerate(chosen):
        for round in rounds:
            found = rows[(rows["layer"] == name) & (rows["round"] == round)]["spectrum"].map(_values)
            values = [value for value in (found.iloc[0] if len(found) else []) if value > 0]
            if values:
                line = f"layer {short[name]}, round {round + 1}"
                data.append(_spectrum(at, line, values, "dot" if round == rounds[0] != rounds[-1] else "solid"))
                summaries.append(f"{line}: {number(values[0])} falling to {number(values[-1])} over {len(values)}")
    if not data:
        return []
    drawn, places = ([value for trace in data for value in trace[axis]] for axis in ("y", "x"))
    decades = math.log10(max(drawn) / min(drawn))
    ticks = {"dtick": math.ceil(decades / 6)} if decades > 1 else {"nticks": 6}
    return [
        Figure(
            title="Spectrum of the aggregate",
            label=f"Singular values of the clients' mean change, largest first. {listed(summaries)}",
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
    """A list from a table, which may be missing."""
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


@dataclass(frozen=True)
class Quantity:
    """A quantity of a layer.  name: column of `figures`; meaning: for a caption; mapped: True with a heat map, too."""

    name: str
    title: str
    meaning: str
    mapped: bool = True


QUANTITIES = (
    Quantity("rank", "Rank of the aggregate", "Rank of the clients' mean change. LoRA's factors cannot hold more "
             "than their own rank of it."),
    Quantity("inflation", "Rank against its bound", "Rank of the mean change over its bound, the sum of the "
             "clients' ranks or the layer's full rank: at 1 no client's directions are another's; at 1 / clients all "
             "are the same."),
    Quantity("effective_rank", "Effective rank of the aggregate", "The exponential of the entropy of its singular "
             "values: how many directions carry it, weak ones counted less."),
    Quantity("stable_rank", "Stable rank of the aggregate", "Squared Frobenius norm over squared largest singular "
             "value: near 1 where one direction dominates."),
    Quantity("server_rank", "Rank of the server's change", "Of what the server changed in the round, after "
             "aggregation, truncation and merging.", mapped=False),
    Quantity("drift", "Client drift", "Distance of the clients' changes from their mean, over the mean's norm: 0 where "
             "all are alike; sqrt(clients - 1) where they are orthogonal."),
    Quantity("agreement", "Agreement of the clients", "Mean cosine between two clients' changes: 1 where they point "
             "the same way, 0 where they have nothing in common."),
    Quantity("overlap", "Overlap of the clients' subspaces", "1 where two clients' strongest directions span the same "
             "subspace; for random ones about rank / width."),
    Quantity("truncated", "Lost by truncation", "Share of the aggregate's norm that is thrown away when it is cut to a "
             "client's rank, which is what FlexLoRA does."),
    Quantity("cross_term", "Cross term", "What averaging B and A apart misses of the mean of B A, over its norm: "
             "FedIT's error."),
    Quantity("gradient_energy", "Gradient energy in the subspace's rank", "Share of a client's squared gradient norm "
             "in its strongest r directions: near 1 where gradients are low-rank. Mean over the clients looked at."),
    Quantity("gradient_rank", "Effective rank of the gradients", "Of a client's first gradient in the round. Mean over "
             "the clients looked at.", mapped=False),
    Quantity("turned", "Kept by the clients' subspaces", "1 where a client's subspace is the same after its round as "
             "before; mean over the clients looked at.", mapped=False),
    Quantity("norm", "Norm of the aggregate", "Frobenius norm of the clients' mean change in the round, in the "
             "weights' unit.", mapped=False),
    Quantity("accumulated", "Accumulated change", "Norm of what the weight has moved from the pretrained one, over the "
             "pretrained one's norm."),
)  # fmt: skip

_OF_CLIENTS = ("gradient_energy", "gradient_rank", "turned")


def figures(run: Run) -> pd.DataFrame:
    """A row per round and layer with every quantity's column, float64, NaN where unknown; and `bound`, the
    upper bound of the aggregate's rank."""
    layers = run.layers[["round", "layer"]].copy()
    for quantity in QUANTITIES:
        if quantity.name in run.layers:
            layers[quantity.name] = pd.to_numeric(run.layers[quantity.name]).astype("float64")
    bounds = run.layers[["rank_sum", "full_rank"]].astype("float64")
    layers["bound"] = bounds.where(bounds > 0).min(axis="columns")
    layers["inflation"] = layers["rank"] / layers["bound"]
    clients = run.client_layers[["round", "layer", *_OF_CLIENTS]]
    clients = clients.astype(dict.fromkeys(_OF_CLIENTS, "float64"))
    means = clients.groupby(["round", "layer"], as_index=False, sort=False)[list(_OF_CLIENTS)].mean()
    return layers.merge(means, on=["round", "layer"], how="left")
