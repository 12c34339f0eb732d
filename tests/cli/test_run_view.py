"""Terminal output of a run: a live line in a terminal, plain lines elsewhere; the final table; the listings; --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text

from rayfed_sub.cli import main, run_view
from rayfed_sub.cli.retime_view import target_of
from rayfed_sub.cli.run_view import Display, print_table
from rayfed_sub.config.loading import load_config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.schemas import RoundRow, Score
from rayfed_sub.reports.run_reader import Run
from rayfed_sub.telemetry.events import PackDone, RoundDone, Stage, Started, Summary

CONFIG = load_config(
    {
        "name": "look",
        "federation": {"clients": 100, "sampled": 8, "rounds": 5},
        "method": {"name": "fedftg", "rank": 4},
    }
)
SHA = "0123456789abcdef" * 4
SUMMARY = Summary(
    name="look",
    method="fedftg",
    rounds=5,
    weights_sha256=SHA,
    uplink_bytes=2_000_000,
    downlink_bytes=50_000_000,
    dense_bytes=25_000_000,
    dense_downlink_bytes=20_000_000,
    change_rank=32.0,
    wall_seconds=61.04,
    train_seconds=42.25,
    peak_memory_bytes=1_234_567_890,
    metrics={"held_out_loss_before": 4.0, "held_out_loss": 3.25, "rouge_l_before": 0.1, "rouge_l": 0.234, "x": 1.0},
    versions={},
    environment={},
    folder="runs/[look]",
)


SCORE = "token_accuracy"
BEFORE = {"held_out_loss": 4.0, SCORE: 0.125}


class Clock:
    """Stand-in for the time module that advances only on request."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_view, "time", clock)
    return clock


def console(terminal: bool, width: int = 120) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, force_terminal=terminal, width=width, legacy_windows=False), text


def pack(n: int, done: int) -> PackDone:
    """Every client has 1500 labels and uploads 25 kB; a round of 8 takes 4 s."""
    return PackDone(n, done, 8, loss=2.5, labels=1500 * done, seconds=done / 2, uplink_bytes=25_000 * done)


def round_done(n: int, held_out: float | None = 3.5, loss: float | None = 2.5) -> RoundDone:
    row = RoundRow(
        round=n,
        clients=8,
        failed=0,
        loss=loss,
        held_out_loss=held_out,
        uplink_bytes=200_000,
        downlink_bytes=1_600_000,
        labels=12_000,
        change_rank=32.0,
        epsilon=None,
        train_seconds=4.0,
        seconds=5.0,
    )
    scores = [] if held_out is None else [Score(None, "held_out_loss", held_out, 9), Score(None, SCORE, 0.25, 9)]
    return RoundDone(row, (), (*scores, *(Score(3, score.metric, 9.9, 1) for score in scores)))


def plain(text: str) -> str:
    """Terminal output without its escape codes."""
    return Text.from_ansi(text).plain


def test_live_line_shows_the_run_s_progress(clock: Clock) -> None:
    terminal, text = console(terminal=True)
    with Display(terminal) as shown:
        shown.show(Stage("reading task and model"))
        shown.show(Started(CONFIG, "runs/look", BEFORE, 10**6))
        clock.now += 4
        shown.show(pack(0, 8))
        clock.now += 1
        shown.show(round_done(0))
        clock.now += 2
        text.seek(0)
        text.truncate()
        shown.show(pack(1, 4))
        shown._bar.refresh()
    line = plain(text.getvalue())
    assert "round 2/5  clients 4/8" in line
    assert "loss 2.500" in line
    assert "3,000 tokens/s" in line  # 4 * 1500 labels in 2 s
    assert "up 300.0 kB" in line  # 200 kB in round 1, and 4 * 25 kB
    assert "0:16 left" in line  # one and a half rounds in 7 s, so three and a half more take 7 / 1.5 * 3.5 = 16.3 s


@pytest.mark.parametrize("width", [50, 80, 100])
def test_live_line_stays_one_line(width: int) -> None:
    """Large numbers of a long run are cut, not folded."""
    terminal, text = console(terminal=True, width=width)
    with Display(terminal) as shown:
        shown.show(Started(CONFIG, "runs/look", BEFORE, 10**6))
        shown.show(PackDone(4, 8, 8, loss=12.345, labels=999_999, seconds=1.0, uplink_bytes=987_654_321))
        text.seek(0)
        text.truncate()
        shown._bar.refresh()
        drawn = plain(text.getvalue()).rstrip("\n")
    assert "round 5/5" in drawn
    assert all(len(line) <= width for line in drawn.splitlines())
    assert len([line for line in drawn.splitlines() if line.strip()]) == 1


def test_no_time_is_left_to_tell_before_a_client_is_done(clock: Clock) -> None:
    terminal, text = console(terminal=True)
    with Display(terminal) as shown:
        shown.show(Started(CONFIG, "runs/look", BEFORE, 10**6))
        shown.show(PackDone(0, 0, 8, loss=None, labels=0, seconds=1.0, uplink_bytes=0))
        shown._bar.refresh()
    line = plain(text.getvalue())
    assert "clients 0/8" in line
    assert "left" not in line.rpartition("clients")[2]


def test_time_left_of_a_resumed_run_ignores_earlier_rounds(clock: Clock) -> None:
    terminal, text = console(terminal=True)
    with Display(terminal) as shown:
        shown.show(Started(CONFIG, "runs/look", BEFORE, 10**6, round=3))
        clock.now += 10
        shown.show(pack(3, 8))
        shown._bar.refresh()
    # Of rounds 4 and 5 the first took 10 s; counted from round 1, only 2.5 s would seem to be left.
    assert "0:10 left" in plain(text.getvalue())


def test_each_round_is_one_plain_line_without_a_terminal(clock: Clock) -> None:
    pipe, text = console(terminal=False, width=40)
    with Display(pipe) as shown:
        shown.show(Stage("reading task and model"))
        shown.show(Started(CONFIG, "runs/[look]", BEFORE, 10**6))
        for n in range(2):
            clock.now += 4
            shown.show(pack(n, 4))
            shown.show(pack(n, 8))
            clock.now += 1
            shown.show(round_done(n, held_out=None if n else 3.5))
        clock.now += 5
        shown.show(round_done(2, loss=None))  # nobody took part
    assert text.getvalue().splitlines() == [
        "reading task and model",
        "look: fedftg, 5 rounds of 4 local steps, 8 of 100 clients each; into runs/[look]",
        "  round    loss  held-out  accuracy tokens/s       up     down    time    left",
        " before             4.000     0.125",
        "    1/5   2.500     3.500     0.250    3,000 200.0 kB   1.6 MB   5.0 s    0:20",  # 5 s each, four more
        "    2/5   2.500                        3,000 200.0 kB   1.6 MB   5.0 s    0:15",
        "    3/5       -     3.500     0.250    3,000 200.0 kB   1.6 MB   5.0 s    0:10",
    ]


@pytest.mark.parametrize(
    ("rounds", "last"), [(5, "    5/5"), (999, "999/999"), (1000, "1000/1000"), (20_000, "  20000")]
)
def test_columns_of_rounds_stay_below_their_heads(rounds: int, last: str, clock: Clock) -> None:
    """In 80 characters at most, from the first round to the last one of any number."""
    pipe, text = console(terminal=False)
    with Display(pipe) as shown:
        federation = CONFIG.federation.model_copy(update={"rounds": rounds})
        shown.show(Started(CONFIG.model_copy(update={"federation": federation}), "runs/look", BEFORE, 10**6))
        for n in (0, rounds - 1):
            done = round_done(n)
            shown.show(replace(done, row=replace(done.row, seconds=5000.0)))
    _, head, before, *lines = text.getvalue().splitlines()
    assert lines[1].startswith(f"{last}   2.500     3.500     0.250    3,000 200.0 kB   1.6 MB 1:23:20 ")
    assert len({line.index(" 3.500") for line in lines} | {before.index(" 4.000"), head.index("held-out") + 2}) == 1
    assert len({*map(len, lines), len(head)}) == 1
    assert len(head) <= 80


@pytest.mark.parametrize(("rule", "updates"), [({"buffer": 3}, "3 updates"), ({"rule": "fedasync"}, "1 update")])
def test_asynchronous_run_begins_with_what_its_rounds_are(rule: dict[str, Any], updates: str) -> None:
    pipe, text = console(terminal=False)
    asynchronous = CONFIG.federation.asynchronous.model_copy(update=rule)
    federation = CONFIG.federation.model_copy(update={"mode": "async", "asynchronous": asynchronous})
    with Display(pipe) as shown:
        shown.show(Started(CONFIG.model_copy(update={"federation": federation}), "runs/look", BEFORE, 10**6))
    rounds = f"5 rounds with {updates} of 4 local steps each, 8 of 100 clients under way at a time"
    assert text.getvalue().splitlines()[0] == f"look: fedftg, {rounds}; into runs/look"


def test_rounds_stay_above_the_live_line_in_a_terminal_too(clock: Clock) -> None:
    terminal, text = console(terminal=True)
    with Display(terminal) as shown:
        shown.show(Started(CONFIG, "runs/look", BEFORE, 10**6))
        clock.now += 5
        shown.show(pack(0, 8))
        shown.show(round_done(0))
    assert "    1/5   2.500     3.500     0.250    3,000 200.0 kB   1.6 MB   5.0 s    0:20\n" in plain(text.getvalue())


def test_classifier_shows_macro_f1_and_row_counts() -> None:
    pipe, text = console(terminal=False)
    with Display(pipe) as shown:
        shown.show(
            Started(
                CONFIG,
                "runs/look",
                {"held_out_loss": 1.4, "accuracy": 0.5, "macro_f1": 0.3},
                10**6,
                0,
                "classification",
            )
        )
    title, before = text.getvalue().splitlines()[-2:]
    assert (title.split()[3:6], before.split()) == (["macro", "F1", "rows/s"], ["before", "1.400", "0.300"])


@pytest.mark.parametrize(("measure", "shown"), [("accuracy", "0.500"), ("mean_absolute_error", "")])
def test_measure_of_the_caller_s_own_makes_no_run_of_labels(measure: str, shown: str) -> None:
    """Its names may be those of a task's scores, of which others are then not missing."""
    pipe, text = console(terminal=False)
    metrics = {"held_out_loss": 1.4, measure: 0.5}
    with Display(pipe) as display:
        display.show(Started(CONFIG, "runs/look", metrics, 10**6, 0, "own"))
    title, before = text.getvalue().splitlines()[-2:]
    assert (title.split()[3], before.split()) == ("accuracy", ["before", "1.400", *shown.split()])
    both = {f"{name}{end}": value for name, value in metrics.items() for end in ("_before", "")}
    display.table(Summary(**{**vars(SUMMARY), "metrics": both}))
    assert "undefined" not in text.getvalue()
    assert "0.5000 -> 0.5000" in text.getvalue()


def test_the_final_table(clock: Clock) -> None:
    pipe, text = console(terminal=False, width=40)
    Display(pipe).table(SUMMARY)
    output = text.getvalue()
    for row in (
        ("look: fedftg", "5 rounds"),
        ("held-out loss (nats/label)", "4.0000 -> 3.2500"),
        ("ROUGE-L of greedy answers", "0.1000 -> 0.2340"),
        ("sent up, all clients", "2.0 MB, 12.5x less than 25.0 MB of dense FedAvg"),  # 25 / 2
        ("sent down, all clients", "50.0 MB, 2.5x 20.0 MB of dense FedAvg"),
        ("rank of the last change", "32 (median over target layers)"),
        ("seconds", "61.0 in all, 42.2 training"),
        ("peak memory, all processes", "1.2 GB"),
        ("weights_sha256", SHA),
        ("run folder", "runs/[look]"),
    ):
        line = next(line for line in output.splitlines() if row[0] in line)
        cells = [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]
        assert tuple(cells) == row


def test_seconds_of_a_run_that_went_on() -> None:
    """Those of this sitting, beside the training of all rounds."""
    pipe, text = console(terminal=False, width=60)
    Display(pipe).table(replace(SUMMARY, resumed=(2,)))
    assert "61.0 since it went on; 42.2 training of all rounds" in text.getvalue()


def test_scores_of_a_bfloat16_model_are_labelled() -> None:
    for precision, marked in (("bfloat16", True), ("float32", False)):
        pipe, text = console(terminal=False)
        Display(pipe).table(Summary(**{**vars(SUMMARY), "precision": precision}))
        assert ("the bfloat16 model" in text.getvalue()) == marked


def test_table_shows_the_available_scores() -> None:
    pipe, text = console(terminal=False)
    metrics = {"accuracy_before": 0.25, "accuracy": 0.5, "macro_f1_before": 0.2, "macro_f1": 0.75}
    Display(pipe).table(Summary(**{**vars(SUMMARY), "metrics": metrics, "downlink_bytes": 0}))
    output = text.getvalue()
    assert all(cell in output for cell in ("macro F1", "0.2000 -> 0.7500", "0.2500 -> 0.5000"))
    assert "ROUGE-L" not in output
    assert "nothing, against 20.0 MB of dense FedAvg" in output


def test_table_names_published_scores_that_do_not_apply() -> None:
    """rouge-score reads nothing of Chinese answers; on English ones both scores are equal and shown once."""
    pipe, text = console(terminal=False)
    chinese = {"rouge_l_unicode_before": 0.25, "rouge_l_unicode": 0.5}
    english = {"bleu_4_before": 0.1, "bleu_4": 0.2, "bleu_4_unicode_before": 0.1, "bleu_4_unicode": 0.2}
    Display(pipe).table(Summary(**{**vars(SUMMARY), "metrics": chinese | english}))
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.getvalue().splitlines()]
    assert [line for line in lines if line[0].startswith(("ROUGE", "BLEU"))] == [
        ["ROUGE-L of greedy answers", "none: its published tokenizer does not read the script"],
        ["ROUGE-L of greedy answers, words of any script", "0.2500 -> 0.5000"],
        ["BLEU-4 of greedy answers", "0.1000 -> 0.2000"],
    ]


def test_unmeasured_rank_is_not_a_number(clock: Clock) -> None:
    pipe, text = console(terminal=False)
    Display(pipe).table(Summary(**{**vars(SUMMARY), "change_rank": None}))
    (line,) = (line for line in text.getvalue().splitlines() if "rank of the last change" in line)
    assert "not looked at" in line


def test_checksum_fits_one_line_at_100_columns() -> None:
    terminal, text = console(terminal=True, width=100)
    Display(terminal).table(SUMMARY)
    lines = plain(text.getvalue()).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if SHA in line]


def test_checksum_is_folded_but_complete_at_60_columns() -> None:
    terminal, text = console(terminal=True, width=60)
    Display(terminal).table(SUMMARY)
    lines = plain(text.getvalue()).splitlines()
    right = [line.split("│")[2].strip() for line in lines if line.count("│") == 3]
    assert max(map(len, lines)) <= 60
    assert SHA in "".join(right)


def test_cells_are_shown_verbatim() -> None:
    pipe, text = console(terminal=False)
    print_table(("a", "[b]"), [(True, "[red]x[/]"), (False, ":cat:")], pipe)
    output = text.getvalue()
    assert all(cell in output for cell in ("[b]", "yes", "no", "[red]x[/]", ":cat:"))


# Listings


def listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", "list", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_methods_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = json.loads(listed(capsys, monkeypatch, "methods", "--json"))
    methods = {row.pop("name"): row for row in rows}
    assert {"fedftg", "fedavg", "fedit", "ffa-lora"} <= set(methods)
    assert methods["fedavg"] == {
        "paper": "arXiv 1602.05629",
        "trained": "the dense target weights",
        "exact": True,
        "wire": "m n / m n",
        "as published": "local AdamW in place of SGD: what FedFTG's release runs",
        "family": "dense weights; averaged: these",
    }


@pytest.mark.parametrize(
    ("what", "name", "rest"),
    [
        ("methods", "fedit", "LoRA's A and B"),
        ("tasks", "table", "hub id, file, folder or glob"),
        ("models", "gpt2", "openai-community/gpt2"),
    ],
)
def test_listings(
    what: str, name: str, rest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each without a terminal, so that `rayfed-sub list models | grep gpt2` works."""
    output = listed(capsys, monkeypatch, what)
    assert [line for line in output.splitlines() if f"│ {name} " in line and rest in line]


# --help


def test_help_is_fast() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "rayfed_sub.cli.main", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "export", "list"))
    assert time.perf_counter() - began < 2  # about 0.6 s; torch or ray alone would take longer


def test_table_counts_cut_and_dropped_rows() -> None:
    counts = {"read": 120, "strange": 0, "capped": 0, "silent": 0, "dropped": 3, "repeated": 0, "train": 107}
    counts |= {"validation": 0, "held_out": 10, "cut": 40, "cut_prompts": 15, "cut_answers": 30}
    for dropped, expected in ((3, "40 cut (15 in the text, 30 in the answer), 3 dropped"), (0, "30 in the answer) ")):
        pipe, text = console(terminal=False)
        Display(pipe).table(Summary(**{**vars(SUMMARY), "rows": {**counts, "dropped": dropped}}))
        (line,) = (line for line in text.getvalue().splitlines() if "rows beyond task.max_length" in line)
        assert expected in line
    pipe, text = console(terminal=False)
    Display(pipe).table(Summary(**{**vars(SUMMARY), "rows": {**counts, "dropped": 0, "cut": 0}}))
    assert "task.max_length" not in text.getvalue()


def test_target_names_a_score_that_the_run_has() -> None:
    of = {"held_out_loss": pd.Series([3.0], index=[1]), "rouge_l": pd.Series([], dtype="float64")}
    assert target_of(cast(Run, SimpleNamespace(overall=of)), "held_out_loss=2") == ("held_out_loss", 2.0)
    for text in ("rouge_l=0.5", "held_out_loss", "held_out_loss=inf"):
        fault = f"--target: got '{text}'; allowed: a score of the run and its value: held_out_loss;"
        with pytest.raises(UserError, match=fault):
            target_of(cast(Run, SimpleNamespace(overall=of)), text)
    with pytest.raises(UserError, match="--target: got 'x=1'; allowed: nothing with runs/a, which has no scores"):
        target_of(cast(Run, SimpleNamespace(overall={"rouge_l": of["rouge_l"]}, folder=Path("runs/a"))), "x=1")
