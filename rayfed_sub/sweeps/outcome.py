"""Files of a finished sweep: trials.parquet, curves.parquet, best.yaml, report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from ray.tune import ResultGrid

from rayfed_sub.config.loading import yaml_text
from rayfed_sub.config.schema import Config
from rayfed_sub.storage import atomic_files
from rayfed_sub.storage.remote import Place
from rayfed_sub.sweeps.progress import failure_of
from rayfed_sub.sweeps.results import Ended, best, curves, table, write
from rayfed_sub.sweeps.space import METRICS, Sweep
from rayfed_sub.sweeps.sweep_report import write_report
from rayfed_sub.sweeps.trial import values_of


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.  frame: see `table`; best: number and configuration of the best trial, None where none has the
    metric; grid: Ray Tune's results."""

    frame: pd.DataFrame
    best: tuple[int, Config] | None
    grid: ResultGrid
    folder: str


def outcome(sweep: Sweep, grid: ResultGrid, place: Place) -> SweepResult:
    """Writes table, best configuration and report from Tune's results."""
    search, folder = sweep.search, place.path
    ended = [
        Ended(int(Path(one.path).name), values_of(one.config), one.metrics or {}, failure_of(one.error)) for one in grid
    ]
    known = [name for name in METRICS if any(name in trial.reported for trial in ended)]
    scores = [column for name in known for column in (f"{name}_before", name)]
    frame, along = table(ended, [*scores, *(["sent_bytes"] if search.metric == "sent_bytes" else [])]), curves(ended)
    write(frame, folder / "trials.parquet")
    write(along, folder / "curves.parquet")
    values = {trial.number: trial.values for trial in ended}
    number = best(frame, search.metric, search.mode)
    found = None
    if number is not None:
        config = sweep.config(values[number]).model_copy(update={"name": f"{sweep.name}-best"})
        text = f"# Trial {number} of {sweep.name}, the best by {search.metric}.\n"
        atomic_files.write(folder / "best.yaml", (text + yaml_text(config.model_dump(mode="json"))).encode())
        found = (number, config)
    settings = search.model_dump(mode="json", exclude_none=True)
    keys, page = list(search.space), folder / "report.html"
    write_report(frame, keys, search.metric, search.mode, sweep.name, page, settings, along)
    return SweepResult(frame, found, grid, place.display_name())
