"""Low-rank blocks of many clients, and products that have the same bits for one client as for many.

Whatever has rank-many columns is computed as its transpose, since a processor's batched product with few columns takes
three to four times as long as one with few rows.

Legend: G clients of a stack, g of them side by side, m, n layer sizes, r rank, R summed rank of closed blocks, i, j, k
any sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from rayfed_sub.core.devices import sent
from rayfed_sub.core.lowrank import padded
from rayfed_sub.core.types import Layer, Tensors


def multiplied(a_Gij: Tensor, b_Gjk: Tensor) -> Tensor:
    """a b for every client, (G, i, k).

    A single row or column takes another path for one client than for several; a second one of zeros keeps the bits.
    """
    rows, columns = a_Gij.shape[1], b_Gjk.shape[2]
    if rows > 1 and columns > 1:
        return torch.bmm(a_Gij, b_Gjk)
    a_Gij = functional.pad(a_Gij, (0, 0, 0, 1)) if rows == 1 else a_Gij
    b_Gjk = functional.pad(b_Gjk, (0, 1)) if columns == 1 else b_Gjk
    return torch.bmm(a_Gij, b_Gjk)[:, :rows, :columns]


def add_product(y_Gik: Tensor, a_Gij: Tensor, b_Gjk: Tensor) -> None:
    """y += a b for every client, in place."""
    if min(*y_Gik.shape[1:], a_Gij.shape[2]) > 1:  # else another path for one client than for several
        y_Gik.baddbmm_(a_Gij, b_Gjk)
    else:
        y_Gik += multiplied(a_Gij, b_Gjk)


@dataclass
class Closed:
    """The closed blocks of one layer, GaLore's or those frozen from the start: each client's own from column 0 on, then
    zeros up to the longest.

    A client whose summed rank would exceed min(m, n) gets one block of that rank, which holds its dense product.
    What a client holds never depends on its neighbours.
    """

    left_GmR: Tensor | None = None
    right_GRn: Tensor | None = None
    used_G: list[int] = field(default_factory=list)  # each client's summed rank

    @classmethod
    def begun(cls, layer: Layer, frozen: Sequence[Tensors], device: torch.device) -> Closed:
        """The clients' `Start.frozen` at the layer, as blocks that were closed before the round."""
        left, right = f"{layer.name}/left", f"{layer.name}/right"
        used = [own[left].shape[1] if left in own else 0 for own in frozen]
        if not any(used):
            return cls()
        nothing = {left: torch.zeros(layer.m, 0), right: torch.zeros(0, layer.n)}
        here = [{name: sent(x.float(), device) for name, x in {**nothing, **own}.items()} for own in frozen]
        lefts = torch.stack([padded(own[left], (layer.m, max(used))) for own in here])
        rights = torch.stack([padded(own[right], (max(used), layer.n)) for own in here])
        return cls(lefts, rights, used)

    def close(self, left_Gmr: Tensor, right_Grn: Tensor, scale_G: Tensor, closing_G: Sequence[bool]) -> None:
        """Appends `scale * left @ right` for the clients that close their open block."""
        m, n, r = left_Gmr.shape[1], right_Grn.shape[2], left_Gmr.shape[2]
        lefts, rights = [], []
        for g, closing in enumerate(closing_G):
            rank = r if closing else 0
            left, right = scale_G[g] * left_Gmr[g, :, :rank], right_Grn[g, :rank]
            if self.left_GmR is not None:
                closed_left, closed_right = self.of(g)
                left, right = torch.cat([closed_left, left], dim=1), torch.cat([closed_right, right])
            if left.shape[1] > min(m, n):
                unit = torch.eye(min(m, n), device=left.device)
                left, right = (left @ right, unit) if n <= m else (unit, left @ right)
            lefts.append(left)
            rights.append(right)
        self.used_G = [left.shape[1] for left in lefts]
        self.left_GmR = torch.stack([padded(left, (m, max(self.used_G))) for left in lefts])
        self.right_GRn = torch.stack([padded(right, (max(self.used_G), n)) for right in rights])

    def decay(self, factor: float | Tensor) -> None:
        """Weight decay shrinks closed blocks like everything else that makes up the weight."""
        if self.left_GmR is not None:
            self.left_GmR = self.left_GmR * factor

    def some(self, kept: Sequence[int], index: Tensor) -> Closed:
        """The clients at the positions `kept`; index: the same, on the blocks' device."""
        if self.left_GmR is None or self.right_GRn is None:
            return Closed()
        return Closed(self.left_GmR[index], self.right_GRn[index], [self.used_G[g] for g in kept])

    def of(self, g: int) -> tuple[Tensor, Tensor]:
        """Client g's own closed blocks side by side, left (m, R) and right (R, n); only after the first `close`."""
        assert self.left_GmR is not None
        assert self.right_GRn is not None
        return self.left_GmR[g, :, : self.used_G[g]], self.right_GRn[g, : self.used_G[g]]

    def between(self, first: int, last: int) -> tuple[Tensor, Tensor] | None:
        """The blocks (g, m, R) and (g, R, n) of clients first to last - 1, which have equally many; None without."""
        if self.left_GmR is None or self.right_GRn is None or not self.used_G[first]:
            return None
        own, left, right = self.used_G[first], self.left_GmR[first:last], self.right_GRn[first:last]
        return (left, right) if own == left.shape[2] else (left[:, :, :own].contiguous(), right[:, :own].contiguous())

    def alike(self) -> Iterator[tuple[int, int]]:
        """Neighbours with equally many blocks: (first, last + 1)."""
        first = 0
        for g in range(1, len(self.used_G) + 1):
            if g == len(self.used_G) or self.used_G[g] != self.used_G[first]:
                yield first, g
                first = g
