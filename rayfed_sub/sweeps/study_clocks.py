"""A study in simulated time: by the devices of its own runs, or every counted run told again for mixes of devices."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayfed_sub.clock.accounts import account, cost_at, costs
from rayfed_sub.reports.retiming import retimed
from rayfed_sub.reports.run_reader import read_run
from rayfed_sub.storage import atomic_files
from rayfed_sub.sweeps.study import Study, StudyTrial
from rayfed_sub.sweeps.study_tables import interpolated, mean_and_deviation, megabytes, of_all, read_rows, study_table

COLUMNS = ("mix", "variant", "seed", "rounds", "held_out_loss", "bytes", "seconds", "joules", "idle_share")
Rows = Sequence[Mapping[str, str]]


def clocks_file(study: Study) -> Path:
    """The CSV file of a study with mixes: a row for each mix, run and evaluated state."""
    return study.results / f"{study.name}-clocks.csv"


def write_clocks(study: Study, trials: Iterable[StudyTrial], folder: Path) -> None:
    """Tells the finished ones of the counted trials below `folder` again for every mix, and writes the file."""
    rows = [row for trial in trials for row in _told(study, trial, folder / trial.folder)]
    content = io.StringIO()
    writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["mix"], row["variant"], row["seed"], row["rounds"])))
    atomic_files.write(clocks_file(study), content.getvalue().encode())


def _told(study: Study, trial: StudyTrial, folder: Path) -> Iterator[dict[str, Any]]:
    if not (folder / "summary.json").exists():  # it diverged
        return
    run = read_run(folder)
    for mix, devices in study.mixes.items():
        timeline = retimed(run, devices)
        spent, idle = costs(timeline), account(timeline)["idle_share"]
        for rounds, loss in run.overall["held_out_loss"].items():
            cost = cost_at(spent, int(str(rounds)))
            values = (mix, trial.variant, trial.seed, rounds, loss, cost.bytes, cost.seconds, cost.joules, idle)
            yield dict(zip(COLUMNS, values, strict=True))


def tables(study: Study) -> list[str]:
    """The Markdown tables of a study that has run: of its scores, and of hours where there are devices."""
    hours = clock_table(study)
    return [*study_table(study), *(["", *hours] if hours else [])]


def clock_table(study: Study) -> list[str]:
    """The Markdown table of hours from the study's CSV files; empty where its runs have no devices."""
    if study.mixes:
        return markdown(study, read_rows(clocks_file(study)))
    rows, curves = (read_rows(study.results / f"{study.name}{end}.csv") for end in ("", "-curves"))
    counted = {(row["variant"], row["seed"]): row for row in rows if row["tuning"] == "False" and not row["failure"]}
    points = [point for point in curves if point["tuning"] == "False" and point.get("seconds")]
    known = [point for point in points if (point["variant"], point["seed"]) in counted]
    idle = {key: row.get("idle_share", "") for key, row in counted.items()}
    return markdown(study, [{**p, "mix": "", "idle_share": idle[p["variant"], p["seed"]]} for p in known])


def markdown(study: Study, rows: Rows) -> list[str]:
    """Mean ± standard deviation over seeds, by mix and variant: hours of the whole run, the loss after the hours of the
    variant `equal_hours` in that mix (interpolated between evaluations), and hours and MB up to the first evaluation
    with a loss of `target` at most."""
    if not rows:
        return []
    mixes, energy = list(dict.fromkeys(row["mix"] for row in rows)), any(row.get("joules") for row in rows)
    order = [mix for mix in study.mixes if mix in mixes] or mixes
    heads = [*(["devices"] if study.mixes else []), "variant", "hours"]
    heads += [f"loss in the hours of {study.equal_hours}"] if study.equal_hours else []
    heads += [f"hours to {study.target:g}", f"MB to {study.target:g}"] if study.target is not None else []
    heads += [*(["kJ"] if energy else []), "idle", "runs"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for mix in order:
        runs = _runs([row for row in rows if row["mix"] == mix])
        budget = statistics.fmean(run[-1][0] for run in of) if (of := runs.get(study.equal_hours or "")) else None
        for variant in study.variants:
            found = runs.get(variant, [])
            if not found:
                continue
            cells = [*([mix] if study.mixes else []), variant, _hours([run[-1][0] for run in found])]
            if study.equal_hours:
                losses = [None if budget is None else interpolated([p[:2] for p in run], budget) for run in found]
                known = [loss for loss in losses if loss is not None]
                cells.append(mean_and_deviation(known) if len(known) == len(losses) else "-")
            if study.target is not None:
                cells += _to_target(found, study.target)
            if energy:
                joules = statistics.fmean(run[-1][3] for run in found)
                cells.append("-" if math.isnan(joules) else f"{joules / 1e3:.3g}")
            own = [row for row in rows if (row["mix"], row["variant"]) == (mix, variant)]
            idle = {row["seed"]: float(row["idle_share"]) for row in own}  # of the whole run, in each of its rows
            cells += [f"{statistics.fmean(idle.values()):.0%}", f"{len(found)} of {len(study.seeds)}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _runs(rows: Rows) -> dict[str, list[list[tuple[float, float, float, float]]]]:
    """By variant its runs: seconds, loss, bytes and joules (NaN where they are not known) at each evaluation."""
    found: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for row in sorted(rows, key=lambda row: int(row["rounds"])):
        values = [float(row.get(name) or "nan") for name in ("seconds", "held_out_loss", "bytes", "joules")]
        found.setdefault(row["variant"], {}).setdefault(row["seed"], []).append((*values,))  # type: ignore[arg-type]
    return {variant: list(runs.values()) for variant, runs in found.items()}


def _to_target(runs: Sequence[Sequence[tuple[float, float, float, float]]], target: float) -> list[str]:
    reached = [next((point for point in run if point[1] <= target), None) for run in runs]
    known = [point for point in reached if point is not None]
    if not known:
        return ["not reached", "-"]
    cells = [_hours([point[0] for point in known]), megabytes(statistics.fmean(point[2] for point in known))]
    return [f"{one}{of_all(len(known), len(runs))}" for one in cells]


def _hours(seconds: Sequence[float]) -> str:
    """Hours with three significant digits.

    >>> _hours([3600.0]), _hours([7200.0, 10800.0])
    ('1', '2.5 ± 0.707')
    """
    hours = [each / 3600 for each in seconds]
    deviation = f" ± {statistics.stdev(hours):.3g}" if len(hours) > 1 else ""
    return f"{statistics.fmean(hours):.3g}{deviation}"
