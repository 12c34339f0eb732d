"""Alerts and failures of a run: skipped clients, packs trained again, resumed runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rayfed_sub.core.text import count
from rayfed_sub.diagnostics.alerts import DIAGNOSED_ROUNDS, Alert, alerts
from rayfed_sub.reports.curves import overall
from rayfed_sub.reports.page import Cell, Facts, Section, Table, Text
from rayfed_sub.reports.run_reader import Run, Runs


def failures(runs: Runs) -> Section | None:
    """Section with a row for each failure and retry; None without any."""
    rows = [[*([name] if len(runs) > 1 else []), *row] for name, run in runs.items() for row in _rows(run)]
    retries = {name: int(run.rounds["retries"].fillna(0).sum()) for name, run in runs.items()}
    lines = [f"{name}: {count('result', lost)} made again." for name, lost in retries.items() if lost]
    if not rows:
        return Section("Failures and retries", [Text(" ".join(lines))]) if lines else None
    columns = [*(["run"] if len(runs) > 1 else []), "round", "what", "who", "attempts", "cause"]
    caption = (
        "Clients that were skipped, packs that were trained again, and rounds with which a run was taken up again."
    )
    return Section("Failures and retries", [*([Text(" ".join(lines))] if lines else []), Table(caption, columns, rows)])


def _rows(run: Run) -> list[list[Cell | str]]:
    rows: list[tuple[int, list[Cell | str]]] = []
    for row in run.clients[run.clients["failure"].notna()].to_dict("records"):
        rows.append((row["round"], ["client skipped", f"client {row['client']}", Cell("-", None), str(row["failure"])]))
    packs = run.packs[(run.packs["attempts"].fillna(1) > 1) | run.packs["trouble"].notna()]
    for row in packs.to_dict("records"):
        attempts = Cell(f"{row['attempts']:g}", float(row["attempts"]))
        cause = row["trouble"] if isinstance(row["trouble"], str) else ""
        rows.append((row["round"], ["pack again", f"pack {row['pack']}, worker {row['worker']}", attempts, cause]))
    for round in run.resumed:
        rows.append((round, ["run taken up again", "", Cell("-", None), ""]))
    return [[Cell(f"{round + 1}", float(round + 1)), *cells] for round, cells in sorted(rows, key=lambda row: row[0])]


def symptoms(runs: Runs) -> Section | None:
    """Section with the alerts on each run's rows; None without alerts."""
    found = {name: symptoms_of(run) for name, run in runs.items()}
    if not any(found.values()):
        return None
    if len(runs) == 1:
        return Section("Symptoms", [Facts({one.name: one.text for raised in found.values() for one in raised})])
    rows = [[name, one.name, one.text] for name, raised in found.items() for one in raised]
    columns = ["run", "alert", "what was seen, a likely cause, a key to turn"]
    return Section("Symptoms", [Table("What the runs' rows showed at their ends.", columns, rows)])


def symptoms_of(run: Run) -> list[Alert]:
    """Alerts on a run's rows."""
    scores = overall(run, "held_out_loss")
    return alerts(
        _alert_rows(run.rounds),
        _alert_rows(_newest(run.layers)),
        _alert_rows(_newest(run.client_layers)),
        run.config,
        before=scores.get(0),
        planned=run.summary.get("planned_memory_bytes"),
    )


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["round"].isin(sorted(frame["round"].unique())[-DIAGNOSED_ROUNDS:])]


def _alert_rows(frame: pd.DataFrame) -> Sequence[Any]:
    """Rows with the columns as attributes."""
    return list(frame.itertuples(index=False, name="Row"))
