"""What a run began with, by its log, and whether what is asked for now is the same run: settings, data, code, start.

Every check raises UserError naming the first difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rayfed_sub.clock.fleet import TRACE
from rayfed_sub.config.checks import not_given
from rayfed_sub.config.loading import flat, stored_config
from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.fingerprint import Fingerprint
from rayfed_sub.methods import with_defaults
from rayfed_sub.models.start import StartInfo
from rayfed_sub.storage.longer_runs import ROUNDS, check_longer, is_longer
from rayfed_sub.telemetry.events import Decided

FREE = (
    *("resources.workers", "resources.state_memory", "resources.deadline", "resources.activation_checkpointing"),
    *("checkpoint.every", "federation.on_client_failure", "trackers"),
    *("diagnostics.every", "diagnostics.clients", "diagnostics.layers", "diagnostics.gradient_layers"),
)
"""Settings that may differ when a run is resumed: they do not change the weights."""
PACKING = ("resources.pack_size", "evaluation.batch_size")
"""Settings that may differ too where the bits are the same in any pack (`planning/packs.py`)."""


DECIDED = "decided"
"""The log's entry of what holds from a round on."""


def log_entries(path: Path) -> list[dict[str, Any]]:
    """The log's complete lines, without a cut last one."""
    log = path / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def logged_decisions(path: Path) -> dict[int, Decided]:
    """What the log has recorded, by finished rounds."""
    names = [field.name for field in fields(Decided)]
    found = [
        Decided(**{name: entry[name] for name in names}) for entry in log_entries(path) if entry["event"] == DECIDED
    ]
    return {decided.finished: decided for decided in found}


def started(path: Path) -> Mapping[str, Any] | None:
    """The log's entry of the run's beginning, written once the initial model was evaluated."""
    return next((entry for entry in log_entries(path) if entry["event"] == "started" and "scores" in entry), None)


def check_config(path: Path, config: Config, any_pack: bool) -> Config:
    """The stored configuration, with which the run of `config` goes on; any_pack: whether its bits are the same in any
    pack."""
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
        stops = (decided for decided in logged_decisions(path).values() if decided.stop is not None)
        check_longer(path, old, config, next(stops, None))
    return old


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
    for key in sorted(keys, key=ROUNDS.__eq__):  # rounds last: a run may have become longer than its file
        if key not in free and before.get(key) != now.get(key):
            allowed = f"{before.get(key)!r}, with which {where} began"
            if key == ROUNDS:
                allowed = f"{before.get(key)!r} or more, for {where} has as many"
            raise UserError(key, now.get(key), allowed, "set that, or begin anew in another folder")


_CHANGED = {
    "rows": "other rows (tokens, pixels or labels)",
    "splits": "other splits of the same rows, or another order",
    "owners": "other owners of the same rows: clients' names, or which client has which rows",
}
"""The meaning of each digest that differs, the most specific first."""


def check_inputs(path: Path, data: Fingerprint, code: Mapping[str, str], begun: StartInfo | None) -> None:
    """UserError where the run in the folder began with other data, with other code, or from another start."""
    check_data(path, data)
    check_code(path, code)
    check_start(path, begun)


def check_data(path: Path, now: Fingerprint) -> None:
    """UserError where the run in the folder began with other data than `now`, or with unknown data.

    Passes any data for a run whose initial model was not evaluated yet, and unknown data of a finished run.
    """
    first = started(path)
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
    first = started(path)
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
    check_same_start(start_digest(path), now, f"the run in {path}")


def check_same_start(then: str | None, now: StartInfo | None, where: str) -> None:
    """UserError where what the run or sweep `where` began from has another digest now than `then`, if that is known."""
    if now is not None and then is not None and then != now.digest:
        allowed = f"the one from which {where} began; its tensors are others now"
        raise UserError("model.start_from", now.place, allowed, "restore it, or begin anew in another folder")


def start_digest(path: Path) -> str | None:
    """Digest of what the run in the folder began from; None where it is not known, or nothing."""
    first = started(path)
    digest: str | None = None if first is None else first.get("start")
    return digest


def backbone_sum(path: Path) -> str | None:
    """Checksum of the matrices with which the run in the folder began; None where it is not known."""
    first = started(path)
    return None if first is None else first.get("backbone") or None


def class_names(path: Path) -> tuple[str, ...]:
    """Names of the classes with which the run in the folder began, in order; empty for language models."""
    first = started(path)
    return () if first is None else tuple(first.get("classes", ()))


def problem_of(path: Path) -> str:
    """The kind of labels with which the run in the folder began."""
    first = started(path)
    return "classification" if first is None else first.get("problem") or "classification"
