"""Overview of runs: facts of a run or a table of several, differing keys, versions and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from rayfed_sub.config.loading import flat
from rayfed_sub.config.schema import GIVEN, Config, Federation
from rayfed_sub.core.text import (
    UNREAD,
    best_in_words,
    count,
    duration,
    megabytes,
    published_name,
    score,
    start_in_words,
)
from rayfed_sub.data.dataset import changed_images, too_long
from rayfed_sub.methods import METHODS, build
from rayfed_sub.reports.curves import AGAINST_BYTES, all_scores, change, overall, shown_scores
from rayfed_sub.reports.page import Cell, Facts, Section, Table, Text, cell
from rayfed_sub.reports.run_reader import Run, Runs

_SPLITS = {"train": "training", "validation": "validation", "held_out": "held-out"}
_CALL = "of the Python call"
"""Text for what objects of a call say in place of a configuration."""


def results(runs: Runs) -> Section:
    """Facts and result of a single run, or a row for each of several."""
    if len(runs) == 1:
        return Section("Result", [Facts(_facts(run)) for run in runs.values()])
    return Section("Results", [_table(runs)])


def state(run: Run) -> str:
    """Progress of a run as text."""
    planned = run.config.federation.rounds
    if run.summary:
        again = f", taken up again {count('time', len(run.resumed))}" if run.resumed else ""
        stopped = f", stopped early: {why}" if (why := run.summary.get("stopped")) else ""
        return f"finished: {count('round', run.done)}{stopped}{again}"
    return f"not finished: {run.done:,} of {f'{planned:,}' if planned else '?'} rounds so far"


def _facts(run: Run) -> dict[str, str]:
    config, federation = run.config, run.config.federation
    found = {"state": state(run)}
    scores = all_scores({run.config.name: run})
    for metric in scores:
        if published_name(metric) not in scores:
            found[score(published_name(metric))] = UNREAD
        values = overall(run, metric)
        found[score(metric, run.problem)] = change(metric, values.tolist(), values.index.tolist())
    if best := run.summary.get("best"):
        found["best round"] = f"{best_in_words(best)}; its checkpoint is kept"
    if config.model.precision != "float32":
        found["scores are of"] = f"the {config.model.precision} model"
    found |= {
        "method": _method(run),
        "model": f"{_CALL if config.model.path == GIVEN else config.model.path}, {config.model.precision}",
        **({"begins from": start_in_words(start)} if (start := run.summary.get("start_from")) else {}),
        "task": _CALL if config.task.name == GIVEN else config.task.name,
        **_rows(run),
        "clients": f"{federation.clients:,}{_cohort(federation)}",
        **({"packs": "of one client"} if run.summary.get("one_at_a_time") else {}),
        "local steps": _steps(run),
        "partition": _CALL if config.task.name == GIVEN else federation.partition.kind,
    }
    if run.done:
        found["sent up"] = _bytes(run, "uplink_bytes")
        found["sent down"] = _bytes(run, "downlink_bytes")
        seconds, training = run.rounds["seconds"].sum(), run.rounds["train_seconds"].sum()
        found["time in rounds"] = f"{duration(seconds)}, {duration(training)} of it training"
    if run.rounds["epsilon"].notna().any():
        whole = run.summary.get("privacy")
        epsilon = run.rounds["epsilon"].max() if whole is None else whole["epsilon"]
        whose = "training rows" if config.privacy.of_examples else "clients"
        found["privacy"] = f"of {whose}: epsilon {epsilon:.3g} at delta {config.privacy.delta:g}"
        if whole is not None:
            by = f"by {whole['accountant']} ({whole['epsilon_rdp']:.3g} by RDP)"
            found["privacy"] += f", {by}, noise {whole['noise']:g}"
    if "weights_sha256" in run.summary:
        found["weights_sha256"] = str(run.summary["weights_sha256"])
    return found | {"seed": str(config.seed)}


def _rows(run: Run) -> dict[str, str]:
    """Counts of training and evaluation rows, and of rows that were cut or dropped."""
    if not run.rows:
        return {}
    kept = {name: run.rows.get(key) for key, name in _SPLITS.items()}
    shown = {"rows": ", ".join(f"{count:,} {name}" for name, count in kept.items() if count)}
    if chunks := run.rows.get("chunks"):
        shown["rows"] += f" texts, {chunks:,} chunks of tokens in all"
    cuts = too_long(run.rows)
    shared = run.rows.get("shared", 0)
    judged = run.scores["split"].dropna().unique().tolist()
    return {
        **shown,
        **({"scores are on": ", ".join(judged)} if judged else {}),
        **({"rows in two official splits": f"{shared:,}"} if shared else {}),
        **({"images": images} if (images := changed_images(run.rows)) else {}),
        **({"rows beyond task.max_length": cuts} if cuts else {}),
    }


def _method(run: Run) -> str:
    rank = run.config.method.get("rank")
    return run.method if rank is None else f"{run.method}, rank {rank}"


def _cohort(federation: Federation) -> str:
    """How many of the clients take part at a time; nothing where all do."""
    if federation.cohort == federation.clients:
        return ""
    if federation.mode == "async":
        return f", {federation.cohort:,} under way at a time"
    more = f" of the {federation.drawn:,} that begin it" if federation.drawn > federation.cohort else ""
    return f", {federation.cohort:,} in a round{more}"


def _steps(run: Run) -> str:
    steps = run.config.federation.model_dump(mode="json")["local_steps"]
    if isinstance(steps, dict):
        return f"{steps['low']} to {steps['high']}"
    if run.config.federation.local_seconds is not None:
        return f"{min(steps)} to {max(steps)}, by speed"
    return ", ".join(map(str, steps)) if isinstance(steps, list) else str(steps)


def _bytes(run: Run, direction: str) -> str:
    yardstick = {"uplink_bytes": "dense_bytes", "downlink_bytes": "dense_downlink_bytes"}[direction]
    total, dense = run.sent(direction), run.summary.get(yardstick)
    if not dense or not total:
        return megabytes(total)
    share = f"{dense / total:.1f} times less than" if total < dense else f"{total / dense:.1f} times"
    return f"{megabytes(total)}, {share} the {megabytes(dense)} of dense FedAvg"


def _table(runs: Runs) -> Table:
    scores = [metric for metric in shown_scores(runs) if metric in AGAINST_BYTES]
    score_heads = [score(metric).partition(" (")[0] for metric in scores]
    heads = [
        "run",
        "method",
        "rank",
        *score_heads,
        "up (MB)",
        "down (MB)",
        "time in rounds (s)",
        "state",
        "rounds",
    ]
    heads += ["clients", "at a time", "local steps", "seed", "rows cut", "rows dropped", "weights"]
    rows: list[list[Cell | str]] = []
    for name, run in runs.items():
        federation, rank = run.config.federation, run.config.method.get("rank")
        values = [overall(run, metric) for metric in scores]
        rows.append(
            [
                *(name, run.method, cell(rank if isinstance(rank, int) else None)),
                *(cell(found.iloc[-1] if len(found) else None) for found in values),
                *(cell(run.sent(way) / 1e6) for way in ("uplink_bytes", "downlink_bytes")),
                *(cell(run.rounds["seconds"].sum()), "finished" if run.summary else "not finished", cell(run.done)),
                *(cell(federation.clients), cell(federation.cohort), _steps(run), cell(run.config.seed)),
                *(cell(run.rows.get(name)) for name in ("cut", "dropped")),
                str(run.summary.get("weights_sha256", "-"))[:12],
            ]
        )
    return Table("A row for each run; scores as at its last evaluation.", heads, rows)


def environment(runs: Runs) -> Section | None:
    """Facts of a single run, or a table of several side by side."""
    known = {name: {**run.versions, **run.environment} for name, run in runs.items()}
    keys = list(dict.fromkeys(key for tree in known.values() for key in tree))
    if not keys:
        return None
    if len(runs) == 1:
        ((_, tree),) = known.items()
        return Section("Versions and machine", [Facts({key: _text(tree[key]) for key in keys})])
    rows: list[list[Cell | str]] = [[key, *(_text(tree.get(key)) for tree in known.values())] for key in keys]
    return Section("Versions and machines", [Table("What each run was computed with.", ["of what", *runs], rows)])


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def differences(runs: Runs) -> Section:
    """A table of the keys that differ, and their values."""
    trees = {name: flat(run.config.model_dump(mode="json")) for name, run in runs.items()}
    if len(runs) == 1:
        (this_run,) = trees.values()
        columns = {"this run": this_run, "default": defaults(next(iter(runs.values())).config)}
        caption, title = "Keys whose values are not the defaults.", "What was set"
    else:
        columns, title = trees, "How the configurations differ"
        caption = "Keys in which the runs' configurations differ; - where a method has no such key."
    if len(runs) == 1:  # keys that an older run lacks have their defaults
        columns = {
            name: {key: value for key, value in tree.items() if key in this_run} for name, tree in columns.items()
        }
    keys = [key for key in dict.fromkeys(key for tree in columns.values() for key in tree) if _differ(key, columns)]
    rows: list[list[Cell | str]] = [[key, *(_cell(tree, key) for tree in columns.values())] for key in keys]
    if not rows:
        return Section(title, [Text("In nothing.")])
    return Section(title, [Table(caption, ["key", *columns], rows)])


def defaults(config: Config) -> dict[str, Any]:
    """Defaults of every key, with the fields of a built-in method; a report imports no class that a run names."""
    name, method = config.method["name"], dict[str, Any]()
    if name in METHODS:
        method = asdict(cast(Any, build({"name": name})))
    tree = Config().model_dump(mode="json")
    return flat({**tree, "method": {**method, "name": tree["method"]["name"]}})


def _differ(key: str, columns: Mapping[str, Mapping[str, Any]]) -> bool:
    values = [_plain(tree.get(key)) for tree in columns.values()]
    return any(value != values[0] for value in values)


def _plain(value: Any) -> Any:
    """A tuple of a record is a list in a file."""
    return list(value) if isinstance(value, tuple) else value


def _cell(tree: Mapping[str, Any], key: str) -> Cell | str:
    value = _plain(tree.get(key))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:g}" if isinstance(value, float) else f"{value}", float(value))
    if value is None:
        return "-"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
