"""The table of a sweep's trials: what each was given and what came of it; without times, so that it can be compared."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rayfed_sub.storage import atomic_files

SENT = ("uplink_bytes", "downlink_bytes")
"""What a run sent in all, as its summary calls it."""


@dataclass(frozen=True)
class Ended:
    """A trial at its end.  told: what it last reported; failure: why it failed, in one line."""

    number: int
    values: Mapping[str, Any]
    told: Mapping[str, Any]
    failure: str | None

    @property
    def status(self) -> str:
        """finished, stopped by the scheduler, or failed."""
        return "failed" if self.failure else "finished" if self.told.get("finished") else "stopped"


def table(ended: Sequence[Ended], metrics: Sequence[str]) -> pd.DataFrame:
    """One row per trial, in their order: trial, the space's keys, status, rounds, metrics, uplink_bytes,
    downlink_bytes, weights_sha256, failure, folder.  Values that are lists or mappings stand as JSON."""
    rows = []
    for trial in sorted(ended, key=lambda trial: trial.number):
        told = trial.told
        values = {key: value if _plain(value) else json.dumps(value) for key, value in trial.values.items()}
        row = {"trial": trial.number, **values, "status": trial.status, "rounds": told.get("rounds", 0)}
        row |= {name: told.get(name) for name in (*metrics, *SENT, "weights_sha256")}
        rows.append({**row, "failure": trial.failure, "folder": f"trials/{trial.number:05d}"})
    whole = dict.fromkeys(SENT, "Int64") | dict.fromkeys(metrics, "float64")
    return pd.DataFrame(rows).astype({**whole, "weights_sha256": "string", "failure": "string"})


def write(frame: pd.DataFrame, path: Path) -> None:
    """trials.parquet.  Raises RunError where the disk is full."""
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    atomic_files.write(path, content.getvalue())


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
