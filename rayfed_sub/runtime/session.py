"""A run from configuration to summary: checks, while Ray comes up aside, then the rounds of the coordinator."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rayfed_sub.config.loading import as_override
from rayfed_sub.config.schema import Config, Federation
from rayfed_sub.core.arrays import Packed, packed
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.methods import adopted, strangers
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.models.own_architecture import without_data
from rayfed_sub.models.start import merged
from rayfed_sub.models.weights import load_weights
from rayfed_sub.planning import plan
from rayfed_sub.planning.call import NOTHING, Given, named
from rayfed_sub.planning.job import Job, check_resources, check_settings, prepare
from rayfed_sub.planning.machines import free_memory
from rayfed_sub.runtime.callbacks import with_callbacks
from rayfed_sub.runtime.cluster import joined, nodes, put_rows
from rayfed_sub.runtime.local_ray import ray_session_aside
from rayfed_sub.runtime.object_store import Shared, get
from rayfed_sub.runtime.rounds import Listener, carry_out
from rayfed_sub.runtime.worker import Spec
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.earlier_runs import read_start
from rayfed_sub.storage.kept_models import KeptModel, keep
from rayfed_sub.storage.remote import Place, open_place
from rayfed_sub.storage.run_folder import RunFolder, check_free, create, new, reopen, summary_of, to_resume
from rayfed_sub.storage.same_run import check_given, check_inputs
from rayfed_sub.telemetry.events import Callback, Notice, Stage, Summary
from rayfed_sub.telemetry.process_memory import give_back
from rayfed_sub.telemetry.trackers import check_trackers

Finisher = Callable[[Place, Listener], None]
"""Adds files to the folder of a finished run, such as its report."""


def no_finisher(place: Place, notify: Listener) -> None:
    """Adds nothing."""


def run(
    config: Config,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    given: Given = NOTHING,
    resume: bool = False,
    address: str | None = None,
    finish: Finisher = no_finisher,
    callbacks: Sequence[Callback] = (),
    forks: str | None = None,
) -> Summary:
    """Runs a federated job and returns its summary; the run folder is `out` (default: runs/<name>, or the next free).

    given: objects in place of what the configuration names.
    out: a path, or s3://bucket/path or gs://bucket/path, to which the files go as they come (storage/remote.py).
    resume: go on with the run in `out` (default: the newest of this name) from its newest checkpoint, to the same
    weights as without the interruption; begins a run where there is none, and returns the summary of a finished one.
    address: of a Ray cluster to join (`auto`: this machine's), by default the environment variable RAY_ADDRESS.
    Without either it uses the cluster that this process is connected to, or starts a local one and shuts it down again.
    A longer run of the same configuration goes on as one of that length would.
    finish: called with the folder of a finished run before the folder is complete, e.g. to write a report into it.
    callbacks: asked between rounds, besides those that the configuration names; they may stop the run or change its
    learning rate.
    forks: the command by which worker processes of a local Ray start, of `fork_server`; None: as Ray starts them.
    Raises UserError before any training where the configuration does not fit, RunError where the run cannot go on.
    An interruption (Ctrl-C) leaves a checkpoint.
    """
    notify = listener or (lambda record: None)
    config, left_out = adopted(named(config, given))
    config, asked = with_callbacks(config, callbacks)
    given = replace(given, callbacks=tuple(callbacks))
    if left_out and listener is None:
        warnings.warn(left_out, stacklevel=3)
    elif left_out:
        notify(Notice(left_out))
    if out is None:
        return _run(config, None, notify, given, resume, address, finish, asked, forks)
    with open_place(out, notify, resume=resume) as place:
        return _run(config, place, notify, given, resume, address, finish, asked, forks)


def _run(
    config: Config,
    place: Place | None,
    notify: Listener,
    given: Given,
    resume: bool,
    address: str | None,
    finish: Finisher,
    callbacks: Mapping[str, Callback],
    forks: str | None,
) -> Summary:
    began = time.perf_counter()
    old = to_resume(place, config.name) if resume else None
    if resume and old is None:
        notify(Notice("nothing to go on with: a new run begins"))
    if old is not None:
        check_given(old.path, config)
    if place is not None and old is None:
        check_free(place.path)
    if address is not None and not config.resources.workers:
        raise UserError("--address", address, "nothing with resources.workers=0, which needs no Ray", "leave one out")
    with joined(address) if config.resources.workers else nullcontext(), ExitStack() as stack:
        there = nodes()
        check_resources(config, there)
        check_settings(config, given)
        check_trackers(config)
        # A plan does not know the memory of a cluster's nodes.
        here = not ray.is_initialized() or len(there) == 1
        free = free_memory()  # before Ray comes up
        if config.resources.workers:
            notify(Stage("starting Ray, reading task and model"))
            wait_for_ray = stack.enter_context(ray_session_aside(forks))
        else:
            notify(Stage("reading task and model"))
        job = prepare(config, given, read_start(config))
        give_back()  # what texts and tokenizers took
        if job.config.resources.workers:
            check_sent(given)
        if old is not None and (summary := _goes_on(old.path, job)) is not None:
            notify(Notice(f"{old.display_name()} is finished already"))
            finish(old, notify)
            return replace(summary, folder=old.display_name())
        for notice in _notices(config, job):
            notify(notice)
        if here:
            plan.check(job, (old or place or Place(Path())).path, free=free)
        folder = _folder(old, place, job)
        notify(Stage("loading weights"))
        with _resume_hint(folder, job.config, notify, given), ThreadPoolExecutor(1) as pool:
            loading, job = [pool.submit(load_backbone, job)], job.loaded
            planned = _planned(pool, job)
            if job.config.resources.workers:
                wait_for_ray()
            put, put_data = (ray.put, put_rows) if config.resources.workers else (_unchanged, _unchanged)
            # No name here may hold the weights for the whole run.
            shared = Shared(put(spec_of(job)), put(loading.pop().result()), put_data(job.dataset))
            job = replace(job, dataset=get(shared.dataset))  # in memory once
            plans = partial(_planned_bytes, planned, notify)
            summary = carry_out(job, shared, folder, notify, began, plans, callbacks)
        with ThreadPoolExecutor(1) as pool:
            down = pool.submit(stack.close)  # a Ray of the run's own goes down meanwhile
            finish(folder.place, notify)
        down.result()
    return summary


def _goes_on(folder: Path, job: Job) -> Summary | None:
    """Checks that the job is that of the folder's run; returns its summary where it is finished."""
    summary = summary_of(folder, job.config, job.any_pack)
    check_inputs(folder, job.dataset.fingerprint, job.code, job.begun)
    return summary


def _folder(old: Place | None, place: Place | None, job: Job) -> RunFolder:
    """The folder of the run that goes on in `old`, or a new one."""
    config = job.config
    folder = reopen(old, config, job.any_pack) if old is not None else create(new(place, config.name), config)
    checkpoints.make(folder.path)
    checkpoints.read(folder.path)  # fail early on a corrupt checkpoint
    if (weights := job.weights) is not None:
        shape, known = job.architecture.shape, job.architecture
        state = {name: weights.tensors[name] for name in weights.state}
        keep(folder.path, KeptModel(shape, known.transposed, known.tied, state))
    folder.place.push()
    return folder


def _notices(config: Config, job: Job) -> Iterator[Notice]:
    """Notices of a run before it begins.  config: that of the job, as it was asked for."""
    if job.architecture.one_at_a_time:
        yield _one_at_a_time(job.architecture)
    asked, default = config.federation, Federation.model_fields["local_steps"].default
    # A run's config.yaml has the steps that it takes.
    if asked.mode == "semi-sync" and asked.local_steps not in (default, job.config.federation.local_steps):
        steps = as_override("federation.local_steps", asked.model_dump(mode="json")["local_steps"])
        yield Notice(f"{steps} is not used: with federation.mode=semi-sync clients' steps follow from local_seconds")


def _one_at_a_time(architecture: Architecture) -> Notice:
    """Says why packs have one client."""
    if architecture.module is not None:
        whose = f"{type(architecture.module).__qualname__} is the caller's own"
        return Notice(f"{whose}: clients train one at a time, and memory is not planned")
    what = f"layers of {architecture.hf_config.model_type} see something else than row after row"
    return Notice(f"{what}: clients train one at a time")


def _unchanged(value: Any) -> Any:
    return value


def _planned(pool: ThreadPoolExecutor, job: Job) -> Callable[[], plan.Planned | None]:
    """Plans the run's memory, aside while workers train.  A run of one process plans at its end: while transformers
    builds a model, torch's default dtype is the model's for all threads, and a loss made meanwhile would be rounded."""
    return pool.submit(plan.memory, job).result if job.config.resources.workers else partial(plan.memory, job)


def _planned_bytes(planned: Callable[[], plan.Planned | None], notify: Listener) -> plan.Planned | None:
    """Planned bytes; None, with a notice, where no plan can be made, e.g. for a method of the user's own."""
    try:
        return planned()
    except Exception as error:
        notify(Notice(f"memory was not planned: {type(error).__name__}: {error}"))
        return None


@contextmanager
def _resume_hint(folder: RunFolder, config: Config, notify: Listener, given: Given = NOTHING) -> Iterator[None]:
    """Adds how to go on to the error or interruption that ended the run, where resuming can help."""
    try:
        yield
    except RunError as error:
        cause = error.cause
        if error.resume is not None and checkpoints.newest(folder.path) is not None:
            cause = f"{cause}; {_resume(folder, config, error.resume, given)}"
        raise RunError(error.stage, cause, round=error.round, client=error.client, resume=error.resume) from None
    except KeyboardInterrupt:
        notify(Notice(f"interrupted; {_resume(folder, config, (), given)}"))
        raise


def _resume(folder: RunFolder, config: Config, overrides: Sequence[str], given: Given) -> str:
    """The command that goes on with a run, or, where none can name what the call handed over, the call."""
    place, classes = folder.place, strangers(config)
    programs = {key: list(names) for key, names in config.programs.items() if names}
    names = [*classes.values(), *(name for found in programs.values() for name in found)]
    if given.has_any or any(name.startswith("__main__") or "<" in name for name in names):
        changed = f", with {' '.join(overrides)}" if overrides else ""
        return f"go on with the same call in Python{changed}: run(..., {place.display_name()!r}, resume=True)"
    # Classes, metrics and callbacks that only the folder names are not imported: name them in the command.
    named = [f"{key}={name}" for key, name in classes.items()]
    named += [as_override(key, found) for key, found in programs.items()]
    words = [
        "rayfed-sub",
        "run",
        place.display_name("config.yaml"),
        *named,
        *overrides,
        "--out",
        place.display_name(),
        "--resume",
    ]
    return f"go on with: {shlex.join(words)}"


def check_sent(given: Given) -> None:
    """UserError naming the first object of the call that cannot be sent to workers."""
    parts: dict[str, Any] = {"method": given.method, "hooks": given.hook}
    if (own := given.model) is not None:
        # Weights travel by themselves: of the module its code counts, and what it holds besides.
        module = without_data(own.module)
        parts |= {"model": module, "loss": own.loss, "batch": own.batch, "measure": own.measure}
    for name, value in parts.items():
        try:
            ray.cloudpickle.dumps(value)
        except Exception as error:  # objects raise anything when they are pickled
            allowed = f"what cloudpickle can send to workers: {type(error).__name__}: {error}"
            shown = getattr(value, "__qualname__", type(value).__qualname__)
            raise UserError(
                name, shown, allowed, "make what it holds where it is used, or set resources.workers=0"
            ) from None


def spec_of(job: Job) -> Spec:
    """Specification of the job's workers."""
    return Spec(job.config, job.method, job.architecture, job.processor, job.noise, plan.recomputes(job))


def load_backbone(job: Job) -> Packed:
    """The weights with which the run begins, as arrays for the object store."""
    if job.weights is not None:
        return packed(job.weights.tensors)
    assert (job.start is None) == (job.begun is None), "a job whose weights are loaded already"
    weights = load_weights(job.config.model, job.architecture, job.config.seed)
    return packed(merged(weights, job.start, job.architecture))
