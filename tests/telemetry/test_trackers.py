"""Trackers of a run: what W&B and MLflow get, once, whatever dies; with stand-ins, and with the real packages where
they are installed."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.telemetry import trackers
from rayfed_sub.telemetry.events import Notice, Summary
from rayfed_sub.telemetry.trackers import Tracked, Tracker, check_trackers, trackers_of

SECRET = "wJalrXUtnFEMI"
SUMMARY = Summary(
    name="kept",
    method="fedftg",
    rounds=2,
    weights_sha256="ab12",
    uplink_bytes=300,
    downlink_bytes=0,
    dense_bytes=900,
    change_rank=None,
    wall_seconds=1.5,
    train_seconds=1.0,
    peak_memory_bytes=5000,
    metrics={"held_out_loss": 2.5},
    versions={"torch": "2.13.0"},
    environment={},
)


def config(*overrides: str) -> Config:
    tree = {"name": "kept", "federation": {"rounds": 2}, "task": {"path": f"s3://AKIA:{SECRET}@bucket/rows.csv"}}
    return load_config({**tree, "trackers": ["wandb", "mlflow"]}, overrides)


# ---- stand-ins, with the signatures of wandb 0.31 and mlflow 3.17


@dataclass
class Board:
    """What was sent to both libraries, in order.  online: steps that W&B's server has; offline, key: of this machine;
    down: what MLflow's server raises at present; lost: its next answer
    is, after it has stored what came."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    online: dict[str, int] = field(default_factory=dict)
    mode: str = "online"
    key: bool = True
    down: Exception | None = None
    lost: bool = False
    runs: dict[str, SimpleNamespace] = field(default_factory=dict)
    experiments: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        return [what for name, what in self.calls if name == kind]


class MlflowException(Exception):  # noqa: N818 - its name there
    def __init__(self, message: str, error_code: str = "INTERNAL_ERROR") -> None:
        super().__init__(message)
        self.error_code = error_code


def fake_wandb(board: Board) -> ModuleType:
    module: Any = ModuleType("wandb")

    class Run:
        def __init__(self, given: Mapping[str, Any]) -> None:
            self._id = given["id"]
            self.offline = board.mode == "offline"
            self.url = f"https://user:{SECRET}@wandb.test/{given['project']}/{self._id}"
            self.sync_dir = f"wandb/offline-run-{self._id}"
            self.starting_step = 0 if self.offline else board.online.get(self._id, -1) + 1
            self.config = SimpleNamespace(update=self._update)
            self.summary = SimpleNamespace(update=lambda d: board.calls.append(("wandb.summary", d)))

        def _update(self, d: Mapping[str, Any], allow_val_change: bool | None = None) -> None:
            assert allow_val_change
            board.calls.append(("wandb.config", d))

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            assert step is not None
            assert commit
            board.online[self._id] = step
            board.calls.append(("wandb.log", (step, data)))

        def finish(self, exit_code: int | None = None) -> None:
            board.calls.append(("wandb.finish", exit_code))

    def init(
        *,
        project: str | None = None,
        id: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        reinit: str | None = None,
        resume: str | None = None,
        settings: Any = None,
    ) -> Run:
        given = {"project": project, "id": id, "name": name, "config": config, "reinit": reinit, "resume": resume}
        board.calls.append(("wandb.init", {**given, "settings": settings}))
        return Run(given)

    def login(*, prompt: bool = True, verify: bool = True) -> bool:
        assert not prompt
        return board.key

    module.__version__ = "0.31.0"
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **given: given
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=board.mode, project=None))
    module.init, module.login = init, login
    found: ModuleType = module
    return found


def fake_mlflow(board: Board) -> ModuleType:
    module: Any = ModuleType("mlflow")

    class MlflowClient:
        def __init__(self) -> None:
            if board.down is not None:
                raise board.down

        def get_experiment_by_name(self, name: str) -> Any:
            found = board.experiments.get(name)
            return None if found is None else SimpleNamespace(experiment_id=found)

        def create_experiment(self, name: str) -> str:
            return board.experiments.setdefault(name, f"of-{name}")

        def create_run(self, experiment_id: str, *, tags: dict[str, Any], run_name: str) -> Any:
            key = f"run-{len(board.runs)}"
            info = SimpleNamespace(run_id=key, lifecycle_stage="active", status="RUNNING", name=run_name)
            data = SimpleNamespace(metrics={}, params={}, tags=dict(tags))
            board.runs[key] = SimpleNamespace(info=info, data=data, experiment=experiment_id)
            board.history[key] = []
            return board.runs[key]

        def get_run(self, run_id: str) -> Any:
            if run_id not in board.runs:
                raise MlflowException(f"Run '{run_id}' not found", "RESOURCE_DOES_NOT_EXIST")
            return board.runs[run_id]

        def update_run(self, run_id: str, status: str | None = None) -> None:
            board.runs[run_id].info.status = status

        def set_terminated(self, run_id: str, status: str | None = None) -> None:
            board.runs[run_id].info.status = status

        def set_tag(self, run_id: str, key: str, value: Any) -> None:
            board.runs[run_id].data.tags[key] = value

        def log_batch(
            self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
        ) -> None:
            if board.down is not None:
                raise board.down
            assert max(len(params), len(tags)) <= 100
            data = board.runs[run_id].data
            for metric in metrics:
                assert abs(metric.timestamp / 1000 - time.time()) < 60
                board.history[run_id].append((metric.key, metric.step, metric.value))
                data.metrics[metric.key] = metric.value
            for param in params:
                if data.params.setdefault(param.key, param.value) != param.value:
                    raise MlflowException("Changing param values is not allowed")
            data.tags.update({tag.key: tag.value for tag in tags})
            if board.lost:
                board.lost = False
                raise ConnectionError("no answer")

    def record(*names: str) -> Callable[..., Any]:
        return lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True)))

    module.__version__ = "3.17.2"
    module.MlflowClient, module.MlflowException = MlflowClient, MlflowException
    module.get_tracking_uri = lambda: f"http://user:{SECRET}@mlflow.test"
    module.entities = ModuleType("mlflow.entities")
    module.entities.Metric = record("key", "value", "timestamp", "step")
    module.entities.Param = module.entities.RunTag = record("key", "value")
    found: ModuleType = module
    return found


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    found = Board()
    modules = {"wandb": fake_wandb(found), "mlflow": fake_mlflow(found)}
    for name, module in {**modules, "mlflow.entities": getattr(modules["mlflow"], "entities")}.items():  # noqa: B009
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return found


def session(
    folder: Path, now: Config, steps: Sequence[int], summary: Summary | None = SUMMARY
) -> tuple[list[str], list[threading.Thread]]:
    """A session of a run whose value after n rounds is n / 2; returns its notices."""
    notices: list[str] = []
    opened = trackers_of(folder, now, lambda notice: notices.append(notice.text))
    for tracker in opened:
        tracker.begin()
        tracker.begin()  # under another coordinator
    for step in steps:
        for tracker in opened:
            tracker.add(step, {"loss/held_out": step / 2, "round/finished": float(step)})
    for tracker in opened:
        if summary is not None:
            tracker.finish(summary)
        tracker.close()
    return notices, [one for one in threading.enumerate() if one.name.startswith("tracker ")]


def test_both_get_configuration_steps_and_summary(board: Board, tmp_path: Path) -> None:
    notices, left = session(tmp_path, config(), [0, 1, 2])
    (began,) = board.of("wandb.init")
    assert (began["project"], began["name"], began["resume"]) == ("rayfed-sub", "kept", "allow")
    assert began["config"]["federation"]["rounds"] == 2
    assert (began["settings"]["console"], began["settings"]["x_disable_meta"]) == ("off", True)
    points = [(step, {"loss/held_out": step / 2, "round/finished": float(step)}) for step in range(3)]
    assert board.of("wandb.log") == points
    (told,) = board.of("wandb.summary")
    assert told["summary"]["metrics"] == {"held_out_loss": 2.5}
    assert board.of("wandb.finish") == [0]

    (run,) = board.runs.values()
    assert (run.experiment, run.info.name, run.info.status) == ("of-rayfed-sub", "kept", "FINISHED")
    assert (run.data.params["federation.rounds"], run.data.params["method.name"]) == ("2", "fedftg")
    (history,) = board.history.values()
    assert [(step, value) for name, step, value in history if name == "loss/held_out"] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert ("summary/metrics.held_out_loss", 2, 2.5) in history
    assert run.data.tags["summary/weights_sha256"] == "ab12"

    assert left == []
    assert sorted(notices) == [
        "MLflow: run run-0 at http://mlflow.test",
        f"W&B: https://wandb.test/rayfed-sub/{began['id']}",
    ]
    sent = repr((board.calls, board.runs, board.history))
    assert "s3://bucket/rows.csv" in sent
    stored = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in sent + stored + "".join(notices)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_resumed_run_goes_on_in_the_same_one(board: Board, tmp_path: Path, mode: str) -> None:
    board.mode = mode
    session(tmp_path, config(), [0, 1, 2], summary=None)  # cut off; its newest checkpoint has one round
    (run,) = board.runs.values()
    assert (run.info.status, board.of("wandb.finish")) == ("KILLED", [1])
    session(tmp_path, config("resources.workers=3", "federation.rounds=3"), [2, 3])
    first, second = board.of("wandb.init")
    assert first["id"] == second["id"] == json.loads((tmp_path / "tracker-wandb.json").read_text())["id"]
    assert [step for step, _ in board.of("wandb.log")] == [0, 1, 2, 3]
    (history,) = board.history.values()  # one run
    assert [step for name, step, _ in history if name == "round/finished"] == [0, 1, 2, 3]
    assert (run.info.status, run.data.params["federation.rounds"]) == ("FINISHED", "2")
    assert (run.data.tags["federation.rounds"], run.data.tags["resources.workers"]) == ("3", "3")
    session(tmp_path, config(), [])  # killed before it was told that all is sent
    assert [name for name, _, _ in history].count("summary/rounds") == 1


def test_rounds_that_run_again_in_one_session_are_sent_once(board: Board, tmp_path: Path) -> None:
    session(tmp_path, config(), [0, 1, 2, 2, 3])  # a coordinator died after two rounds
    (history,) = board.history.values()
    assert [step for name, step, _ in history if name == "round/finished"] == [0, 1, 2, 3]
    assert [step for step, _ in board.of("wandb.log")] == [0, 1, 2, 3]


def test_run_that_is_gone_begins_anew(board: Board, tmp_path: Path) -> None:
    session(tmp_path, config("trackers=[mlflow]"), [0], summary=None)
    board.runs["run-0"].info.lifecycle_stage = "deleted"
    session(tmp_path, config("trackers=[mlflow]"), [1])
    assert json.loads((tmp_path / "tracker-mlflow.json").read_text()) == {"id": "run-1"}


def test_environment_names_project_and_experiment(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SimpleNamespace(settings=SimpleNamespace(mode="online", project="mine"))
    monkeypatch.setattr(sys.modules["wandb"], "setup", lambda: given)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    session(tmp_path, config(), [0])
    assert (board.of("wandb.init")[0]["project"], list(board.experiments)) == ("mine", ["ours"])
    given.settings.project = "another"
    session(tmp_path, config(), [1])
    assert board.of("wandb.init")[1]["project"] == "mine"  # where the run is


def test_session_that_never_had_the_folder_leaves_the_run_of_the_other_one(board: Board, tmp_path: Path) -> None:
    session(tmp_path, config(), [0, 1], summary=None)
    board.runs["run-0"].info.status = "RUNNING"  # goes on in another process
    for tracker in trackers_of(tmp_path, config(), lambda notice: None):
        tracker.close()
    assert len(board.of("wandb.init")) == 1
    assert board.runs["run-0"].info.status == "RUNNING"


def test_values_whose_receipt_is_lost_are_not_sent_again(board: Board, tmp_path: Path) -> None:
    (tracker,) = trackers_of(tmp_path, config("trackers=[mlflow]"), lambda notice: None)
    tracker.begin()
    wait_for(lambda: bool(board.runs) and bool(board.runs["run-0"].data.params))
    board.lost = True
    tracker.add(0, {"round/finished": 0.0})
    wait_for(lambda: not board.lost)
    tracker.add(1, {"round/finished": 1.0})
    tracker.finish(SUMMARY)
    assert [step for name, step, _ in board.history["run-0"] if name == "round/finished"] == [0, 1]


def wait_for(met: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, f"not met within {seconds} s"
        time.sleep(0.005)


def test_server_that_fails_is_told_once_and_gets_everything_later(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-123")
    notices: list[Notice] = []
    (tracker,) = trackers_of(tmp_path, config("trackers=[mlflow]"), notices.append)
    tracker.begin()
    tracker.add(0, {"round/finished": 0.0})
    wait_for(lambda: bool(board.history.get("run-0")))
    board.down = ConnectionError(f"http://user:{SECRET}@mlflow.test refused tok-123")
    for step in (1, 2):
        tracker.add(step, {"round/finished": float(step)})
        wait_for(tracker._items.empty)
        time.sleep(0.02)
    board.down = None
    tracker.add(3, {"round/finished": 3.0})
    tracker.finish(SUMMARY)
    assert [step for name, step, _ in board.history["run-0"] if name == "round/finished"] == [0, 1, 2, 3]
    where, failed = (notice.text for notice in notices)
    assert where.startswith("MLflow: run run-0")
    cause = "ConnectionError: http://mlflow.test refused ***"
    assert failed == f"MLflow: {cause}; the run goes on without it, and its folder has what is missing there"


def test_server_that_hangs_holds_up_nothing_but_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_SECONDS", 0.05)
    free, notices = threading.Event(), list[Notice]()

    def opens() -> Tracked:
        free.wait(10)
        raise OSError("gave up")

    tracker = Tracker("MLflow", opens, notices.append)
    tracker.begin()
    began = time.monotonic()
    for step in range(50):
        tracker.add(step, {})
    tracker.finish(SUMMARY)
    tracker.close()
    assert time.monotonic() - began < 5
    free.set()
    (notice,) = notices
    assert notice.text.startswith("MLflow: no answer within 0.05 s; ")


def test_full_disk_is_the_run_s_own_affair(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *parts: bytes) -> None:
        raise RunError("writing files", f"{path}: No space left on device")

    monkeypatch.setattr(trackers.atomic_files, "write", full)
    notices, _ = session(tmp_path, config("trackers=[wandb]"), [0])
    assert len(notices) == 1
    assert "No space left on device" in notices[0]


# ---- before anything starts


def test_check_names_what_is_missing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(config())
    board.key = False
    with pytest.raises(UserError, match=r"^trackers: got 'wandb'; .*run `wandb login` or set WANDB_API_KEY$"):
        check_trackers(config())
    board.mode = "offline"
    check_trackers(config())
    monkeypatch.setattr(sys.modules["wandb"], "__version__", "0.9.1")
    with pytest.raises(UserError, match=r"^trackers: got 'wandb'; allowed: wandb>=0.31; installed is 0.9.1; pip inst"):
        check_trackers(config())
    monkeypatch.setattr(sys.modules["mlflow"], "get_tracking_uri", lambda: "file:/mlruns")
    board.down = MlflowException("refused")
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: got 'file:/mlruns'; .*MlflowException: refused"):
        check_trackers(config("trackers=[mlflow]"))
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^trackers: got 'mlflow'; .*; pip install 'mlflow>=3.0'$"):
        check_trackers(config("trackers=[mlflow]"))
    check_trackers(config("trackers=[]"))


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"^trackers: "):
        config("trackers=[comet]")


# ---- the real packages


def records_of(file: Path) -> Iterator[bytes]:
    """The records of W&B's offline file, a LevelDB log: blocks of 32 KiB, whose parts are a checksum (4 bytes), a
    length (2), a kind (1: whole, 2: first, 3: middle, 4: last) and the content; before them a head of 7 bytes."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_real_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    check_trackers(config())
    session(tmp_path, config(), [0, 1, 2], summary=None)
    _, left = session(tmp_path, config("federation.rounds=3"), [2, 3])
    assert left == []

    client = mlflow.MlflowClient()
    key = json.loads((tmp_path / "tracker-mlflow.json").read_text())["id"]
    history = [(point.step, point.value) for point in client.get_metric_history(key, "loss/held_out")]
    assert history == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    found = client.get_run(key)
    assert (found.info.run_name, found.info.status) == ("kept", "FINISHED")
    assert found.data.params["task.path"] == "s3://bucket/rows.csv"
    assert (found.data.params["federation.rounds"], found.data.tags["federation.rounds"]) == ("2", "3")
    assert found.data.metrics["summary/metrics.held_out_loss"] == 2.5

    steps, names = [], set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        assert SECRET.encode() not in file.read_bytes()
        for content in records_of(file):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.project, record.run.display_name))
    assert steps == [0, 1, 2, 3]
    assert names == {(json.loads((tmp_path / "tracker-wandb.json").read_text())["id"], "rayfed-sub", "kept")}
