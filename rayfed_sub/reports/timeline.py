"""Timeline of packs by worker, and planned and measured memory."""

from __future__ import annotations

from typing import Any

import pandas as pd

from rayfed_sub.core.text import count, duration, number, rounded
from rayfed_sub.reports.curves import FRAME, FROM_ZERO, ROUNDS, Curve, legend, overlay
from rayfed_sub.reports.layer_metrics import DETAILED
from rayfed_sub.reports.page import Cell, Details, Figure, Section, Table, cell, plain
from rayfed_sub.reports.run_reader import Run, Runs

_BARS = 1000
"""Most bars that a browser draws quickly; of more packs, several of a worker share a bar."""


def timeline(runs: Runs) -> Section | None:
    """Section with a bar per pack and worker, for each run."""
    shown = [name for name, run in runs.items() if len(run.packs)][:DETAILED]
    if not shown:
        return None
    if len(runs) == 1:
        return Section("Workers", [_figure(run) for run in runs.values()])
    return Section("Workers", [Details(name, [_figure(runs[name])], opened=name == shown[0]) for name in shown])


def clocked(run: Run) -> pd.DataFrame:
    """The packs with `began` in seconds since the first one; the time between the sessions of a
    resumed run is left out."""
    packs = run.packs.astype({"began": "float64", "seconds": "float64"})
    session = packs["round"].map(lambda round: sum(again <= round for again in set(run.resumed)))
    began, end = packs["began"].copy(), 0.0
    for _, rows in packs.groupby(session):
        shifted = rows["began"] - rows["began"].min() + end
        began.loc[rows.index] = shifted
        end = float((shifted + rows["seconds"]).max())
    return packs.assign(began=began)


def bars(packs: pd.DataFrame, most: int = _BARS) -> tuple[pd.DataFrame, str]:
    """Bars with columns worker, began, end, round, last (round), clients, packs; and the meaning of a bar."""
    packs = packs.assign(end=packs["began"] + packs["seconds"], last=packs["round"], packs=1)
    columns = ["worker", "round", "last", "began", "end", "clients", "packs", "first"]
    if len(packs) <= most:
        return packs[columns], "a pack of clients"
    rounds, workers = packs["round"].max() + 1, packs["worker"].nunique()
    together = max(1, -(-rounds * workers // most))
    groups = packs.assign(group=packs["round"] // together).groupby(["group", "worker"], as_index=False)
    drawn = groups.agg(
        round=("round", "min"),
        last=("last", "max"),
        began=("began", "min"),
        end=("end", "max"),
        clients=("clients", "sum"),
        packs=("packs", "sum"),
        first=("first", "first"),
    )
    return drawn[columns], f"a worker's packs of {'one round' if together == 1 else f'{together} rounds'}"


def _figure(run: Run) -> Figure:
    packs = clocked(run)
    drawn, what = bars(packs)
    troubled = packs[(packs["attempts"].fillna(1) > 1) | packs["trouble"].notna()]
    workers = sorted({int(worker) for worker in packs["worker"]})
    whole = float((packs["began"] + packs["seconds"]).max())
    busy = float(packs["seconds"].sum()) / (whole * len(workers)) if whole else 0.0
    again = f" {count('pack', len(troubled))} had to be trained again." if len(troubled) else ""
    summary = (
        f"{count('pack', len(packs))} on {count('worker', len(workers))} in {duration(whole)}; workers trained for "
    )
    summary += f"{min(busy, 1.0):.0%} of that time.{_useful(packs)}"
    turn = drawn["round"].rank(method="dense")
    # Rounds in turn are strong and faint, so that their borders show.
    parity = [(drawn[turn % 2 == side], colour) for side, colour in ((0, "--accent"), (1, "--dim"))]
    marks = [_marks(troubled)] if len(troubled) else []
    return Figure(
        title="Packs by worker",
        label=f"Timeline of workers: {summary}{again}",
        caption=f"{summary} Each bar: {what}; rounds alternate in colour; the rest is evaluation, aggregation and "
        f"waiting.{again}{' A cross marks where.' if again else ''}",
        data=[*(_bars(rows, colour) for rows, colour in parity if len(rows)), *marks],
        layout={
            "height": 110 + max(26 * len(workers), 60),
            "barmode": "overlay",
            "bargap": 0.25,
            "showlegend": False,
            "margin": {**FRAME["margin"], "l": 90},
            "xaxis": {
                "title": {"text": "seconds since the first pack"},
                "automargin": False,
                "nticks": 8,
                "rangemode": "tozero",
            },
            "yaxis": {
                "type": "category",
                "automargin": False,
                "categoryorder": "array",
                "categoryarray": [_worker(worker) for worker in workers],
                "range": [len(workers) - 0.5, -0.5],
                "showgrid": False,
            },
        },
    )


def _useful(packs: pd.DataFrame) -> str:
    """The share of real tokens among those that linear layers saw; nothing where no pack tells it."""
    computed = float(packs["computed"].sum()) if "computed" in packs else 0.0
    if not computed:
        return ""
    return f" {float(packs['tokens'].sum()) / computed:.1%} of what linear layers computed were real tokens or images."


def _bars(rows: pd.DataFrame, colour: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "y": [_worker(worker) for worker in rows["worker"]],
        "base": [rounded(began, 7) for began in rows["began"]],
        "x": [rounded(end - began) for began, end in zip(rows["began"], rows["end"], strict=True)],
        "marker": {"color": colour, "line": {"width": 1, "color": "--page"}},
        "hovertext": [_hover_text(row) for row in rows.to_dict("records")],
        "hoverinfo": "text",
    }


def _hover_text(row: dict[Any, Any]) -> str:
    rounds = (
        f"round {row['round'] + 1}"
        if row["round"] == row["last"]
        else f"rounds {row['round'] + 1} to {row['last'] + 1}"
    )
    packs = f"{count('pack', int(row['packs']))}, " if row["packs"] > 1 else ""
    first = f" from client {row['first']}" if row["packs"] == 1 else ""
    return f"{rounds}<br>{packs}{count('client', int(row['clients']))}{first}<br>{duration(row['end'] - row['began'])}"


def _marks(troubled: pd.DataFrame) -> dict[str, Any]:
    notes = []
    for row in troubled.fillna({"attempts": 1}).to_dict("records"):
        trouble = [plain(row["trouble"])] if isinstance(row["trouble"], str) else []
        attempts = f"round {row['round'] + 1}, pack {row['pack']}: {count('attempt', int(row['attempts']))}"
        notes.append("<br>".join([attempts, *trouble]))
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [rounded(began, 7) for began in troubled["began"]],
        "y": [_worker(worker) for worker in troubled["worker"]],
        "marker": {"symbol": "x", "size": 11, "color": "--mark", "line": {"width": 1, "color": "--page"}},
        "hovertext": notes,
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _worker(worker: int) -> str:
    return f"worker {worker}"


def memory(runs: Runs) -> Section | None:
    """Section with the memory of all processes of a run over rounds, and the plan."""
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        planned, peak = run.summary.get("planned_memory_bytes"), _peak(run)
        if peak:
            share = cell(100 * peak / planned if planned else None)
            rows.append([name, cell(planned / 1e6 if planned else None), cell(peak / 1e6), share])
    if not rows:
        return None
    figures = _over_rounds(runs)
    caption = "All processes of a run together, the highest since it was last begun; planned: by rayfed-sub plan."
    table = Table(caption, ["run", "planned (MB)", "peak (MB)", "peak / planned (%)"], rows)
    return Section("Memory", [*(legend(runs) if figures else []), *figures, table, *_on_gpus(runs)])


def _on_gpus(runs: Runs) -> list[Table]:
    """A row for each worker on a GPU."""
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        planned = run.summary.get("planned_gpu_bytes")
        for worker, peak in sorted((run.summary.get("gpu_memory") or {}).items()):
            allocated, reserved = peak["allocated"], peak["reserved"]
            share = cell(100 * allocated / planned if planned else None)
            megabytes = [cell(planned / 1e6 if planned else None), cell(allocated / 1e6), cell(reserved / 1e6)]
            rows.append([name, worker, *megabytes, share])
    caption = (
        "Workers on GPUs, by node and process: tensors at most, planned and allocated, and the memory that torch kept "
        "for them; a context of about 600 MB comes on top."
    )
    columns = ["run", "worker", "planned (MB)", "allocated (MB)", "reserved (MB)", "allocated / planned (%)"]
    return [Table(caption, columns, rows)] if rows else []


def _peak(run: Run) -> float:
    measured = run.rounds["memory_bytes"].dropna()
    return max(float(run.summary.get("peak_memory_bytes") or 0), float(measured.max()) if len(measured) else 0.0)


def _over_rounds(runs: Runs) -> list[Figure]:
    curves = []
    for at, (name, run) in enumerate(runs.items()):
        rows = run.rounds[run.rounds["memory_bytes"].notna()]
        if rows.empty:
            continue
        x, y = (rows["round"] + 1).tolist(), (rows["memory_bytes"].astype("float64") / 1e6).tolist()
        planned = run.summary.get("planned_memory_bytes")
        beside = f" of {number(planned / 1e6)} planned" if planned else ""
        curves.append(Curve(at, name, x, y, f"at most {number(max(y))} MB{beside}"))
        if planned and len(runs) == 1:
            curves.append(Curve(1, "planned", [x[0], x[-1]], [planned / 1e6] * 2))
    caption = "At each round's end."
    if any(curve.name == "planned" for curve in curves):
        caption += " The dashed line: what was planned at most, with Ray and the command's own process."
    return [overlay("Memory of coordinator and workers (MB)", ROUNDS, curves, caption, FROM_ZERO)] if curves else []
