"""Terminal view of a run: a live line while it goes on, a line per finished round, a table at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from rayfed_sub.cli.data_view import cut
from rayfed_sub.config.schema import Federation, StepRange
from rayfed_sub.core.schemas import AnswerRow
from rayfed_sub.core.text import (
    SCORES_OF,
    UNDEFINED,
    UNREAD,
    best_in_words,
    count,
    is_named,
    problem_of,
    published_name,
    score,
    shown,
    start_in_words,
)
from rayfed_sub.data.dataset import changed_images, too_long
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.storage.remote import inside
from rayfed_sub.telemetry.events import Answered, Notice, PackDone, RoundDone, Stage, Started, Summary

_LISTED = 8
"""Most numbers of local steps that are listed."""
_ROUND = "{:>{}} {:>7}  {:>8}  {:>8} {:>8} {:>8} {:>8} {:>7} {:>7}"
"""Widths of a round's columns, 78 characters in all; 80 where the first needs 9."""
_COUNTED = 10_000
"""From so many rounds on the first column has a round's number without theirs."""

_SCORES = (
    *("held_out_loss", "token_accuracy", "rouge_l", "rouge_l_unicode", "bleu_4", "bleu_4_unicode"),
    *("accuracy", "macro_f1", "matthews", "micro_f1", "subset_accuracy", "pearson", "spearman", "mean_absolute_error"),
)
"""Most scores of the final table; summary.json has all."""


_ANSWERS, _ANSWER_WIDTH = 3, 100
"""Answers that are shown at the end of a run, and characters of each of their texts at most."""


_PROGRESS = logging.getLogger("rayfed_sub.progress")  # how far a long reading of data is


class _Heard(logging.Handler):
    """Shows each message."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


class Display:
    """Shows a run's records as they come; without a terminal, one plain line per round."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            expand=True,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._heard = _Heard(lambda text: self._bar.update(self._task, description=text))
        self._rounds = self._first = 0
        self._bytes: dict[int, int] = {}  # by round: one may be run twice
        self._began = 0.0
        self._score = self._speed = ""  # headline score, and unit of the speed
        self._problem: str | None = None  # of the run that has started

    def __enter__(self) -> Display:
        self._bar.start()
        _PROGRESS.addHandler(self._heard)
        _PROGRESS.setLevel(logging.INFO)
        return self

    def __exit__(self, *raised: object) -> None:
        _PROGRESS.removeHandler(self._heard)
        self._bar.stop()

    def show(self, record: Stage | Notice | Started | PackDone | RoundDone | Answered) -> None:
        """Shows a record of the run."""
        match record:
            case Stage():
                self._stage(record)
            case Notice():
                self._print(record.text)
            case Started():
                self._started(record)
            case PackDone():
                self._pack(record)
            case RoundDone():
                self._round(record)
            case Answered():
                self._answered(record)

    def _stage(self, record: Stage) -> None:
        self._bar.update(self._task, description=record.text)
        if not self._console.is_terminal:
            self._print(record.text)

    def _started(self, record: Started) -> None:
        federation, method = record.config.federation, record.config.method_in_words
        self._rounds, self._began = federation.rounds or 0, time.monotonic()
        self._print(f"{record.config.name}: {method}, {_extent(federation)}; into {record.folder}")
        titles = {"macro_f1": "macro F1", "micro_f1": "micro F1", "pearson": "Pearson"}
        self._problem = record.problem
        self._score = _headline(record.problem, record.metrics)
        title = titles.get(self._score, "accuracy")
        self._speed = "tokens/s" if "token_accuracy" in record.metrics else "rows/s"
        self._line("round", "loss", "held-out", title, self._speed, "up", "down", "time", "left", style="dim")
        if not record.round:
            self._line("before", "", *self._judged(record.metrics), *[""] * 5)
        self._first = record.round  # above 0 in a resumed run
        self._bar.update(self._task, description="training", total=self._rounds, completed=record.round)

    def _pack(self, record: PackDone) -> None:
        # In rounds: not every sampled client takes part in each.
        done = record.round + record.clients_done / record.clients
        here, elapsed = done - self._first, time.monotonic() - self._began
        left = f"  {clock(elapsed / here * (self._rounds - done))} left" if here else ""
        self._bar.update(
            self._task,
            description=f"round {record.round + 1}/{self._rounds}  clients {record.clients_done}/{record.clients}",
            completed=done,
            note=f"loss {_loss(record.loss)}  {record.labels / record.seconds:,.0f} {self._speed}  "
            f"up {size(sum(self._bytes.values()) + record.uplink_bytes)}{left}",
        )

    def _round(self, record: RoundDone) -> None:
        row = record.row
        self._bytes[row.round] = row.uplink_bytes
        elapsed, here = time.monotonic() - self._began, row.round + 1 - self._first
        self._line(
            f"{row.round + 1}{self._of}",
            _loss(row.loss),
            *self._judged(overall(record.scores)),
            f"{row.labels / row.train_seconds:,.0f}",
            size(row.uplink_bytes),
            size(row.downlink_bytes),
            f"{row.seconds:.1f} s" if row.seconds < 1000 else clock(row.seconds),
            clock(elapsed / here * (self._rounds - row.round - 1)),
        )

        for client in record.client_rows:
            if client.failure is not None:
                self._print(f"round {row.round + 1}: client {client.client} skipped: {client.failure}")

    def _answered(self, record: Answered) -> None:
        """A few answers, those that training changed first."""
        by_row: dict[int, list[AnswerRow]] = {}
        for answer in record.answers:
            by_row.setdefault(answer.row, []).append(answer)
        both = sorted(by_row.values(), key=lambda found: found[0].answer == found[-1].answer)
        for found in both[:_ANSWERS]:
            texts = {"question": found[0].question, "reference": found[0].reference}
            texts |= {("after" if answer.rounds else "before"): answer.answer for answer in found}
            self._print("")
            for name, text in texts.items():
                # A question's end says most: what comes before it may be a template's or a chat's.
                shown = cut(text[::-1], _ANSWER_WIDTH)[::-1] if name == "question" else cut(text, _ANSWER_WIDTH)
                self._print(f"{name:>9}  {shown}")
        self._print("")

    def _judged(self, metrics: Mapping[str, float]) -> tuple[str, str]:
        """Held-out loss and headline score; empty where there was no evaluation."""
        loss, score = metrics.get("held_out_loss"), metrics.get(self._score)
        missing = "-" if metrics and self._score in UNDEFINED and self._problem != "own" else ""
        return "" if loss is None else f"{loss:.3f}", missing if score is None else f"{score:.3f}"

    @property
    def _of(self) -> str:
        """The number of rounds, as it follows a round's own."""
        return f"/{self._rounds}" if self._rounds < _COUNTED else ""

    def _line(self, first: str, *cells: str, style: str = "") -> None:
        """A line of the table of rounds."""
        width = max(7, len(f"{self._rounds}{self._of}"))
        self._print(_ROUND.format(first, width, *cells).rstrip(), style)

    def _print(self, line: str, style: str = "") -> None:
        # Text, not str: a folder's name may hold [brackets] that Rich would take for markup.
        self._console.print(Text(line, style), soft_wrap=True)

    def table(self, summary: Summary) -> None:
        """The final table of a run."""
        metrics, seconds = summary.metrics, f"{summary.wall_seconds:.1f} in all, {summary.train_seconds:.1f} training"
        if summary.resumed:
            seconds = f"{summary.wall_seconds:.1f} since it went on; {summary.train_seconds:.1f} training of all rounds"
        rows = [
            *_scores(metrics, self._problem or problem_of(metrics)),
            *([("scores are of", f"the {summary.precision} model")] if summary.precision != "float32" else []),
            *([("scores are on", summary.split)] if summary.split else []),
            *([("rows in two official splits", f"{shared:,}")] if (shared := summary.rows.get("shared")) else []),
            *([("images", images)] if (images := changed_images(summary.rows)) else []),
            *([("rows beyond task.max_length", cuts)] if (cuts := too_long(summary.rows)) else []),
            *([("begins from", start_in_words(summary.start_from))] if summary.start_from else []),
            *([("stopped early", summary.stopped)] if summary.stopped else []),
            *([("best round", best_in_words(summary.best))] if summary.best else []),
            *([("clients", "trained one at a time")] if summary.one_at_a_time else []),
            ("sent up, all clients", _against(summary.uplink_bytes, summary.dense_bytes)),
            ("sent down, all clients", _against(summary.downlink_bytes, summary.dense_downlink_bytes)),
            ("rank of the last change", _rank(summary.change_rank)),
            ("seconds", seconds),
            *([("privacy", _privacy(summary.privacy))] if summary.privacy else []),
            *([("simulated time", _simulated(summary.simulated))] if summary.simulated else []),
            ("peak memory, all processes", size(summary.peak_memory_bytes)),
            *([("  on a GPU, tensors of a worker", _on_gpu(summary))] if summary.gpu_memory else []),
            ("weights_sha256", summary.weights_sha256),
            ("run folder", summary.folder),
            ("report", inside(summary.folder, "report.html")),
        ]
        print_table((f"{summary.name}: {summary.method}", _rounds(summary.rounds)), rows, self._console)


def _on_gpu(summary: Summary) -> str:
    peak, planned = max(one["allocated"] for one in summary.gpu_memory.values()), summary.planned_gpu_bytes
    return size(peak) + (f" of {size(planned)} planned" if planned else "")


def _headline(problem: str, metrics: Mapping[str, float]) -> str:
    """The score of a round's line; of a caller's own measures the one that is named like a classifier's."""
    known = {"classification": "macro_f1", "multi-label": "micro_f1", "regression": "pearson"}
    if problem == "own":
        return next((name for name in ("macro_f1", "accuracy") if name in metrics), "token_accuracy")
    return known.get(problem, "token_accuracy")


def _scores(metrics: Mapping[str, float], problem: str) -> Iterable[tuple[str, str]]:
    """The final table's lines of scores; problem: the kind of labels."""
    names = (*_SCORES, *filter(is_named, metrics))
    own = SCORES_OF[problem] if problem not in ("causal-lm", "own") else ()
    both = {name: (metrics.get(f"{name}_before"), metrics.get(name)) for name in names}
    both = {name: found for name, found in both.items() if None not in found or name in own}
    for name in shown(both):
        if published_name(name) not in both:
            yield score(published_name(name)), UNREAD
        words = ["-" if value is None else f"{value:.4f}" for value in both[name]]
        why = f" ({UNDEFINED[name]})" if "-" in words and name in UNDEFINED else ""
        yield score(name, problem), f"{' -> '.join(words)}{why}"


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], console: Console | None = None, *, whole: bool = False
) -> None:
    """A table as wide as its rows need, folded only on a narrower terminal; whole: but for its first column, of names
    that a person copies."""
    console = console or Console()
    if not console.is_terminal:  # Rich would assume 80 columns
        console = Console(file=console.file, width=1000)
    table = Table(*(Column(Text(name), overflow="fold", no_wrap=whole and i == 0) for i, name in enumerate(columns)))
    for row in rows:
        table.add_row(
            *(Text({True: "yes", False: "no"}[cell] if isinstance(cell, bool) else str(cell)) for cell in row)
        )
    console.print(table)


def size(count: float) -> str:
    """Bytes as text.

    >>> size(1536), size(48_660_480), size(999_960)
    ('1.5 kB', '48.7 MB', '1.0 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Duration as text.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _privacy(spent: Mapping[str, Any]) -> str:
    """The privacy account as text.

    >>> account = {"epsilon": 4.784, "delta": 1e-3, "accountant": "PLD", "epsilon_rdp": 5.655, "noise": 1.0}
    >>> _privacy(account)
    "epsilon 4.78 at delta 0.001 by PLD (5.66 by RDP), noise 1, of clients, for the server's tensors"
    >>> _privacy({**account, "unit": "example"})
    'epsilon 4.78 at delta 0.001 by PLD (5.66 by RDP), noise 1, of training rows, for all uploads'
    """
    covered = (
        "training rows, for all uploads" if spent.get("unit") == "example" else "clients, for the server's tensors"
    )
    return (
        f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} by {spent['accountant']} "
        f"({spent['epsilon_rdp']:.3g} by RDP), noise {spent['noise']:g}, of {covered}"
    )


def _simulated(found: Mapping[str, Any]) -> str:
    """The account of the virtual clock as text.

    >>> shares = {"counted_share": 0.75, "idle_share": 0.5, "wasted_bytes": 1500, "joules": None}
    >>> _simulated({"seconds": 3675.0, **shares})
    "1:01:15, 75% of clients' rounds counted, idle for 50%, 1.5 kB wasted"
    """
    energy = "" if found["joules"] is None else f", {found['joules'] / 1000:.3g} kJ"
    wasted = f"{size(found['wasted_bytes'])} wasted"
    counted = f"{found['counted_share']:.0%} of clients' rounds counted"
    return f"{clock(found['seconds'])}, {counted}, idle for {found['idle_share']:.0%}, {wasted}{energy}"


def _rank(rank: float | None) -> str:
    return "not looked at" if rank is None else f"{rank:g} (median over target layers)"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _against(sent: int, dense: int) -> str:
    if not sent:
        return f"nothing, against {size(dense)} of dense FedAvg"
    share = f"{dense / sent:.1f}x less than" if sent < dense else f"{sent / dense:.1f}x"
    return f"{size(sent)}, {share} {size(dense)} of dense FedAvg"


def _extent(federation: Federation) -> str:
    """Rounds, local steps and clients as text."""
    steps = f"{_steps(federation.local_steps)} local steps"
    clients = f"{federation.cohort:,} of {federation.clients:,} clients"
    if federation.mode != "async":
        return f"{_rounds(federation.rounds or 0)} of {steps}, {clients} each"
    updates = count("update", federation.updates)
    return f"{_rounds(federation.rounds or 0)} with {updates} of {steps} each, {clients} under way at a time"


def _rounds(count: int) -> str:
    return f"{count} round{'s' if count != 1 else ''}"


def _steps(steps: object) -> str:
    if isinstance(steps, StepRange):
        return f"{steps.low} to {steps.high}"
    if isinstance(steps, tuple) and len(steps) > _LISTED:  # of clients of unequal speed
        return f"{min(steps)} to {max(steps)}"
    return ", ".join(map(str, steps)) if isinstance(steps, tuple) else str(steps)
