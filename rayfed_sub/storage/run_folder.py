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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute

from rayfed_sub.clock.accounts import account
from rayfed_sub.clock.fleet import TRACE
from rayfed_sub.config.checks import not_given
from rayfed_sub.config.loading import flat, stored_config, yaml_text
from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.schemas import AnswerRow, ClientLayer, CohortLayer, RoundRow, Score, ScoreRow, TimelineRow
from rayfed_sub.data.fingerprint import Fingerprint
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.methods import with_defaults
from rayfed_sub.models.start import StartInfo
from rayfed_sub.storage import atomic_files, checkpoints
from rayfed_sub.storage.longer_runs import ROUNDS, check_longer, is_longer, lengthened
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.table_parts import KINDS, Table, table
from rayfed_sub.telemetry.events import Beginning, Decided, RoundDone, Summary

FREE = (
    *("resources.workers", "resources.state_memory", "resources.deadline", "resources.activation_checkpointing"),
    *("checkpoint.every", "federation.on_client_failure", "trackers"),
    *("diagnostics.every", "diagnostics.clients", "diagnostics.layers", "diagnostics.gradient_layers"),
)
"""Settings that may differ when a run is resumed: they do not change the weights."""
PACKING = ("resources.pack_size", "evaluation.batch_size")
"""Settings that may differ too where the bits are the same in any pack (`planning/packs.py`)."""


_OPTIONAL = ("answers", "timeline")  # tables that are there only where they have rows
_DECIDED = "decided"  # the log's entry of what holds from a round on


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
        atomic_files.append(self.path / "log.jsonl", _line(_DECIDED, asdict(decided)))

    def decisions(self) -> dict[int, Decided]:
        """What the log has recorded, by finished rounds, also of rounds that are to run again."""
        return _decisions(self.path)

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
        entries = [entry for entry in _entries(self.path) if entry["event"] != "round" or entry["round"] < round]
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

    def clients(self) -> int:
        """Clients that took part in any round."""
        return len({client for rows in self._tables["clients"].rows() for client in rows["client"].to_pylist()})

    def simulated(self) -> dict[str, Any] | None:
        """The account of the timeline; None for a run without devices."""
        rows = self._all("timeline")
        return account(rows.to_pandas()) if rows.num_rows else None

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
        return tuple(entry["round"] for entry in _entries(self.path) if entry["event"] == "resumed")

    def begun(self) -> bool:
        """True where the initial model was evaluated before the run was cut off."""
        return self.beginning() is not None

    def beginning(self) -> Beginning | None:
        """The run's beginning; None where it was cut off before its initial model was evaluated."""
        first = _started(_entries(self.path))
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

    Raises UserError naming the first setting that differs, except for those in `FREE`, and in `PACKING` with any_pack,
    and where something depended on the number of rounds; RunError where a run to lengthen is at work.
    """
    old = _check_config(place.path, config, any_pack)
    if is_longer(config, old):
        with checkpoints.claim(place.path, 0):  # another run may be at work there
            _write_config(place.path, lengthened(place, old, config))
    return RunFolder(place)


def _check_config(path: Path, config: Config, any_pack: bool) -> Config:
    """The stored configuration."""
    old, free = stored_config(path), (*FREE, *PACKING) if any_pack else FREE
    if old.resources.first_pack == config.resources.first_pack:  # `auto` keeps it where bits depend on packs
        free = (*free, PACKING[0])
    if is_longer(config, old):
        free = (*free, ROUNDS)
    if old.devices.trace is not None and config.devices.trace is not None:
        free = (*free, TRACE)  # `check_code` compares the lines, wherever the file lies
    then, now = (one.model_copy(update={"method": with_defaults(one.method)}) for one in (old, config))
    check_same(then.model_dump(mode="json"), now.model_dump(mode="json"), free, f"the run in {path}")
    if is_longer(config, old):
        stops = (decided for decided in _decisions(path).values() if decided.stop is not None)
        check_longer(path, old, config, next(stops, None))
    return old


_ROUNDS = "federation.rounds"


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str], where: str) -> None:
    """UserError naming the first key whose value differs, except for the free ones; where: the run or sweep that began
    with `old`, for the message."""
    before, now = flat(old), flat(new)
    for field in ("method.rank_pattern", "method.alpha_pattern"):  # the first pattern that matches counts
        then, asked = ([key for key in keys if key.startswith(f"{field}.")] for keys in (before, now))
        if then != asked and sorted(then) == sorted(asked):
            patterns = [key.removeprefix(f"{field}.") for key in then]
            allowed = f"the order of patterns with which {where} began: {', '.join(patterns)}"
            raise UserError(field, asked[0].removeprefix(f"{field}."), allowed, "put them in that order")
    keys = [*before, *(key for key in now if key not in before)]
    for key in sorted(keys, key=_ROUNDS.__eq__):  # rounds last: a run may have become longer than its file
        if key not in free and before.get(key) != now.get(key):
            allowed = f"{before.get(key)!r}, with which {where} began"
            if key == _ROUNDS:
                allowed = f"{before.get(key)!r} or more, for {where} has as many"
            raise UserError(key, now.get(key), allowed, "set that, or begin anew in another folder")


_CHANGED = {
    "rows": "other rows (tokens, pixels or labels)",
    "splits": "other splits of the same rows, or another order",
    "owners": "other owners of the same rows: clients' names, or which client has which rows",
}
"""The meaning of each digest that differs, the most specific first."""


def check_data(path: Path, now: Fingerprint) -> None:
    """UserError where the run in the folder began with other data than `now`, or with unknown data.

    Passes any data for a run whose initial model was not evaluated yet, and unknown data of a finished run.
    """
    first = _started(_entries(path))
    if first is None or ("data" not in first and (path / "summary.json").exists()):
        return
    if "data" not in first:
        allowed = "a run whose log.jsonl holds digests of its data; this one is of an older version"
        raise UserError("--resume", str(path), allowed, "begin anew in another folder")
    check_same_data(first["data"], now, str(path))


def check_same_data(then: Mapping[str, Any], now: Fingerprint, where: str) -> None:
    """UserError naming the difference between the data and `then`, the stored fingerprint of the run or sweep at
    `where`."""
    for name, change in _CHANGED.items():
        if then[name] != getattr(now, name):
            counts = f" ({then['count']:,} rows then, {now.count:,} now)" if then["count"] != now.count else ""
            allowed = f"the data with which it began; now there are {change}{counts}"
            raise UserError("--resume", where, allowed, "restore the data, or begin anew in another folder")


def check_given(path: Path, config: Config) -> None:
    """UserError where the run in the folder began with rows or a model of a Python call, and this call has none."""
    then = stored_config(path)
    for field, before, now in (
        ("task.name", then.task.name, config.task.name),
        ("model.path", then.model.path, config.model.path),
    ):
        if before == GIVEN and now != GIVEN:
            raise not_given(field)


def check_code(path: Path, now: Mapping[str, str]) -> None:
    """UserError naming the object of the call whose code or settings are others than those with which the run in the
    folder began.  Passes for a run whose initial model was not evaluated yet."""
    first = _started(_entries(path))
    then = {} if first is None else first.get("code", {})
    for name in (*then, *(name for name in now if name not in then)) if first is not None else ():
        if then.get(name) != now.get(name):
            allowed = f"the {name} with which the run in {path} began; now there is other code, or other settings"
            advice = "give that to run(..., resume=True) in Python, or begin anew in another folder"
            if name == TRACE:
                allowed = f"the file with which the run in {path} began; its lines are others now"
                advice = "restore it, or begin anew in another folder"
            raise UserError(name, "another one" if name in now else None, allowed, advice)


def check_start(path: Path, now: StartInfo | None) -> None:
    """UserError where the run in the folder began from another adapter or run of the same name.  Passes for a run whose
    initial model was not evaluated yet."""
    if now is not None and (known := start_digest(path)) is not None and known != now.digest:
        allowed = f"the one from which the run in {path} began; its tensors are others now"
        raise UserError("model.start_from", now.place, allowed, "restore it, or begin anew in another folder")


def start_digest(path: Path) -> str | None:
    """Digest of what the run in the folder began from; None where it is not known, or nothing."""
    first = _started(_entries(path))
    digest: str | None = None if first is None else first.get("start")
    return digest


def backbone_sum(path: Path) -> str | None:
    """Checksum of the matrices with which the run in the folder began; None where it is not known."""
    first = _started(_entries(path))
    return None if first is None else first.get("backbone") or None


def class_names(path: Path) -> tuple[str, ...]:
    """Names of the classes with which the run in the folder began, in order; empty for language models."""
    first = _started(_entries(path))
    return () if first is None else tuple(first.get("classes", ()))


def problem_of(path: Path) -> str:
    """The kind of labels with which the run in the folder began."""
    first = _started(_entries(path))
    return "classification" if first is None else first.get("problem") or "classification"


def summary_of(path: Path, config: Config, any_pack: bool = False) -> Summary | None:
    """The summary of a run; None where it is not finished, or has fewer rounds than `config`.  Raises UserError as
    `reopen`."""
    old = _check_config(path, config, any_pack)
    if not (path / "summary.json").exists() or is_longer(config, old):
        return None
    entries = json.loads((path / "summary.json").read_text(encoding="utf-8"))
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


def _entries(path: Path) -> list[dict[str, Any]]:
    """The log's complete lines, without a cut last one."""
    log = path / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _decisions(path: Path) -> dict[int, Decided]:
    names = [field.name for field in fields(Decided)]
    found = [Decided(**{name: entry[name] for name in names}) for entry in _entries(path) if entry["event"] == _DECIDED]
    return {decided.finished: decided for decided in found}


def _started(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The log's entry of the run's beginning, written once the initial model was evaluated."""
    return next((entry for entry in entries if entry["event"] == "started" and "scores" in entry), None)


def _line(event: str, entry: Mapping[str, Any]) -> str:
    return json.dumps({"event": event, **entry})


def _scored(rounds: int, scores: Sequence[Score]) -> list[ScoreRow]:
    return [ScoreRow(rounds, **asdict(score)) for score in scores]


def _in_round(round: int, rows: pa.Table) -> pa.Table:
    return rows.filter(compute.equal(rows["round"], round))
