"""What a person sees in the terminal: a live line per round while it runs, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from rayfed_sub.engine.journal import PackDone, RoundDone, Stage, Started, Summary


class Display:
    """Shows a run's records as they come; without a terminal, one plain line per round."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._rounds = self._done = self._labels = self._bytes = 0
        self._held_out = ""
        self._began = 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def show(self, record: Stage | Started | PackDone | RoundDone) -> None:
        """One record of the journal."""
        match record:
            case Stage():
                self._stage(record)
            case Started():
                self._started(record)
            case PackDone():
                self._pack(record)
            case RoundDone():
                self._round(record)

    def _stage(self, record: Stage) -> None:
        self._bar.update(self._task, description=record.text)
        if not self._console.is_terminal:
            self._console.print(record.text)

    def _started(self, record: Started) -> None:
        config = record.config
        self._rounds, self._began = config.federation.rounds or 0, time.monotonic()
        cohort = config.federation.sampled or config.federation.clients
        federation = config.federation
        self._console.print(
            f"[bold]{config.name}[/]: {config.method['name']}, {cohort} of {federation.clients} clients a round, "
            f"{self._rounds} rounds of {federation.local_steps} local steps; into {record.folder}",
            highlight=False,
        )
        self._held_out = f"{record.held_out_loss:.3f}"
        self._console.print(f"before   held-out loss {self._held_out}", highlight=False)
        self._bar.update(self._task, description="round 1", total=self._rounds * cohort, completed=0)

    def _pack(self, record: PackDone) -> None:
        done = record.round * record.clients + record.clients_done
        elapsed = time.monotonic() - self._began
        left = elapsed / done * (self._rounds * record.clients - done)
        speed = record.labels / record.seconds
        sent = self._bytes + record.uplink_bytes
        self._bar.update(
            self._task,
            description=f"round {record.round + 1}/{self._rounds}  clients {record.clients_done}/{record.clients}",
            completed=done,
            note=f"loss {record.loss:.3f}  {speed:,.0f} tokens/s  up {size(sent)}  {clock(left)} left",
        )

    def _round(self, record: RoundDone) -> None:
        row = record.row
        self._bytes += row.uplink_bytes
        held_out = "" if row.held_out_loss is None else f"  held-out loss {row.held_out_loss:.3f}"
        left = (time.monotonic() - self._began) / (row.round + 1) * (self._rounds - row.round - 1)
        self._console.print(
            f"round {row.round + 1:>3}/{self._rounds}  clients {row.clients}  loss {row.loss:.3f}{held_out}  "
            f"{row.labels / row.train_seconds:,.0f} tokens/s  up {size(row.uplink_bytes)}  "
            f"down {size(row.downlink_bytes)}  {row.seconds:.1f} s  {clock(left)} left",
            highlight=False,
        )

    def table(self, summary: Summary) -> None:
        """The final table of a run."""
        metrics = summary.metrics
        rows = [
            ("held-out loss (nats/token)", _change(metrics["held_out_loss_before"], metrics["held_out_loss"])),
            ("ROUGE-L of greedy answers", _change(metrics["rouge_l_before"], metrics["rouge_l"])),
            ("sent up, all clients", _against(summary.uplink_bytes, summary.dense_bytes)),
            ("sent down, all clients", _against(summary.downlink_bytes, summary.dense_bytes)),
            ("rank of the last aggregated change", f"{summary.change_rank:g} (median over target layers)"),
            ("seconds", f"{summary.wall_seconds:.1f} in all, {summary.train_seconds:.1f} training"),
            ("peak memory, all processes", size(summary.peak_memory_bytes)),
            ("weights_sha256", summary.weights_sha256),
            ("run folder", summary.folder),
        ]
        print_table((f"{summary.name}: {summary.method}", f"{summary.rounds} rounds"), rows, self._console)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], console: Console | None = None) -> None:
    """Rows under columns, as wide as they need."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    (console or Console()).print(table)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(1536), size(48_660_480)
    ('1.5 kB', '48.7 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Time left for people.

    >>> clock(75)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _change(before: float | None, after: float | None) -> str:
    return "not asked for" if before is None or after is None else f"{before:.4f} -> {after:.4f}"


def _against(sent: int, dense: int) -> str:
    share = f", {dense / sent:.1f}x less than" if sent else "; against"
    return f"{size(sent)}{share} {size(dense)} of dense target weights"
