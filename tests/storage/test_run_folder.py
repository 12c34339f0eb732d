"""The run folder: names, atomic files, tables, and the mark of a finished run."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import parquet

from rayfed_sub.config.loading import load_config, stored_config, yaml_text
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.schemas import ClientRow, RoundRow, Score, TimelineRow
from rayfed_sub.methods.downloads import dense_traffic
from rayfed_sub.storage import checkpoints, table_parts
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import (
    check_free,
    create,
    finished,
    fresh,
    latest,
    make,
    reopen,
    summary_of,
)
from rayfed_sub.telemetry.events import Beginning, RoundDone, Summary

CONFIG = load_config({"name": "kept", "federation": {"rounds": 2}})


def round_row(n: int, held_out: float | None) -> RoundRow:
    return RoundRow(n, 2, 0, 2.5, held_out, 100, 200, 50, 8.0, None, 1.5, 2.0)


def round_rows(folder: Path) -> list[RoundRow]:
    return [RoundRow(**row) for row in parquet.read_table(folder / "rounds.parquet").to_pylist()]


def client_row(n: int, client: int) -> ClientRow:
    return ClientRow(n, client, 3.0, 50, 100, 2.5, 2.25, 25.0, 4.0, 1.0)


def done(n: int, held_out: float | None, *clients: int) -> RoundDone:
    """Round n of these clients, after which client 1 and all together have the loss `held_out`."""
    scores = [] if held_out is None else [Score(who, "held_out_loss", held_out, 50) for who in (None, 1)]
    return RoundDone(round_row(n, held_out), tuple(client_row(n, client) for client in clients), tuple(scores))


def score_rows(folder: Path) -> list[tuple[int, int | None, float]]:
    rows = parquet.read_table(folder / "scores.parquet").to_pylist()
    return [(row["rounds"], row["client"], row["value"]) for row in rows]


def summary(folder: Path) -> Summary:
    metrics = {"held_out_loss_before": 4.0, "held_out_loss": 2.0}
    return Summary("kept", "fedftg", 2, "ab" * 32, 1, 2, 3, 8.0, 2.0, 1.0, 4, metrics, {}, {}, folder=str(folder))


def test_default_names_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [fresh(None, "tiny") for _ in range(3)]
    assert made == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]
    made[1].rmdir()
    assert fresh(None, "tiny") == Path("runs/tiny-2")
    assert fresh(None, "other") == Path("runs/other")
    assert all(path.is_dir() for path in made)


def test_simultaneous_runs_get_separate_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: fresh(None, "tiny"), range(40)))
    assert len(set(made)) == 40


def test_named_folder_is_used_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert fresh(tmp_path, "tiny") == tmp_path
    assert fresh(tmp_path / "a" / "b", "tiny").is_dir()


def test_folder_with_a_run_and_file_are_refused(tmp_path: Path) -> None:
    create(Place(tmp_path), CONFIG)
    for path, allowed in ((tmp_path, "a folder without a run in it"), (tmp_path / "config.yaml", "a folder")):
        for refuse in (check_free, lambda path: fresh(path, "tiny")):
            with pytest.raises(UserError) as caught:
                refuse(path)
            assert (caught.value.field, caught.value.value, caught.value.allowed) == ("--out", str(path), allowed)


def test_impossible_folder_is_refused_under_the_given_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^--to: got '.*file/sub'; allowed: a folder that can be made; Not a directory"
    ):
        make(tmp_path / "file" / "sub", "--to")


def test_every_file_of_a_run(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    assert load_config(tmp_path / "config.yaml") == CONFIG
    folder.write_tables()  # before the first round is over: columns without rows
    assert list(pd.read_parquet(tmp_path / "rounds.parquet").columns) == list(RoundRow.__dataclass_fields__)
    assert len(pd.read_parquet(tmp_path / "clients.parquet")) == 0

    folder.add(done(0, None, 1, 5))
    folder.add(done(1, 2.0, 1))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry["round"], entry["held_out_loss"]) for entry in log] == [
        ("round", 0, None),
        ("round", 1, 2.0),
    ]
    folder.write_tables()
    rounds, clients = pd.read_parquet(tmp_path / "rounds.parquet"), pd.read_parquet(tmp_path / "clients.parquet")
    assert rounds["round"].tolist() == [0, 1]
    assert rounds["held_out_loss"].isna().tolist() == [True, False]
    assert list(zip(clients["round"], clients["client"], strict=True)) == [(0, 1), (0, 5), (1, 1)]
    assert round_rows(tmp_path) == [round_row(0, None), round_row(1, 2.0)]
    assert score_rows(tmp_path) == [(2, None, 2.0), (2, 1, 2.0)]  # after two rounds, over all rows and client 1's
    assert folder.scores(2) == [Score(None, "held_out_loss", 2.0, 50), Score(1, "held_out_loss", 2.0, 50)]

    folder.write_summary(summary(tmp_path))
    summary_json = json.loads((tmp_path / "summary.json").read_text())
    assert summary_json["metrics"] == {"held_out_loss_before": 4.0, "held_out_loss": 2.0}
    assert "folder" not in summary_json  # a run folder can be moved
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("client_layers.parquet", "clients.parquet", "config.yaml", "layers.parquet", "log.jsonl", "packs.parquet"),
        *("rounds.parquet", "scores.parquet", "summary.json"),
    ]


PART = "rounds.parquet/part-000000.parquet"


@pytest.mark.parametrize("file", ["config.yaml", PART, "summary.json"])
def test_interrupted_write_keeps_the_old_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.add(done(0, 3.0, 1))
    folder.write_tables()
    if file != PART:
        folder.write_summary(summary(tmp_path))
    before = (tmp_path / file).read_bytes()

    def cut_off(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", cut_off)
    folder.add(done(1, 2.0))
    writes = {
        "config.yaml": lambda: create(Place(tmp_path), load_config({"name": "another"})),
        PART: folder.write_tables,
        "summary.json": lambda: folder.write_summary(Summary(**{**vars(summary(tmp_path)), "rounds": 9})),
    }
    with pytest.raises(RunError, match=rf"writing files: .*{file}: No space left on device"):
        writes[file]()
    assert (tmp_path / file).read_bytes() == before
    assert not list(tmp_path.rglob(".*"))  # the unfinished file takes no space either


def test_run_with_a_summary_is_finished(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.write_tables()
    with pytest.raises(UserError, match="the folder of a finished run"):
        finished(tmp_path)
    folder.write_summary(summary(tmp_path))
    assert finished(tmp_path) == CONFIG


BEGINNING = Beginning((Score(None, "held_out_loss", 4.0, 50),), {"torch": "2.13"}, {"threads": 1})


def test_resumed_run_is_cut_to_the_rounds_that_count(tmp_path: Path) -> None:
    """Three rounds were run, the tables were written after two of them, the checkpoint has one."""
    first = create(Place(tmp_path), CONFIG)
    assert not first.begun()
    first.begin(BEGINNING)
    for n in range(3):
        first.add(done(n, 2.0, 1, 5))
        if n == 1:
            first.write_tables()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"event": "rou')  # the process died during the write

    again = reopen(Place(tmp_path), CONFIG)
    assert again.begun()
    assert again.go_on(1) == BEGINNING
    assert again.rounds["round"].to_pylist() == [0]
    for n in (1, 2):
        again.add(done(n, 1.0, 2))
    again.write_tables()
    assert round_rows(tmp_path) == [round_row(0, 2.0), round_row(1, 1.0), round_row(2, 1.0)]
    clients = pd.read_parquet(tmp_path / "clients.parquet")
    assert list(zip(clients["round"], clients["client"], strict=True)) == [(0, 1), (0, 5), (1, 2), (2, 2)]
    assert score_rows(tmp_path) == [
        *((0, None, 4.0), (1, None, 2.0), (1, 1, 2.0)),
        *((2, None, 1.0), (2, 1, 1.0), (3, None, 1.0), (3, 1, 1.0)),
    ]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry.get("round")) for entry in log] == [
        *(("started", None), ("round", 0), ("resumed", 1), ("round", 1), ("round", 2))
    ]
    assert again.resumed() == (1,)


def test_exchanges_are_those_of_the_timeline_where_there_is_one(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    failed = replace(client_row(0, 5), uplink_bytes=0, failure="NaN")
    folder.add(replace(done(0, None, 1), client_rows=(client_row(0, 1), failed)))
    folder.add(done(1, None))
    assert (list(folder.exchanges()), folder.trained_rounds()) == ([(1, 0, 1, 1), (5, 0, 0, 1)], {0})
    late = TimelineRow(2, 1, "a", 1, 0.0, 1.0, 2.0, 1.0, 4.0, 4.0, 0.0, "late", 200, 40, 4.0, 9.0, None)
    gone = replace(late, client=3, version=0, outcome="offline", uplink_bytes=0, ended=0.25)
    failed = replace(late, client=4, outcome="failed", uplink_bytes=0, upload_seconds=0.0, ended=3.0)
    folder.add(replace(done(2, None, 1), timeline=(late, gone, failed)))
    exchanges = [(1, 1, 1, 1), (3, 0, 0, 0.25), (4, 1, 0, 1)]
    assert (list(folder.exchanges()), folder.trained_rounds()) == (exchanges, {0, 2})


def test_dense_fedavg_pays_for_what_crossed(tmp_path: Path) -> None:
    """Transfers of 1 s down, 2 s of work, 4 s up, given up after 4 s, and after 0.25 s: of dense FedAvg as well a
    quarter crosses.  The cut-off download comes again as a whole, since its client lacks it."""
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    late = TimelineRow(1, 1, "a", 1, 10.0, 1.0, 2.0, 4.0, 14.0, 14.0, 0.0, "late", 200, 10, 4.0, 9.0, None)
    gone = replace(late, client=3, outcome="offline", downlink_bytes=50, uplink_bytes=0, upload_seconds=0.0)
    again = [replace(gone, ended=10.25), replace(gone, round=2, ended=12.0), replace(gone, round=3, ended=12.0)]
    folder.add(done(0, None, 1))
    folder.add(replace(done(1, None), timeline=(late, *again)))
    assert list(folder.exchanges()) == [(1, 1, 0.25, 1), (3, 1, 0, 0.25), (3, 1, 0, 1), (3, 1, 0, 1)]
    assert dense_traffic(folder.exchanges(), folder.trained_rounds(), 1000, private=False) == (250, 1000 + 250 + 1000)


def test_exchanges_of_many_parts_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dense FedAvg's downloads are counted, of which each version costs a client once."""
    monkeypatch.setattr(table_parts, "FULL", 1)
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    for n in range(5):
        folder.add(done(n, None, 1, 2))
        folder.write_tables()
    assert len(list((tmp_path / "clients.parquet").iterdir())) > 1
    assert list(folder.exchanges()) == [(client, n, 1, 1) for n in range(5) for client in (1, 2)]
    assert dense_traffic(folder.exchanges(), folder.trained_rounds(), 100, private=False) == (1000, 800)


def test_table_of_the_user_s_own_stays_where_nothing_is_answered(tmp_path: Path) -> None:
    (tmp_path / "answers.parquet").write_bytes(b"mine")
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    folder.add(done(0, 2.0, 1))
    folder.write_tables()
    folder.write_summary(summary(tmp_path))
    assert (tmp_path / "answers.parquet").read_bytes() == b"mine"


def test_rounds_of_an_older_version_s_tables_go_on_in_parts(tmp_path: Path) -> None:
    """Its tables are one file each; with them the run folder tells what it told while the rounds ran."""
    rounds = [done(n, 2.0, n, 5) for n in range(3)]
    first = create(Place(tmp_path), CONFIG)
    first.begin(BEGINNING)
    for one in rounds:
        first.add(one)
    first.write_tables()
    for at in tmp_path.glob("*.parquet"):
        table = parquet.read_table(at)
        shutil.rmtree(at)
        parquet.write_table(table, at)

    again = reopen(Place(tmp_path), CONFIG)
    assert again.go_on(2) == BEGINNING
    assert (tmp_path / "rounds.parquet").is_dir()
    again.add(rounds[2])
    again.write_tables()
    assert round_rows(tmp_path) == [one.row for one in rounds]
    for folder in (first, again):
        assert folder.scores(3) == list(rounds[2].scores)
        assert folder.overall_scores() == {n: {"held_out_loss": 2.0 if n else 4.0} for n in range(4)}
        assert len({client for client, *_ in folder.exchanges()}) == 4
    again.write_summary(summary(tmp_path))
    assert len({client for client, *_ in again.exchanges()}) == 4
    assert round_rows(tmp_path) == [one.row for one in rounds]


def test_incomplete_first_line_is_written_anew(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    (tmp_path / "log.jsonl").write_text('{"event": "star')
    assert not folder.begun()
    folder.begin(BEGINNING)
    assert reopen(Place(tmp_path), CONFIG).go_on(0) == BEGINNING


def test_tables_without_a_finished_round_are_refused(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.begin(BEGINNING)
    folder.add(done(0, 2.0))
    folder.write_tables()
    with pytest.raises(UserError, match=r"--resume: got .*; allowed: a run folder with 2 rounds in rounds.parquet"):
        reopen(Place(tmp_path), CONFIG).go_on(2)


def test_run_resumes_only_with_its_own_settings(tmp_path: Path) -> None:
    create(Place(tmp_path), CONFIG)
    free = ["resources.workers=7", "resources.state_memory=3MB", "resources.deadline=5", "checkpoint.every=4"]
    free += ["trackers=[wandb]", "resources.pack_size=4"]  # what auto stands for here
    settings = {"name": "kept", "federation": {"rounds": 2}}
    assert reopen(Place(tmp_path), load_config(settings, free)).path == tmp_path
    for override, message in {
        "seed=3": f"seed: got 3; allowed: 0, with which the run in {tmp_path} began; set that, or begin anew",
        "optimizer.lr=2": "optimizer.lr: got 2.0; allowed: 0.001, with which",
        "federation.rounds=1": "federation.rounds: got 1; allowed: 2 or more, for the run in",
        "resources.pack_size=9": "resources.pack_size: got 9; allowed: 'auto', with which",
    }.items():
        with pytest.raises(UserError) as caught:
            reopen(Place(tmp_path), load_config(settings, [override]))
        assert str(caught.value).startswith(message)


SETTINGS = {"name": "kept", "federation": {"rounds": 2}}
LONGER = {
    "nothing depends on it": ([], 2, None),
    "a run that is not finished": (["evaluation.every=4"], 1, None),
    "a schedule": (["optimizer.schedule=cosine"], 2, "optimizer.schedule=cosine follows their number"),
    "a budget": (
        ["privacy={clip: 1, epsilon: 8}", "federation.client_weighting=uniform"],
        2,
        "privacy.epsilon is a budget of them all",
    ),
    "a last round like no other": (["evaluation.every=4", "checkpoint.every=0"], 2, "no checkpoint before it is left"),
}


@pytest.mark.parametrize("case", LONGER)
def test_run_goes_on_for_more_rounds_where_nothing_depended_on_them(case: str, tmp_path: Path) -> None:
    overrides, finished_rounds, refusal = LONGER[case]
    folder = create(Place(tmp_path), load_config(SETTINGS, overrides))
    checkpoints.make(tmp_path)
    checkpoints.write(tmp_path, checkpoints.Checkpoint(finished_rounds, {}, {}))
    folder.write_summary(summary(tmp_path))
    longer = load_config(SETTINGS, [*overrides, "federation.rounds=9", "resources.workers=7"])
    if refusal is None:
        assert summary_of(tmp_path, longer) is None
        reopen(Place(tmp_path), longer)
        assert not (tmp_path / "summary.json").exists()
        assert stored_config(tmp_path) == load_config(SETTINGS, [*overrides, "federation.rounds=9"])
        return
    for look in (lambda: summary_of(tmp_path, longer), lambda: reopen(Place(tmp_path), longer)):
        with pytest.raises(UserError) as caught:
            look()
        assert str(caught.value).startswith("federation.rounds: got 9; allowed: 2, ")
        assert refusal in str(caught.value)
    assert summary_of(tmp_path, load_config(SETTINGS, overrides)) is not None  # nothing is lost


def test_torn_summary_is_one_line(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    folder.write_summary(summary(tmp_path))
    (tmp_path / "summary.json").write_text('{"name": "to')
    with pytest.raises(UserError, match=r"^--out: got '.*summary\.json'; allowed: a whole file; delete it"):
        summary_of(tmp_path, CONFIG)


def test_last_round_like_no_other_runs_again(tmp_path: Path) -> None:
    config = load_config(SETTINGS, ["diagnostics.every=4"])
    create(Place(tmp_path), config)
    checkpoints.make(tmp_path)
    for rounds in (1, 2):
        checkpoints.write(tmp_path, checkpoints.Checkpoint(rounds, {}, {}))
    checkpoints.keep_best(tmp_path, 2)
    longer = load_config(SETTINGS, ["diagnostics.every=4", "federation.rounds=9"])
    with pytest.raises(UserError, match=r"judged or diagnosed out of turn, and became the best one"):
        reopen(Place(tmp_path), longer)
    (checkpoints.root(tmp_path) / "best-000002.json").unlink()
    with checkpoints.claim(tmp_path, 0), pytest.raises(RunError, match="another run is at work here"):
        reopen(Place(tmp_path), longer)
    assert (checkpoints.newest(tmp_path), stored_config(tmp_path)) == (2, config)
    reopen(Place(tmp_path), longer)
    assert (checkpoints.newest(tmp_path), stored_config(tmp_path)) == (1, longer)


def test_run_whose_bits_are_the_same_in_any_pack_resumes_with_other_packs(tmp_path: Path) -> None:
    create(Place(tmp_path), CONFIG)
    settings = {"name": "kept", "federation": {"rounds": 2}, "resources": {"pack_size": 9}}
    config = load_config(settings, ["evaluation.batch_size=1"])
    assert reopen(Place(tmp_path), config, any_pack=True).path == tmp_path
    with pytest.raises(UserError, match=r"^evaluation\.batch_size: got 1|^resources\.pack_size: got 9"):
        reopen(Place(tmp_path), config)


def test_stored_configuration_of_an_older_version_keeps_its_meaning(tmp_path: Path) -> None:
    """In older versions the run's own seed drew the splits if the task had none, and all batches were bucketed."""
    create(Place(tmp_path), CONFIG).write_summary(summary(tmp_path))
    for task in ({"seed": None}, {}, {"seed": 5}):
        old = {"name": "kept", "seed": 7, "task": task, "federation": {"rounds": 2}}
        (tmp_path / "config.yaml").write_text(yaml_text(old))
        config = finished(tmp_path)
        assert (config.task.seed, config.federation.batching) == (task.get("seed") or 7, "bucketed")
        assert reopen(Place(tmp_path), config).path == tmp_path
        with pytest.raises(UserError, match=r"^federation\.batching: got 'shuffled'; allowed: 'bucketed', with which"):
            summary_of(tmp_path, load_config({**old, "task": {"seed": config.task.seed}}))
    with pytest.raises(UserError, match=r"^task\.seed: got None"):  # a configuration passed in is not a stored one
        load_config({"task": {"seed": None}})


def test_stored_configuration_of_an_older_version_gets_the_new_names(tmp_path: Path) -> None:
    new = {
        "evaluation": {"eval_rows": 64, "generate_rows": 3, "split": "validation"},
        "federation": {"rounds": 2, "client_weighting": "uniform"},
        "method": {"name": "fedavg", "optimizer_state": "reset"},
        "optimizer": {"schedule": "cosine", "final_lr_ratio": 0.1},
        "task": {"validation_share": 0.1},
    }
    old = {
        "evaluation": {"examples": 64, "generate": 3, "on": "validation"},
        "federation": {"rounds": 2, "weights": "uniform"},
        "method": {"name": "fedavg", "state": "reset"},
        "optimizer": {"schedule": "cosine", "final": 0.1},
        "task": {"validation_share": 0.1, "seed": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml_text(old))
    assert stored_config(tmp_path) == load_config(new, ["federation.batching=bucketed"])


def test_stored_over_selection_that_adds_nobody_is_read(tmp_path: Path) -> None:
    devices = {"classes": {"a": {"seconds_per_step": 1.0}}}
    old = {"federation": {"clients": 4, "rounds": 2, "sampled": None, "over_selection": 1.5}, "devices": devices}
    (tmp_path / "config.yaml").write_text(yaml_text(old))
    assert stored_config(tmp_path).federation.over_selection == 1.0


def test_stored_class_of_devices_without_a_share_is_left_out(tmp_path: Path) -> None:
    """No client had one, so the others' devices are the same without it."""
    classes = {"a": {"seconds_per_step": 1.0}, "b": {"seconds_per_step": 2.0}}
    old = {"federation": {"clients": 4, "rounds": 2}, "devices": {"classes": classes, "shares": {"b": 1.0}}}
    (tmp_path / "config.yaml").write_text(yaml_text(old))
    assert list(stored_config(tmp_path).devices.classes) == ["b"]


def test_finished_run_returns_its_summary_again(tmp_path: Path) -> None:
    folder = create(Place(tmp_path), CONFIG)
    assert summary_of(tmp_path, CONFIG) is None
    folder.write_summary(summary(tmp_path))
    assert summary_of(tmp_path, CONFIG) == summary(tmp_path)


def test_newest_run_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert latest("tiny") is None
    for _ in range(11):
        create(Place(fresh(None, "tiny")), CONFIG)
    (tmp_path / "runs" / "tiny-12").mkdir()  # claimed, but nothing in it
    create(Place(fresh(Path("runs/tiny-large"), "tiny")), CONFIG)
    assert latest("tiny") == Path("runs/tiny-11")
    os.utime("runs/tiny/config.yaml", (2**31, 2**31))  # the first folder was deleted, and its name used again
    assert latest("tiny") == Path("runs/tiny")


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = load_config({"name": "1e5"})
    create(Place(tmp_path), config)
    assert load_config(tmp_path / "config.yaml") == config
