"""The run folder: config.yaml, log.jsonl, tables, checkpoints/, report.html, summary.json.

The tables are rounds.parquet, clients.parquet, packs.parquet, scores.parquet, with diagnostics layers.parquet and
client_layers.parquet, and where questions are answered answers.parquet; while the run goes on they are folders of parts
under the same names (`table_parts.py`).  A model that a Python call handed over is kept in model.json and
model.safetensors (`kept_models.py`).  The report is made from all of them after the last round.

Every file appears whole or not at all; summary.json is written last, so a folder with it holds a finished run.  The
tables have every round of the newest checkpoint; later rounds are cut off when the run is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from rayfed_sub.clock.accounts import account
from rayfed_sub.clock.fleet import Floats
from rayfed_sub.config.loading import stored_config, yaml_text
from rayfed_sub.config.schema import Config, Device
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.schemas import AnswerRow, ClientLayer, CohortLayer, RoundRow, Score, ScoreRow, TimelineRow
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.storage import atomic_files, checkpoints
from rayfed_sub.storage.longer_runs import is_longer, lengthened
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.same_run import DECIDED, check_config, log_entries, logged_decisions, started
from rayfed_sub.storage.table_parts import KINDS, Table, table
from rayfed_sub.telemetry.events import Beginning, Decided, RoundDone, Summary

_OPTIONAL = ("answers", "timeline")  # tables that are there only where they have rows
_TIMES = ("began", "download_seconds", "compute_seconds", "upload_seconds", "ended")


class RunFolder:
    """A run's existing folder, owned by the process that started the run."""

    def __init__(self, place: Place) -> None:
        self.place, self.path = place, place.path
        self.rounds = table(RoundRow, [])
        self._tables = {name: Table(self.path, name) for name in KINDS}

    def begin(self, beginning: Beginning, answers: Sequence[AnswerRow] = ()) -> None:
        """Writes the initial model's answers, then the first line of the log; keeps its scores."""
        first = {"scores": _scored(0, beginning.scores), "answers": answers}
        for name, one in self._tables.items():
            if name not in _OPTIONAL or first.get(name):
                one.begin(first.get(name, ()))
        if answers:
            self._tables["answers"].write()
        atomic_files.write(self.path / "log.jsonl", _line("started", asdict(beginning)).encode() + b"\n")

    def add(self, done: RoundDone) -> None:
        """Adds a finished round: to the log at once, to the tables with the next `write_tables`."""
        atomic_files.append(self.path / "log.jsonl", _line("round", asdict(done.row)))
        n = done.row.round
        added = {"rounds": [done.row], "clients": done.client_rows, "packs": done.packs, "answers": done.answers}
        added["timeline"] = done.timeline
        added |= {"layers": done.layers, "client_layers": done.client_layers, "scores": _scored(n + 1, done.scores)}
        for name, rows in added.items():
            self._tables[name].add(n, rows)
        # Last: it decides whether the round counts.
        self.rounds = pa.concat_tables([self.rounds, table(RoundRow, [done.row])])

    def end(self, under_way: Sequence[TimelineRow]) -> None:
        """Writes the rows of clients that are under way when the run ends; cut off where it goes on."""
        if under_way:
            self._tables["timeline"].add(self.rounds.num_rows, under_way)
            self._tables["timeline"].write()

    def complete(self, scores: Sequence[Score], answers: Sequence[AnswerRow], epsilon: float | None) -> None:
        """Adds to the last round what a run's last round has: scores, answers, the privacy spent; in place of what it
        has of these."""
        finished = self.rounds.num_rows
        row = RoundRow(**self.rounds.slice(finished - 1).to_pylist()[0])
        row = replace(row, held_out_loss=overall(scores).get("held_out_loss"), epsilon=epsilon)
        new: dict[str, Sequence[Any]] = {"rounds": [row], "scores": _scored(finished, scores), "answers": answers}
        for name, rows in new.items():
            self._tables[name].replace(finished, rows)
        self.rounds = pa.concat_tables([self.rounds.slice(0, finished - 1), table(RoundRow, [row])])

    def record(self, decided: Decided) -> None:
        """Writes to the log what holds after so many rounds, before it takes effect."""
        atomic_files.append(self.path / "log.jsonl", _line(DECIDED, asdict(decided)))

    def decisions(self) -> dict[int, Decided]:
        """What the log has recorded, by finished rounds, also of rounds that are to run again."""
        return logged_decisions(self.path)

    def go_on(self, round: int) -> Beginning:
        """Cuts `round` and later rounds off log and tables, but for what was decided after them; returns the run's
        beginning.

        Raises UserError where they lack an earlier round.
        """
        beginning = self.beginning()
        converted = beginning is not None and self._tables["rounds"].cut(round)
        self.rounds = self._all("rounds")
        if self.rounds.num_rows != round or beginning is None:
            allowed = f"a run folder with {round} rounds in rounds.parquet, as its checkpoint has, and its log"
            raise UserError("--resume", str(self.path), allowed, "begin anew in another folder")
        entries = [entry for entry in log_entries(self.path) if entry["event"] != "round" or entry["round"] < round]
        atomic_files.write(self.path / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        atomic_files.append(self.path / "log.jsonl", _line("resumed", {"round": round}))
        cut = [one.cut(round) for name, one in self._tables.items() if name != "rounds"]
        self._tables["scores"].lead(_scored(0, beginning.scores))
        if converted or any(cut):
            self.place.push()  # before later parts: in the store a table's one file counts, where it has both
        return beginning

    def scores(self, rounds: int) -> list[Score]:
        """The scores after `rounds` finished rounds."""
        found = self._all("scores", lambda rows: rows.filter(compute.equal(rows["rounds"], rounds)))
        return [Score(**row) for row in found.drop_columns(["rounds"]).to_pylist()]

    def overall_scores(self) -> dict[int, dict[str, float]]:
        """The scores over all held-out rows, by finished rounds."""
        found: dict[int, list[Score]] = {}
        for row in self._all("scores", lambda rows: rows.filter(rows["client"].is_null())).to_pylist():
            found.setdefault(row.pop("rounds"), []).append(Score(**row))
        return {rounds: overall(scores) for rounds, scores in found.items()}

    def answers(self) -> list[AnswerRow]:
        """The answers of the initial model, then those of the trained one; none where nothing is answered."""
        return [AnswerRow(**row) for row in self._all("answers").to_pylist()]

    def exchanges(self) -> Iterator[tuple[int, int, float, float]]:
        """Client, finished rounds of the server that it began from, and the shares of its upload and of its download
        that crossed, of everybody who began, those included whose update did not count; a client's in the order of the
        rounds."""
        found = self._all("timeline", _begun)
        for batch in (found if found.num_rows else self._all("clients", _trained)).to_batches():
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def trained_rounds(self) -> set[int]:
        """The rounds in which the server took an update."""
        taken = self._all("clients", lambda rows: rows.filter(compute.is_null(rows["failure"])).select(["round"]))
        return set(compute.unique(taken["round"]).to_pylist())

    def simulated(self, classes: Mapping[str, Device]) -> dict[str, Any] | None:
        """The account of the timeline, by these classes of devices; None for a run without devices."""
        rows = self._all("timeline")
        return account(rows.to_pandas(), classes) if rows.num_rows else None

    def diagnosed_rounds(self, most: int) -> list[tuple[tuple[CohortLayer, ...], tuple[ClientLayer, ...]]]:
        """Diagnostics of the newest diagnosed rounds, at most so many, in order."""
        layers, client_layers = (self._tables[name].newest(most) for name in ("layers", "client_layers"))
        return [
            (
                tuple(CohortLayer(**row) for row in _in_round(n, layers).to_pylist()),
                tuple(ClientLayer(**row) for row in _in_round(n, client_layers).to_pylist()),
            )
            for n in sorted(set(layers["round"].to_pylist()))[-most:]
        ]

    def resumed(self) -> tuple[int, ...]:
        """The rounds from which the run was resumed."""
        return tuple(entry["round"] for entry in log_entries(self.path) if entry["event"] == "resumed")

    def begun(self) -> bool:
        """True where the initial model was evaluated before the run was cut off."""
        return self.beginning() is not None

    def beginning(self) -> Beginning | None:
        """The run's beginning; None where it was cut off before its initial model was evaluated."""
        first = started(self.path)
        if first is None:
            return None
        known = {field.name: first[field.name] for field in fields(Beginning) if field.name in first}
        return Beginning(**{**known, "scores": tuple(Score(**score) for score in first["scores"])})

    def write_tables(self) -> None:
        """Writes all rows that the tables on the disk lack."""
        for name, one in self._tables.items():
            if name not in _OPTIONAL or one.has_any:
                one.write()

    def write_summary(self, summary: Summary) -> None:
        """summary.json, the last file of a run, after the parts of its tables have become one file each."""
        for one in self._tables.values():
            one.merge()
        content = {key: value for key, value in asdict(summary).items() if key != "folder"}
        atomic_files.write(self.path / "summary.json", (json.dumps(content, indent=2) + "\n").encode())

    def _all(self, name: str, of: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> pa.Table:
        """The rows of a table that `of` takes from each of its parts, in order."""
        return pa.concat_tables([of(rows) for rows in self._tables[name].rows()][::-1])


def create(place: Place, config: Config) -> RunFolder:
    """Writes config.yaml, the first file of a new run, into its existing folder."""
    _write_config(place.path, config)
    return RunFolder(place)


def _write_config(path: Path, config: Config) -> None:
    atomic_files.write(path / "config.yaml", yaml_text(config.model_dump(mode="json")).encode())


def reopen(place: Place, config: Config, any_pack: bool = False) -> RunFolder:
    """The folder of a run that began with `config`, or with fewer rounds, and then is to go on to their number;
    any_pack: whether its bits are the same in any pack.

    Raises UserError naming the first setting that differs, except for those of `same_run.FREE`, and of `PACKING` with
    any_pack, and where something depended on the number of rounds; RunError where a run to lengthen is at work.
    """
    old = check_config(place.path, config, any_pack)
    if is_longer(config, old):
        with checkpoints.claim(place.path, 0):  # another run may be at work there
            _write_config(place.path, lengthened(place, old, config))
    return RunFolder(place)


def summary_of(path: Path, config: Config, any_pack: bool = False) -> Summary | None:
    """The summary of a run; None where it is not finished, or has fewer rounds than `config`.  Raises UserError as
    `reopen`."""
    old = check_config(path, config, any_pack)
    if not (path / "summary.json").exists() or is_longer(config, old):
        return None
    try:
        entries = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except ValueError as error:
        allowed, advice = "a whole file", "delete it: with --resume the run ends again from its last checkpoint"
        raise UserError("--out", str(path / "summary.json"), allowed, advice) from error
    return Summary(**{**entries, "resumed": tuple(entries["resumed"])}, folder=str(path))


def opened(place: Place, config: Config, any_pack: bool) -> RunFolder:
    """The folder of a run to resume or to begin.  Raises UserError as `reopen` and `make`."""
    if (place.path / "config.yaml").exists():
        return reopen(place, config, any_pack)
    make(place.path, "--out")
    return create(place, config)


def to_resume(place: Place | None, name: str, file: str = "config.yaml") -> Place | None:
    """Folder of the run or sweep to resume, known by its first `file`; None where none has begun."""
    if place is not None:
        return place if (place.path / file).exists() else None
    path = latest(name, file)
    return None if path is None else Place(path)


def latest(name: str, file: str = "config.yaml") -> Path | None:
    """The latest run (or sweep, by its first `file`) of this name under runs/; None where there is none."""
    found = [Path("runs") / name]
    found += [path for path in Path("runs").glob(f"{name}-*") if path.name.removeprefix(f"{name}-").isdigit()]
    begun = [path / file for path in found if (path / file).exists()]
    return max(begun, key=lambda file: file.stat().st_mtime_ns).parent if begun else None


def check_free(path: Path, file: str = "config.yaml") -> None:
    """UserError where `path` cannot be the folder of a new run or, by its first `file`, a new sweep."""
    if any((path / other).exists() for other in ("config.yaml", "sweep.yaml")):
        advice = "choose another, or go on with --resume" if (path / file).exists() else "choose another"
        raise UserError("--out", str(path), "a folder without a run in it", advice)
    if path.exists() and not path.is_dir():
        raise UserError("--out", str(path), "a folder", "choose another path")


def new(place: Place | None, name: str) -> Place:
    """The given place with its folder created, or a fresh one on this machine."""
    path = fresh(None if place is None else place.path, name)
    return Place(path, None if place is None else place.mirror)


def fresh(path: Path | None, name: str) -> Path:
    """Creates a new run's folder: `path`, which must be free, or the first free of runs/<name>, runs/<name>-2 ..."""
    if path is not None:
        check_free(path)
        make(path, "--out")
        return path
    base, number = Path("runs") / name, 1
    make(base.parent, "--out")
    while True:
        candidate = base if number == 1 else base.with_name(f"{name}-{number}")
        try:
            candidate.mkdir()  # creates and claims it at once, for runs that start together
        except FileExistsError:
            number += 1
        else:
            return candidate


def make(path: Path, field: str) -> None:
    """Creates the folder and its parents.  Raises UserError, naming `field`, where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(field, str(path), "a folder that can be made", f"{error.strerror}: {error.filename}") from None


def finished(path: Path) -> Config:
    """The configuration of a finished run.  Raises UserError where there is none."""
    if not (path / "summary.json").is_file():
        raise UserError("RUN", str(path), "the folder of a finished run (it has a summary.json)", "check the path")
    return stored_config(path)


def _begun(timeline: pa.Table) -> pa.Table:
    """The exchanges of a timeline, see `RunFolder.exchanges`."""
    began, download, work, upload, ended = (timeline[name].to_numpy() for name in _TIMES)
    sent = _crossed(began + download + work, upload, ended) * (timeline["outcome"].to_numpy() != "failed")
    exchanges = timeline.select(["client", "version"]).append_column("sent", pa.array(sent))
    return exchanges.append_column("received", pa.array(_crossed(began, download, ended)))


def _crossed(began: Floats, seconds: Floats, ended: Floats) -> Floats:
    """The shares of transfers that had crossed when they ended; exactly 1 where all had."""
    whole = ended >= began + seconds  # as `Flight` adds them up
    return np.where(whole, 1.0, np.maximum(ended - began, 0.0) / np.where(seconds > 0, seconds, 1.0))


def _trained(clients: pa.Table) -> pa.Table:
    """The exchanges of a table of clients whose rounds waited for everybody."""
    sent = compute.cast(compute.is_null(clients["failure"]), pa.float64())
    exchanges = clients.select(["client", "round"]).append_column("sent", sent)
    return exchanges.append_column("received", pa.array(np.ones(clients.num_rows)))


def _line(event: str, entry: Mapping[str, Any]) -> str:
    return json.dumps({"event": event, **entry})


def _scored(rounds: int, scores: Sequence[Score]) -> list[ScoreRow]:
    return [ScoreRow(rounds, **asdict(score)) for score in scores]


def _in_round(round: int, rows: pa.Table) -> pa.Table:
    return rows.filter(compute.equal(rows["round"], round))
