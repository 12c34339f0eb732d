"""A study: one claim, several variants of one configuration, several seeds, settings tuned on validation rows first.

    python experiments/study.py experiments/studies/NAME.yaml [key=value ...] [--runs DIR] [--jobs N]
    python experiments/study.py experiments/studies/NAME.yaml --show
    python experiments/study.py experiments/studies/NAME.yaml --against VARIANT

Every run is a folder of its own below DIR (runs/studies); a study that was stopped goes on where it was.  Beside the
YAML it leaves NAME.csv, a row for every run, and NAME-curves.csv, a row for every evaluated round.

A study's keys:
    claim     what is to be tested, and by whom it is claimed
    base      the configuration, relative to the study's file
    set       overrides for all runs
    variants  name: overrides
    seeds     of the runs that count
    tune      optional: key, values, seeds, set (overrides of the trials, such as fewer rounds); each variant takes the
              value with the lowest mean held-out loss on the validation rows, and never sees the held-out ones
    equal_bytes  optional: a variant whose traffic is the budget of the column of equal bytes
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import multiprocessing.util
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from rayfed_sub import RunError, UserError, load_config, run
from rayfed_sub.runtime.cluster import ray_session

SCORES = ("held_out_loss", "token_accuracy", "rouge_l", "bleu_4", "teacher_forced_rouge_l", "accuracy", "macro_f1")
SENT = ("rounds", "uplink_bytes", "downlink_bytes", "change_rank", "weights_sha256")
COLUMNS = (
    *("variant", "seed", "tuning", "value", "model"),
    *(*SCORES, *(f"{name}_before" for name in SCORES)),
    *(*SENT, "failure"),
)


@dataclass(frozen=True)
class Tune:
    key: str
    values: tuple[Any, ...]
    seeds: tuple[int, ...] = (0,)
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    name: str
    file: Path
    claim: str
    base: Path
    seeds: tuple[int, ...]
    variants: Mapping[str, Sequence[str]]
    set: tuple[str, ...] = ()
    tune: Tune | None = None
    equal_bytes: str | None = None


@dataclass(frozen=True)
class Trial:
    """One run of a study.  value: of the tuned key; tuning: it only serves to choose that."""

    variant: str
    seed: int
    value: Any
    tuning: bool
    overrides: tuple[str, ...] = field(repr=False)

    @property
    def folder(self) -> Path:
        value = "" if self.value is None else f"-{self.value}"
        return Path(self.variant) / f"{'tuning' if self.tuning else 'run'}{value}-{self.seed}"


def read_study(file: Path) -> Study:
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tuned = tree.pop("tune", None)
    tune = Tune(**{key: tuple(v) if isinstance(v, list) else v for key, v in tuned.items()}) if tuned else None
    base, set_ = file.parent / tree.pop("base"), tuple(tree.pop("set", ()))
    return Study(file.stem, file, base=base, set=set_, tune=tune, **{**tree, "seeds": tuple(tree["seeds"])})


def tuning_trials(study: Study, variant: str, more: Sequence[str]) -> Iterator[Trial]:
    """The variant's runs that choose a value; whatever `more` says, they are judged on validation rows."""
    for value in study.tune.values if study.tune else ():
        for seed in study.tune.seeds if study.tune else ():
            settings = (f"{study.tune.key}={value}", "evaluation.generate_rows=0", "evaluation.split=validation")
            shared = (*study.set, *study.variants[variant], *study.tune.set, f"seed={seed}", *more)
            yield Trial(variant, seed, value, True, (*shared, *settings))


def counted_trials(study: Study, variant: str, more: Sequence[str], value: Any) -> Iterator[Trial]:
    """The variant's runs that count, with the chosen value where there was something to choose."""
    key = () if study.tune is None else (f"{study.tune.key}={value}",)
    for seed in study.seeds:
        yield Trial(variant, seed, value, False, (*study.set, *study.variants[variant], f"seed={seed}", *more, *key))


def carry_out(study: Study, trial: Trial, runs: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs the trial, or goes on with it; its row and its curve.  One that diverges has its failure in the row."""
    config = load_config(study.base, [*trial.overrides, f"name={study.name}"])
    folder = runs / study.name / trial.folder
    told = {"variant": trial.variant, "seed": trial.seed, "tuning": trial.tuning, "value": trial.value}
    model = {"model": Path(config.model.path).name}
    try:
        summary = run(config, folder, resume=True)
    except RunError as error:
        if "finite" not in error.cause:
            raise
        return {**dict.fromkeys(COLUMNS), **told, **model, "failure": str(error).partition(";")[0]}, []
    scores = {name: summary.metrics.get(name) for name in (*SCORES, *(f"{name}_before" for name in SCORES))}
    sent = {name: getattr(summary, name) for name in SENT}
    row = {**told, **model, **scores, **sent, "failure": None}
    return row, list(_curve(folder, told))


def _curve(folder: Path, told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Scores over all held-out rows against the bytes sent so far, both ways, for every evaluated state."""
    rounds = pq.read_table(folder / "rounds.parquet").to_pylist()
    sent = [0]
    for row in rounds:
        sent.append(sent[-1] + row["uplink_bytes"] + row["downlink_bytes"])
    scores: dict[int, dict[str, float]] = {}
    for score in pq.read_table(folder / "scores.parquet").to_pylist():
        if score["client"] is None and score["metric"] in ("held_out_loss", "macro_f1"):
            scores.setdefault(score["rounds"], {})[score["metric"]] = score["value"]
    for done, found in sorted(scores.items()):
        yield {
            **told,
            "rounds": done,
            "bytes": sent[done],
            "held_out_loss": found.get("held_out_loss"),
            "macro_f1": found.get("macro_f1"),
        }


def best(rows: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> Any:
    """The value whose trials have the lowest mean loss; one of whose trials diverged is out.

    Raises ValueError where that leaves none.
    """
    losses = {value: [row["held_out_loss"] for row in rows if row["value"] == value] for value in values}
    means = {
        value: statistics.fmean(own)
        for value, own in losses.items()
        if all(loss is not None and math.isfinite(loss) for loss in own)
    }
    if not means:
        raise ValueError(f"every value of {list(values)} diverged; give smaller ones")
    return min(means, key=lambda value: means[value])


def markdown(study: Study, rows: Sequence[Mapping[str, str]], curves: Sequence[Mapping[str, str]]) -> list[str]:
    """The study's table: mean ± standard deviation over seeds, from the cells of its two CSV files.

    The column of equal bytes is the held-out loss when `equal_bytes`' variant's whole traffic (up and down, all
    clients) has been sent, linear between evaluated rounds; methods that send less are taken at their end, and "-" says
    that a method sends more before its first evaluated round.
    """
    counted = [row for row in rows if row["tuning"] == "False"]
    whole = [row for row in counted if not row["failure"]]
    shown = [name for name in SCORES if any(row[name] for row in whole)]
    sent = [float(row["uplink_bytes"]) + float(row["downlink_bytes"]) for row in _of(whole, study.equal_bytes)]
    limit = statistics.fmean(sent) if sent else None
    columns = ["variant", *([study.tune.key] if study.tune else []), *(name.replace("_", " ") for name in shown)]
    columns += [*([f"loss at {limit / 1e6:.3g} MB"] if limit else []), "MB up", "MB down", "runs"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for variant in study.variants:
        begun, own = _of(counted, variant), _of(whole, variant)
        runs = f"{len(own)} of {len(study.seeds)}"
        if not own:
            why = "diverged" if begun else "not run"
            lines.append("| " + " | ".join([variant, *[why] * (len(columns) - 2), runs]) + " |")
            continue
        cells = [variant, *([_edged(study.tune, own[0]["value"])] if study.tune else [])]
        cells += [_spread([float(row[name]) for row in own if row[name]]) for name in shown]
        if limit:
            curve = [point for point in _of(curves, variant) if point["tuning"] == "False"]
            ends = [[point for point in curve if point["seed"] == row["seed"]] for row in own]
            losses = [_loss_at(end, limit) for end in ends]
            cells.append("-" if None in losses else _spread([loss for loss in losses if loss is not None]))
        cells += [_megabytes(statistics.fmean(float(row[name]) for row in own)) for name in SENT[1:3]]
        lines.append("| " + " | ".join([*cells, runs]) + " |")
    return lines


def paired(rows: Sequence[Mapping[str, str]], one: str, other: str, score: str) -> tuple[list[float], float]:
    """`one`'s score less `other`'s for every seed in which both have it, and how many times the other's mean its mean
    over these seeds is.  Raises ValueError where there is no such seed."""
    own, theirs = (
        {row["seed"]: float(row[score]) for row in _of(rows, variant) if row["tuning"] == "False" and row[score]}
        for variant in (one, other)
    )
    seeds = sorted(own.keys() & theirs.keys(), key=int)
    if not seeds:
        raise ValueError(f"no seed with {score} of both {one} and {other}")
    ratio = sum(own[seed] for seed in seeds) / sum(theirs[seed] for seed in seeds)
    return [own[seed] - theirs[seed] for seed in seeds], ratio


def differences(study: Study, rows: Sequence[Mapping[str, str]], one: str) -> list[str]:
    """A Markdown table of `paired`, seed by seed, of one variant with each of the others that has finished runs."""
    whole = [row for row in rows if row["tuning"] == "False" and not row["failure"]]
    shown = [name for name in SCORES if any(row[name] for row in _of(whole, one))]
    lines = [
        "| " + " | ".join([f"{one} less", *(name.replace("_", " ") for name in shown)]) + " |",
        "|" + " --- |" * (len(shown) + 1),
    ]
    for other in study.variants:
        if other == one or not _of(whole, other):
            continue
        found = [paired(whole, one, other, name) for name in shown]
        cells = [f"{', '.join(f'{difference:+.3f}' for difference in own)}; {ratio:.2f}x" for own, ratio in found]
        lines.append("| " + " | ".join([other, *cells]) + " |")
    return lines


def _of(rows: Sequence[Mapping[str, str]], variant: str | None) -> list[Mapping[str, str]]:
    return [row for row in rows if row["variant"] == variant]


def _loss_at(curve: Sequence[Mapping[str, str]], sent: float) -> float | None:
    """None before the first evaluated round: a loss falls steeply at first, far below a line from the untrained one."""
    untrained, *points = sorted((float(point["bytes"]), float(point["held_out_loss"])) for point in curve)
    assert untrained[0] == 0
    return None if sent < points[0][0] else float(np.interp(sent, *zip(*points, strict=True)))


def _edged(tune: Tune, value: str) -> str:
    """The tuned value, marked where it stands at the grid's edge: a better one may lie outside."""
    return f"{value} (edge)" if value in (str(tune.values[0]), str(tune.values[-1])) else value


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def _megabytes(count: float) -> str:
    """To three digits.

    >>> _megabytes(3.4739e6), _megabytes(2.1234e9)
    ('3.47', '2,120')
    """
    rounded = float(f"{count / 1e6:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def csv_files(study: Study) -> tuple[Path, Path]:
    """Where a study's rows and curves stand."""
    return study.file.with_suffix(".csv"), study.file.with_name(f"{study.name}-curves.csv")


def tables(file: Path) -> list[str]:
    """The Markdown table of the study in `file`, from what its runs left."""
    study = read_study(file)
    rows, curves = map(read, csv_files(study))
    return markdown(study, rows, curves)


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def place(row: Mapping[str, Any]) -> Any:
        return row["variant"], not row["tuning"], str(row["value"]), row["seed"], row["rounds"] or 0

    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))
    part.replace(file)


def carry_out_all(study: Study, todo: Sequence[Trial], runs: Path, pool: Executor, results: Results) -> None:
    """Runs the trials, as many at a time as the pool has processes, and writes both tables after each."""
    left = {pool.submit(carry_out, study, trial, runs): trial for trial in todo}
    for done in as_completed(left):
        trial = left[done]
        row, curve = done.result()
        results.take(row, curve)
        rows, curves = csv_files(study)
        write(rows, results.rows)
        if results.curves:
            write(curves, results.curves)
        what = "tuning" if trial.tuning else "run"
        print(f"{what} {trial.variant} seed {trial.seed} {trial.value}: {row['failure'] or row['held_out_loss']}")


def _begin() -> None:
    """A Ray session for all the runs of one process: starting one takes longer than many a run."""
    stack = ExitStack()
    stack.enter_context(ray_session())
    multiprocessing.util.Finalize(None, stack.close, exitpriority=0)


@dataclass
class Results:
    """Rows of both tables so far, those of earlier sittings too."""

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]

    def take(self, row: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        """A trial's row and curve, in the place of those that it had."""
        self.rows = [*(old for old in self.rows if _which(old) != _which(row)), row]
        self.curves = [*(old for old in self.curves if _which(old) != _which(row)), *curve]

    def keep(self, trials: Sequence[Trial], tuning: bool) -> None:
        """Drops rows of an earlier sitting that are of no trial any more, be it for another value or another seed."""
        wanted = {(trial.variant, trial.seed, trial.tuning, trial.value) for trial in trials}
        self.rows = [row for row in self.rows if row["tuning"] != tuning or _which(row) in wanted]
        self.curves = [row for row in self.curves if row["tuning"] != tuning or _which(row) in wanted]


def _which(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The trial that a row is of."""
    return tuple(row[name] for name in ("variant", "seed", "tuning", "value"))


def _earlier(file: Path, study: Study) -> list[dict[str, Any]]:
    """The rows that an earlier sitting left of variants that the study still has."""
    rows = read(file) if file.exists() else []
    return [{key: _parsed(cell) for key, cell in row.items()} for row in rows if row["variant"] in study.variants]


def check_model(study: Study, rows: Sequence[Mapping[str, Any]], more: Sequence[str]) -> None:
    """UserError where the earlier rows are of another model than the one that would run now."""
    (first, *_) = study.variants.values()
    model = Path(load_config(study.base, [*study.set, *first, *more]).model.path).name
    for other in {row["model"] for row in rows} - {model}:
        file = csv_files(study)[0]
        raise UserError(
            "model.path", model, f"{other}, as in the rows of {file}", "give that model, or move the CSV away"
        )


def _parsed(cell: str) -> Any:
    """What was written as this cell.

    >>> [_parsed(cell) for cell in ("", "True", "3", "0.003", "fedit")]
    [None, True, 3, 0.003, 'fedit']
    """
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return {"": None, "True": True, "False": False}.get(cell, cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, e.g. task.path=FILE.parquet")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--show", action="store_true", help="run nothing: the table of what is there")
    against = "run nothing: this variant's scores less each other's, seed by seed, and their ratio"
    parser.add_argument("--against", metavar="VARIANT", help=against)
    given = parser.parse_args()
    study = read_study(given.study)
    if given.against is not None:
        if given.against not in study.variants:
            parser.error(f"--against {given.against}: {study.name} has {'; '.join(study.variants)}")
        print(*differences(study, read(csv_files(study)[0]), given.against), sep="\n")
        return
    if given.show:
        print(*tables(given.study), sep="\n")
        return
    results = Results(*(_earlier(file, study) for file in csv_files(study)))
    check_model(study, results.rows, given.overrides)
    print(study.claim.strip())

    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn"), _begin) as pool:
        chosen: dict[str, Any] = {}
        if study.tune is not None:
            tuning = [trial for variant in study.variants for trial in tuning_trials(study, variant, given.overrides)]
            results.keep(tuning, True)
            carry_out_all(study, tuning, given.runs, pool, results)
            for variant in study.variants:
                own = [row for row in results.rows if row["variant"] == variant and row["tuning"]]
                chosen[variant] = best(own, study.tune.values)
                print(f"{variant}: {study.tune.key}={_edged(study.tune, str(chosen[variant]))}")
        counted = [
            trial
            for variant in study.variants
            for trial in counted_trials(study, variant, given.overrides, chosen.get(variant))
        ]
        results.keep(counted, False)
        carry_out_all(study, counted, given.runs, pool, results)
    print(*tables(given.study), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"study: {error}")
