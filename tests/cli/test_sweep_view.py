"""Terminal output of a sweep."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text

from rayfed_sub.cli import sweep_view
from rayfed_sub.cli.sweep_view import SweepDisplay
from rayfed_sub.sweeps.progress import Begun, TrialNow
from rayfed_sub.sweeps.results import format_value, headings
from rayfed_sub.telemetry.events import Notice, Stage

KEYS = ("federation.local_steps", "method.rank", "optimizer.lr")


class Clock:
    """Stand-in for the time module that advances only on request."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sweep_view, "time", clock)
    return clock


def trial(number: int, status: str, round: int = 4, metric: float | None = None, **changed: Any) -> TrialNow:
    values = dict(zip(KEYS, (2, 8, 0.001), strict=True))
    return TrialNow(number, values, status, round, 4, metric, seconds=10.0 * round, **changed)


def shown(
    trials: list[TrialNow], terminal: bool = True, width: int = 100, height: int = 24, mode: str = "min"
) -> tuple[SweepDisplay, StringIO]:
    """A display of a sweep of 10 trials after these records."""
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, height=height, legacy_windows=False)
    display = SweepDisplay(console)
    display.show(Begun("look", KEYS, "held_out_loss", mode, total=10, at_once=2, folder="runs/[look]"))
    for now in trials:
        display.show(now)
    return display, text


def screen(display: SweepDisplay) -> list[str]:
    """The current lines of the live table."""
    console = Console(file=StringIO(), width=display._console.width, height=display._console.height)
    console.print(display._drawn())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def numbers(lines: list[str]) -> list[int]:
    """The trial numbers in the table's lines, from top to bottom."""
    return [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]


def test_running_trials_come_first_then_the_best() -> None:
    trials = [
        trial(0, "waiting", 0),
        trial(1, "failed", metric=0.5, failure="loss is NaN"),
        trial(2, "stopped", 1, 2.0),
        trial(3, "finished", metric=3.5),
        trial(4, "running", 3, 1.5),
        trial(5, "finished", metric=2.5),
        trial(6, "running", 0),
    ]
    display, _ = shown(trials)
    lines = screen(display)
    assert numbers(lines[2:-1]) == [4, 6, 5, 3, 2, 1, 0]
    assert lines[0].split() == ["trial", "local_steps", "rank", "lr", "status", "round", "held_out_loss", "time"]
    # The best so far is a finished trial: running and failed ones may still change.
    assert [line.split() for line in lines if "*" in line] == [
        ["5", "2", "8", "1e-3", "finished", "4/4", "2.5000", "*", "0:40"]
    ]
    assert lines[-1].startswith("4/10 done  2 running  1 failed  best 2.5000 (trial 5)")


def test_trial_without_a_known_length() -> None:
    begun = TrialNow(0, dict.fromkeys(KEYS, 1), "running", round=0, rounds=0, metric=None, seconds=0.0)
    display, _ = shown([begun])
    assert "running      -" in "\n".join(screen(display))


def test_higher_metric_can_be_better() -> None:
    display, _ = shown([trial(0, "finished", metric=0.25), trial(1, "finished", metric=0.75)], mode="max")
    assert numbers(screen(display)[2:-1]) == [1, 0]
    assert "best 0.7500 (trial 1)" in screen(display)[-1]


def test_table_fits_the_screen_height() -> None:
    display, _ = shown([trial(number, "finished", metric=float(number)) for number in range(9)], height=10)
    lines = screen(display)
    # 10 lines less the 5 without a trial.
    assert numbers(lines[2:7]) == [0, 1, 2, 3, 4]
    assert lines[7] == "and 4 more"
    assert len(lines) == 9


@pytest.mark.parametrize("width", [60, 80, 140])
def test_numbers_are_whole_at_any_width(width: int) -> None:
    display, _ = shown([trial(0, "finished", metric=2.5)], width=width)
    lines = screen(display)
    assert max(map(len, lines)) <= width
    assert lines[2].split() == ["0", "2", "8", "1e-3", "finished", "4/4", "2.5000", "*", "0:40"]


def test_time_left_uses_this_session_alone(clock: Clock) -> None:
    # Three of ten trials were finished before and took no time in this session.
    display, _ = shown([trial(number, "finished", metric=3.0) for number in range(3)])
    assert "left" not in screen(display)[-1]
    display.show(trial(3, "running", 0))
    clock.now += 30
    display.show(trial(3, "running", 2, 2.5))
    # Half a trial in 30 s; 6.5 trials are left, 390 s.
    assert screen(display)[-1].endswith("6:30 left")
    assert screen(display)[2].endswith("0:20")
    clock.now += 5
    assert screen(display)[2].endswith("0:25"), "the time of a running trial advances between its rounds"


def test_failures_remain_in_the_terminal() -> None:
    retried = trial(1, "retried", 0, failure="node lost")
    failed = trial(1, "failed", 2, failure="[round 2] loss is NaN")
    _, text = shown([trial(1, "running", 1), retried, retried, failed, failed])
    lines = Text.from_ansi(text.getvalue()).plain.splitlines()
    assert lines[1:] == ["trial 1 runs again: node lost", "trial 1 failed: [round 2] loss is NaN"]


def test_each_ended_trial_is_one_line_without_a_terminal() -> None:
    trials = [
        trial(0, "running", 1, 4.0),
        trial(0, "finished", metric=3.0),
        trial(1, "stopped", 2, 2.0),
        trial(2, "failed", 1, failure="round 1, client 3, training: loss is NaN"),
        trial(3, "finished", metric=2.5),
    ]
    display, text = shown(trials, terminal=False)
    display.show(Notice("interrupted"))
    display.show(Stage("writing the report"))
    values = "local_steps=2 rank=8 lr=1e-3"
    assert text.getvalue().splitlines() == [
        "look: 10 trials over local_steps, rank, lr, 2 at once, by held_out_loss (lower is better); into runs/[look]",
        f"1/10  trial 0  {values}  finished  round 4/4  held_out_loss 3.0000 (best so far)  0:40",
        f"2/10  trial 1  {values}  stopped  round 2/4  held_out_loss 2.0000  0:20",
        f"3/10  trial 2  {values}  failed: round 1, client 3, training: loss is NaN  round 1/4  0:10",
        f"4/10  trial 3  {values}  finished  round 4/4  held_out_loss 2.5000 (best so far)  0:40",
        "interrupted",
        "writing the report",
    ]


def test_the_live_table_leaves_nothing_behind() -> None:
    text = StringIO()
    with SweepDisplay(Console(file=text, force_terminal=True, width=100, height=24)) as display:
        display.show(Begun("look", KEYS, "held_out_loss", "min", 1, 1, "runs/look"))
        display.show(trial(0, "finished", metric=2.5))
    assert "held_out_loss" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K"), "the table's lines are erased last"


FRAME = pd.DataFrame(
    {
        "trial": range(24),
        "federation.local_steps": 2,
        "method.rank": 8,
        "optimizer.lr": 0.001,
        "status": ["failed", "stopped", *["finished"] * 22],
        "rounds": [0, 2, *[4] * 22],
        "held_out_loss": [None, 1.0, *(5.0 - 0.1 * number for number in range(22))],
        "uplink_bytes": 1_000_000,
        "downlink_bytes": 2_000_000,
    }
)


def test_the_final_table() -> None:
    display, text = shown([], terminal=False)
    display.table(FRAME, best=23)
    lines = text.getvalue().splitlines()[1:]
    # Trials 2 to 23 have finished with 5.0 down to 2.9: the best 20 of them.
    assert numbers(lines[2:-2]) == list(range(23, 3, -1))
    assert lines[2].split() == ["23", "2", "8", "1e-3", "finished", "4", "2.9000", "*", "3.0", "MB"]
    assert sum("*" in line for line in lines) == 1
    assert lines[-2:] == [
        "and 4 more in trials.parquet",
        "runs/[look]: trials.parquet, curves.parquet, best.yaml (trial 23), report.html, trials/",
    ]


def test_the_final_table_of_failures() -> None:
    display, text = shown([], terminal=False)
    display.table(FRAME[:1], best=None)
    lines = text.getvalue().splitlines()[1:]
    assert lines[2].split() == ["0", "2", "8", "1e-3", "failed", "0", "-", "3.0", "MB"]
    assert lines[-2:] == [
        "No trial ended with a held_out_loss, so there is no best one.",
        "runs/[look]: trials.parquet, curves.parquet, report.html, trials/",
    ]


def test_headings_distinguish_keys() -> None:
    assert headings(["seed", "task.seed", "method.rank"]) == {
        "seed": "seed",
        "task.seed": "task.seed",
        "method.rank": "rank",
    }


def test_values_are_short() -> None:
    assert [format_value(value) for value in (0, 0.0, 1024, 1e-4, 0.00316228, 123456.0, float("nan"), True)] == [
        "0",
        "0",
        "1024",
        "1e-4",
        "3.162e-3",
        "1.235e5",
        "-",
        "True",
    ]
