"""A sweep from its definition to its table: trials under Ray Tune, each a federated run in its own placement group.

The first bundle of every group lies on the cluster's head and holds the trial's own process and its coordinator, so
that run folders lie where the sweep was started; the others hold a worker each.  What Tune needs to go on lies in the
folder's tune/, what a trial needs in its run folder.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import ray
import yaml
from pyarrow import fs
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune import Callback, PlacementGroupFactory, ResultGrid
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from rayfed_sub.config import Config
from rayfed_sub.config_files import flat, read_yaml
from rayfed_sub.engine import files, planning
from rayfed_sub.engine.folder import check_free, latest, new
from rayfed_sub.engine.job import check_resources, job_on
from rayfed_sub.engine.journal import Notice, Stage
from rayfed_sub.engine.mirror import SWEEP, Place, inside, placed
from rayfed_sub.engine.nodes import HEAD, nodes
from rayfed_sub.engine.ray_session import joined, ray_session
from rayfed_sub.errors import UserError
from rayfed_sub.sweeps.capacity import at_once
from rayfed_sub.sweeps.commons import Commons, foundations, ground_key, shared
from rayfed_sub.sweeps.journal import Begun, TrialNow
from rayfed_sub.sweeps.outcome import SweepResult, outcome
from rayfed_sub.sweeps.space import Sweep, largest
from rayfed_sub.sweeps.trial import NUMBER, trial, values_of
from rayfed_sub.sweeps.watcher import Watcher

Listener = Callable[[Stage | Notice | Begun | TrialNow], None]
"""Is shown the records as they come."""

_FILE = "sweep.yaml"
_TUNE = "tune"
_SHARE = 0.001  # of the head, so that Ray places the first bundle there
_FOREVER = 10**9  # ASHA stops a trial there, which ends by itself before


def run_sweep(
    sweep: Sweep,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Runs all trials and leaves trials.parquet, best.yaml and report.html in the sweep's folder `out` (default:
    runs/<name>, or the next free).

    resume: go on with the sweep in `out` (default: the newest of this name): trials that are through stay as they are,
    others go on from their last checkpoints, failed ones as well.  address: as in `run`.
    Raises UserError before anything starts where the sweep does not fit: a configuration, the machine or cluster.
    """
    tell = listener or (lambda record: None)
    if out is None:
        return _run(sweep, None, tell, resume, address)
    with placed(out, tell, resume=resume, order=SWEEP) as place:
        return _run(sweep, place, tell, resume, address)


def _run(sweep: Sweep, place: Place | None, tell: Listener, resume: bool, address: str | None) -> SweepResult:
    old = _to_resume(place, sweep.name) if resume else None
    if resume and old is None:
        tell(Notice("nothing to go on with: a new sweep begins"))
    if old is not None:
        _check_same(sweep, old)
    elif place is not None:
        check_free(place.path)
    with joined(address):
        there, points = nodes(), sweep.points()
        for config in map(sweep.config, points):
            check_resources(config, there)
        tell(Stage("reading tasks and models"))
        grounds = foundations(map(sweep.config, points))
        jobs = [job_on(grounds[ground_key(own)][1], own) for own in map(sweep.config, largest(points))]
        for job in jobs if len(there) == 1 else ():  # of a cluster's nodes no plan knows the memory
            planning.check(job, (old or place or Place(Path())).path)
        side_by_side = at_once(jobs, there, min(sweep.count, sweep.search.concurrent or sweep.count))
        here = old or new(place, sweep.name)
        files.write(here.path / _FILE, _text(sweep))
        here.saved()
        tell(Stage("starting Ray, loading weights"))
        with ray_session():
            _check_head()
            commons = shared(grounds)
            del grounds, jobs, job  # the object store has them now
            search = sweep.search
            keys = tuple(search.space)
            tell(Begun(sweep.name, keys, search.metric, search.mode, sweep.count, side_by_side, here.called()))
            try:
                return outcome(sweep, _fitted(sweep, commons, here, side_by_side, tell), here)
            except KeyboardInterrupt:
                file, folder = shlex.quote(here.called(_FILE)), shlex.quote(here.called())
                tell(Notice(f"interrupted; go on with: rayfed-sub sweep {file} --out {folder} --resume"))
                raise


def _to_resume(place: Place | None, name: str) -> Place | None:
    """Where the sweep is that is to go on; None where none has begun."""
    if place is not None:
        return place if (place.path / _FILE).exists() else None
    path = latest(name, _FILE)
    return None if path is None else Place(path)


def _text(sweep: Sweep) -> bytes:
    section = sweep.search.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump({**sweep.tree, "sweep": section}, sort_keys=False).encode()


def _check_same(sweep: Sweep, place: Place) -> None:
    """UserError naming the first key with which the sweep there began otherwise."""
    old, new = flat(read_yaml(place.path / _FILE)), flat(yaml.safe_load(_text(sweep)))
    for key in [*old, *(key for key in new if key not in old)]:
        if key not in ("sweep.concurrent", "sweep.retries") and old.get(key) != new.get(key):
            allowed = f"{old.get(key)!r}, with which the sweep in {place.called()} began"
            raise UserError(key, new.get(key), allowed, "set that, or begin anew in another folder")


def _check_head() -> None:
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    if HEAD not in resources:
        advice = "start the sweep there, e.g. by ray job submit"
        raise UserError("--address", "a worker node", "the cluster's head, where trials keep their folders", advice)


def _fitted(sweep: Sweep, commons: Commons, place: Place, side_by_side: int, tell: Listener) -> ResultGrid:
    """All trials to their ends, from where they are."""
    search, trials = sweep.search, inside(place.called() if place.mirror else str(place.path.absolute()), "trials")
    filesystem, root = _storage(place)
    numbers = count(_first_free(filesystem, f"{root}/{_TUNE}"))
    found_as_it_goes = search.searcher == "optuna"
    body = tune.with_parameters(trial, sweep=sweep, commons=commons, trials=trials)
    with _quiet():
        analysis = tune.run(
            tune.with_resources(body, lambda given: _bundles(sweep.config(values_of(given)))),
            name=_TUNE,
            storage_path=root,
            storage_filesystem=filesystem,
            config=_domains(sweep) if found_as_it_goes else {"trial": tune.grid_search(_numbered(sweep))},
            num_samples=search.trials if found_as_it_goes else 1,
            metric=search.metric,
            mode=search.mode,
            max_concurrent_trials=side_by_side,
            search_alg=_optuna(search.seed) if found_as_it_goes else None,
            scheduler=_scheduler(sweep),
            max_failures=search.retries,
            reuse_actors=True,
            trial_dirname_creator=lambda own: f"{_number(own.config, numbers):05d}",
            callbacks=[Watcher(search.metric, tell), *_loggers(sweep)],
            resume="AUTO+ERRORED",
            raise_on_failed_trial=False,
            verbose=0,
        )
    return ResultGrid(analysis)


def _storage(place: Place) -> tuple[fs.FileSystem, str]:
    """Where Tune keeps what it needs to go on, in pyarrow's words."""
    if place.mirror is None:
        return fs.LocalFileSystem(), str(place.path.absolute())
    return place.mirror.filesystem, place.mirror.root


def _first_free(filesystem: fs.FileSystem, folder: str) -> int:
    """The number after those of the trials that have a folder, for trials that a searcher thinks of as it goes."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return max((int(info.base_name) + 1 for info in found if info.base_name.isdigit()), default=0)


def _number(given: Mapping[str, Any], numbers: Iterator[int]) -> int:
    return int(given["trial"][NUMBER]) if NUMBER in given["trial"] else next(numbers)


def _numbered(sweep: Sweep) -> list[dict[str, Any]]:
    return [{NUMBER: number, **point} for number, point in enumerate(sweep.points())]


def _domains(sweep: Sweep) -> dict[str, Any]:
    """The space in Tune's words."""
    return {
        "trial": {
            key: tune.choice(list(axis.choice))
            if axis.choice
            else (tune.loguniform if axis.loguniform else tune.uniform)(*axis.values)
            for key, axis in sweep.search.space.items()
        }
    }


def _bundles(config: Config) -> PlacementGroupFactory:
    """The trial's own process and its coordinator on the head, and a bundle of exactly its shape for each worker."""
    resources = config.resources
    worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    shape = {name: amount for name, amount in worker.items() if amount}
    return PlacementGroupFactory([{HEAD: _SHARE}, *[shape] * resources.workers], strategy="PACK")


def _scheduler(sweep: Sweep) -> TrialScheduler | None:
    search, rounds = sweep.search, "rounds"
    if search.scheduler == "asha":
        return ASHAScheduler(time_attr=rounds, max_t=_FOREVER, grace_period=search.grace, reduction_factor=2)
    if search.scheduler == "median":
        return MedianStoppingRule(time_attr=rounds, grace_period=search.grace)
    return None


def _optuna(seed: int) -> Any:
    """Optuna's searcher.  Raises UserError where the package is missing."""
    try:
        import optuna
    except ImportError:
        allowed, advice = "random, or optuna where that is installed", "pip install optuna"
        raise UserError("sweep.searcher", "optuna", allowed, advice) from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(seed=seed)


def _loggers(sweep: Sweep) -> list[Callback]:
    """Tune's own; Tune itself reads what the first of them writes.  Raises UserError where a package is missing."""
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
    """Tune's own words and habits: it prints tables, takes over Ctrl-C, and writes logs that nobody asked for."""
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
