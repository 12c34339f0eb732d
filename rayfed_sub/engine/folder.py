"""What a run leaves behind: config.yaml, log.jsonl, rounds.parquet, clients.parquet, checkpoints/, summary.json.

Every file appears whole or not at all (written beside its place, then renamed); summary.json comes last of all, so a
folder that has it holds a finished run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from rayfed_sub.config import Config, load_config
from rayfed_sub.errors import UserError


@dataclass(frozen=True)
class RoundRow:
    """One round.  Bytes are wire bytes of the whole cohort; losses in nats per label; labels: tokens that carried loss;
    change_rank: median over the target layers of the rank of the aggregated change; seconds include evaluation."""

    round: int
    clients: int
    loss: float
    held_out_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    labels: int
    change_rank: float
    train_seconds: float
    seconds: float


@dataclass(frozen=True)
class ClientRow:
    """One client's round.  loss: mean over its local steps; loss_last: at its last step, before that step."""

    round: int
    client: int
    weight: float
    uplink_bytes: int
    downlink_bytes: int
    loss: float
    loss_last: float
    labels: float
    steps: float
    periods: float


@dataclass(frozen=True)
class Summary:
    """The finished run, as summary.json.  metrics: held_out_loss and rouge_l before and after; dense_bytes: what one
    direction would have cost with dense target weights."""

    name: str
    method: str
    rounds: int
    weights_sha256: str
    uplink_bytes: int
    downlink_bytes: int
    dense_bytes: int
    change_rank: float
    wall_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    metrics: dict[str, float | None]
    versions: dict[str, str]
    environment: dict[str, Any]
    folder: str = field(default="", compare=False)


class RunFolder:
    """A run's folder, owned by the process that started the run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        _atomically(path / "config.yaml", text.encode())
        self._rounds: list[RoundRow] = []
        self._clients: list[ClientRow] = []

    def add(self, row: RoundRow, clients: Sequence[ClientRow]) -> None:
        """Notes a finished round; the log has it at once, the tables with the next `write_tables`."""
        self._rounds.append(row)
        self._clients.extend(clients)
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"event": "round", **asdict(row)}) + "\n")

    def write_tables(self) -> None:
        """rounds.parquet and clients.parquet with all rows so far."""
        import pandas as pd

        for name, rows, kind in (("rounds", self._rounds, RoundRow), ("clients", self._clients, ClientRow)):
            columns = [f.name for f in fields(kind)]
            table = pd.DataFrame([asdict(row) for row in rows], columns=columns)
            temporary = self.path / f".{name}.parquet"
            table.to_parquet(temporary, index=False)
            os.replace(temporary, self.path / f"{name}.parquet")

    def write_summary(self, summary: Summary) -> None:
        """summary.json, the last file of a run."""
        content = {key: value for key, value in asdict(summary).items() if key != "folder"}
        _atomically(self.path / "summary.json", (json.dumps(content, indent=2) + "\n").encode())


def fresh(path: Path | None, name: str) -> Path:
    """The folder of a new run: `path`, which must not hold a run yet, or the first free of runs/<name>, runs/<name>-2, ..."""
    if path is not None:
        if (path / "config.yaml").exists():
            raise UserError("--out", str(path), "a folder without a run in it", "choose another folder or delete this one")
        if path.exists() and not path.is_dir():
            raise UserError("--out", str(path), "a folder", "choose another path")
        return path
    base, number = Path("runs") / name, 1
    while (candidate := base if number == 1 else base.with_name(f"{name}-{number}")).exists():
        number += 1
    return candidate


def finished(path: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and summary of a finished run.  Raises UserError where there is none."""
    if not (path / "summary.json").is_file():
        raise UserError("RUN", str(path), "the folder of a finished run (it has a summary.json)", "check the path")
    return load_config(path / "config.yaml"), json.loads((path / "summary.json").read_text(encoding="utf-8"))


def _atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Puts a complete folder in its place."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
