"""The report of runs: the right numbers from run folders that are complete, interrupted, old or many."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayfed_sub.clock.fleet import fleet_of
from rayfed_sub.config.loading import read_yaml, yaml_text
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.schemas import ClientLayer, ClientRow, CohortLayer, PackRow, RoundRow, ScoreRow
from rayfed_sub.reports.clients import clients, per_client
from rayfed_sub.reports.clients import table as clients_table
from rayfed_sub.reports.curves import sent
from rayfed_sub.reports.layer_metrics import QUANTITIES, figures
from rayfed_sub.reports.page import Cell, Details, Facts, Figure, Legend, Section, Table, Text, cell
from rayfed_sub.reports.report import sections, write_report
from rayfed_sub.reports.run_reader import _COLUMNS, Run, named, read_run
from rayfed_sub.reports.simulated_time import simulated_time, told
from rayfed_sub.reports.timeline import bars, clocked
from rayfed_sub.telemetry.events import Summary
from tests.helpers.browser import Outline
from tests.helpers.written_runs import FAILURE, RANK, STEPS, write_run

RECORDS = {
    **{"rounds": RoundRow, "clients": ClientRow, "scores": ScoreRow},
    **{"packs": PackRow, "layers": CohortLayer, "client_layers": ClientLayer},
}


def report(*runs: Run) -> dict[str, list[Any]]:
    """The report's sections by title, each with its parts, including those of details."""
    found = {section.title: section for section in sections(named(runs))}
    return {title: parts(section) for title, section in found.items()}


def parts(section: Section) -> list[Any]:
    return [inner for part in section.parts for inner in (part.parts if isinstance(part, Details) else [part])]


def figure(found: list[Any], title: str) -> Figure:
    """The first figure of that title."""
    return next(part for part in found if isinstance(part, Figure) and part.title == title)


def table(found: list[Any]) -> Table:
    return next(part for part in found if isinstance(part, Table))


def texts(found: Table, column: str) -> list[str]:
    at = list(found.columns).index(column)
    return [cell.text if isinstance(cell, Cell) else cell for cell in (row[at] for row in found.rows)]


# --- the folder


def test_written_tables_match_the_engine_s(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name, record in RECORDS.items():
        names = {field.name for field in dataclasses.fields(record)}
        assert set(pd.read_parquet(folder / f"{name}.parquet").columns) == names, name
        assert set(_COLUMNS[name]) == names, name
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {field.name for field in dataclasses.fields(Summary)} - {"folder"}


def test_running_run_is_shown_up_to_its_log(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=5, done=3))  # tables lack the third round
    assert (run.done, run.summary) == (3, {})
    assert run.clients["round"].max() == 1
    assert run.versions["ray"] == "2.60.0"
    found = report(run)
    assert next(iter(found["Result"])).pairs["state"] == "not finished: 3 of 5 rounds so far"
    assert figure(found["Quality over rounds"], "Training loss (nats/label)").data[0]["x"] == [1, 2, 3]


def test_run_without_a_round_has_summary_and_settings(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=5, done=1)
    for name in RECORDS:
        (folder / f"{name}.parquet").unlink()
    (folder / "log.jsonl").write_text("")
    assert list(report(read_run(folder))) == ["Result", "What was set"]


def test_older_run_omits_missing_figures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", diagnostics=False)
    (folder / "packs.parquet").unlink()
    rounds = pd.read_parquet(folder / "rounds.parquet")
    rounds.drop(columns=["retries", "memory_bytes"]).to_parquet(folder / "rounds.parquet")
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("planned_memory_bytes")
    (folder / "summary.json").write_text(json.dumps(summary))
    found = report(read_run(folder))
    assert list(found) == [
        *("Result", "What was set", "Quality over rounds", "Quality against traffic", "Clients", "Memory"),
        "Versions and machine",
    ]
    assert table(found["Memory"]).rows == [["run", Cell("-", None), Cell("1,000", 1000.0), Cell("-", None)]]
    assert "cosine to mean" not in table(found["Clients"]).columns


def test_run_of_a_version_without_a_task_seed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=3)
    stored = read_yaml(folder / "config.yaml")
    stored["task"]["seed"] = None
    del stored["federation"]["batching"]
    (folder / "config.yaml").write_text(yaml_text(stored))
    run = read_run(folder)
    assert (run.config.task.seed, run.config.federation.batching) == (3, "bucketed")
    assert "Quality over rounds" in report(run)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", r"the folder of a run \(it has a config.yaml\); check the path"),
        ("sweep.yaml", "", r"a sweep's own report is .*report.html"),
        ("config.yaml", "federation: {wings: 2}", "a run folder that this version can read; .*wings"),
        ("rounds.parquet", "no table", "a run folder that this version can read"),
        ("summary.json", "{", "a run folder that this version can read"),
    ],
)
def test_folder_without_a_run_is_refused(tmp_path: Path, file: str | None, content: str, message: str) -> None:
    folder = tmp_path / "run"
    if file in (None, "sweep.yaml"):
        folder.mkdir()
    else:
        write_run(folder)
    if file:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=f"^RUN: got .*{message}"):
        read_run(folder)


def test_run_labels_name_their_differences(tmp_path: Path) -> None:
    def called(*names: str, methods: tuple[str, ...] = ("fedit",) * 3) -> list[str]:
        base = tmp_path / "-".join([*names, *methods]).replace("/", "_")
        places = zip(names, methods, strict=False)
        return list(named([read_run(write_run(base / name, "name=x", method=method)) for name, method in places]))

    assert called("a") == ["x"]
    assert called("a", "b", methods=("fedit", "flora")) == ["fedit", "flora"]
    assert called("a", "b") == ["a", "b"]
    assert called("a/0", "b/0") == ["a/0", "b/0"]
    run = read_run(write_run(tmp_path / "twice"))
    assert list(named([run, run])) == ["twice 1", "twice 2"]


# --- contents


def test_section_order_follows_a_reader_s_questions(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", again=((1, 0),), cross=0.3))
    assert list(report(run)) == [
        *("Symptoms", "Result", "What was set", "Quality over rounds", "Quality against traffic"),
        *("Ranks, drift and subspaces", "Clients", "Workers", "Memory", "Failures and retries"),
        "Versions and machine",
    ]


def test_alerts_come_first(tmp_path: Path) -> None:
    healthy, ill = (read_run(write_run(tmp_path / name, cross=cross)) for name, cross in (("a", 0.05), ("b", 0.3)))
    assert "Symptoms" not in report(healthy)
    (alone,) = report(ill)["Symptoms"]
    assert list(alone.pairs) == ["cross term"]
    assert "method.name=fedex-lora" in alone.pairs["cross term"]
    both = table(report(healthy, ill)["Symptoms"])
    assert [row[:2] for row in both.rows] == [["b", "cross term"]]


def test_summary_of_one_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=5, clients=6, resumed=(2,)))
    (facts,) = report(run)["Result"]
    assert isinstance(facts, Facts)
    assert facts.pairs["state"] == "finished: 5 rounds, taken up again 1 time"
    # 4 * 0.8**rounds + 1: 5 before, 4 * 0.32768 + 1 after
    assert facts.pairs["held-out loss (nats/label)"] == "5 before training, 2.311 after 5 rounds"
    assert facts.pairs["sent up"] == "1.2 MB, 16.7 times less than the 20 MB of dense FedAvg"  # 5 * 6 * 40 kB
    assert facts.pairs["sent down"].startswith("3.84 MB, 4.2 times less than the 16 MB")  # 4 * 6 * 160 kB
    assert facts.pairs["method"] == "fedit, rank 4"
    assert facts.pairs["weights_sha256"] == "00" * 32
    assert facts.pairs["rows"] == "1,080 training, 110 held-out"
    assert facts.pairs["scores are on"] == "test"
    assert facts.pairs["rows in two official splits"] == "4"
    assert facts.pairs["images"] == "2 transparent, over white"
    assert facts.pairs["rows beyond task.max_length"] == "40 cut (15 in the text, 30 in the answer), 3 dropped"


def test_privacy_budget_and_accountant_are_shown(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    run.rounds["epsilon"] = [float(n) / 2 for n in range(1, len(run.rounds) + 1)]
    run.summary["privacy"] = {"epsilon": 2.5, "epsilon_rdp": 3.0, "noise": 1.25, "accountant": "PLD", "delta": 1e-5}
    (facts,) = report(run)["Result"]
    assert isinstance(facts, Facts)
    most = f"{len(run.rounds) / 2:.3g}"
    assert facts.pairs["privacy"] == f"of clients: epsilon {most} at delta 1e-05, by PLD (3 by RDP), noise 1.25"


def test_each_of_several_runs_has_a_row(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, seed=at, method=name)) for at, name in enumerate(("fedit", "fedavg"))]
    rows = table(report(*runs)["Results"])
    assert texts(rows, "run") == ["fedit", "fedavg"]
    assert texts(rows, "rank") == ["4", "-"]
    assert texts(rows, "held-out loss") == ["2.311", "2.311"]
    assert texts(rows, "up (MB)") == ["1.2", "1.2"]
    assert texts(rows, "weights") == ["0" * 12, "010101010101"]
    assert (texts(rows, "rows cut"), texts(rows, "rows dropped")) == (["40", "40"], ["3", "3"])


def test_settings_are_compared_with_each_other_and_with_the_defaults(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "a", "optimizer.lr=0.1", "method.alpha=8"))
    second = read_run(write_run(tmp_path / "b", method="flora"))
    found = table(report(first, second)["How the configurations differ"])
    assert found.columns == ["key", "a", "b"]
    assert dict(zip(texts(found, "key"), zip(texts(found, "a"), texts(found, "b"), strict=True), strict=True)) == {
        "name": ("a", "b"),
        "method.name": ("fedit", "flora"),
        "method.alpha": ("8", "-"),
        "optimizer.lr": ("0.1", "0.001"),
    }
    alone = table(report(first)["What was set"])
    assert alone.columns == ["key", "this run", "default"]
    assert "optimizer.lr" in texts(alone, "key")
    assert texts(alone, "default")[texts(alone, "key").index("method.alpha")] == "16"
    assert "method.optimizer_state" not in texts(alone, "key"), "a key unknown to an older run has its default"


def test_settings_of_an_unknown_method(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: fedit", "name: 'elsewhere:Method'"))
    assert "method.rank" in texts(table(report(read_run(folder))["What was set"]), "key")


# --- curves


def test_scores_over_rounds_and_against_bytes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=5, clients=6, every=2))
    found = report(run)
    loss = figure(found["Quality over rounds"], "Held-out loss (nats/label)")
    assert loss.data[0]["x"] == [0, 2, 4, 5]
    assert loss.data[0]["y"] == pytest.approx([5, 3.56, 2.638, 2.311], abs=6e-4)  # 4 * 0.8**rounds + 1
    assert loss.label.endswith("finished rounds. run: 5 before training, 2.311 after 5 rounds.")
    sent = figure(found["Quality against traffic"], "Held-out loss (nats/label)")
    # Six clients: 0.24 MB up a round, 0.96 MB down from the second round on.
    assert sent.data[0]["x"] == pytest.approx([0, 2 * 0.24 + 0.96, 4 * 0.24 + 3 * 0.96, 5 * 0.24 + 4 * 0.96])
    assert sent.layout["xaxis"].get("type") is None
    assert not any(isinstance(part, Legend) for part in found["Quality over rounds"])


def test_bytes_under_way_at_the_end_are_in_the_last_point(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=2, clients=6))
    left = {"round": 2, "outcome": "unfinished", "uplink_bytes": 1e6, "downlink_bytes": 5e5}
    run = dataclasses.replace(run, timeline=pd.DataFrame([left]).reindex(columns=list(_COLUMNS["timeline"])))
    assert sent(run).tolist() == pytest.approx([0.24e6, 2 * 0.24e6 + 0.96e6 + 1.5e6])
    assert sent(dataclasses.replace(run, rounds=run.rounds[:0])).empty


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((), "6"),
        (("federation.sampled=3",), "6, 3 in a round"),
        (("federation.sampled=3", "federation.over_selection=1.5"), "6, 3 in a round of the 5 that begin it"),
        (
            ("federation.sampled=3", "federation.mode=async", "federation.asynchronous.buffer=2"),
            "6, 3 under way at a time",
        ),
    ],
)
def test_clients_at_a_time_are_told_as_the_mode_has_them(asked: tuple[str, ...], words: str, tmp_path: Path) -> None:
    devices = "devices.classes={a: {seconds_per_step: 1}}"
    (facts,) = report(read_run(write_run(tmp_path / "run", devices, *asked, diagnostics=False)))["Result"]
    assert isinstance(facts, Facts)
    assert facts.pairs["clients"] == words


def test_widely_spread_bytes_use_a_logarithmic_axis(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{clients}", clients=clients)) for clients in (2, 40)]
    found = report(*runs)["Quality against traffic"]
    assert found[0] == Legend(["2", "40"])
    sent = figure(found, "Held-out loss (nats/label)")
    assert sent.layout["xaxis"]["type"] == "log"
    assert [len(trace["x"]) for trace in sent.data] == [5, 5], "there is no place for 0 bytes"
    assert [trace["meta"] for trace in sent.data] == [0, 1]


def test_long_curves_are_thinned_and_keep_their_end_points(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=1000, clients=1, layers=1, every=1000))
    (trace,) = figure(report(run)["Quality over rounds"], "Training loss (nats/label)").data
    assert len(trace["x"]) == 300
    assert (trace["x"][0], trace["x"][-1]) == (1, 1000)


def test_axes_of_counts_repeat_no_number(tmp_path: Path) -> None:
    def axis(rounds: int) -> dict[str, Any]:
        run = read_run(write_run(tmp_path / f"{rounds}", rounds=rounds))
        return dict(figure(report(run)["Quality over rounds"], "Held-out loss (nats/label)").layout["xaxis"])

    assert axis(1)["dtick"] == axis(7)["dtick"] == 1
    assert "dtick" not in axis(8)


def test_classes_have_a_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    scores = pd.read_parquet(folder / "scores.parquet")
    rows = [{"rounds": at, "metric": "f1/cat", "value": value, "count": 9} for at, value in enumerate((0.1, 0.6, 0.5))]
    pd.concat([scores, pd.DataFrame(rows)]).to_parquet(folder / "scores.parquet")
    found = table(report(read_run(folder))["Quality over rounds"])
    assert found.rows == [["run", "cat", Cell("0.1", 0.1), Cell("0.5", 0.5), Cell("0.6", 0.6)]]


def test_published_scores_that_do_not_apply(tmp_path: Path) -> None:
    """The score over words of any script is shown where it differs; a missing published score is named."""
    folder = write_run(tmp_path / "run", rounds=2)
    scores = pd.read_parquet(folder / "scores.parquet")
    again = scores[scores["metric"] == "rouge_l"].assign(metric="rouge_l_unicode")

    def summary_and_titles(table: pd.DataFrame) -> tuple[dict[str, str], set[str]]:
        table.to_parquet(folder / "scores.parquet")
        found = report(read_run(folder))
        (facts,) = [part for part in found["Result"] if isinstance(part, Facts)]
        titles = {f"{part.title}" for part in found["Quality over rounds"] if isinstance(part, Figure)}
        return dict(facts.pairs), {title for title in titles if title.startswith("ROUGE")}

    published, unicode = "ROUGE-L of greedy answers", "ROUGE-L of greedy answers, words of any script"
    facts, titles = summary_and_titles(pd.concat([scores, again]))
    assert (published in facts, unicode in facts, titles) == (True, False, {published})
    facts, titles = summary_and_titles(pd.concat([scores, again.assign(value=0.5)]))
    assert (published in facts, unicode in facts, titles) == (True, True, {published, unicode})
    facts, titles = summary_and_titles(pd.concat([scores[scores["metric"] != "rouge_l"], again]))
    assert facts[published] == "none: its published tokenizer does not read the script"
    assert (unicode in facts, titles) == (True, {unicode})


# --- layers


def test_figures_of_layers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=3, clients=20, sampled=10, layers=4, every=3))
    found = figures(run)
    assert len(found) == 3 * 4
    # Eight measured clients of rank 4: 31 of 32 directions; the layer's own bound is 64.
    assert found["bound"].unique().tolist() == [8 * RANK]
    assert found["inflation"].unique().tolist() == pytest.approx([31 / 32])
    assert found["accumulated"].notna().sum() == 4  # after the last round
    energy = run.client_layers.groupby(["round", "layer"])["gradient_energy"].mean()
    first = found.iloc[1]
    assert first["gradient_energy"] == pytest.approx(energy[first["round"], first["layer"]])
    run.layers.loc[0, "full_rank"] = 16
    assert figures(run)["bound"].tolist()[:2] == [16, 32]


def test_heat_maps_of_layers(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, layers=4, rounds=rounds)) for name, rounds in (("a", 3), ("b", 4))]
    shown = next(section for section in sections(named(runs)) if section.title == "Ranks, drift and subspaces")
    details = [part for part in shown.parts if isinstance(part, Details)]
    assert [(one.title, one.opened) for one in details] == [("a, layer by layer", False), ("b, layer by layer", False)]
    maps = [figure(list(one.parts), "Client drift") for one in details]
    drift = runs[0].layers.pivot_table(index="layer", columns="round", values="drift", sort=False)
    assert maps[0].data[0]["x"] == [1, 2, 3]
    assert maps[0].data[0]["y"] == ["0.gate_proj", "0.up_proj", "0.down_proj", "1.gate_proj"]
    assert maps[0].data[0]["z"][3] == pytest.approx(drift.loc["model.layers.1.mlp.gate_proj"].tolist(), rel=1e-3)
    most = max(run.layers["drift"].max() for run in runs)
    ends = [(found.layout["coloraxis"]["cmin"], found.layout["coloraxis"]["cmax"]) for found in maps]
    assert ends == [(0, pytest.approx(most, rel=1e-3))] * 2, "the same colours in all runs"
    assert re.match(
        r"Client drift: heat map of 4 layers over rounds 1 to 3\. From [\d.]+ to [\d.]+, the highest in layer "
        r"\d\.\w+, round 3; in the last round from [\d.]+ to [\d.]+\.$",
        maps[0].label,
    )
    titles = {part.title for part in details[0].parts if isinstance(part, Figure)}
    assert titles == {quantity.title for quantity in QUANTITIES if quantity.mapped} | {"Spectrum of the aggregate"}


def test_many_layers_and_rounds_are_thinned(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", layers=90, rounds=100, clients=2))
    found = report(run)["Ranks, drift and subspaces"]
    assert Text("64 of 90 layers, evenly spaced.") in found
    drift = [part for part in found if isinstance(part, Figure) and part.title == "Client drift"][1].data[0]
    assert (len(drift["y"]), len(drift["x"])) == (64, 80)
    assert (drift["x"][0], drift["x"][-1], drift["y"][-1]) == (1, 100, "29.down_proj")


def test_dense_changes_have_no_ranks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", method="fedavg", rounds=1, clients=1, layers=1)
    layers = pd.read_parquet(folder / "layers.parquet")
    ranks = ["rank", "rank_sum", "stable_rank", "effective_rank", "truncated", "cross_term", "overlap", "agreement"]
    layers[ranks] = None
    layers["spectrum"] = [[] for _ in range(len(layers))]
    layers.to_parquet(folder / "layers.parquet")
    clients = pd.read_parquet(folder / "client_layers.parquet")
    clients[["turned", "gradient_energy", "gradient_rank"]] = None
    clients.to_parquet(folder / "client_layers.parquet")
    found = report(read_run(folder))["Ranks, drift and subspaces"]
    assert [part.title for part in found if isinstance(part, Figure)] == [
        *("Rank of the server's change", "Client drift", "Norm of the aggregate", "Accumulated change"),
        "Accumulated change against local steps",
        *("Client drift", "Accumulated change"),
    ]
    write_report([read_run(folder)], tmp_path / "report.html")


def test_accumulated_change_against_steps(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=4, every=2, skipped=((0, 1),)))
    moved = figure(report(run)["Ranks, drift and subspaces"], "Accumulated change against local steps").data[0]
    assert moved["x"] == [2 * STEPS, 4 * STEPS]
    assert moved["y"] == [0.02, 0.04]


def test_spectra_of_the_first_and_the_last_round(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", layers=5, clients=3, rounds=4))
    found = figure(report(run)["Ranks, drift and subspaces"], "Spectrum of the aggregate")
    names = [f"layer {layer}, round {n}" for layer in ("0.gate_proj", "0.down_proj", "1.up_proj") for n in (1, 4)]
    assert [trace["name"] for trace in found.data] == names
    assert found.data[0]["y"][:2] == [1, 0.7788]  # exp(-1/4)
    assert found.data[1]["y"][0] == 0.512  # 0.8**3
    assert [trace["line"]["dash"] for trace in found.data] == ["dot", "solid"] * 3


# --- clients


def test_each_client_has_totals_over_the_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=4, clients=3, skipped=((1, 2), (3, 2))))
    found = per_client(run)
    assert found["rounds"].tolist() == [4, 4, 2]
    assert found["skipped"].tolist() == [0, 0, 2]
    assert found["weight"].tolist() == [20, 21, 22]
    assert found["steps"].tolist() == [4 * STEPS, 4 * STEPS, 2 * STEPS]
    assert found["up"].tolist() == pytest.approx([0.16, 0.16, 0.08])
    rows = run.clients[run.clients["client"] == 2].set_index("round")
    assert found.loc[2, ["loss_first", "loss_last"]].tolist() == rows.loc[[0, 2], "loss"].tolist()
    last = run.scores[(run.scores["rounds"] == 4) & (run.scores["metric"] == "held_out_loss")].set_index("client")
    assert found["held_out_loss"].tolist() == last["value"].loc[[0, 1, 2]].tolist()
    assert found["cosine"].tolist() == run.client_layers.groupby("client")["cosine"].mean().tolist()
    shown = table(report(run)["Clients"])
    assert texts(shown, "client") == ["0", "1", "2"]
    assert texts(shown, "up (MB)") == ["0.16", "0.16", "0.08"]


def test_clients_that_were_dropped_have_rows_and_bytes(tmp_path: Path) -> None:
    """Client 0 counted once, in 3 of 4 MB; 7 never did; 8 is under way when the run ends."""
    rows = [(0, "counted", 1e6, 2e6), (0, "late", 0, 1e6), (7, "offline", 0, 5e5), (7, "stale", 1e6, 2e6)]
    rows += [(8, "unfinished", 0, 1e6)]
    columns = ["client", "outcome", "uplink_bytes", "downlink_bytes"]
    asked = ("federation.mode=async", "federation.asynchronous.buffer=1", "devices.classes={a: {seconds_per_step: 1}}")
    one = read_run(write_run(tmp_path / "run", *asked, clients=9, sampled=1, rounds=1, diagnostics=False))
    timeline = pd.DataFrame(rows, columns=columns).reindex(columns=list(_COLUMNS["timeline"]))
    run = dataclasses.replace(one, clients=one.clients.assign(client=0), timeline=timeline)
    found = per_client(run)
    assert found.index.tolist() == [0, 7, 8]
    assert found[["rounds", "dropped", "up", "down"]].to_numpy().tolist() == [
        [1, 1, 1, 3],
        [0, 2, 1, 2.5],
        [0, 0, 0, 1],
    ]
    assert found.loc[7, "held_out_loss"] == run.of_clients.loc[7, "held_out_loss"]
    assert "discounted by its staleness" in clients_table(run).caption
    everybody = dataclasses.replace(run, clients=run.clients[:0], timeline=timeline[timeline["client"] == 7])
    assert per_client(everybody)[["rounds", "dropped"]].to_numpy().tolist() == [[0, 2]]
    section = clients({"run": everybody})
    assert section is not None
    assert [part.title for part in section.parts if isinstance(part, Details)] == ["1 client"]


def test_spread_of_client_scores(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", clients=5))
    found = report(run)["Clients"]
    unequal = figure(found, "Held-out loss (nats/label) of clients, best to worst").data[0]
    assert unequal["x"] == [0, 25, 50, 75, 100]
    assert unequal["y"] == sorted(unequal["y"])
    band, middle = figure(found, "Training loss of clients (nats/label)").data
    losses = run.clients[run.clients["round"] == 0]["loss"]
    assert middle["y"][0] == pytest.approx(losses.median(), rel=1e-3)
    assert (band["y"][0], band["y"][-1]) == pytest.approx((losses.quantile(0.9), losses.quantile(0.1)), rel=1e-3)


def test_class_that_never_took_part_is_told_with_its_scores(tmp_path: Path) -> None:
    classes = "devices.classes={fast: {seconds_per_step: 1}, slow: {seconds_per_step: 9, hours: [[12, 13]]}}"
    one = read_run(write_run(tmp_path / "run", classes, clients=4))
    fleet = fleet_of(one.config)
    assert fleet is not None
    slow = [client for client in range(4) if fleet.name_of(client) == "slow"]
    row = {"round": 0, "version": 0, "client": ({*range(4)} - {*slow}).pop(), "device": "fast", "outcome": "counted"}
    numbers = dict.fromkeys(_COLUMNS["timeline"], 1.0)
    run = dataclasses.replace(one, timeline=pd.DataFrame([{**numbers, **row}]))
    section = simulated_time({"run": run})
    assert section is not None
    (found,) = (part for part in section.parts if isinstance(part, Table) and part.columns[1] == "devices")
    assert texts(found, "devices") == ["fast", "slow"]
    assert (texts(found, "clients"), texts(found, "of all updates (%)")) == (["1", "0"], ["100", "0"])
    assert texts(found, "rounds that counted (%)") == ["100", "0"]
    assert found.rows[1][found.columns.index("held-out loss")] == cell(run.of_clients.loc[slow, "held_out_loss"].mean())
    assert told(run)["classes"]["slow"]["participation"] == 0
    few = run.config.devices.model_copy(update={"shares": {"fast": 1.0, "slow": 1e-9}})  # by rounding no client
    assert told(dataclasses.replace(run, config=run.config.model_copy(update={"devices": few})))["classes"]["slow"]
    devices = run.config.devices.model_copy(update={"trace": "gone.csv"})
    traced = dataclasses.replace(run, config=run.config.model_copy(update={"devices": devices}))
    section = simulated_time({"run": traced})
    assert section is not None
    (found,) = (part for part in section.parts if isinstance(part, Table) and part.columns[1] == "devices")
    assert (texts(found, "devices"), texts(found, "held-out loss")[1]) == (["fast", "slow"], "-")


# --- workers, memory, failures


def test_sessions_are_side_by_side_on_the_timeline(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", clients=8, rounds=4, resumed=(2,)))
    packs = clocked(run)
    assert packs["began"].min() == 0
    first, second = packs[packs["round"] < 2], packs[packs["round"] >= 2]
    assert second["began"].min() == pytest.approx((first["began"] + first["seconds"]).max()), "an hour lay between"
    shown = figure(report(run)["Workers"], "Packs by worker")
    assert sum(len(trace["x"]) for trace in shown.data) == 4 * 2  # two packs of four clients a round
    assert shown.label.startswith("Timeline of workers: 8 packs on 2 workers in ")
    assert set(shown.data[0]["y"]) == {"worker 0", "worker 1"}
    assert shown.data[0]["hovertext"][0].startswith("round 2<br>4 clients from client 0<br>")


@pytest.mark.parametrize(
    ("most", "number", "what"),
    [
        (60, 60, "a pack of clients"),
        (59, 20, "a worker's packs of one round"),  # 10 rounds of 2 workers
        (19, 10, "a worker's packs of 2 rounds"),
    ],
)
def test_many_packs_are_drawn_together(tmp_path: Path, most: int, number: int, what: str) -> None:
    run = read_run(write_run(tmp_path / "run", clients=24, rounds=10))  # 6 packs a round
    drawn, note = bars(clocked(run), most)
    assert (len(drawn), note) == (number, what)
    assert drawn["clients"].sum() == 240
    assert drawn["packs"].sum() == 60


def test_failures_and_retries(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", clients=8, skipped=((2, 3),), again=((1, 1),), resumed=(2,)))
    found = report(run)
    summary, rows = found["Failures and retries"]
    assert summary == Text("run: 1 result made again.")
    assert rows.rows == [
        [Cell("2", 2.0), "pack again", "pack 1, worker 1", Cell("2", 2.0), "worker 1 died"],
        [Cell("3", 3.0), "client skipped", "client 3", Cell("-", None), FAILURE],
        [Cell("3", 3.0), "run taken up again", "", Cell("-", None), ""],
    ]
    shown = figure(found["Workers"], "Packs by worker")
    assert shown.data[-1]["hovertext"] == ["round 2, pack 1: 2 attempts<br>worker 1 died"]
    assert shown.label.endswith("1 pack had to be trained again.")
    assert "Failures and retries" not in report(read_run(write_run(tmp_path / "well")))


def test_measured_memory_is_shown_beside_the_plan(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=3))
    shown, rows = report(run)["Memory"]
    assert [trace["y"] for trace in shown.data] == [[800, 801, 802], [900, 900]]
    assert shown.label.endswith("run: at most 802 MB of 900 planned.")
    assert rows.rows == [["run", Cell("900", 900.0), Cell("1,000", 1000.0), Cell("111.1", pytest.approx(1000 / 9))]]


def test_workers_on_gpus_are_shown_beside_the_plan(tmp_path: Path) -> None:
    """A row a worker, of 3,000 MB planned: 2,400 allocated are 80 %."""
    folder = write_run(tmp_path / "run", rounds=3)
    summary = json.loads((folder / "summary.json").read_text())
    workers = {f"node {pid}": {"allocated": 2_400_000_000, "reserved": 2_500_000_000} for pid in (11, 12)}
    (folder / "summary.json").write_text(
        json.dumps(summary | {"gpu_memory": workers, "planned_gpu_bytes": 3_000_000_000})
    )
    *_, rows = report(read_run(folder))["Memory"]
    shown = ["3,000", "2,400", "2,500", "80"]
    assert [row[:2] for row in rows.rows] == [["run", "node 11"], ["run", "node 12"]]
    assert [cell.text for cell in rows.rows[0][2:]] == shown


# --- the file


def test_text_is_never_markup(tmp_path: Path) -> None:
    nasty = "</script><b>\"'&$x$ <img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / "run", f"task.prompt={json.dumps(nasty)}", skipped=((1, 1),), again=((1, 0),))
    for name, column in (("clients", "failure"), ("packs", "trouble"), ("layers", "layer"), ("client_layers", "layer")):
        frame = pd.read_parquet(folder / f"{name}.parquet")
        frame[column] = frame[column].where(frame[column].isna(), nasty)
        frame.to_parquet(folder / f"{name}.parquet")
    path = tmp_path / "report.html"
    write_report([read_run(folder)], path)
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert {tag for tag, _ in outline.found} & {"b", "img"} == set()
    assert outline.texts.count(nasty) >= 3  # the setting, two causes
    drawn = [json.loads(found) for found in re.findall(r"<script type='application/json'>(.*?)</script>", text)]
    assert "<b>" not in json.dumps(drawn)


def test_plotly_knows_every_property(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    def coloured(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "black" if key.endswith("color") and isinstance(own, str) else coloured(own)
                for key, own in value.items()
            }
        return [coloured(own) for own in value] if isinstance(value, list) else value

    run = read_run(write_run(tmp_path / "run", rounds=3, again=((1, 0),)))
    drawn = [part for found in report(run).values() for part in found if isinstance(part, Figure)]
    maps = sum(quantity.mapped for quantity in QUANTITIES)
    assert len(drawn) == len(QUANTITIES) + maps + 2 + 4 + 3 + 2 + 1 + 1  # steps, spectrum; scores; bytes; clients; ...
    for one in drawn:
        go.Figure([coloured(trace) for trace in one.data], coloured(one.layout))
        assert re.search(r"\d", one.label), "a label describes the figure, with numbers"


def test_file_is_complete_or_absent(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^--out: got .*no/report.html.*No such file"):
        write_report([run], tmp_path / "no" / "report.html")
    path = tmp_path / "report.html"
    path.mkdir()
    with pytest.raises(UserError, match="--out"):
        write_report([run], path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["report.html", "run"]


@pytest.mark.slow
def test_many_runs_stay_small(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{at}", layers=30, rounds=40, seed=at)) for at in range(8)]
    path = tmp_path / "report.html"
    write_report(runs, path)
    assert path.stat().st_size < 10_000_000
    found = {section.title: section for section in sections(named(runs))}
    layers = found["Ranks, drift and subspaces"]
    assert sum(isinstance(part, Details) for part in layers.parts) == 6
    assert "Layer by layer only for the first 6 runs." in layers.parts[0].text
    assert len(figure(list(layers.parts), "Client drift").data) == 8


@pytest.mark.parametrize(("rounds", "sampled"), [(100, 100), (10, None)])
def test_ten_thousand_clients_stay_small(tmp_path: Path, rounds: int, sampled: int | None) -> None:
    folder = write_run(tmp_path / "run", clients=10_000, sampled=sampled, rounds=rounds, layers=30, every=rounds)
    path = tmp_path / "report.html"
    write_report([read_run(folder)], path)
    assert path.stat().st_size < 10_000_000


def test_title_names_the_runs(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{at}", "name=study", seed=at, layers=1, rounds=1)) for at in range(5)]
    others = [read_run(write_run(tmp_path / name, layers=1, rounds=1)) for name in ("a", "b")]
    found = []
    for several in (runs, runs[:2], others, others[:1]):
        write_report(several, tmp_path / "report.html")
        found += re.findall("<h1>(.*)</h1>", (tmp_path / "report.html").read_text())
    assert found == ["study: 5 runs", "study: 2 runs, 0, 1", "2 runs, a, b", "a: fedit"]
