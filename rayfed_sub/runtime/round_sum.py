"""What a round gathers up to its commit: the running sum, rows, diagnostics, the timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayfed_sub.clock.virtual_clock import Clock
from rayfed_sub.core.schemas import ClientRow, PackRow, TimelineRow
from rayfed_sub.core.types import Accumulator, ModelShape, Update
from rayfed_sub.diagnostics import client_diagnostics
from rayfed_sub.diagnostics.client_diagnostics import ClientDiagnostics
from rayfed_sub.diagnostics.server_change import add_ranks
from rayfed_sub.methods.hooked import unhooked
from rayfed_sub.methods.own_failures import named
from rayfed_sub.methods.protocol import Method
from rayfed_sub.runtime.round_metrics import RoundMetrics, client_row, pack_row
from rayfed_sub.runtime.scheduler import Done
from rayfed_sub.storage.client_states import Key
from rayfed_sub.storage.landings import Landing


class RoundSum:
    """The gathering of round n.  ranks: layer -> summed rank of the updates, of the diagnosed layers.

    factor: on the server's step; clock, landings: after the round, received: in it, see `RoundState`."""

    def __init__(
        self, n: int, metrics: RoundMetrics, total: Accumulator, ranks: dict[str, int | None], watched: int
    ) -> None:
        self._n, self._most = n, watched
        self.metrics, self.total, self.ranks = metrics, total, ranks
        self.trained: list[Key] = []
        self.packs: list[PackRow] = []
        self.watched: list[ClientDiagnostics] = []
        self.timeline: tuple[TimelineRow, ...] = ()
        self.factor = 1.0
        self.clock: Clock | None = None
        self.landings: Mapping[int, Landing] = {}
        self.received: dict[int, int] = {}

    def pack(self, done: Done) -> None:
        """Takes the row and the diagnostics of a finished pack; of an asynchronous round, which trains several times,
        no more diagnostics than of one cohort."""
        self.packs.append(pack_row(self._n, replace(done, index=len(self.packs))))
        kept = map(client_diagnostics.kept, done.result.diagnostics)
        self.watched = [*self.watched, *kept][: self._most]

    def add(self, method: Method, shape: ModelShape, update: Update, down: int) -> None:
        """Adds an update to the sum; down: bytes of its client's download."""
        with named("method", unhooked(method), "accumulate", self._n, update.client):
            self.total = method.accumulate(self.total, update, shape)
        self.ranks = add_ranks(self.ranks, update.tensors)
        self.metrics.add(client_row(self._n, update, down))

    def skip(self, row: ClientRow) -> None:
        """Takes the row of a failed client, which holds what it began with."""
        self.metrics.add(row)
        self.received[row.client] = self._n

    def empty(self) -> None:
        """Frees the sum and the diagnostics, once the round is committed."""
        self.total, self.watched = Accumulator(0.0, {}), []

    @property
    def _dropped(self) -> list[TimelineRow]:
        """Rows of clients that are in no other table."""
        return [row for row in self.timeline if row.outcome not in ("counted", "failed")]

    @property
    def clients(self) -> int:
        """Clients of the round, those dropped included."""
        return len(self.metrics.rows) + len(self._dropped)

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes up and down, of dropped clients too."""
        dropped, rows = self._dropped, self.metrics.rows
        up = self.metrics.uplink_bytes + sum(row.uplink_bytes for row in dropped)
        return up, sum(row.downlink_bytes for row in rows) + sum(row.downlink_bytes for row in dropped)
