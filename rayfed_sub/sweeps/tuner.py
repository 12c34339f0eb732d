"""Trials under Ray Tune, each a federated run in a placement group of its own.

The first bundle of every group lies on the cluster's head and holds the trial's process and its coordinator, so that
run folders lie where the sweep was started; every other bundle holds a worker.  Tune keeps its state in the folder's
tune/, a trial in its run folder.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from pyarrow import fs
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune import Callback, PlacementGroupFactory, ResultGrid
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.runtime.cluster import HEAD
from rayfed_sub.storage.remote import Place
from rayfed_sub.sweeps.shared_inputs import SharedInputs
from rayfed_sub.sweeps.space import Axis, Search, Trials
from rayfed_sub.sweeps.trial import NUMBER, trial, values_of

TRIALS = "trials"
"""The folder of the trials' run folders in a sweep's."""
_TUNE = "tune"
_FOREVER = 10**9  # ASHA's last round, which no trial reaches


def check_unused(place: Place) -> None:
    """UserError where the place of a new sweep has files of another: Tune would unpickle files in its folder."""
    filesystem, root = _storage(place)
    for name in (_TUNE, TRIALS):
        if filesystem.get_file_info(fs.FileSelector(f"{root}/{name}", allow_not_found=True)):
            allowed = f"a folder without {name}/, which another sweep has left"
            raise UserError("--out", place.display_name(), allowed, "choose another folder")


def tuned(
    sweep: Trials,
    inputs: SharedInputs,
    place: Place,
    trials: str,
    side_by_side: int,
    finder: Any,
    callbacks: Sequence[Callback],
    resume: bool,
) -> ResultGrid:
    """Runs or resumes all trials.  place: for Tune's state; trials: path or URI of their run folders; finder: see
    `searcher`."""
    search = sweep.search
    filesystem, root = _storage(place)
    numbers = count(_first_free(filesystem, f"{root}/{_TUNE}"))
    share = math.floor(1e4 / side_by_side) / 1e4  # Ray counts in ten thousandths
    body = tune.with_parameters(trial, sweep=sweep, inputs=inputs, trials=trials)
    with _quiet():
        analysis = tune.run(
            tune.with_resources(body, lambda given: _bundles(sweep.config(values_of(given)), share)),
            name=_TUNE,
            storage_path=root,
            storage_filesystem=filesystem,
            config={"trial": _domains(search)} if finder else {"trial": tune.grid_search(_numbered(sweep))},
            num_samples=search.trials if finder else 1,
            metric=search.metric,
            mode=search.mode,
            max_concurrent_trials=side_by_side,
            search_alg=finder,
            scheduler=_scheduler(search),
            max_failures=search.retries,
            reuse_actors=True,
            trial_dirname_creator=lambda new: f"{_number(new.config, numbers):05d}",
            callbacks=callbacks,
            resume="AUTO+ERRORED" if resume else False,
            raise_on_failed_trial=False,
            verbose=0,
        )
    return ResultGrid(analysis)


def _storage(place: Place) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for Tune's state, and the path in it."""
    if place.mirror is None:
        return fs.LocalFileSystem(), str(place.path.absolute())
    return place.mirror.filesystem, place.mirror.root


def _first_free(filesystem: fs.FileSystem, folder: str) -> int:
    """First number without a trial's folder, for trials that a searcher proposes one by one."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return max((int(info.base_name) + 1 for info in found if info.base_name.isdigit()), default=0)


def _number(given: Mapping[str, Any], numbers: Iterator[int]) -> int:
    return int(given["trial"][NUMBER]) if NUMBER in given["trial"] else next(numbers)


def _numbered(sweep: Trials) -> list[dict[str, Any]]:
    return [{NUMBER: number, **point} for number, point in enumerate(sweep.points())]


def _domains(search: Search) -> dict[str, Any]:
    """The space as Tune's domains."""

    def domain(axis: Axis) -> Any:
        if axis.choice:
            return tune.choice(list(axis.choice))
        return (tune.loguniform if axis.loguniform else tune.uniform)(*axis.values)

    return {key: domain(axis) for key, axis in search.space.items()}


def _bundles(config: Config, share: float) -> PlacementGroupFactory:
    """Placement group of a trial: a bundle on the head for its process and coordinator, and one for each worker; a
    single bundle where the trial trains in its own process.

    share: of the head's resource; limits concurrent trials.  Tune's own limit ignores trials that it resumes."""
    resources = config.resources
    worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    shape = {name: amount for name, amount in worker.items() if amount}
    if not resources.workers:
        return PlacementGroupFactory([{HEAD: share, **shape}])
    return PlacementGroupFactory([{HEAD: share}, *[shape] * resources.workers], strategy="PACK")


def _scheduler(search: Search) -> TrialScheduler | None:
    rounds = "rounds"
    if search.scheduler == "asha":
        return ASHAScheduler(
            time_attr=rounds,
            max_t=_FOREVER,
            grace_period=search.grace,
            reduction_factor=2,
            stop_last_trials=False,  # else rungs passed between two evaluations would count
        )
    if search.scheduler == "median":
        return MedianStoppingRule(time_attr=rounds, grace_period=search.grace, min_time_slice=math.inf)  # never pauses
    return None


def searcher(search: Search) -> Any:
    """Search algorithm that proposes trials one by one; None where all are known in advance.

    Raises UserError where a package is missing.
    """
    if search.searcher == "random":
        return None
    try:
        import optuna
    except ImportError:
        allowed, advice = "random, or optuna where that is installed", "pip install optuna"
        raise UserError("sweep.searcher", "optuna", allowed, advice) from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(seed=search.seed)


def loggers(sweep: Trials) -> list[Callback]:
    """Tune's loggers; Tune reads the files of the first one itself.  Raises UserError where a package is missing."""
    found: list[Callback] = [JsonLoggerCallback()]
    for name in sweep.search.loggers:
        try:
            if name == "tensorboard":
                found.append(TBXLoggerCallback())
            elif name == "wandb":
                import wandb  # noqa: F401

                found.append(WandbLoggerCallback(project=sweep.name))
            else:
                import mlflow  # noqa: F401

                found.append(MLflowLoggerCallback(experiment_name=sweep.name))
        except ImportError:
            raise UserError("sweep.loggers", name, "loggers that are installed", f"pip install {name}") from None
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off Tune's tables, its handling of Ctrl-C and its default logs."""
    ours = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a metric of texts is known at the end only
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    before = {name: os.environ.get(name) for name in ours}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(ours)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
