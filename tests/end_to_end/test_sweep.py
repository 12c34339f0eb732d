"""Sweeps end to end: each trial is the run of its configuration, even if others fail, are stopped or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_sub import UserError, load_config, run, sweep
from rayfed_sub.cli import main
from rayfed_sub.sweeps.progress import Begun, TrialNow
from rayfed_sub.sweeps.runner import run_sweep
from rayfed_sub.sweeps.space import load_sweep
from rayfed_sub.telemetry.events import Notice
from tests.helpers import chaos

GRID = Path(__file__).parents[2] / "experiments" / "sweeps" / "tagg-rank-lr.yaml"
# Two rounds of two clients: nearly all of a trial's time is the start of its processes.
SMALL = ("federation.rounds=2", "federation.local_steps=1", "evaluation.eval_rows=16", "federation.clients=2")


def space(text: str, *overrides: str) -> list[str]:
    return [*SMALL, f"sweep.space={{{text}}}", *overrides]


@pytest.mark.parametrize(("workers", "retries"), [(0, 0), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_trials_match_the_runs_of_their_configurations(
    workers: int, retries: int, ray_session: None, tmp_path: Path
) -> None:
    records: list[Any] = []
    text = "optimizer.lr: {grid: [0.003, 1e39]}"  # 1e39 is infinite in float32
    phone = "devices.classes.phone={seconds_per_step: 1800, power: 2}"
    checked = load_sweep(GRID, space(text, phone, f"sweep.retries={retries}", f"resources.workers={workers}"))
    result = run_sweep(checked, tmp_path / "sweep", records.append)

    frame = result.frame
    assert list(frame["status"]) == ["finished", "failed"]
    cause = "round 0, client 0, local training: non-finite values in model.layers.0.mlp.up_proj/left; "
    advice = "lower optimizer.lr and begin anew in another folder; federation.on_client_failure=skip would leave"
    assert frame["failure"][1] == f"{cause}{advice} such clients out"
    alone = run(checked.config({"optimizer.lr": 0.003}), tmp_path / "alone")
    assert frame["weights_sha256"][0] == alone.weights_sha256
    assert frame["held_out_loss"][0] == alone.metrics["held_out_loss"]
    assert frame["uplink_bytes"][0] == alone.uplink_bytes
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sweep" / "trials.parquet"), frame)

    along = pd.read_parquet(tmp_path / "sweep" / "curves.parquet")  # two rounds of a step, two clients
    assert along[["trial", "rounds", "seconds", "joules"]].to_numpy().tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1800, 2 * 2 * 1800],
        [0, 2, 3600, 2 * 2 * 3600],
    ]
    assert along["score"].tolist()[0::2] == [frame["held_out_loss_before"][0], frame["held_out_loss"][0]]
    assert along["bytes"].iloc[-1] == alone.uplink_bytes + alone.downlink_bytes
    assert (frame["simulated_hours"][0], frame["counted_share"][0]) == (1.0, 1.0)

    assert result.best is not None
    number, config = result.best
    assert number == 0
    assert load_config(tmp_path / "sweep" / "best.yaml") == config
    assert config.optimizer.lr == 0.003
    assert (tmp_path / "sweep" / "report.html").exists()
    assert list((tmp_path / "sweep" / "tune").glob("00000/events.*"))  # TensorBoard's

    (begun,) = (record for record in records if isinstance(record, Begun))
    assert (begun.total, begun.at_once) == (2, 2)
    assert {r.number: r.status for r in records if isinstance(r, TrialNow)} == {0: "finished", 1: "failed"}
    assert {r.number for r in records if isinstance(r, TrialNow) and r.status == "retried"} == (
        {1} if retries else set()
    )

    # Resumed: finished trials are reported and kept.
    again: list[Any] = []
    once = load_sweep(GRID, space(text, phone, "sweep.retries=0", f"resources.workers={workers}"))
    resumed = run_sweep(once, tmp_path / "sweep", again.append, resume=True)
    pd.testing.assert_frame_equal(resumed.frame, result.frame)
    assert {r.number for r in again if isinstance(r, TrialNow) and r.status == "finished"} == {0}
    with pytest.raises(UserError, match=r"optimizer\.eps: got 0\.1; allowed: None, with which the sweep in"):
        run_sweep(
            load_sweep(GRID, space(text, phone, "optimizer.eps=0.1", f"resources.workers={workers}")),
            tmp_path / "sweep",
            resume=True,
        )
    with pytest.raises(UserError, match="a folder without a run in it"):
        run_sweep(checked, tmp_path / "sweep")


def test_resume_without_a_sweep_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Any] = []
    monkeypatch.chdir(tmp_path)
    checked = load_sweep(GRID, ["resources.workers=100"])
    with pytest.raises(UserError, match=r"resources\.workers: got 100; allowed: 1 to"):
        run_sweep(checked, None, records.append, resume=True)
    assert records == [Notice("nothing to go on with: a new sweep begins")]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_sweep_ends_with_the_same_table(tmp_path: Path) -> None:
    text = "federation.local_steps: {grid: [1, 2]}, optimizer.lr: {loguniform: [1e-3, 1e-2]}"
    asked = [str(GRID), *space(text, "sweep.trials=2"), "--out"]
    command = [sys.executable, "-m", main.__name__, "sweep", *asked]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)

    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, str(folder)], start_new_session=True)
    while not list(folder.glob("trials/*/summary.json")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "trials.parquet").exists()
    subprocess.run([*command, str(folder), "--resume"], check=True)
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(tmp_path / name / "trials.parquet") for name in ("whole", "killed"))
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("killed", ["", "ray::Worker", "ray::Coordinator"])
def test_a_crew_goes_from_trial_to_trial(killed: str, ray_session: None, tmp_path: Path) -> None:
    """Its processes serve four trials of unlike models, with the bits of the runs alone; also where one of them is
    killed in the second trial: a worker's process comes back as that trial's worker, not as the first one's."""
    found, due = dict[int, set[int]](), [killed] if killed else []

    def listener(record: object) -> None:
        if not isinstance(record, TrialNow) or record.status != "running" or not record.round:
            return
        if record.number == 1 and due:
            chaos.kill_one(due.pop())
            return
        pids = {process.pid for name in ("ray::Worker", "ray::Coordinator") for process in chaos.actors(name)}
        found.setdefault(record.number, pids)

    text = "method.name: {grid: [fedftg, fedit]}, optimizer.lr: {grid: [0.003, 0.01]}"
    checked = load_sweep(GRID, space(text, "sweep.concurrent=1", "federation.rounds=6", "resources.workers=1"))
    frame = run_sweep(checked, tmp_path / "sweep", listener).frame
    assert list(frame["status"]) == ["finished"] * 4
    assert not due
    if not killed:
        assert all(pids == found[0] and len(pids) == 2 for pids in found.values())
    assert {0, 2, 3} <= found.keys()
    for number, point in enumerate(checked.points()):
        alone = run(checked.config({**point, "resources.workers": 0}), tmp_path / f"alone-{number}")
        assert frame["weights_sha256"][number] == alone.weights_sha256


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_schedulers_stop_the_worse_trials(ray_session: None, tmp_path: Path, scheduler: str) -> None:
    # One after the other, the best first: each later trial is worse at the same round.
    text = "optimizer.lr: {grid: [0.01, 0.003, 1e-6, 1e-7]}"
    more = ("federation.rounds=4", f"sweep.scheduler={scheduler}", "sweep.concurrent=1")
    frame = sweep(GRID, space(text, *more), tmp_path / "sweep").frame
    assert frame["status"][0] == "finished"
    assert frame["status"][3] == "stopped"
    assert frame["rounds"][3] < 4


@pytest.mark.slow
def test_optuna_suggests_trials_one_by_one(ray_session: None, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    text = "optimizer.lr: {loguniform: [1e-3, 1e-2]}, method.rank: {choice: [2, 4]}"
    result = sweep(GRID, space(text, "sweep.searcher=optuna", "sweep.trials=3"), tmp_path / "sweep")
    assert list(result.frame["trial"]) == [0, 1, 2]
    assert list(result.frame["status"]) == ["finished"] * 3
    assert result.frame["optimizer.lr"].between(1e-3, 1e-2).all()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sweep_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    import boto3

    asked = [str(GRID), *space("method.rank: {grid: [2, 4]}"), "--out", f"{bucket}/sweep"]
    command = [sys.executable, "-m", main.__name__, "sweep", *asked]
    subprocess.run(command, check=True)
    store = boto3.client("s3")
    keys = {entry["Key"] for entry in store.list_objects_v2(Bucket="bucket")["Contents"]}
    assert {
        "sweep/sweep.yaml",
        "sweep/trials.parquet",
        "sweep/curves.parquet",
        "sweep/best.yaml",
        "sweep/report.html",
    } <= keys
    assert {f"sweep/trials/{number:05d}/summary.json" for number in (0, 1)} <= keys
    for name in ("first", "again"):
        store.download_file("bucket", "sweep/trials.parquet", str(tmp_path / name))
        subprocess.run([*command, "--resume"], check=True)
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / name) for name in ("first", "again")))
