"""Terminal view of a sweep: a live table of trials, a line per ended one, a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rayfed_sub.cli.data_view import cut
from rayfed_sub.cli.run_view import clock, size
from rayfed_sub.sweeps.progress import Begun, TrialNow
from rayfed_sub.sweeps.results import format_value, headings
from rayfed_sub.telemetry.events import Notice, Stage

if TYPE_CHECKING:
    import pandas as pd

_RUNNING = ("running", "retried")
_ENDED = ("finished", "stopped", "failed")
_ORDER = {"running": 0, "retried": 0, "finished": 1, "stopped": 2, "failed": 3, "waiting": 4}
_STYLES = {"running": "cyan", "retried": "yellow", "failed": "red", "stopped": "dim", "waiting": "dim"}
_VALUE = 24
"""Most characters of a key's name or value."""
_SHORT = 8
"""Characters of a value on the narrowest screen."""
_ROWS = 20
"""Trials in the final table."""
_OTHERS = 5
"""Lines of the screen besides trials: heads, rule, number of hidden trials, summary, one empty."""


class SweepDisplay:
    """Shows a sweep's records as they come; without a terminal, one plain line per trial that ended."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._sweep = Begun("", (), "", "min", 0, 0, "")
        self._heads: dict[str, str] = {}  # short names of the space's keys
        self._trials: dict[int, TrialNow] = {}
        self._updated: dict[int, float] = {}  # time of each trial's last record
        self._first: dict[int, float] = {}  # how far each trial was when it was first heard of
        self._began = time.monotonic()
        self._stage = "starting"
        self._live = Live(console=self._console, transient=True, get_renderable=self._drawn, refresh_per_second=4)

    def __enter__(self) -> SweepDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._live.stop()

    def show(self, record: Stage | Notice | Begun | TrialNow) -> None:
        """Shows a record; a trial whose first record is its end belongs to an earlier session."""
        match record:
            case Stage():
                self._stage = record.text
                if not self._console.is_terminal:
                    self._print(record.text)
            case Notice():
                self._print(record.text)
            case Begun():
                self._begun(record)
            case TrialNow():
                self._trial(record)

    def _begun(self, sweep: Begun) -> None:
        self._trials = {}  # a study has two parts, whose trials are numbered from 0 each
        self._sweep, self._heads = sweep, headings(sweep.keys)
        self._began, self._stage = time.monotonic(), ""
        better = {"min": "lower", "max": "higher"}[sweep.mode]
        self._print(
            f"{sweep.name}: {_trials(sweep.total)} over {', '.join(self._heads.values())}, {sweep.at_once} at once, "
            f"by {sweep.metric} ({better} is better); into {sweep.folder}"
        )

    def _trial(self, trial: TrialNow) -> None:
        before = self._trials.get(trial.number)
        if before is None:
            self._first[trial.number] = _progress(trial)
        # Add the trial last: the drawing thread looks up its other entries.
        self._updated[trial.number] = time.monotonic()
        self._trials[trial.number] = trial
        self._stage = ""
        if trial.status == "retried" and (before is None or before.status != "retried"):
            self._print(f"trial {trial.number} runs again: {trial.failure}", "yellow")
        if trial.status not in _ENDED or (before is not None and before.status == trial.status):
            return
        if not self._console.is_terminal:
            self._print(self._line(trial))
        elif trial.status == "failed":
            self._print(f"trial {trial.number} failed: {trial.failure}", "red")

    def table(self, frame: pd.DataFrame, best: int | None) -> None:
        """The final table of `frame`, a sweep's trials.parquet: the best trials first, then the folder."""
        from rayfed_sub.sweeps.results import best_first

        sweep = self._sweep
        ranked = best_first(frame, sweep.metric, sweep.mode).head(_ROWS)
        # Rich would fold a table to the 80 columns that it takes a file to have.
        console = self._console if self._console.is_terminal else Console(file=self._console.file, width=1000)
        table = _Table(["trial"], list(self._heads.values()), ["status", "rounds", sweep.metric, "sent"])
        for row in ranked.astype("object").where(ranked.notna(), None).to_dict("records"):
            sent = [row[name] for name in ("uplink_bytes", "downlink_bytes") if row[name] is not None]
            table.add(
                [f"{row['trial']}", *(format_value(row[key]) for key in self._heads), row["status"]],
                [
                    "-" if row["rounds"] is None else f"{row['rounds']:.0f}",
                    _score(row.get(sweep.metric)) + _mark(row["trial"] == best),
                ],
                [size(sum(sent)) if sent else "-"],
                best=row["trial"] == best,
            )
        console.print(table.fitted(console.width))
        if len(frame) > len(ranked):
            self._print(f"and {len(frame) - len(ranked)} more in trials.parquet", "dim")
        if best is None:
            self._print(f"No trial ended with a {sweep.metric}, so there is no best one.")
        settings = [f"best.yaml (trial {best})"] if best is not None else []
        files = ["trials.parquet", "curves.parquet", *settings, "report.html", "trials/"]
        self._print(f"{sweep.folder}: {', '.join(files)}")

    def _line(self, trial: TrialNow) -> str:
        """An ended trial as a line of a log."""
        sweep, done = self._sweep, sum(other.status in _ENDED for other in self._trials.values())
        values = " ".join(f"{head}={format_value(trial.values[key])}" for key, head in self._heads.items())
        best = self._best(list(self._trials.values()))
        ended = f"failed: {trial.failure}" if trial.status == "failed" else trial.status
        parts = [f"{done}/{sweep.total}", f"trial {trial.number}", values, ended, f"round {_rounds_text(trial)}"]
        if trial.metric is not None:
            parts.append(f"{sweep.metric} {_score(trial.metric)}{' (best so far)' if trial is best else ''}")
        return "  ".join([*parts, clock(trial.seconds)])

    def _best(self, trials: Sequence[TrialNow]) -> TrialNow | None:
        """The best of the finished trials, of the stopped ones where none has finished."""
        first = min(trials, key=self._merit, default=None)
        return first if first is not None and _merited(first) else None

    def _merit(self, trial: TrialNow) -> tuple[bool, bool, float, int]:
        """Sort key: best first; trials without a metric, such as running ones, by their number."""
        if trial.metric is None or not _merited(trial):
            return True, False, 0.0, trial.number
        return False, trial.status == "stopped", {"min": 1, "max": -1}[self._sweep.mode] * trial.metric, trial.number

    def _drawn(self) -> Group | Text:
        """The live table, fitted to the screen's height."""
        trials = list(self._trials.values())  # as they are now: Rich draws in a thread of its own
        if not trials:
            return Text(self._stage)
        best, sweep = self._best(trials), self._sweep
        ordered = sorted(trials, key=lambda trial: (_ORDER[trial.status], self._merit(trial)))
        shown = ordered[: max(1, self._console.height - _OTHERS)]
        table = _Table(["trial"], list(self._heads.values()), ["status", "round", sweep.metric, "time"])
        for trial in shown:
            waiting = trial.status == "waiting"
            table.add(
                [f"{trial.number}", *(format_value(trial.values[key]) for key in self._heads), trial.status],
                [
                    "" if waiting else _rounds_text(trial),
                    _score(trial.metric) + _mark(trial is best),
                ],
                ["" if waiting else clock(self._seconds(trial))],
                best=trial is best,
            )
        more = len(ordered) - len(shown)
        return Group(
            table.fitted(self._console.width),
            *([Text(f"and {more} more", "dim")] if more else []),
            self._summary(trials, best),
        )

    def _summary(self, trials: Sequence[TrialNow], best: TrialNow | None) -> Text:
        """Progress of the sweep as one line."""
        if self._stage:
            return Text(self._stage)
        sweep = self._sweep
        counted = (_ENDED, ("failed",), _RUNNING)
        done, failed, running = (sum(trial.status in statuses for trial in trials) for statuses in counted)
        parts = [f"{done}/{sweep.total} done", f"{running} running", *([f"{failed} failed"] if failed else [])]
        if best is not None:
            parts.append(f"best {_score(best.metric)} (trial {best.number})")
        if (left := self._left(trials)) is not None:
            parts.append(f"{clock(left)} left")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")

    def _left(self, trials: Sequence[TrialNow]) -> float | None:
        """Seconds until all trials have ended, at the pace of this session; None while unknown."""
        gained = sum(_progress(trial) - self._first[trial.number] for trial in trials)
        ahead = self._sweep.total - sum(map(_progress, trials))
        return (time.monotonic() - self._began) / gained * ahead if gained > 0 else None

    def _seconds(self, trial: TrialNow) -> float:
        """The trial's time, which goes on while it runs."""
        since = time.monotonic() - self._updated[trial.number]
        return trial.seconds + (since if trial.status in _RUNNING else 0.0)

    def _print(self, line: str, style: str = "") -> None:
        # Text, not str: a folder's name may hold [brackets] that Rich would take for markup.
        self._console.print(Text(line, style), soft_wrap=True)


def _rounds_text(trial: TrialNow) -> str:
    """Finished rounds of all rounds, once those are known."""
    return f"{trial.round}/{trial.rounds}" if trial.rounds else "-"


def _progress(trial: TrialNow) -> float:
    """Finished share of the trial, 1 once it has ended, early or not."""
    return 1.0 if trial.status in _ENDED else trial.round / max(1, trial.rounds)


def _merited(trial: TrialNow) -> bool:
    """True for a trial that can be the best."""
    return trial.status in ("finished", "stopped") and trial.metric is not None and math.isfinite(trial.metric)


class _Table:
    """Table of texts with the best row marked; the keys' columns shrink to fit the width."""

    def __init__(self, before: Sequence[str], keys: Sequence[str], after: Sequence[str]) -> None:
        self._heads = [*before, *keys, *after]
        self._rows: list[tuple[list[str], str]] = []
        self._keys = range(len(before), len(before) + len(keys))

    def add(self, *parts: Sequence[str], best: bool) -> None:
        """A row whose cells consist of parts."""
        self._rows.append(([cell for part in parts for cell in part], "bold green" if best else ""))

    def fitted(self, width: int) -> Table:
        """The table: a line under its heads, texts aligned left and numbers right."""
        natural = [
            max(map(len, column)) for column in zip(self._heads, *(cells for cells, _ in self._rows), strict=True)
        ]
        room = width - 2 * len(natural) - sum(natural) + sum(natural[at] for at in self._keys)
        # Heads are cut first: a value of few characters says nothing without its last one.
        least = {at: min(max((len(cells[at]) for cells, _ in self._rows), default=0), _SHORT) for at in self._keys}
        for most in range(_VALUE, 2, -1):
            across = {at: max(min(natural[at], most), least[at]) for at in self._keys}
            if sum(across.values()) <= room:
                break
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
        for at, head in enumerate(self._heads):
            justify: Literal["left", "right"] = "left" if head == "status" else "right"
            table.add_column(Text(cut(head, across.get(at, len(head)))), justify=justify, no_wrap=True)
        for cells, style in self._rows:
            fitted = (cut(cell, across[at]) if at in across else cell for at, cell in enumerate(cells))
            table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in fitted), style=style)
        return table


def _mark(best: bool) -> str:
    return " *" if best else "  "


def _score(metric: float | None) -> str:
    return "-" if metric is None or math.isnan(metric) else f"{metric:.4f}"


def _trials(count: int) -> str:
    return f"{count} trial{'s' if count != 1 else ''}"
