"""Reader of run folders, of finished, running and interrupted runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from rayfed_sub.clock.timeline_rows import UNFINISHED
from rayfed_sub.config.loading import stored_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.text import first_distinct, problem_of
from rayfed_sub.storage.table_parts import place

_COLUMNS = {
    "rounds": (
        *("round", "clients", "failed", "loss", "held_out_loss", "uplink_bytes", "downlink_bytes", "labels"),
        *("change_rank", "epsilon", "train_seconds", "seconds", "retries", "memory_bytes"),
    ),
    "clients": (
        *("round", "client", "weight", "uplink_bytes", "downlink_bytes", "loss", "loss_last", "labels", "steps"),
        *("periods", "failure"),
    ),
    "scores": ("rounds", "client", "metric", "value", "count", "split"),
    "answers": ("rounds", "row", "client", "question", "reference", "answer"),
    "layers": (
        *("round", "layer", "clients", "norm", "rank", "rank_sum", "stable_rank", "effective_rank", "truncated"),
        *("cross_term", "overlap", "agreement", "drift", "accumulated", "server_rank", "spectrum", "full_rank"),
    ),
    "client_layers": (
        *("round", "client", "layer", "norm", "rank", "stable_rank", "effective_rank", "cosine", "distance"),
        *("turned", "gradient_energy", "gradient_rank", "spectrum"),
    ),
    "timeline": (
        *("round", "client", "device", "version", "began", "download_seconds", "compute_seconds", "upload_seconds"),
        *("ended", "round_ended", "idle_seconds", "outcome", "downlink_bytes", "uplink_bytes", "steps", "tokens"),
        "joules",
    ),
    "packs": (
        "round",
        "pack",
        "clients",
        "first",
        "worker",
        "began",
        "seconds",
        "tokens",
        "computed",
        "attempts",
        "trouble",
    ),
}
"""The tables of a run folder and their columns; a missing table is empty, a missing column has missing values."""


@dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    The columns of each table are those of the run's records; values may be missing (NaN) in any of them.  summary:
    summary.json, empty where the run is not finished.  resumed: the rounds from which it was resumed.  rows: the
    task's `RowCounts`, empty for runs of older versions.
    """

    folder: Path
    config: Config
    summary: Mapping[str, Any]
    rounds: pd.DataFrame
    clients: pd.DataFrame
    scores: pd.DataFrame
    answers: pd.DataFrame
    layers: pd.DataFrame
    client_layers: pd.DataFrame
    packs: pd.DataFrame
    timeline: pd.DataFrame
    versions: Mapping[str, Any]
    environment: Mapping[str, Any]
    resumed: tuple[int, ...]
    rows: Mapping[str, int]

    @property
    def method(self) -> str:
        """Names of the method and its hook."""
        return self.config.method_in_words

    @cached_property
    def overall(self) -> Mapping[str, pd.Series[float]]:
        """Every score over all held-out rows, by finished rounds."""
        rows = self.scores[self.scores["client"].isna()]
        found = {
            str(metric): pd.Series(own["value"].to_numpy("float64"), index=own["rounds"].to_numpy("int64"))
            for metric, own in rows.groupby("metric", sort=False)
        }
        if "held_out_loss" not in found:  # a run that was cut off has its rounds in the log alone
            known = self.rounds[self.rounds["held_out_loss"].notna()]
            index = known["round"].to_numpy("int64") + 1
            found["held_out_loss"] = pd.Series(known["held_out_loss"].to_numpy("float64"), index=index)
        return {metric: values.dropna().sort_index() for metric, values in found.items()}

    @cached_property
    def of_clients(self) -> pd.DataFrame:
        """Each client's scores at the last evaluation, without scores of single classes: client x metric."""
        rows = self.scores[self.scores["client"].notna() & ~self.scores["metric"].astype("str").str.contains("/")]
        rows = rows[rows["rounds"] == rows["rounds"].max()].astype({"client": "int64", "value": "float64"})
        table: pd.DataFrame = rows.pivot_table(index="client", columns="metric", values="value")
        return table

    @property
    def problem(self) -> str:
        """The kind of labels that the run learns, of `text.SCORES_OF`."""
        return problem_of(self.scores["metric"].dropna().astype("str").unique())

    def sent(self, direction: str) -> int:
        """Bytes of a direction (`uplink_bytes`, `downlink_bytes`), of clients under way at the run's end too."""
        left = self.timeline["outcome"] == UNFINISHED
        return int(self.rounds[direction].sum() + self.timeline.loc[left, direction].sum())

    @property
    def evaluations(self) -> int:
        """Number of evaluations."""
        return len(self.overall["held_out_loss"])

    @property
    def done(self) -> int:
        """Number of finished rounds."""
        return len(self.rounds)


Runs = Mapping[str, Run]
"""Runs by their names in the report, in the given order."""


def read_run(folder: Path, display_name: str | None = None) -> Run:
    """The run in a folder, finished or not.  display_name: shown in place of the folder's path.

    Raises UserError where there is no run, or where it cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        sweep = (folder / "sweep.yaml").is_file()
        advice = f"a sweep's own report is {folder / 'report.html'}" if sweep else "check the path"
        raise UserError("RUN", str(folder), "the folder of a run (it has a config.yaml)", advice)
    try:
        config = stored_config(folder)
        log = _log(folder / "log.jsonl")
        summary = _summary(folder / "summary.json")
        tables = {name: _table(place(folder, name), columns) for name, columns in _COLUMNS.items()}
    except (ValueError, OSError) as error:  # UserError is a ValueError; so are pyarrow's and json's
        raise UserError("RUN", str(folder), "a run folder that this version can read", str(error)) from None
    first = next((entry for entry in log if entry["event"] == "started"), {})
    if not summary:  # the log is ahead of the tables, which are written with the checkpoints
        logged = {entry["round"]: entry for entry in log if entry["event"] == "round"}
        if len(logged) > len(tables["rounds"]):
            tables["rounds"] = _framed(list(logged.values()), _COLUMNS["rounds"])
    if tables["scores"].empty and first.get("scores"):
        tables["scores"] = _framed([{"rounds": 0, **score} for score in first["scores"]], _COLUMNS["scores"])
    return Run(
        folder=Path(display_name or folder),
        config=config,
        summary=summary,
        **tables,
        versions=summary.get("versions") or first.get("versions") or {},
        environment=summary.get("environment") or first.get("environment") or {},
        resumed=tuple(entry["round"] for entry in log if entry["event"] == "resumed"),
        rows=summary.get("rows") or first.get("rows") or {},
    )


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by their names or methods, or by the shortest unique ends of their paths."""
    parts = [run.folder.resolve().parts for run in runs]
    longest = max(map(len, parts))
    tails = (["/".join(path[-length:]) for path in parts] for length in range(1, longest + 1))
    names = first_distinct([[run.config.name for run in runs], [run.method for run in runs], *tails])
    return dict(zip(names, runs, strict=True))


def _log(path: Path) -> list[dict[str, Any]]:
    """The log's complete lines, without a last one that is being written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _summary(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _table(path: Path | None, columns: Sequence[str]) -> pd.DataFrame:
    return (pd.DataFrame() if path is None else pd.read_parquet(path)).reindex(columns=list(columns))


def _framed(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).reindex(columns=list(columns))
    numbers = [name for name in columns if name not in ("metric", "failure")]
    return frame.astype({name: "float64" for name in numbers if frame[name].dtype == object})
