"""Runs with devices: the clock changes no bits of a synchronous run, and asynchronous ones have one hash."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from rayfed_sub import load_config, run
from rayfed_sub.cli.main import app
from rayfed_sub.clock.accounts import account
from rayfed_sub.config.loading import stored_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Broadcast, Client, ClientState, ModelShape, Start
from rayfed_sub.methods.fedavg import FedAvg
from rayfed_sub.planning.job import prepare
from rayfed_sub.planning.plan import plan_of
from rayfed_sub.reports.clients import per_client
from rayfed_sub.reports.page import Table, cell
from rayfed_sub.reports.retiming import retimed
from rayfed_sub.reports.run_reader import read_run
from rayfed_sub.reports.simulated_time import simulated_time
from rayfed_sub.runtime.session import _notices
from rayfed_sub.telemetry.events import Notice, PackDone, Summary
from tests.helpers import chaos

TWO = {
    "slow": {"seconds_per_step": 2.0, "up_mbit": 1, "down_mbit": 4, "power": 5},
    "fast": {"tokens_per_second": 500.0, "up_mbit": 10, "down_mbit": 40, "latency": 0.1},
}
ALIKE = {"one": {"seconds_per_step": 2.0, "up_mbit": 1.0}}
ASYNC = ["federation.mode=async", "federation.asynchronous.buffer=2", "federation.sampled=5", "federation.rounds=6"]


def job(*overrides: str, devices: dict[str, Any] | None = None, workers: int = 0) -> Config:
    quiet = ["diagnostics.every=0", "evaluation.every=6", "federation.sampled=5", "federation.rounds=3"]
    classes = [] if devices is None else [f"devices.classes={devices}"]
    return chaos.job(workers, *quiet, *classes, *overrides)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return run(job(), tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def buffered(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return run(job(*ASYNC, devices=TWO), tmp_path_factory.mktemp("buffered") / "run")


def same(summary: Summary, undisturbed: Summary) -> None:
    assert summary.weights_sha256 == undisturbed.weights_sha256
    assert summary.metrics == undisturbed.metrics
    for table in ("clients", "timeline"):
        ours, theirs = (pd.read_parquet(f"{run.folder}/{table}.parquet") for run in (summary, undisturbed))
        pd.testing.assert_frame_equal(ours, theirs)


def test_clock_changes_neither_bits_nor_tables_of_a_synchronous_run(plain: Summary, tmp_path: Path) -> None:
    """A class of devices that no client has by rounding is in the account too."""
    devices = {**TWO, "rare": {"seconds_per_step": 9.0}}
    clocked = run(job("devices.shares={slow: 1, fast: 1, rare: 1.0e-9}", devices=devices), tmp_path / "run")
    assert clocked.simulated is not None
    clients = {name: one["clients"] for name, one in clocked.simulated["classes"].items()}
    assert clients["rare"] == 0 < min(clients["fast"], clients["slow"])
    assert clocked.weights_sha256 == plain.weights_sha256
    ours, theirs = (pd.read_parquet(f"{one.folder}/clients.parquet") for one in (clocked, plain))
    pd.testing.assert_frame_equal(ours, theirs)
    assert not Path(plain.folder, "timeline.parquet").exists()
    timeline = pd.read_parquet(f"{clocked.folder}/timeline.parquet")
    assert timeline["uplink_bytes"].sum() == plain.uplink_bytes
    slow = timeline[timeline["device"] == "slow"].iloc[0]
    assert slow["compute_seconds"] == 2.0 * 4
    assert slow["upload_seconds"] == pytest.approx(8 * slow["uplink_bytes"] / 1e6)


def test_finished_run_is_told_again_for_other_devices(plain: Summary, tmp_path: Path, capsys: Any) -> None:
    """With the devices of a run that had them it gives that run's own timeline."""
    clocked = run(job(devices=TWO), tmp_path / "run")
    told = retimed(read_run(Path(plain.folder)), job(devices=TWO).devices)
    pd.testing.assert_frame_equal(told, pd.read_parquet(f"{clocked.folder}/timeline.parquet"))
    assert clocked.simulated == account(told)
    file = tmp_path / "devices.yaml"
    file.write_text("devices: {classes: {fast: {seconds_per_step: 0.5}}}")
    asked = ["retime", plain.folder, "--devices", str(file), "--json"]
    again = json.loads(CliRunner().invoke(app, asked).stdout)
    assert again["seconds"] == 3 * 4 * 0.5
    assert [(one["rounds"], one["seconds"]) for one in again["evaluations"]] == [(0, 0.0), (3, 6.0)]
    shown = CliRunner().invoke(app, [*asked[:-1], "--target", "held_out_loss=0.1"]).stdout
    assert "not reached" in shown


def test_local_steps_that_a_semi_synchronous_run_does_not_take_are_told(tmp_path: Path) -> None:
    """4 of the devices' 2 seconds in 8; a run of its config.yaml, which has these, says nothing."""
    said: list[str] = []
    semi = ["federation.mode=semi-sync", "federation.local_seconds=8", "federation.rounds=1"]
    config = job(*semi, "federation.local_steps=[1, 3]", devices=ALIKE)
    run(config, tmp_path / "run", lambda record: said.append(record.text) if isinstance(record, Notice) else None)
    assert said == [
        "federation.local_steps=[1, 3] is not used: with federation.mode=semi-sync clients' steps follow from "
        "local_seconds"
    ]
    assert set(pd.read_parquet(tmp_path / "run" / "clients.parquet")["steps"]) == {4}
    stored = stored_config(tmp_path / "run")
    assert not list(_notices(stored, prepare(stored)))


@dataclass(frozen=True)
class Failing(FedAvg):
    """FedAvg whose client 1 has weights that are no numbers."""

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        start = super().start_client(broadcast, state, client, shape)
        spoiled = {name: tensor * float("nan") for name, tensor in start.tensors.items()}
        return replace(start, tensors=spoiled) if client.id == 1 else start


@pytest.mark.slow
def test_run_with_failures_and_a_break_is_told_again(tmp_path: Path) -> None:
    """A client that fails at its first step is waited for up to its last one, in both."""

    def interrupt(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == 2:
            raise KeyboardInterrupt

    config, failing = job("federation.on_client_failure=skip", devices=TWO), Failing()
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", interrupt, method=failing)
    summary = run(config, tmp_path / "run", resume=True, method=failing)
    found = read_run(Path(summary.folder))
    told = retimed(found, config.devices)
    assert summary.resumed
    assert {"failed", "counted"} == set(told["outcome"])
    pd.testing.assert_frame_equal(told, found.timeline)


def test_only_runs_that_waited_for_everybody_are_told_again(buffered: Summary, plain: Summary) -> None:
    with pytest.raises(UserError, match=r"RUN: got .*; allowed: a synchronous run that waited for all of its clients"):
        retimed(read_run(Path(buffered.folder)), job(devices=TWO).devices)
    hours = job(devices={"one": {"seconds_per_step": 1.0, "hours": [[8, 18]]}}).devices
    with pytest.raises(UserError, match="--devices: got 'hours'; allowed: devices without hours and dropout"):
        retimed(read_run(Path(plain.folder)), hours)
    leaving = job(devices={"one": {"seconds_per_step": 1.0, "dropout": 0.1}}).devices
    with pytest.raises(UserError, match="--devices: got 'dropout'; allowed: devices without hours and dropout"):
        retimed(read_run(Path(plain.folder)), leaving)
    with pytest.raises(UserError, match=r"--devices: got \{\}; allowed: a file with devices.classes"):
        retimed(read_run(Path(plain.folder)), job().devices)


def test_report_tells_the_simulated_time(buffered: Summary, plain: Summary) -> None:
    with_devices, without = read_run(Path(buffered.folder)), read_run(Path(plain.folder))
    assert simulated_time({"plain": without}) is None
    section = simulated_time({"plain": without, "buffered": with_devices})
    assert section is not None
    page = json.dumps([str(part) for part in section.parts])
    assert "simulated hours" in page
    (classes,) = [part for part in section.parts if isinstance(part, Table) and part.columns[1] == "devices"]
    assert {(row[0], row[1]) for row in classes.rows} == {("buffered", "slow"), ("buffered", "fast")}
    twice = simulated_time({"one": with_devices, "other": with_devices})
    assert twice is not None
    (budgets,) = [p for p in twice.parts if isinstance(p, Table) and p.caption.startswith("Quality under a budget")]
    last = float(with_devices.overall["held_out_loss"].iloc[-1])
    assert [row[2] for row in budgets.rows] == [cell(last)] * 2
    assert buffered.simulated is not None
    whole = buffered.simulated["classes"]
    assert sum(of_class["counted"] for of_class in whole.values()) == 6 * 2
    assert sum(of_class["participation"] for of_class in whole.values()) == pytest.approx(1.0)
    assert whole["slow"]["staleness"] > whole["fast"]["staleness"]


@pytest.mark.slow
def test_plan_names_devices_that_are_too_small_and_what_waits() -> None:
    small = {"phone": {"seconds_per_step": 1.0, "memory": "100kB"}, "board": {"seconds_per_step": 1.0, "memory": "4GB"}}
    notes = plan_of(prepare(job(*ASYNC, devices=small))).notes
    (too_small,) = [note for note in notes if "cannot hold" in note]
    assert too_small.startswith("4 of 8 clients (phone, 0.1 MB) cannot hold the model and one client's training")
    (waiting,) = [note for note in notes if "wait" in note]
    assert waiting.startswith("Up to 5 clients are under way")
    assert not any("devices" in note or "under way" in note for note in plan_of(prepare(job())).notes)


def test_fedbuff_of_a_whole_cohort_of_equal_devices_has_the_bits_of_sync(plain: Summary, tmp_path: Path) -> None:
    """In spite of the server's momentum, whose memory the steps go through."""
    asked = ["federation.mode=async", "federation.asynchronous.buffer=5"]
    summary = run(job(*asked, "resources.pack_size=3", devices=ALIKE), tmp_path / "run")
    assert summary.weights_sha256 == plain.weights_sha256
    assert summary.metrics == plain.metrics


def test_asynchronous_run_goes_on_to_the_same_bits(buffered: Summary, tmp_path: Path) -> None:
    """Interrupted in the fourth step, with clients of several versions under way; then with packs of another size."""
    assert pd.read_parquet(f"{buffered.folder}/timeline.parquet").eval("round - version").max() > 1

    def interrupt(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(*ASYNC, devices=TWO), tmp_path / "run", interrupt)
    again = run(job(*ASYNC, "resources.pack_size=1", devices=TWO), tmp_path / "run", resume=True)
    same(again, buffered)
    assert again.resumed in ((3,), (4,))


@pytest.mark.slow
def test_ten_thousand_clients_with_a_daily_trace(tmp_path: Path) -> None:
    lines = [f"{k},{'slow' if k % 3 else 'fast'},{k % 24},{(k + 2) % 24}" for k in range(10_000)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["client,device,from,to", *lines]) + "\n")
    many = ["federation.clients=10000", "federation.sampled=40", "federation.asynchronous.buffer=20"]
    dealt = "federation.partition={kind: resample, rows_per_client: 2}"
    config = job(*ASYNC, *many, dealt, f"devices.trace={trace}", "resources.pack_size=20", devices=TWO)
    summary = run(config, tmp_path / "run")
    assert summary.simulated is not None
    assert sum(of_class["counted"] for of_class in summary.simulated["classes"].values()) == 6 * 20


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("disturbed", ["quiet", "ray::Worker", "ray::Coordinator", "interrupted"])
def test_asynchronous_runs_have_one_hash(
    workers: int, disturbed: str, ray_session: None, buffered: Summary, tmp_path: Path
) -> None:
    """A process of that name is killed in the third step, or the command is interrupted there and goes on."""
    config, due = job(*ASYNC, devices=TWO, workers=workers), [] if disturbed == "quiet" else [disturbed]

    def listener(record: Any) -> None:
        if isinstance(record, PackDone) and record.round == 2 and due:
            kind = due.pop()
            if kind == "interrupted":
                raise KeyboardInterrupt
            chaos.kill_one(kind)

    if disturbed == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", listener)
    summary = run(config, tmp_path / "run", listener, resume=disturbed == "interrupted")
    same(summary, buffered)
    assert not due
    assert bool(summary.resumed) == (disturbed in ("ray::Coordinator", "interrupted"))


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["method={name: flexlora}", "server.optimizer=plain"],
            "federation.mode: got 'async'; allowed: sync or semi-sync with method.name=flexlora, whose updates are",
        ),
        (
            ["method={name: shared-galore}"],
            "whose updates are for the server that clients began from; or choose one of fedftg, fedavg",
        ),
        (
            ["federation.asynchronous={rule: fedasync}"],
            "federation.asynchronous.rule: got 'fedasync'; allowed: fedbuff with method.name=fedftg, whose clients "
            "send changes, not models to mix; set rule=fedbuff, buffer=1 and server.lr in place of mixing",
        ),
    ],
)
def test_methods_that_cannot_be_asynchronous_get_one_line(overrides: list[str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(job(*ASYNC, *overrides, devices=TWO), tmp_path / "run")
    assert fault in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_privacy_does_not_go_with_hours_of_devices(tmp_path: Path) -> None:
    hours = {"one": {"seconds_per_step": 1.0, "hours": [[8, 18]]}}
    private = ["privacy.clip=1", "privacy.noise=1", "federation.client_weighting=uniform"]
    with pytest.raises(UserError, match=r"privacy.clip: got 1.0; allowed: nothing with hours or dropout of .* every"):
        run(job(*private, devices=hours), tmp_path / "run")
    with pytest.raises(UserError, match=r"nothing with hours or dropout of devices: the accountant counts each"):
        run(
            job(*private, "privacy.unit=example", "method={name: fedit}", devices=hours),
            tmp_path / "run",
        )


def test_clients_under_way_at_the_end_are_in_the_totals(buffered: Summary) -> None:
    timeline, rounds = (pd.read_parquet(f"{buffered.folder}/{name}.parquet") for name in ("timeline", "rounds"))
    left = timeline[timeline["outcome"] == "unfinished"]
    assert set(left["round"]) == {6}
    assert 0 < len(left) <= 5
    for way, total in {"uplink_bytes": buffered.uplink_bytes, "downlink_bytes": buffered.downlink_bytes}.items():
        assert total == timeline[way].sum() == rounds[way].sum() + left[way].sum()
        assert total == read_run(Path(buffered.folder)).sent(way)
    by_client = per_client(read_run(Path(buffered.folder)))
    assert 1e6 * float(by_client["up"].sum()) == pytest.approx(buffered.uplink_bytes)
    assert buffered.simulated is not None
    dropped = timeline[timeline["outcome"] != "counted"]
    assert buffered.simulated["wasted_bytes"] == dropped["uplink_bytes"].sum() + dropped["downlink_bytes"].sum() > 0


def test_dropped_client_downloads_what_it_has_missed(tmp_path: Path) -> None:
    """Each round adds three blocks of rank 1 to a layer; who came too late for a round holds its broadcast."""
    drop = ["federation.sampled=3", "federation.over_selection=2", "federation.rounds=4", "server.optimizer=plain"]
    summary = run(job(*drop, "method.rank=1", "method.refresh_every=100", devices=TWO), tmp_path / "run")
    timeline = pd.read_parquet(f"{summary.folder}/timeline.parquet")
    assert (timeline["began"] + timeline["download_seconds"] <= timeline["ended"]).all()
    holds, dropped, charged, again = dict[int, int](), set[int](), dict[int, set[int]](), 0
    for _, rows in timeline.groupby("round"):
        for row in rows.itertuples():
            charged.setdefault(row.round - holds.get(row.client, 0), set()).add(row.downlink_bytes)
            again += row.client in dropped
        holds |= dict.fromkeys(rows["client"], rows["round"].iloc[0])
        dropped = set(rows.loc[rows["outcome"] == "late", "client"])
    (block,) = charged[1]
    assert charged == {missed: {missed * block} for missed in charged}
    assert again


def test_nobody_downloads_a_server_again_that_no_update_has_moved(tmp_path: Path) -> None:
    """4 s of training in 5 s: round 1, with 2 s of download, counts nobody; in round 2 everybody has it.  By dense
    FedAvg too each client sends twice what it downloads once."""
    slow = {"one": {"seconds_per_step": 1.0, "down_mbit": 0.1}}
    summary = run(job("federation.round_deadline=5", "federation.sampled=null", devices=slow), tmp_path / "run")
    timeline = pd.read_parquet(f"{summary.folder}/timeline.parquet")
    rounds = [rows for _, rows in timeline.groupby("round")]
    assert [set(rows["outcome"]) for rows in rounds] == [{"counted"}, {"late"}, {"counted"}]
    assert [rows["downlink_bytes"].sum() for rows in rounds] == [0, summary.downlink_bytes, 0]
    assert summary.dense_bytes == 2 * summary.dense_downlink_bytes > 0


@pytest.mark.slow
def test_longer_run_goes_on_with_the_clock(buffered: Summary, tmp_path: Path) -> None:
    shorter = [word.replace("rounds=6", "rounds=4") for word in ASYNC]
    run(job(*shorter, devices=TWO), tmp_path / "run")
    same(run(job(*ASYNC, devices=TWO), tmp_path / "run", resume=True), buffered)


def test_run_does_not_go_on_with_another_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,device\n" + "".join(f"{client},slow\n" for client in range(8)))
    config = job(f"devices.trace={trace}", "federation.rounds=1", devices=TWO)
    done = run(config, tmp_path / "run")
    classes = (done.simulated or {})["classes"]
    assert {name: one["clients"] for name, one in classes.items()} == {"fast": 0, "slow": 5}
    assert run(config, tmp_path / "run", resume=True) == done
    moved = trace.rename(tmp_path / "moved.csv")
    config, old = config.model_copy(update={"devices": config.devices.model_copy(update={"trace": str(moved)})}), config
    assert run(config, tmp_path / "run", resume=True) == done
    with pytest.raises(UserError, match=r"devices.trace: got '.*trace.csv'; allowed: a CSV file: No such file"):
        run(old, tmp_path / "run", resume=True)
    moved.write_text(moved.read_text().replace("7,slow", "7,fast"))
    with pytest.raises(UserError, match=r"devices.trace: got 'another one'; allowed: the file with which the run in"):
        run(config, tmp_path / "run", resume=True)


def test_load_config_names_a_bad_profile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"devices.classes.slow.up_mbit: got 0; allowed: a number > 0, or null"):
        load_config({"devices": {"classes": {"slow": {"seconds_per_step": 1.0, "up_mbit": 0}}}})
