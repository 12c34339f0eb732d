"""What `diagnostics/alerts.py` makes of a run's rows, first of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from rayfed_sub.diagnostics.alerts import LOOKS, Alert, alerts
from rayfed_sub.reports.curves import overall
from rayfed_sub.reports.page import Facts, Section, Table
from rayfed_sub.reports.run_reader import Run, Runs


def noticed(runs: Runs) -> Section | None:
    """The alerts that each run showed at its end, None where none did."""
    found = {name: symptoms_of(run) for name, run in runs.items()}
    if not any(found.values()):
        return None
    if len(runs) == 1:
        return Section("Symptoms", [Facts({one.name: one.text for told in found.values() for one in told})])
    rows = [[name, one.name, one.text] for name, told in found.items() for one in told]
    columns = ["run", "alert", "what was seen, a likely cause, a key to turn"]
    return Section("Symptoms", [Table("What the runs' rows showed at their ends.", columns, rows)])


def symptoms_of(run: Run) -> list[Alert]:
    """Those that a run's rows show."""
    scores = overall(run, "held_out_loss")
    return alerts(
        _rows(run.rounds),
        _rows(_newest(run.layers)),
        _rows(_newest(run.client_layers)),
        run.config,
        before=scores.get(0),
        planned=run.summary.get("planned_memory_bytes"),
    )


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["round"].isin(sorted(frame["round"].unique())[-LOOKS:])]


def _rows(frame: pd.DataFrame) -> Sequence[Any]:
    """With the columns' names as attributes."""
    return list(frame.itertuples(index=False, name="Row"))
