"""After any death a run ends with the same bits and the same rows; see chaos.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_sub import run
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.schemas import RoundRow
from rayfed_sub.runtime import rounds
from rayfed_sub.runtime.links import CoordinatorLink
from rayfed_sub.runtime.rounds import leave
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create
from rayfed_sub.telemetry.events import Notice, PackDone, RoundDone, Summary
from tests.helpers import chaos

TIMES = ["train_seconds", "seconds", "retries", "memory_bytes"]
"""Columns that may differ: times, and traces of the disturbance."""


def same(summary: Summary, undisturbed: Summary) -> None:
    """Compare weights, scores and rows: none lost, none doubled."""
    assert summary.weights_sha256 == undisturbed.weights_sha256
    assert summary.metrics == undisturbed.metrics
    for table in ("rounds", "clients", "scores", "layers", "client_layers"):
        ours, theirs = (pd.read_parquet(f"{run.folder}/{table}.parquet") for run in (summary, undisturbed))
        pd.testing.assert_frame_equal(
            ours.drop(columns=TIMES, errors="ignore"), theirs.drop(columns=TIMES, errors="ignore")
        )


@pytest.mark.parametrize("coordinators", [(2,), pytest.param((1, 3), marks=pytest.mark.slow)])
def test_run_survives_a_worker_and_coordinators(
    coordinators: tuple[int, ...], ray_session: None, undisturbed_job: Summary, tmp_path: Path
) -> None:
    """The short form of the soak: a worker dies in the second round, coordinators in others.  Packs find their size,
    the undisturbed run has two clients in each."""
    due = [(1, "ray::Worker"), *((round, "ray::Coordinator") for round in coordinators)]
    messages: list[str] = []

    def listener(record: Any) -> None:
        if isinstance(record, PackDone) and due and due[0][0] == record.round:
            chaos.kill_one(due.pop(0)[1])
        if isinstance(record, Notice):
            messages.append(record.text)

    summary = run(chaos.job(2, "resources.pack_size=auto"), tmp_path / "run", listener)
    assert not due
    same(summary, undisturbed_job)
    assert summary.resumed == coordinators  # checkpoints are requested after a round has been read
    assert [text.partition(";")[0] for text in messages][::2] == ["the coordinator died"] * len(coordinators)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_run_leaves_a_checkpoint_and_resumes(
    workers: int, ray_session: None, undisturbed_job: Summary, tmp_path: Path
) -> None:
    """Ctrl-C in the third round, without a due checkpoint."""
    messages: list[str] = []

    def interrupt(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == 2:
            raise KeyboardInterrupt
        if isinstance(record, Notice):
            messages.append(record.text)

    config, folder = chaos.job(workers, "checkpoint.every=0"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(config, folder, interrupt)
    assert messages == [f"interrupted; go on with: rayfed-sub run {folder}/config.yaml --out {folder} --resume"]
    # As on a smaller machine: the bits do not depend on which clients train side by side.
    smaller = chaos.job(workers, "checkpoint.every=0", "resources.pack_size=1", "evaluation.batch_size=3")
    summary = run(smaller, folder, resume=True)
    same(summary, undisturbed_job)
    assert summary.resumed in ((2,), (3,))  # the third round may end while the interrupt is delivered
    assert run(config, folder, resume=True) == summary  # finished: nothing happens


def test_killed_process_loses_the_rounds_since_the_checkpoint(undisturbed_job: Summary, tmp_path: Path) -> None:
    """The state after SIGKILL: tables and log are ahead of the checkpoint."""

    def end(record: Any) -> None:
        if isinstance(record, RoundDone) and record.row.round == 2:
            raise MemoryError

    config, folder = chaos.job(0, "checkpoint.every=2"), tmp_path / "run"
    with pytest.raises(MemoryError):
        run(config, folder, end)
    summary = run(config, folder, resume=True)
    same(summary, undisturbed_job)
    assert summary.resumed == (2,)


def test_resume_starts_a_run_that_never_began(undisturbed_job: Summary, tmp_path: Path) -> None:
    same(run(chaos.job(0), tmp_path / "run", resume=True), undisturbed_job)


def test_run_does_not_resume_with_other_settings(undisturbed_job: Summary) -> None:
    with pytest.raises(UserError, match=r"method.rank: got 2; allowed: 4, with which the run in .* began"):
        run(chaos.job(0, "method.rank=2"), undisturbed_job.folder, resume=True)
    # Fewer rounds than the run has, as in the file of a run that was made longer, are not what is named first.
    with pytest.raises(UserError, match=r"method.rank: got 2; allowed: 4, with which the run in .* began"):
        run(chaos.job(0, "method.rank=2", "federation.rounds=3"), undisturbed_job.folder, resume=True)
    with pytest.raises(UserError, match=r"federation.rounds: got 3; allowed: 4 or more, for the run in .* has as many"):
        run(chaos.job(0, "federation.rounds=3"), undisturbed_job.folder, resume=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifteen_disturbed_runs_have_one_hash(ray_session: None, tmp_path: Path) -> None:
    hashes = {row[:2]: row[2] for row in chaos.table(tmp_path)}
    assert len(hashes) == 15
    assert len(set(hashes.values())) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak_with_deaths(ray_session: None, tmp_path: Path) -> None:
    """200 rounds; a pack takes about 0.1 s, and a process dies every 2.5 to 5 s."""
    calm, quiet = chaos.soak(200, 0, tmp_path / "calm")
    fierce, fire = chaos.soak(200, chaos.PAUSE, tmp_path / "fierce")
    same(fierce, calm)
    print(f"{len(fire.deaths)} deaths; growth {quiet.growth(20) / 1e3:.0f} and {fire.growth(20) / 1e3:.0f} kB a round")
    assert len(fire.deaths) >= 10  # one of the deaths is the coordinator's
    assert quiet.growth(20) < 1e6
    assert fire.growth(20) < 1e6


def test_round_without_its_rows_does_not_count(tmp_path: Path) -> None:
    """Its evaluation failed after the server's update: the checkpoint before it is valid, and the round runs again."""
    folder, asked = create(Place(tmp_path), chaos.job(1)), []

    def ask(name: str) -> Any:
        asked.append(name)
        return 1  # finished rounds

    leave(folder, ask, lambda: None)
    assert asked == ["halt"]
    row = RoundRow(0, 8, 0, 3.0, 2.5, 64, 64, 10, 4.0, None, 1.0, 1.0)
    leave(folder, ask, lambda: folder.add(RoundDone(row, ())))  # it had only not been read
    assert asked == ["halt", "halt", "checkpoint"]
    assert pd.read_parquet(tmp_path / "rounds.parquet")["round"].tolist() == [0]


class Watched:
    """A coordinator's link that notes the order of rounds and calls; fails: the first checkpoint finds no space."""

    def __init__(self, link: CoordinatorLink, calls: list[str | int], fails: bool) -> None:
        self._link, self._calls, self._fails = link, calls, fails

    def ask(self, name: str) -> Any:
        self._calls.append(name)
        if self._fails and name == "checkpoint" and self._calls.count(name) == 1:
            raise RunError("writing files", "No space left on device")
        return self._link.ask(name)

    def round(self, n: int, lr_factor: float) -> Iterator[PackDone | RoundDone]:
        self._calls.append(n)
        return self._link.round(n, lr_factor)

    def release(self) -> None:
        self._link.release()

    def close(self) -> None:
        self._link.close()


def test_round_begins_before_the_checkpoint_of_the_last_one_is_written(
    undisturbed_job: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where that cannot be written, the run ends with its line, and with a checkpoint once there is space again."""
    calls, fails, coordinator_of = list[str | int](), True, rounds.coordinator_of
    monkeypatch.setattr(rounds, "coordinator_of", lambda *parts: Watched(coordinator_of(*parts), calls, fails))
    config, folder = chaos.job(0, "checkpoint.every=2"), tmp_path / "run"
    with pytest.raises(RunError, match=r"^writing files: No space left on device; go on with: rayfed-sub run"):
        run(config, folder)
    watched = [call for call in calls if call in (*range(4), "pin", "checkpoint", "halt")]
    assert watched == [0, 1, "pin", 2, "checkpoint", "halt", "checkpoint"]
    calls.clear()
    fails = False
    summary = run(config, folder, resume=True)
    assert [call for call in calls if call in (*range(4), "pin", "checkpoint")] == [2, 3, "pin", "checkpoint"]
    same(summary, undisturbed_job)
    assert summary.resumed == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_command_ends_cleanly(signal_: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C as from a terminal, for the whole process group with Ray's processes; SIGTERM as from a scheduler."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "rayfed_sub.cli.main", "run", "experiments/tiny.yaml", *chaos.settings(2)]
    process = subprocess.Popen(
        [*command, "checkpoint.every=0", "federation.rounds=60", "--out", str(folder)],
        cwd=chaos.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().startswith("1/60"):
            break
    if signal_ == signal.SIGINT:
        os.killpg(process.pid, signal_)
    else:
        process.send_signal(signal_)
    output = process.stdout.read()
    assert process.wait() == 130
    assert f"interrupted; go on with: rayfed-sub run {folder}/config.yaml --out {folder} --resume" in output
    assert "Traceback" not in output
    assert list((folder / "checkpoints").glob("manifest-*.json"))
