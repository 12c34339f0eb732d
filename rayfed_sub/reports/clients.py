"""Clients in a report: differences between them, and a table."""

from __future__ import annotations

import pandas as pd

from rayfed_sub.core.text import LOWER, SCORES, count, evenly, number, rounded, score, shown, unit
from rayfed_sub.reports.curves import ROUNDS, Axis, Curve, legend, overlay, problem
from rayfed_sub.reports.layer_metrics import DETAILED
from rayfed_sub.reports.page import Cell, Details, Figure, Section, Table, Text, cell
from rayfed_sub.reports.run_reader import Run, Runs

_SHARES = 201
"""Most points of a curve over clients."""
_DROPPED = ("late", "stale", "offline")
"""Outcomes of clients that are in no table but the timeline, but for those under way at the run's end."""


def clients(runs: Runs) -> Section | None:
    """Scores of clients from best to worst, and for each run their losses over rounds and their table."""
    shown = [name for name, run in runs.items() if len(run.clients) or len(run.timeline)][:DETAILED]
    if not shown:
        return None
    tables = {name: table(runs[name]) for name in shown}
    counts = {name: count("client", len(found.rows)) for name, found in tables.items()}
    unequal = [figure for metric in ("held_out_loss", "accuracy", "micro_f1") for figure in _unequal(runs, metric)]
    details = [
        Details(
            counts[name] if len(runs) == 1 else f"{name}: {counts[name]}",
            [*_spread(runs[name]), tables[name]],
            opened=len(runs) == 1,
        )
        for name in shown
    ]
    few = [Text(f"Tables of the first {DETAILED} runs.")] if len(shown) < len(runs) else []
    return Section("Clients", [*(legend(runs) if unequal else []), *unequal, *few, *details])


def table(run: Run) -> Table:
    """A row per client that was sampled at least once, of whose rounds none need have counted."""
    by_client = per_client(run)
    heads = {
        **{"rounds": "times counted", "skipped": "skipped", "dropped": "dropped", "weight": "weight"},
        **{"steps": "local steps", "up": "up (MB)", "down": "down (MB)"},
        **{"loss_first": "first loss", "loss_last": "last loss"},
        **{"cosine": "cosine to mean", "distance": "distance to mean", "turned": "subspace kept"},
    }
    columns = ["client", *(str(name) for name in by_client if by_client[name].notna().any())]
    rows: list[list[Cell | str]] = [
        [Cell(f"{client}", float(client)), *map(cell, values)]
        for client, *values in by_client[columns[1:]].itertuples(name=None)
    ]
    caption = "Each client that was sampled. weight: what its last update counted for, such as its rows or 1"
    caption += ", discounted by its staleness. " if run.config.federation.mode == "async" else ". "
    if "dropped" in columns:
        caption += "dropped: rounds that it began and whose update did not count, for it came late or not at all. "
    if len(run.timeline):
        caption += "up, down: of every round that it began. "
    per_label = "squared errors" if run.problem == "regression" else "in nats per label"
    caption += f"local steps: of the rounds that counted. Losses: means over a round's, {per_label}. "
    if "cosine" in columns:
        caption += "cosine, distance: of its change to the cohort's mean change, over the layers and rounds looked at. "
    if {*SCORES} & {*columns}:
        caption += "Scores: at the last evaluation, over held-out rows like its own."
    return Table(caption.strip(), [heads.get(name, score(name).partition(" (")[0]) for name in columns], rows)


def per_client(run: Run) -> pd.DataFrame:
    """Table of clients over the whole run, float64, by client; columns as in `table`."""
    rows = run.clients.astype({name: "float64" for name in run.clients if name not in ("failure", "round", "client")})
    skipped = rows["failure"].notna()
    trained = rows[~skipped].sort_values("round", kind="stable").groupby("client")
    every = rows.assign(skipped=skipped.astype("float64")).groupby("client")
    begun = run.timeline if len(run.timeline) else rows  # the clients' table has no rows of those dropped
    sent = begun.groupby("client")[["uplink_bytes", "downlink_bytes"]].sum() / 1e6
    found = pd.DataFrame(
        {
            "rounds": trained.size(),
            "skipped": every["skipped"].sum(),
            "dropped": run.timeline[run.timeline["outcome"].isin(_DROPPED)].groupby("client").size(),
            "weight": trained["weight"].last(),
            "steps": trained["steps"].sum(),
            "up": sent["uplink_bytes"],
            "down": sent["downlink_bytes"],
            "loss_first": trained["loss"].first(),
            "loss_last": trained["loss"].last(),
        },
        dtype="float64",
    )
    found = found.set_index(found.index.astype("int64")).sort_index()  # that of no rows is of another type
    numbers = ["rounds", "skipped", "dropped", "steps"]
    found[numbers] = found[numbers].fillna(0.0)
    found = found.drop(columns=[name for name in ("skipped", "dropped") if not found[name].any()])
    looked = ["cosine", "distance", "turned"]
    seen = run.client_layers[["client", *looked]].astype(dict.fromkeys(looked, "float64"))
    found = found.join(seen.groupby("client")[looked].mean())
    scores = run.of_clients
    return found.join(scores[shown({str(metric): scores[metric].dropna().tolist() for metric in scores})])


def _unequal(runs: Runs, metric: str) -> list[Figure]:
    """A score of all clients, sorted; a flat curve means equal quality for all."""
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        scores = run.of_clients
        values = sorted(scores[metric].dropna().tolist(), reverse=metric not in LOWER) if metric in scores else []
        if len(values) > 1:
            kept = evenly(range(len(values)), _SHARES)
            x, y = [100 * place / (len(values) - 1) for place in kept], [values[place] for place in kept]
            curves.append(Curve(at, name, x, y, f"best {number(y[0])}, worst {number(y[-1])}"))
    words = score(metric, problem(runs))
    title = f"{words[0].upper()}{words[1:]} of clients, best to worst"
    axis = Axis("share of clients (%)", {"nticks": 6})
    caption = "At the last evaluation, over held-out rows like each client's own: the flatter, the more alike."
    return [overlay(title, axis, curves, caption)] if curves else []


def _spread(run: Run) -> list[Figure]:
    """Median and range of clients' losses over rounds."""
    trained = run.clients[run.clients["failure"].isna()]
    losses = trained.dropna(subset=["loss"]).astype({"loss": "float64"}).groupby("round")["loss"]
    if losses.ngroups < 2 or losses.size().max() < 2:
        return []
    low, middle, high = (losses.quantile(share) for share in (0.1, 0.5, 0.9))
    rounds = evenly(middle.index.tolist(), _SHARES)
    caption = f"Median {number(middle.iloc[0])} in the first round, {number(middle.iloc[-1])} in the last; from "
    caption += f"{number(low.iloc[-1])} to {number(high.iloc[-1])} there"
    figure = overlay(
        f"Training loss of clients ({unit(run.problem)})",
        ROUNDS,
        [Curve(0, "median", [round + 1 for round in rounds], [middle[round] for round in rounds], caption)],
        "Median over the round's clients whose updates counted; the band holds the middle four fifths of them.",
    )
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": [round + 1 for round in rounds] + [round + 1 for round in rounds[::-1]],
        "y": [rounded(high[round]) for round in rounds] + [rounded(low[round]) for round in rounds[::-1]],
        "fill": "toself",
        "fillcolor": "--faint",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    median = {key: value for key, value in figure.data[0].items() if key != "meta"}  # no run of the legend
    return [Figure(figure.label, figure.caption, [band, median], figure.layout, title=figure.title)]
