"""Tables of a study: CSV files with a row per run and a row per evaluated round, and Markdown made from them."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayfed_sub.core.errors import UserError
from rayfed_sub.storage import atomic_files
from rayfed_sub.sweeps.results import SENT
from rayfed_sub.sweeps.study import Study, StudyTrial, Tune

SCORES = (
    *("held_out_loss", "token_accuracy", "rouge_l", "bleu_4", "teacher_forced_rouge_l", "accuracy", "macro_f1"),
    *("matthews", "micro_f1", "subset_accuracy", "pearson", "spearman", "mean_absolute_error"),
)
ENDS = ("rounds", *SENT, "change_rank", "weights_sha256")
"""Columns from the run's summary besides its scores."""
VERSIONS = ("rayfed_sub", "torch", "transformers")
"""Whose versions are in the column `versions`."""
COLUMNS = (
    *("variant", "seed", "tuning", "value", "model"),
    *(*SCORES, *(f"{name}_before" for name in SCORES)),
    *(*ENDS, "versions", "failure"),
)


@dataclass(frozen=True)
class StudyRows:
    """Rows of both CSV files so far, also of earlier sessions."""

    rows: tuple[Mapping[str, Any], ...]
    curves: tuple[Mapping[str, Any], ...]

    def taking(self, row: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> StudyRows:
        """The rows with a trial's row and curve added, or replaced."""
        others = (old for old in self.rows if _trial_of(old) != _trial_of(row))
        return StudyRows((*others, row), (*(old for old in self.curves if _trial_of(old) != _trial_of(row)), *curve))

    def keeping(self, trials: Sequence[StudyTrial], tuning: bool) -> StudyRows:
        """The rows without those of trials that are no longer among `trials`, e.g. of a dropped value or seed."""
        wanted = {(trial.variant, trial.seed, trial.tuning, trial.value) for trial in trials}

        def kept(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
            return tuple(row for row in rows if row["tuning"] != tuning or _trial_of(row) in wanted)

        return StudyRows(kept(self.rows), kept(self.curves))


def csv_files(study: Study) -> tuple[Path, Path]:
    """Paths of a study's CSV files: rows, curves."""
    return study.results / f"{study.name}.csv", study.results / f"{study.name}-curves.csv"


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file.  Raises UserError where there is none."""
    if not file.is_file():
        raise UserError("STUDY", str(file), "the CSV file of a study that has run", "run the study first")
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def earlier(study: Study) -> StudyRows:
    """The rows of earlier sessions, of variants that the study still has."""
    rows, curves = (read_rows(file) if file.exists() else [] for file in csv_files(study))

    def parsed(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, Any], ...]:
        known = (row for row in rows if row["variant"] in study.variants)
        return tuple({key: _parsed(cell) for key, cell in row.items()} for row in known)

    return StudyRows(parsed(rows), parsed(curves))


def write_rows(study: Study, found: StudyRows) -> None:
    """Writes both files, sorted; none without rows."""
    for file, rows in zip(csv_files(study), (found.rows, found.curves), strict=True):
        if rows:
            content = io.StringIO()
            columns = dict.fromkeys(name for row in rows for name in row)  # older rows have fewer
            writer = csv.DictWriter(content, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=_order))
            atomic_files.write(file, content.getvalue().encode())


def study_table(study: Study) -> list[str]:
    """The Markdown table of the study, from its CSV files.  Raises UserError where it has not run."""
    rows, curves = map(read_rows, csv_files(study))
    return markdown(study, rows, curves)


def markdown(study: Study, rows: Sequence[Mapping[str, str]], curves: Sequence[Mapping[str, str]]) -> list[str]:
    """The study's table: mean ± standard deviation over seeds, from the cells of its two CSV files.  A score that
    some seeds have not, for it is not defined there, is the mean of the others and says of how many.

    The column of equal bytes is the held-out loss after the total traffic (up and down, all clients) of the variant
    `equal_bytes`, interpolated between evaluated rounds.  For methods that send less it is the last loss; "-" marks a
    method that sends more before its first evaluated round.
    """
    counted = [row for row in rows if row["tuning"] == "False"]
    whole = [row for row in counted if not row["failure"]]
    shown = [name for name in SCORES if any(row.get(name) for row in whole)]
    sent = [sum(float(row[name]) for name in SENT) for row in _of(whole, study.equal_bytes)]
    limit = statistics.fmean(sent) if sent else None
    columns = ["variant", *([study.tune.key] if study.tune else []), *(name.replace("_", " ") for name in shown)]
    columns += [*([f"loss at {limit / 1e6:.3g} MB"] if limit else []), "MB up", "MB down", "runs"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for variant in study.variants:
        begun, finished = _of(counted, variant), _of(whole, variant)
        runs = f"{len(finished)} of {len(study.seeds)}"
        if not finished:
            why = "diverged" if begun else "not run"
            lines.append("| " + " | ".join([variant, *[why] * (len(columns) - 2), runs]) + " |")
            continue
        cells = [variant, *([edged(study.tune, variant, finished[0]["value"])] if study.tune else [])]
        for name in shown:
            values = [float(row[name]) for row in finished if row.get(name)]
            cells.append(f"{mean_and_deviation(values)}{of_all(len(values), len(finished))}")
        if limit:
            curve = [point for point in _of(curves, variant) if point["tuning"] == "False"]
            ends = [[point for point in curve if point["seed"] == row["seed"]] for row in finished]
            losses = [_loss_at(end, limit) for end in ends]
            cells.append("-" if None in losses else mean_and_deviation([loss for loss in losses if loss is not None]))
        cells += [megabytes(statistics.fmean(float(row[name]) for row in finished)) for name in SENT]
        lines.append("| " + " | ".join([*cells, runs]) + " |")
    return lines


def paired(rows: Sequence[Mapping[str, str]], one: str, other: str, score: str) -> tuple[list[float], float]:
    """Differences of `one`'s score less `other`'s, by common seed, and the ratio of their means over these seeds, NaN
    where that is by 0.  Raises UserError where they have no seed in common."""
    ours, theirs = (
        {row["seed"]: float(row[score]) for row in _of(rows, variant) if row["tuning"] == "False" and row.get(score)}
        for variant in (one, other)
    )
    seeds = sorted(ours.keys() & theirs.keys(), key=int)
    if not seeds:
        raise UserError("--against", one, f"a variant that has a seed with {score} in common with {other}", "run both")
    base = sum(theirs[seed] for seed in seeds)
    ratio = sum(ours[seed] for seed in seeds) / base if base else math.nan
    return [ours[seed] - theirs[seed] for seed in seeds], ratio


def differences(study: Study, rows: Sequence[Mapping[str, str]], one: str) -> list[str]:
    """Markdown table of `paired` differences, seed by seed, of one variant to each other variant with finished runs."""
    whole = [row for row in rows if row["tuning"] == "False" and not row["failure"]]
    shown = [name for name in SCORES if any(row.get(name) for row in _of(whole, one))]
    lines = [
        "| " + " | ".join([f"{one} less", *(name.replace("_", " ") for name in shown)]) + " |",
        "|" + " --- |" * (len(shown) + 1),
    ]
    for other in study.variants:
        if other == one or not _of(whole, other):
            continue
        lines.append("| " + " | ".join([other, *(_difference(whole, one, other, name) for name in shown)]) + " |")
    return lines


def _difference(rows: Sequence[Mapping[str, str]], one: str, other: str, score: str) -> str:
    """A cell of `differences`; empty for a score that `other` has not."""
    if not any(row.get(score) for row in _of(rows, other)):
        return ""
    diffs, ratio = paired(rows, one, other, score)
    times = "" if math.isnan(ratio) else f"; {ratio:.2f}x"
    return f"{', '.join(f'{difference:+.3f}' for difference in diffs)}{times}"


def edged(tune: Tune, variant: str, value: str) -> str:
    """The tuned value, marked where it is the first or last candidate: a better one may lie outside."""
    candidates = tune.values_of(variant)
    return f"{value} (edge)" if value in (str(candidates[0]), str(candidates[-1])) else value


def _of(rows: Sequence[Mapping[str, str]], variant: str | None) -> list[Mapping[str, str]]:
    return [row for row in rows if row["variant"] == variant]


def _trial_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Identity of a row's trial."""
    return tuple(row[name] for name in ("variant", "seed", "tuning", "value"))


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["variant"], not row["tuning"], str(row["value"]), row["seed"], row["rounds"] or 0


def _loss_at(curve: Sequence[Mapping[str, str]], sent: float) -> float | None:
    """Interpolated loss after so many bytes."""
    return interpolated([(float(point["bytes"]), float(point["held_out_loss"])) for point in curve], sent)


def interpolated(curve: Sequence[tuple[float, float]], spent: float) -> float | None:
    """Loss after so much of something, from a curve (spent, loss).  None before the first evaluated round: the loss
    falls steeply at first, and interpolation from the untrained model would be far too high."""
    untrained, *points = sorted(curve)
    assert untrained[0] == 0
    done, losses = zip(*points, strict=True)
    return None if spent < done[0] else float(np.interp(spent, np.array(done), np.array(losses)))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation with three decimals; empty for no values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def of_all(known: int, seeds: int) -> str:
    """Behind a mean that some seeds lack, of how many it is.

    >>> of_all(3, 3), of_all(2, 3), of_all(0, 3)
    ('', ' (2 of 3)', '')
    """
    return f" ({known} of {seeds})" if 0 < known < seeds else ""


def megabytes(count: float) -> str:
    """Megabytes with three significant digits.

    >>> megabytes(3.4739e6), megabytes(2.1234e9)
    ('3.47', '2,120')
    """
    rounded = float(f"{count / 1e6:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def _parsed(cell: str) -> Any:
    """The value of a CSV cell.

    >>> [_parsed(cell) for cell in ("", "True", "3", "0.003", "fedit")]
    [None, True, 3, 0.003, 'fedit']
    """
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return {"": None, "True": True, "False": False}.get(cell, cell)
