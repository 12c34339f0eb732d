"""What a run leaves behind: config.yaml, log.jsonl, rounds.parquet, clients.parquet, checkpoints/, summary.json.

Every file appears whole or not at all (written beside its place, then renamed); summary.json comes last of all, so a
folder that has it holds a finished run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from rayfed_sub.config import Config, load_config
from rayfed_sub.engine.journal import ClientRow, RoundRow, Summary
from rayfed_sub.errors import UserError


class RunFolder:
    """A run's folder, which is there already, owned by the process that started the run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
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


def check_free(path: Path) -> None:
    """UserError where `path` cannot be a new run's folder."""
    if (path / "config.yaml").exists():
        raise UserError("--out", str(path), "a folder without a run in it", "choose another or delete it")
    if path.exists() and not path.is_dir():
        raise UserError("--out", str(path), "a folder", "choose another path")


def fresh(path: Path | None, name: str) -> Path:
    """Makes a new run's folder: `path`, which must be free, or the first free of runs/<name>, runs/<name>-2 ..."""
    if path is not None:
        check_free(path)
        make(path, "--out")
        return path
    base, number = Path("runs") / name, 1
    make(base.parent, "--out")
    while True:
        candidate = base if number == 1 else base.with_name(f"{name}-{number}")
        try:
            candidate.mkdir()  # makes and claims it in one, for runs that start at the same time
        except FileExistsError:
            number += 1
        else:
            return candidate


def make(path: Path, field: str) -> None:
    """Makes the folder, and those above it.  Raises UserError, naming `field`, where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(field, str(path), "a folder that can be made", f"{error.strerror}: {error.filename}") from None


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
    """Puts a complete folder in its place; an older one of that name is only deleted after that."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
