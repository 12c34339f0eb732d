"""Experiment trackers of a run besides TensorBoard: Weights & Biases and MLflow, as `trackers` names them.

A tracker gets the resolved configuration as parameters, the scalars of `metrics.py` by TensorBoard's names and steps,
and at the end the summary.  Account, server, project and experiment are the library's own affair: its environment
variables and settings; without any the project, or experiment, is called rayfed-sub.

`tracker-<name>.json` in the run folder has the run's id there, so that a resumed run goes on in the same one.  No step
is sent twice: MLflow's server and W&B's know the last one that they have, and of an offline W&B run the file does.
Texts of URIs are `redacted`, and W&B gets neither terminal output nor command line, which may hold such as well.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from typing import Any

from rayfed_sub.config.loading import flat
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError, redacted
from rayfed_sub.storage import atomic_files
from rayfed_sub.telemetry.events import Notice, Summary

_PROJECT = "rayfed-sub"
_OLDEST = {"wandb": (0, 31), "mlflow": (3, 0)}
_LABELS = {"wandb": "W&B", "mlflow": "MLflow"}
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
_SECONDS = 30.0  # that the end of a run waits for a tracker
_STEP = "round/finished"  # a metric of every step, whose value is the step


@dataclass(frozen=True)
class Tracked:
    """A run that a tracker has opened.  where: for people; known: the last step that it has, -1 for none; send: sends a
    later step's values by name; end: sends the summary, None for a run that was cut off, and closes the run there."""

    where: str
    known: int
    send: Callable[[int, Mapping[str, float]], None]
    end: Callable[[Mapping[str, Any] | None], None]


@dataclass(frozen=True)
class _Point:
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class _End:
    summary: Mapping[str, Any] | None


class Tracker:
    """A run's values on their way to a tracker, in a thread, so that training never waits for a server.

    Whatever the library raises becomes one Notice and ends nothing: a tracker holds a copy of what the run folder has,
    and a run of days is worth more than its copy.  Nothing is dropped meanwhile: values wait in memory, and with each
    later round the run is opened anew, which says what the tracker has, and the rest is sent in order.
    """

    def __init__(self, label: str, open: Callable[[], Tracked], notify: Callable[[Notice], None]) -> None:
        self._label, self._open, self._notify = label, open, notify
        self._items: SimpleQueue[_Point | _End] = SimpleQueue()
        self._news: SimpleQueue[str] = SimpleQueue()
        self._opened = self._failed = self._over = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {label}")

    def begin(self) -> None:
        """Opens the run there, once.  Not before the run folder is this run's: another session's run that goes on in
        it would be opened, and closed, under it."""
        if self._thread.ident is None:
            self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Hands over values by name after `step` finished rounds; returns at once.  After `begin`, as `finish`."""
        self._items.put(_Point(step, dict(values)))
        self._tell()

    def finish(self, summary: Summary) -> None:
        """Hands over the summary of a finished run; waits half a minute at most for what is on its way."""
        self._end(_plain(asdict(summary)))

    def close(self) -> None:
        """Ends the thread, if it has begun; a run without a summary ends as cut off."""
        if self._thread.ident is not None and not self._over:
            self._end(None)

    def _end(self, summary: Mapping[str, Any] | None) -> None:
        self._over = True
        self._items.put(_End(summary))
        self._thread.join(_SECONDS)
        if self._thread.is_alive():
            self._fail(f"no answer within {_SECONDS:g} s")
        self._tell()

    def _tell(self) -> None:
        """Passes news on from the run's own thread, which the listener belongs to."""
        while not self._news.empty():
            self._notify(Notice(self._news.get()))

    def _fail(self, cause: str) -> None:
        if not self._failed:
            self._failed = True
            rest = "the run goes on without it, and its folder has what is missing there"
            self._news.put(f"{self._label}: {cause}; {rest}")

    def _work(self) -> None:
        waiting: deque[_Point | _End] = deque()
        tracked, last, over = None, -1, False
        while True:
            try:
                if tracked is None:
                    tracked = self._begin()
                    last = tracked.known
                while waiting:
                    item = waiting[0]
                    if isinstance(item, _End):
                        tracked.end(item.summary)
                    elif item.step > last:  # rounds run again after a coordinator's death, or in a resumed run
                        tracked.send(item.step, item.values)
                        last = item.step
                    waiting.popleft()
            except Exception as error:  # see the class: told, and tried again
                tracked = None
                self._fail(_line(error))
            if over:
                return
            waiting.append(self._items.get())
            while not self._items.empty():
                waiting.append(self._items.get())
            over = isinstance(waiting[-1], _End)

    def _begin(self) -> Tracked:
        tracked = self._open()
        if not self._opened:
            self._opened = True
            self._news.put(f"{self._label}: {tracked.where}")
        return tracked


def check_trackers(config: Config) -> None:
    """UserError where a tracker's library is missing or too old, has nobody logged in, or cannot open its store."""
    for name in config.trackers:
        oldest = _OLDEST[name]
        wanted = f"{name}>={'.'.join(map(str, oldest))}"
        try:
            version = str(importlib.import_module(name).__version__)
        except (ImportError, AttributeError):  # a folder of that name, as W&B leaves one, is a module without a version
            raise UserError("trackers", name, "trackers that are installed", f"pip install '{wanted}'") from None
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
            allowed = f"{wanted}; installed is {version}"
            raise UserError("trackers", name, allowed, f"pip install '{wanted}'")
        {"wandb": _check_wandb, "mlflow": _check_mlflow}[name]()


def trackers_of(folder: Path, config: Config, notify: Callable[[Notice], None]) -> tuple[Tracker, ...]:
    """The trackers that the configuration names, for the run in the folder."""
    opens = {"wandb": _open_wandb, "mlflow": _open_mlflow}
    names = dict.fromkeys(config.trackers)
    return tuple(Tracker(_LABELS[name], partial(opens[name], folder, config), notify) for name in names)


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.Error:  # a key that cannot be one; its message may repeat it
        known = False
    if not known:
        allowed = "wandb where somebody is logged in to W&B, or with WANDB_MODE=offline"
        raise UserError("trackers", "wandb", allowed, "run `wandb login` or set WANDB_API_KEY")


def _check_mlflow() -> None:
    import mlflow

    uri = mlflow.get_tracking_uri()
    if uri.startswith(("http", "databricks")):  # a server that does not answer takes minutes: see `Tracker`
        return
    try:
        mlflow.MlflowClient().get_experiment_by_name(_PROJECT)
    except Exception as error:  # of MLflow, of its database's driver, or of the disk
        allowed = f"a place that MLflow can open ({_line(error)})"
        raise UserError("MLFLOW_TRACKING_URI", uri, allowed, "e.g. sqlite:///mlflow.db or http://HOST:5000") from None


def _open_wandb(folder: Path, config: Config) -> Tracked:
    import wandb

    known = _read(folder, "wandb")
    if not known:
        project = wandb.setup().settings.project or _PROJECT
        known = {"id": secrets.token_hex(8), "project": project, "step": -1}
        _write(folder, "wandb", known)
    run = wandb.init(
        project=known["project"],
        id=known["id"],
        name=config.name,
        config=_parameters(config),
        resume="allow",
        reinit="create_new",  # a run of the caller's own stays as it is
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # the command line
            x_save_requirements=False,
            init_timeout=_SECONDS,
            finish_timeout=_SECONDS,
        ),
    )
    if run.offline:
        where, last = f"offline; `wandb sync {run.sync_dir}` sends it", known["step"]
    else:
        run.config.update(_parameters(config), allow_val_change=True)  # of a resumed run some may be others
        where, last = redacted(run.url or "switched off"), run.starting_step - 1

    def send(step: int, values: Mapping[str, float]) -> None:
        _write(folder, "wandb", {**known, "step": step})  # before: an offline run would show a step twice
        run.log(dict(values), step=step, commit=True)

    def end(summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            run.summary.update({"summary": dict(summary)})
        run.finish(exit_code=0 if summary is not None else 1)

    return Tracked(where, last, send, end)


def _open_mlflow(folder: Path, config: Config) -> Tracked:
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    client = mlflow.MlflowClient()
    run = _resumed(client, _read(folder, "mlflow").get("id"))
    if run is None:
        tags = {"mlflow.source.name": "rayfed-sub"}
        run = client.create_run(_experiment(client), run_name=config.name, tags=tags)
        _write(folder, "mlflow", {"id": run.info.run_id})
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    key, metrics, params = run.info.run_id, run.data.metrics, run.data.params
    texts = {_name(name): _text(value) for name, value in flat(_parameters(config)).items()}
    # A parameter cannot change: what a resumed run has set otherwise becomes a tag.
    for some in _batches([Param(name, text[:6000]) for name, text in texts.items() if name not in params]):
        client.log_batch(key, params=some)
    for name, text in texts.items():
        if params.get(name, text[:6000]) != text[:6000]:
            client.set_tag(key, name, text[:5000])

    def send(step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        client.log_batch(key, metrics=[Metric(_name(name), value, now, step) for name, value in values.items()])

    def end(summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            found = {_name(f"summary/{name}"): value for name, value in flat(summary).items()}
            numbers = {name: float(value) for name, value in found.items() if _is_number(value)}
            now, step = time.time_ns() // 1_000_000, int(summary["rounds"])
            if client.get_run(key).data.metrics.get("summary/rounds") != step:  # else sent before
                client.log_batch(key, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])
            others = [RunTag(name, _text(value)[:5000]) for name, value in found.items() if name not in numbers]
            for some in _batches(others):
                client.log_batch(key, tags=some)
        client.set_terminated(key, "FINISHED" if summary is not None else "KILLED")

    where = f"run {key} at {redacted(mlflow.get_tracking_uri())}"
    return Tracked(where, int(metrics.get(_STEP, -1)), send, end)


def _resumed(client: Any, key: str | None) -> Any:
    """MLflow's run of this id; None where there is none, or it was deleted, or it is at another server."""
    import mlflow

    if key is None:
        return None
    try:
        run = client.get_run(key)
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment(client: Any) -> str:
    """Id of MLflow's experiment, which is made where it is missing."""
    import mlflow

    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
    found = client.get_experiment_by_name(name)
    try:
        key: str = client.create_experiment(name) if found is None else found.experiment_id
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run may have made it meanwhile
            raise
        key = client.get_experiment_by_name(name).experiment_id
    return key


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / f"tracker-{name}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _write(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    atomic_files.write(folder / f"tracker-{name}.json", json.dumps(content).encode())


def _parameters(config: Config) -> dict[str, Any]:
    """The configuration without credentials."""
    found: dict[str, Any] = _plain(config.model_dump(mode="json"))
    return found


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and mappings, without credentials in the texts.

    >>> _plain({"path": "s3://AKIA:secret@bucket/rows", "resumed": (1, 2)})
    {'path': 's3://bucket/rows', 'resumed': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return redacted(value)
    return [_plain(item) for item in value] if isinstance(value, Sequence) else value


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    """As many at a time as MLflow takes parameters or tags."""
    return (list(items[start : start + 100]) for start in range(0, len(items), 100))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(name: str) -> str:
    """The name in the characters that MLflow takes, as the normal form of a path.

    >>> _name("scores/f1/tabby cat"), _name("method.rank_pattern.q_proj$"), _name("scores/f1/../")
    ('scores/f1/tabby cat', 'method.rank_pattern.q_proj_', 'scores/f1/_/_')
    """
    parts = re.sub(r"[^\w.\-: /]", "_", name)[:250].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)


def _line(error: Exception) -> str:
    """The error in one line, without credentials."""
    text = " ".join(str(error).split())
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {shorten(redacted(text), 300)}"
