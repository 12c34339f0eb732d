"""A sweep from its definition to its table: checks, then Ray, then the trials under Ray Tune."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from rayfed_sub.config.loading import as_override, read_yaml, yaml_text
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.methods import strangers
from rayfed_sub.planning import plan
from rayfed_sub.planning.job import Job, JobInputs, check_resources, job_on
from rayfed_sub.planning.machines import Node, free_memory
from rayfed_sub.runtime.callbacks import with_callbacks
from rayfed_sub.runtime.cluster import HEAD, joined, nodes
from rayfed_sub.runtime.fork_server import fork_server
from rayfed_sub.runtime.local_ray import ray_session_aside
from rayfed_sub.storage import atomic_files
from rayfed_sub.storage.remote import SWEEP, Place, inside, open_place
from rayfed_sub.storage.run_folder import check_free, new, to_resume
from rayfed_sub.storage.same_run import FREE, check_same, check_same_data, check_same_start
from rayfed_sub.sweeps.capacity import at_once, check_disk
from rayfed_sub.sweeps.outcome import SweepResult, outcome
from rayfed_sub.sweeps.progress import Begun, TrialNow, Watcher
from rayfed_sub.sweeps.shared_inputs import all_inputs, input_key, shared
from rayfed_sub.sweeps.space import Sweep, Trials, check_metric_of, largest
from rayfed_sub.sweeps.tuner import TRIALS, check_unused, loggers, searcher, tuned
from rayfed_sub.telemetry.events import Notice, Stage

Listener = Callable[[Stage | Notice | Begun | TrialNow], None]
"""Receives the sweep's records as they come."""

_FILE = "sweep.yaml"
_DATA = "data.json"
"""The fingerprints of the trials' data sets, each with the digest of what `model.start_from` names, in the order of the
sweep's points."""
_FREE = ("sweep.concurrent", "sweep.retries", *FREE)
"""Settings that may differ when a sweep is taken up again."""


def run_sweep(
    sweep: Sweep,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Runs all trials and leaves trials.parquet, curves.parquet, best.yaml and report.html in the sweep's folder `out`
    (default: runs/<name>, or the next free).

    resume: go on with the sweep in `out` (default: the newest of this name): trials that are through stay as they are,
    others go on from their last checkpoints, failed ones as well.  address: as in `run`.
    Raises UserError before anything starts where the sweep does not fit: a configuration, the machine or cluster.
    """
    notify = listener or (lambda record: None)
    for line in sweep.left_out:
        if listener is None:
            warnings.warn(line, stacklevel=3)
        else:
            notify(Notice(line))
    if out is None:
        return _run(sweep, None, notify, resume, address)
    with open_place(out, notify, resume=resume, order=SWEEP) as place:
        return _run(sweep, place, notify, resume, address)


def _run(sweep: Sweep, place: Place | None, notify: Listener, resume: bool, address: str | None) -> SweepResult:
    old = to_resume(place, sweep.name, _FILE) if resume else None
    if resume and old is None:
        notify(Notice("nothing to go on with: a new sweep begins"))
    if old is not None:
        check_same(read_yaml(old.path / _FILE), _tree(sweep), _FREE, f"the sweep in {old.display_name()}")
    elif place is not None:
        check_free(place.path, _FILE)
        check_unused(place)
    search = sweep.search
    callbacks, finder = [Watcher(search.metric, notify), *loggers(sweep)], searcher(search)
    forked = all(sweep.config(point).resources.forked for point in sweep.points())
    with joined(address), fork_server(forked, address) as forks:
        there, runs, free = nodes(), old or place or Place(Path()), free_memory()
        with ray_session_aside(forks) as wait_for_ray:
            inputs, jobs = checked(sweep, there, runs.path, notify, free)
            side_by_side = at_once(jobs, there, min(sweep.count, search.concurrent or sweep.count), free)
            check_disk(jobs, sweep.count, side_by_side, runs, resumed=old is not None)
            bases = [base for _, base in inputs.values()]
            if old is not None and (old.path / _DATA).exists():  # else each resumed trial checks its own
                check_bases(json.loads((old.path / _DATA).read_text(encoding="utf-8")), bases, old.display_name())
            here = old or new(place, sweep.name)
            atomic_files.write(here.path / _DATA, json.dumps(list(map(_digests, bases))).encode())
            atomic_files.write(here.path / _FILE, yaml_text(_tree(sweep)).encode())
            here.push()
            notify(Stage("loading weights"))
            wait_for_ray()
            check_head()
            shared_inputs = shared(inputs)
            del inputs  # the object store has them now
            keys = tuple(search.space)
            notify(Begun(sweep.name, keys, search.metric, search.mode, sweep.count, side_by_side, here.display_name()))
            try:
                trials = inside(here.mirror.uri if here.mirror else str(here.path.absolute()), TRIALS)
                grid = tuned(sweep, shared_inputs, here, trials, side_by_side, finder, callbacks, old is not None)
            except KeyboardInterrupt:
                names = strangers(sweep.config(sweep.points()[0]))
                named = [f"{key}={name}" for key, name in names.items() if key not in sweep.search.space]
                named += [as_override(key, list(names)) for key, names in sweep.programs.items() if names]
                words = [
                    "rayfed-sub",
                    "sweep",
                    here.display_name(_FILE),
                    *named,
                    "--out",
                    here.display_name(),
                    "--resume",
                ]
                notify(Notice(f"interrupted; go on with: {shlex.join(words)}"))
                raise
            return outcome(sweep, grid, here)


def checked(
    sweep: Trials, there: Sequence[Node], folder: Path, notify: Listener, free: int | None = None
) -> tuple[Mapping[str, tuple[Config, JobInputs]], list[Job]]:
    """Checks all trials; returns their inputs and the most demanding jobs.  Raises UserError for a trial that cannot
    work.  there: the nodes; folder: on the disk of the run folders; free: as in `plan.check`."""
    points = sweep.points()
    configs = [sweep.config(point) for point in points]
    for config in configs:
        if config.trackers:
            allowed = "none in a sweep or study, whose trials are many runs"
            raise UserError(
                "trackers", list(config.trackers), allowed, "set trackers=[], and sweep.loggers for a sweep"
            )
        check_resources(config, there)
        with_callbacks(config, ())  # those that the configuration names can be imported
    notify(Stage("reading tasks and models"))
    inputs = all_inputs(configs)
    check_metric_of(sweep.search.metric, (base.dataset.kind for _, base in inputs.values()))
    for config in configs:
        job_on(inputs[input_key(config)][1], config)
    jobs = [job_on(inputs[input_key(config)][1], config) for config in map(sweep.config, largest(points))]
    if len(there) == 1:  # a plan does not know the memory of a cluster's nodes
        for job in jobs:
            plan.check(job, folder, free=free)
    return inputs, jobs


def _digests(base: JobInputs) -> dict[str, Any]:
    """An entry of data.json."""
    return {**asdict(base.dataset.fingerprint), "start": None if base.begun is None else base.begun.digest}


def check_bases(then: Sequence[Mapping[str, Any]], now: Sequence[JobInputs], where: str) -> None:
    """UserError where the sweep `where` began with other data, or from another start; then: data.json, which may be of
    a version without starts."""
    for before, base in zip(then, now, strict=True):
        check_same_data(before, base.dataset.fingerprint, where)
        check_same_start(before.get("start"), base.begun, f"the sweep in {where}")


def _tree(sweep: Sweep) -> dict[str, Any]:
    """Content of sweep.yaml."""
    return {**sweep.tree, "sweep": sweep.search.model_dump(mode="json", exclude_none=True)}


def check_head() -> None:
    """UserError where this process is not on the cluster's head."""
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    if HEAD not in resources:
        advice = "start the sweep there, e.g. by ray job submit"
        raise UserError("--address", "a worker node", "the cluster's head, where trials keep their folders", advice)
