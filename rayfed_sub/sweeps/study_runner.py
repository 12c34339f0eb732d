"""A study from its definition to its tables: tuning runs, then the counted runs, both as trials under Ray Tune.

Every run has its own folder, so that an interrupted study, or one with more seeds or values, runs only what is missing.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rayfed_sub.config.loading import load_config, read_yaml
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.planning.job import JobInputs, job_on
from rayfed_sub.reports.report import report_run
from rayfed_sub.runtime.cluster import joined, nodes
from rayfed_sub.runtime.fork_server import fork_server
from rayfed_sub.runtime.local_ray import ray_session
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import make, summary_of
from rayfed_sub.storage.same_run import check_inputs
from rayfed_sub.sweeps.capacity import at_once
from rayfed_sub.sweeps.progress import Begun, TrialNow, Watcher, failure_of
from rayfed_sub.sweeps.results import CLOCKED
from rayfed_sub.sweeps.runner import Listener, check_head, checked
from rayfed_sub.sweeps.shared_inputs import input_key, shared
from rayfed_sub.sweeps.study import Part, Study, StudyTrial, check_trials, counted_trials, tuning_trials
from rayfed_sub.sweeps.study_clocks import tables, write_clocks
from rayfed_sub.sweeps.study_tables import (
    COLUMNS,
    ENDS,
    SCORES,
    VERSIONS,
    csv_files,
    earlier,
    edged,
    write_rows,
)
from rayfed_sub.sweeps.trial import values_of
from rayfed_sub.sweeps.trial_curves import curve
from rayfed_sub.sweeps.tuner import loggers, tuned
from rayfed_sub.telemetry.events import Notice, Summary


class Results:
    """Rows of the study's runs so far, also of earlier sessions; writes the CSV files after each run."""

    def __init__(self, study: Study, folder: Path) -> None:
        self._study, self._folder = study, folder
        self.found = earlier(study)

    def keep(self, trials: Sequence[StudyTrial], tuning: bool) -> None:
        """Drops the rows of trials that are no longer part of the study."""
        self.found = self.found.keeping(trials, tuning)

    def take(self, trial: StudyTrial, config: Config, summary: Summary | None, failure: str | None = None) -> None:
        """Adds an ended trial: its summary, or the cause where it diverged."""
        row, curve = rows_of(trial, config, self._folder / trial.folder, summary, failure)
        self.found = self.found.taking(row, curve)
        write_rows(self._study, self.found)


def run_study(
    study: Study,
    overrides: Sequence[str],
    runs: Path,
    jobs: int,
    listener: Listener | None = None,
) -> list[str]:
    """Runs what the study lacks, writes its CSV files after each run, and returns its Markdown table.

    overrides: for all runs.  runs: the folder that gets one for each study, with the run folders.  jobs: most
    concurrent runs.  Raises UserError before anything starts where a run is not valid, and where every value of a
    variant diverged; RunError where a run failed for another reason.
    """
    notify = listener or (lambda record: None)
    check_trials(study, overrides)
    folder = runs / study.name
    results = Results(study, folder)
    check_model(study, results.found.rows, overrides)
    make(study.results, "study.results")
    tree = read_yaml(study.base, "study.base")
    with joined():
        chosen: dict[str, Any] = {}
        if study.tune is not None:
            tuning = [trial for name in study.variants for trial in tuning_trials(study, name, overrides)]
            results.keep(tuning, True)
            run_part(Part(study.name, tree, tuple(tuning), jobs), folder, notify, results)
            for variant in study.variants:
                tuned_rows = [row for row in results.found.rows if row["variant"] == variant and row["tuning"]]
                chosen[variant] = best_value(tuned_rows, study.tune.values_of(variant))
                notify(Notice(f"{variant}: {study.tune.key}={edged(study.tune, variant, str(chosen[variant]))}"))
        counted = [t for name in study.variants for t in counted_trials(study, name, overrides, chosen.get(name))]
        results.keep(counted, False)
        run_part(Part(study.name, tree, tuple(counted), jobs), folder, notify, results)
    if study.mixes:
        write_clocks(study, counted, folder)
    return tables(study)


def run_part(part: Part, folder: Path, notify: Listener, results: Results) -> None:
    """Runs the part's unfinished trials below the study's folder, and takes the results of all.

    Raises RunError, after all trials have ended, where a trial failed for another reason than divergence.
    """
    there = nodes()
    inputs, largest_jobs = checked(part, there, folder, notify)
    missing = missing_trials(part, folder, inputs, results)
    if not missing:
        return
    rest = Part(part.name, part.tree, tuple(missing), part.concurrent)
    side_by_side = at_once(largest_jobs, there, min(rest.count, part.concurrent))

    def take(record: Notice | TrialNow) -> None:
        notify(record)
        if isinstance(record, TrialNow) and record.status == "finished":
            trial = rest.trial(record.values)
            results.take(trial, missing[trial], summary_of(folder / trial.folder, missing[trial]))
            report_run(Place(folder / trial.folder), notify)

    forked = all(job.config.resources.forked for job in largest_jobs)
    with (
        fork_server(forked) as forks,
        ray_session(forks),
        TemporaryDirectory(prefix="rayfed-sub-study-") as tune_state,
    ):
        check_head()
        shared_inputs, search, run_folders = shared(inputs), rest.search, str(folder.absolute())
        del inputs, largest_jobs  # the object store has them now
        notify(Begun(part.name, tuple(search.space), search.metric, search.mode, rest.count, side_by_side, str(folder)))
        callbacks = [Watcher(search.metric, take), *loggers(rest)]
        try:
            grid = tuned(
                rest, shared_inputs, Place(Path(tune_state)), run_folders, side_by_side, None, callbacks, resume=False
            )
        except KeyboardInterrupt:
            notify(Notice("interrupted; the same command goes on"))
            raise
    failed = [(rest.trial(values_of(one.config)), failure_of(one.error) or "") for one in grid if one.error]
    for trial, failure in failed:
        if diverged(failure):
            results.take(trial, missing[trial], None, failure.partition(";")[0])
    for trial, failure in failed:
        if not diverged(failure):
            raise RunError(f"study, run {folder / trial.folder}", failure)


def missing_trials(
    part: Part, folder: Path, inputs: Mapping[str, tuple[Config, JobInputs]], results: Results
) -> dict[StudyTrial, Config]:
    """The unfinished trials with their configurations; `results` takes the finished ones.

    Raises UserError where a run folder belongs to another configuration, to other data, code or another start.
    """
    missing = {}
    for trial in part.trials:
        config = part.config(trial.values)
        job, run_folder = job_on(inputs[input_key(config)][1], config), folder / trial.folder
        summary = None
        if (run_folder / "config.yaml").exists():
            summary = summary_of(run_folder, job.config)
            check_inputs(run_folder, job.dataset.fingerprint, job.code, job.begun)
        if summary is None:
            missing[trial] = job.config
        else:
            results.take(trial, job.config, summary)
    return missing


def diverged(failure: str) -> bool:
    """True for the failure of a run whose numbers became infinite or NaN, at a client or at the server.

    >>> diverged("round 3, client 1, local training: non-finite loss at local step 2; lower optimizer.lr")
    True
    >>> diverged("round 3, callback mine:halve: answered lr_factor=inf, not a finite number >= 0")
    False
    """
    return re.match(r"round \d+, (client \d+, local training|aggregation): non-finite ", failure) is not None


def rows_of(
    trial: StudyTrial, config: Config, folder: Path, summary: Summary | None, failure: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A trial's row and its curve; summary: None where it diverged, with the cause in `failure`."""
    keys = {"variant": trial.variant, "seed": trial.seed, "tuning": trial.tuning, "value": trial.value}
    row = {**dict.fromkeys(COLUMNS), **keys, "model": Path(config.model.path).name, "failure": failure}
    if summary is None:
        return row, []
    scores = {name: summary.metrics.get(name) for name in (*SCORES, *(f"{name}_before" for name in SCORES))}
    clock = summary.simulated
    clocked = {} if clock is None else {"simulated_hours": clock["seconds"] / 3600}
    clocked |= {} if clock is None else {name: clock[name] for name in CLOCKED if name in clock}
    ends: dict[str, Any] = {name: getattr(summary, name) for name in ENDS}
    ends["versions"] = "; ".join(f"{name} {summary.versions.get(name)}" for name in VERSIONS)
    return {**row, **scores, **ends, **clocked}, list(_curve(folder, keys))


def best_value(rows: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> Any:
    """The value with the lowest mean loss among values of which no trial diverged.

    Raises UserError where there is none.
    """
    losses = {value: [row["held_out_loss"] for row in rows if row["value"] == value] for value in values}
    means = {
        value: statistics.fmean(of_value)
        for value, of_value in losses.items()
        if all(loss is not None and math.isfinite(loss) for loss in of_value)
    }
    if not means:
        allowed = f"values of which one does not diverge; all did with {rows[0]['variant']}"
        raise UserError("study.tune.values", list(values), allowed, "add smaller ones")
    return min(means, key=lambda value: means[value])


def check_model(study: Study, rows: Sequence[Mapping[str, Any]], more: Sequence[str]) -> None:
    """UserError where the earlier rows belong to another model than the one to run now."""
    (first, *_) = study.variants.values()
    model = Path(load_config(study.base, [*study.set, *first, *more]).model.path).name
    for other in {row["model"] for row in rows} - {model}:
        file = csv_files(study)[0]
        raise UserError(
            "model.path", model, f"{other}, as in the rows of {file}", "give that model, or move the CSV away"
        )


def _curve(folder: Path, keys: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Scores over all held-out rows against the bytes sent so far, both ways, for every evaluated state."""
    shown = ("held_out_loss", "macro_f1", "micro_f1", "pearson")
    for at in curve(folder):
        found = {name: at.scores[name] for name in shown if name in at.scores}
        known = {"held_out_loss": None, "macro_f1": None, **found}
        clocked = {} if at.seconds is None else {"seconds": at.seconds, "joules": at.joules}
        yield {**keys, "rounds": at.rounds, "bytes": at.bytes, **known, **clocked}
