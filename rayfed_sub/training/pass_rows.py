"""The rows of a pass as a layer sees them, and runs of neighbouring clients with equally many.

Legend: G clients of a stack, g of them side by side, N tokens of a client, n numbers of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """The rows of a pass as a layer sees them; of a flat row each token is one.  parts: each client's; size: all of
    those, with what only fills the pass up; where: of each, (size, 3) int64, its client's place in the step, its row in
    the client's batch, its place in that row (of a whole row 0); anything for what only fills the pass up."""

    parts: tuple[int, ...]
    size: int
    where: Tensor

    def runs(self, clients: slice, kind_G: Sequence[int] | None = None) -> tuple[Run, ...]:
        """The runs of some neighbouring clients; kind_G: as for `runs`."""
        return runs(self.parts[clients], sum(self.parts[: clients.start]), kind_G)


@dataclass(frozen=True)
class Run:
    """Neighbours in a stack whose tokens are equally many and follow each other: clients first to last - 1, `count`
    tokens each, from token `begin` of the pass on."""

    first: int
    last: int
    begin: int
    count: int

    def of(self, x_Sn: Tensor) -> Tensor:
        """Their tokens, (g, N, n), a view."""
        clients = self.last - self.first
        return x_Sn[self.begin : self.begin + clients * self.count].view(clients, self.count, -1)

    def scaled(self, tokens: int, rows: int) -> Run:
        """The run of tokens where so many rows have so many tokens; a client that has all rows has all of them, also
        where they are no multiple of the rows."""
        return Run(self.first, self.last, self.begin * tokens // rows, self.count * tokens // rows)


def runs(count_G: Sequence[int], begin: int = 0, kind_G: Sequence[int] | None = None) -> tuple[Run, ...]:
    """The clients that have tokens, in runs of equal number and equal `kind`, from token `begin` on.

    >>> runs([4, 4, 0, 8])
    (Run(first=0, last=2, begin=0, count=4), Run(first=3, last=4, begin=8, count=8))
    """
    found: list[Run] = []
    for g, count in enumerate(count_G):
        alike = kind_G is None or g == 0 or kind_G[g] == kind_G[g - 1]
        if found and alike and found[-1].last == g and found[-1].count == count:
            found[-1] = Run(found[-1].first, g + 1, found[-1].begin, count)
        elif count:
            found.append(Run(g, g + 1, begin, count))
        begin += count
    return tuple(found)


def token_runs(rows: tuple[Run, ...] | None, tokens: int, all_rows: int) -> tuple[Run, ...]:
    """The runs of rows as runs of tokens."""
    return (Run(0, 1, 0, tokens),) if rows is None else tuple(run.scaled(tokens, all_rows) for run in rows)
