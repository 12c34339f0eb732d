"""Rows of a round's clients and packs, and running sums over its clients."""

from __future__ import annotations

import time
from typing import Any

from rayfed_sub.core.schemas import ClientRow, PackRow
from rayfed_sub.core.types import Update
from rayfed_sub.runtime.scheduler import Done
from rayfed_sub.telemetry.events import PackDone


def client_row(n: int, update: Update, down: int) -> ClientRow:
    """A client's row of round n; down: wire bytes that it received."""
    measured: dict[str, Any] = dict(update.metrics)
    return ClientRow(n, update.client, update.weight, update.wire_bytes, down, **measured, failure=update.failure)


def pack_row(n: int, done: Done) -> PackRow:
    """A pack's row of round n."""
    # Ray's answers are timed by a clock that has no date.
    ended = time.time() - (time.monotonic() - done.ended)
    trouble = "; ".join(dict.fromkeys(done.troubles)) or None
    outcome, attempts = done.result, len(done.troubles) + 1
    return PackRow(
        round=n,
        pack=done.index,
        clients=len(done.units),
        first=done.units[0],
        worker=done.worker,
        began=ended - outcome.seconds[0],
        seconds=outcome.seconds[0],
        tokens=outcome.tokens,
        computed=outcome.computed,
        attempts=attempts,
        trouble=trouble,
    )


class RoundMetrics:
    """rows: in the cohort's order.  failed: number of skipped clients; labels, uplink_bytes: sums over all.

    The sums are kept up to date: summing all rows after every pack would take time quadratic in the cohort.
    """

    def __init__(self, round: int, clients: int, began: float) -> None:
        self.rows: list[ClientRow] = []
        self.failed = self.uplink_bytes = 0
        self._round, self._clients, self._began = round, clients, began
        self._labels = self._losses = 0.0
        self._with_loss = 0

    def add(self, row: ClientRow) -> None:
        """Adds the next client's row."""
        self.rows.append(row)
        self.failed += row.failure is not None
        self.uplink_bytes += row.uplink_bytes
        self._labels += row.labels
        if row.loss is not None and row.failure is None:  # the loss of a failed client stays in its own row
            self._with_loss += 1
            self._losses += row.loss

    @property
    def labels(self) -> int:
        return int(self._labels)

    @property
    def loss(self) -> float | None:
        """Unweighted mean over clients that were not skipped, nats; None while no client has a loss."""
        return self._losses / self._with_loss if self._with_loss else None

    def progress(self) -> PackDone:
        """Progress of the round up to now; of an asynchronous one more clients may train than it waits for."""
        return PackDone(
            round=self._round,
            clients_done=len(self.rows),
            clients=max(self._clients, len(self.rows)),
            loss=self.loss,
            labels=self.labels,
            seconds=time.perf_counter() - self._began,
            uplink_bytes=self.uplink_bytes,
        )
