"""The rounds of a prepared run in its folder: under a coordinator, from the newest checkpoint on, to the summary.

A run goes on from its folder, whatever ended it: a new coordinator, in this process or a later one, loads the newest
checkpoint, and the tables are cut to the rounds that it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ray.exceptions import RayActorError, RayError

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.methods.downloads import dense_traffic
from rayfed_sub.planning.job import Job
from rayfed_sub.planning.plan import Planned
from rayfed_sub.planning.sampling import draws
from rayfed_sub.privacy.accountant import account
from rayfed_sub.runtime.callbacks import with_callbacks
from rayfed_sub.runtime.course import Course
from rayfed_sub.runtime.front import front_of_this_process
from rayfed_sub.runtime.links import CoordinatorLink, Crew, coordinator_of
from rayfed_sub.runtime.live import Live
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.alert_log import Watch
from rayfed_sub.telemetry.events import (
    Answered,
    Beginning,
    Callback,
    Notice,
    PackDone,
    RoundDone,
    Stage,
    Started,
    Summary,
)
from rayfed_sub.telemetry.process_memory import PeakMemory, peak_of
from rayfed_sub.telemetry.trackers import Tracker, trackers_of

_LIVES = 5  # coordinators that may die one after another without a new checkpoint

Listener = Callable[[Stage | Notice | Started | PackDone | RoundDone | Answered], None]
"""Receives the run's records as they come."""


def carry_out(
    job: Job,
    shared: Shared,
    folder: RunFolder,
    notify: Listener,
    began: float,
    planned: Callable[[], Planned | None] = lambda: None,
    callbacks: Mapping[str, Callback] | None = None,
    crew: Crew | None = None,
) -> Summary:
    """Runs the job in its folder from the newest checkpoint on, in the current Ray session; writes and returns the
    summary.

    began: `time.perf_counter()` at the start.  planned: its memory.  callbacks: by name; None: those that the
    configuration names.  crew: see `coordinator_of`.  Raises RunError where the run cannot go on.
    """
    callbacks = with_callbacks(job.config, ())[1] if callbacks is None else callbacks
    front = front_of_this_process()
    with ExitStack() as stack:
        processes = (None, *([] if front is None else [front.process]))
        memory = [stack.enter_context(closing(PeakMemory(process=process))) for process in processes]
        trackers = [stack.enter_context(closing(one)) for one in trackers_of(folder.path, job.config, notify)]
        summary = _with_restarts(job, folder, shared, notify, memory, callbacks, trackers, crew)
        wall = time.perf_counter() - began
        plan = planned() or Planned(None)
        whole = replace(summary, wall_seconds=wall, planned_memory_bytes=plan.processes, planned_gpu_bytes=plan.on_gpu)
        folder.write_summary(whole)
        for tracker in trackers:
            tracker.finish(whole)
    return whole


def _with_restarts(
    job: Job,
    folder: RunFolder,
    shared: Shared,
    notify: Listener,
    memory: Sequence[PeakMemory],
    callbacks: Mapping[str, Callback],
    trackers: Sequence[Tracker],
    crew: Crew | None,
) -> Summary:
    """Runs the rounds; after a coordinator's death under another one, from the newest checkpoint on."""
    lives, reached = _LIVES, checkpoints.newest(folder.path)
    while True:
        coordinator = coordinator_of(job, folder.path, shared, crew)
        try:
            summary = _rounds(job, folder, coordinator, notify, memory, callbacks, trackers)
            coordinator.release()
            return summary
        except RayActorError as error:
            if error.actor_init_failed:
                raise
            cause = str(error).strip().splitlines()[-1].strip()
            before, reached = reached, checkpoints.newest(folder.path)
            lives = lives - 1 if reached == before else _LIVES - 1
            if not lives:
                raise RunError("coordinator", f"died {_LIVES} times without a checkpoint in between: {cause}") from None
            notify(Notice(f"the coordinator died; another goes on from the last checkpoint ({cause})"))
        finally:
            coordinator.close()


def _rounds(
    job: Job,
    folder: RunFolder,
    coordinator: CoordinatorLink,
    notify: Listener,
    memory: Sequence[PeakMemory],
    callbacks: Mapping[str, Callback],
    trackers: Sequence[Tracker],
) -> Summary:
    """Runs the remaining rounds and writes tables and checkpoints; returns the summary without its wall time.
    memory: of this process, and of its front.  Raises RayActorError where the coordinator dies."""
    config, ask = job.config, coordinator.ask

    def follow(records: Iterable[PackDone | RoundDone]) -> None:
        """Reads a round's records to the end; writes and reports them."""
        for record in records:
            if isinstance(record, RoundDone):
                folder.add(record)
                live.add(record)
                course.add(record)
            notify(record)
            for alert in watch.add(record) if isinstance(record, RoundDone) else ():
                notify(Notice(alert.text))

    done = ask("start")
    first = _beginning(done, folder, job, ask, notify)
    targets = sum(4 * layer.m * layer.n for layer in job.architecture.shape.targets)
    notify(Started(config, folder.place.display_name(), overall(first.scores), targets, done, job.dataset.kind))
    rounds = config.federation.rounds or 0
    records: Iterator[PackDone | RoundDone] = iter(())
    watch, live, course = Watch(folder, config), Live(folder, config, trackers), Course(folder, config, callbacks)
    stopped, factor, due = None, 1.0, False
    try:
        if done and course.best == done:  # the last session may have ended before it kept it
            ask("keep_best")
        for n in range(done, rounds):
            decided = course.decide(n)
            if decided.stop is not None:
                stopped = decided.stop
                break
            if decided.lr_factor != factor:
                notify(Notice(f"from round {n + 1} on: the learning rate times {decided.lr_factor:g}"))
            factor = decided.lr_factor
            records = coordinator.round(n, factor)
            if due:  # while that round begins
                _keep(folder, ask, course)
            follow(records)
            due = _pinned(n, config, folder, ask, course)
        if due:
            _keep(folder, ask, course)
        if stopped is not None:
            notify(Notice(f"stopped after round {folder.rounds.num_rows} of {rounds}: {stopped}"))
            _complete(folder, ask, course)
        if answers := folder.answers():
            notify(Answered(tuple(answers)))
        return _summary(job, folder, first, ask, memory, stopped, course.best_score())
    except (KeyboardInterrupt, RunError):
        notify(Stage("stopping: a checkpoint first"))
        with suppress(RunError, RayError):  # a full disk stays full: the first error counts
            leave(folder, ask, lambda: follow(records))
        raise
    finally:
        live.close()


def _pinned(n: int, config: Config, folder: RunFolder, ask: Callable[[str], Any], course: Course) -> bool:
    """Pins round n where a checkpoint of it is due; True where that is still to be written, beside the next round.  The
    best round so far is kept at once: an interruption in the next one would leave a checkpoint of that alone."""
    every, best = config.checkpoint.every, course.best == n + 1
    due = n + 1 == config.federation.rounds or bool(every and (n + 1) % every == 0)
    if due or best:
        ask("pin")
    if best:
        _keep(folder, ask, course)
    return due and not best


def _keep(folder: RunFolder, ask: Callable[[str], Any], course: Course) -> None:
    """Writes tables and a checkpoint of the last finished round, which is pinned and may be the best one."""
    folder.write_tables()
    ask("checkpoint")
    if course.best == folder.rounds.num_rows:
        ask("keep_best")
    folder.place.push()


def _complete(folder: RunFolder, ask: Callable[[str], Any], course: Course) -> None:
    """Gives the last finished round, after which the run stops, what a last round has."""
    scores, answers = ask("evaluated")
    folder.complete(scores, answers, ask("epsilon"))
    course.judged(folder.rounds.num_rows, scores)
    ask("pin")
    _keep(folder, ask, course)


def _beginning(done: int, folder: RunFolder, job: Job, ask: Callable[[str], Any], notify: Listener) -> Beginning:
    """The run's beginning: of a new run, or of the resumed one, whose tables are then cut to its `done` rounds.

    Raises UserError where the resumed run began with other weights."""
    config, backbone = job.config, ask("backbone_sum")
    versions, environment = ask("workers_environment")
    noise = {} if job.noise is None else {"noise": job.noise}  # other versions of the accountant may find another one
    now: dict[str, Any] = {"versions": versions, "environment": {**environment, **noise}}
    before = folder.beginning()
    if before is None and not done:
        notify(Stage("evaluating the initial model"))
        rows, data = asdict(job.dataset.row_counts), asdict(job.dataset.fingerprint)
        scores, answers = ask("evaluated")
        about: dict[str, Any] = {"rows": rows, "data": data, "backbone": backbone}
        code, classes = dict(job.code), list(job.dataset.class_names)
        start = None if job.begun is None else job.begun.digest
        problem = job.dataset.kind
        beginning = Beginning(scores, **now, **about, code=code, classes=classes, problem=problem, start=start)
        folder.begin(beginning, answers)
        return beginning
    if before is not None and before.backbone != backbone:
        allowed = f"the weights with which the run in {folder.place.display_name()} began; these are others"
        advice = "restore them, or begin anew in another folder"
        if job.architecture.class_rows != ():
            advice = "begin anew in another folder, if the run is of a version that did not sort a checkpoint's classes"
        raise UserError("model.path", config.model.path, allowed, advice)
    beginning = folder.go_on(done)
    notify(Notice(f"going on after round {done} of {config.federation.rounds}"))
    then = {**beginning.versions, **beginning.environment}
    after = {**now["versions"], **now["environment"]}
    other = [f"{name} {then.get(name)} then, {after[name]} now" for name in after if then.get(name) != after[name]]
    if other:
        notify(Notice(f"the bits may differ from an undisturbed run's: {'; '.join(other)}"))
    return beginning


def leave(folder: RunFolder, ask: Callable[[str], Any], follow: Callable[[], None]) -> None:
    """Stops the coordinator and writes tables and checkpoint of the last finished round.  follow: reads the rest of a
    round's records.

    Nothing is written for a finished round whose rows are lost: the earlier checkpoint stays the newest.
    """
    finished = ask("halt")
    if folder.rounds.num_rows < finished:  # a round ended unread
        follow()
    if folder.rounds.num_rows == finished:
        folder.write_tables()
        ask("checkpoint")


def _summary(
    job: Job,
    folder: RunFolder,
    first: Beginning,
    ask: Callable[[str], Any],
    memory: Sequence[PeakMemory],
    stopped: str | None,
    best: dict[str, Any] | None,
) -> Summary:
    rows, config, left = folder.rounds.to_pylist(), job.config, ask("under_way")
    samples = [*(one.sample() for one in memory), *ask("memory")]
    folder.end(left)
    before, start = overall(first.scores), job.begun
    counted = len(rows) if stopped is None else config.federation.rounds or 0
    shape = job.architecture.shape
    biases = sum(layer.m for layer in shape.head if layer.bias)
    dense = 4 * (sum(layer.m * layer.n for layer in (*shape.targets, *shape.head)) + biases)
    dense_up, dense_down = dense_traffic(
        folder.exchanges(),
        folder.trained_rounds(),
        dense,
        private=config.privacy.of_clients,
        start=0 if start is None else start.wire_bytes,
    )
    return Summary(
        name=config.name,
        method=str(config.method["name"]),
        rounds=len(rows),
        weights_sha256=ask("weights_sha256"),
        uplink_bytes=sum(row["uplink_bytes"] for row in rows) + sum(row.uplink_bytes for row in left),
        downlink_bytes=sum(row["downlink_bytes"] for row in rows) + sum(row.downlink_bytes for row in left),
        dense_bytes=dense_up,
        dense_downlink_bytes=dense_down,
        change_rank=rows[-1]["change_rank"],
        wall_seconds=0.0,
        train_seconds=sum(row["train_seconds"] for row in rows),
        peak_memory_bytes=peak_of(samples),
        metrics={f"{name}_before": value for name, value in before.items()} | overall(folder.scores(len(rows))),
        versions=first.versions,
        environment=first.environment,
        # The moment of a stop follows from what the rounds released, so all that were planned count.
        privacy=account(config, job.noise, partial(draws, config, job.dataset, counted)),
        resumed=folder.resumed(),
        precision=config.model.precision,
        logits=None if job.architecture.logits is None else str(job.architecture.logits),
        rows=first.rows,
        split=next((score.split for score in first.scores), None),
        stopped=stopped,
        best=best,
        one_at_a_time=job.architecture.one_at_a_time,
        start_from=None if start is None else asdict(start),
        simulated=folder.simulated(config.devices.classes),
        gpu_memory={f"{one.process[0]} {one.process[1]}": asdict(one.gpu) for one in samples if one.gpu is not None},
        folder=folder.place.display_name(),
    )
