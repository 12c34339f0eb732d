"""GaLore's projector periods inside a pack (arXiv 2403.03507, in the dual form of ARCHITECTURE.md).

Within a period a client's weight is W0 + scale * left @ right, with one factor fixed (the gradient's own singular
basis) and the other trained from zero.  At a refresh the old block is closed and a new one opened; the same backward
pass gives the new basis and the first projected gradient in it, from the layer's input x and output gradient d.

Legend: G clients, g those that are renewed, m, n layer sizes, r rank, k projected side (n on the right, m on the
left), l the other side, R closed ranks, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from torch import Tensor

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import padded, sides
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, Subspace, Tensors
from rayfed_sub.training.projectors import bases, extremes


@dataclass
class Refresh:
    """A refresh: the due clients, and the results of the backward pass for them.

    rows: per layer the new bases (G, r, k), zero for clients that are not due.  gradients: per layer the projected
    gradient in the new basis, shaped like the trained factor.  failures: client position -> cause.
    """

    subspaces: Sequence[Subspace]
    due_G: Sequence[bool]
    draws: Sequence[tuple[int, ...]]  # per client (seed, client, step): names the random projectors' streams
    tensors: Tensors
    rows: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def capture(self, layer: Layer) -> Callable[[Tensor, Tensor], None]:
        """The layer's backward hook: takes x (G, N, n) and d (G, N, m)."""
        fixed, trained = sides(layer)
        right = fixed.endswith("/right")
        old_Grk = as_rows(layer, self.tensors[fixed])

        def hook(x_GNn: Tensor, d_GNm: Tensor) -> None:
            ends_22GN = torch.stack([extremes(x) for x in (x_GNn, d_GNm)])
            sound_G: list[bool] = ends_22GN.isfinite().all(dim=3).all(dim=1).all(dim=0).tolist()
            for g, (due, sound) in enumerate(zip(self.due_G, sound_G, strict=True)):
                if due and not sound:
                    self.failures.setdefault(g, f"non-finite gradient in {layer.name}")
            renewed = [g for g, due in enumerate(self.due_G) if due and sound_G[g]]
            some = slice(None) if len(renewed) == len(self.due_G) else renewed  # a slice copies nothing
            near_gNk, far_gNl = (x.float()[some] for x in ((x_GNn, d_GNm) if right else (d_GNm, x_GNn)))
            rows_Grk, gradient = torch.zeros_like(old_Grk), torch.zeros_like(self.tensors[trained])
            if renewed:
                ranks, kind = [self.subspaces[g].rank for g in renewed], self.subspaces[0].projector

                def draw(position: int) -> Generator:
                    seed, *names = self.draws[renewed[position]]
                    return stream(seed, "projector", layer.name, *names)

                rows_grk = bases(kind, near_gNk, far_gNl, ranks, old_Grk[some], draw, swapped=not right)
                R_glr = torch.bmm(far_gNl.mT, torch.bmm(near_gNk, rows_grk.mT))
                rows_Grk[some], gradient[some] = rows_grk, R_glr if right else R_glr.mT
            self.rows[layer.name], self.gradients[layer.name] = rows_Grk, gradient

        return hook


def as_rows(layer: Layer, fixed: Tensor) -> Tensor:
    """A fixed factor, (G, r, n) on the right or (G, m, r) on the left, as rows (G, r, k)."""
    return fixed if layer.m >= layer.n else fixed.transpose(1, 2)


def renew(
    layer: Layer,
    refresh: Refresh,
    tensors: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: Mapping[str, dict[str, Tensor]],
    step_G: Sequence[int],
    optimizer: Optimizer,
) -> None:
    """Opens the new period of the due clients: basis replaced, trained factor zeroed, gradient and moments moved.

    A layer that saw no gradient at all (no label in any client's batch) gets a basis of zeros and stays put.
    """
    fixed, trained = sides(layer)
    device = tensors[fixed].device
    due_G = torch.tensor(list(refresh.due_G), device=device)[:, None, None]
    old_Grk = as_rows(layer, tensors[fixed])
    new_Grk = refresh.rows.get(layer.name, torch.zeros_like(old_Grk))
    zero = torch.zeros_like(tensors[trained])
    rule = refresh.subspaces[0].moments
    if rule != "keep":
        turn_Grr = torch.bmm(new_Grk, old_Grk.transpose(1, 2))
        for role, moved in moved_moments(layer, rule, turn_Grr, moments, trained, step_G, optimizer).items():
            moments[role][trained] = torch.where(due_G, moved, moments[role][trained])
    new_fixed = new_Grk if fixed.endswith("/right") else new_Grk.transpose(1, 2)
    tensors[fixed] = torch.where(due_G, new_fixed, tensors[fixed])
    tensors[trained] = torch.where(due_G, zero, tensors[trained])
    gradients[trained] = torch.where(due_G, refresh.gradients.get(layer.name, zero), gradients[trained])


def moved_moments(
    layer: Layer,
    rule: str,
    turn_Grr: Tensor,
    moments: Mapping[str, Mapping[str, Tensor]],
    trained: str,
    step_G: Sequence[int],
    optimizer: Optimizer,
) -> dict[str, Tensor]:
    """Adam's moments in the new basis, C = Q_new Q_old^T: `reset` gives zeros, `rotate` is LDAdam's rule (arXiv
    2410.16103): m <- C m and v <- (1 - b2^t) |C^2 (v' - m'^2) + (C m')^2| with v', m' bias-corrected."""
    if rule == "reset":
        return {role: torch.zeros_like(tensors[trained]) for role, tensors in moments.items()}

    def turned(C_Grr: Tensor, x: Tensor) -> Tensor:  # x is (G, m, r) on the right side, (G, r, n) on the left
        return torch.bmm(x, C_Grr.transpose(1, 2)) if layer.m >= layer.n else torch.bmm(C_Grr, x)

    moved = {role: turned(turn_Grr, tensors[trained]) for role, tensors in moments.items()}
    if "m2" in moments:
        b1, b2 = optimizer.betas
        t_G = torch.tensor(step_G, dtype=torch.float64).clamp_min(1)  # before the first step all moments are zero
        seen1_G, seen2_G = ((1 - b**t_G).to(turn_Grr)[:, None, None] for b in (b1, b2))
        mean, square = moments["m1"][trained] / seen1_G, moments["m2"][trained] / seen2_G
        moved["m2"] = (
            seen2_G * (turned(turn_Grr.square(), square - mean.square()) + turned(turn_Grr, mean).square()).abs()
        )
    return moved


@dataclass
class Closed:
    """The closed blocks of one layer: each client's own from column 0 on, then zeros up to the longest.

    A client whose summed rank would exceed min(m, n) gets one block of that rank, which holds its dense product.
    What a client holds never depends on its neighbours.
    """

    left_GmR: Tensor | None = None
    right_GRn: Tensor | None = None
    used_G: list[int] = field(default_factory=list)  # each client's summed rank

    def close(self, left_Gmr: Tensor, right_Grn: Tensor, scale_G: Tensor, rank_G: Sequence[int]) -> None:
        """Appends `scale * left @ right` for every client; rank_G: its own rank, 0 for those that go on."""
        m, n = left_Gmr.shape[1], right_Grn.shape[2]
        lefts, rights = [], []
        for g, rank in enumerate(rank_G):
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

    def decay(self, factor: float) -> None:
        """Weight decay shrinks closed blocks like everything else that makes up the weight."""
        if self.left_GmR is not None:
            self.left_GmR = self.left_GmR * factor

    def select(self, kept: Tensor) -> None:
        """Keeps the clients at the given positions."""
        if self.left_GmR is not None and self.right_GRn is not None:
            self.left_GmR, self.right_GRn = self.left_GmR[kept], self.right_GRn[kept]
            self.used_G = [self.used_G[g] for g in kept.tolist()]

    def of(self, g: int) -> tuple[Tensor, Tensor]:
        """Client g's own closed blocks side by side, left (m, R) and right (R, n); only after the first `close`."""
        assert self.left_GmR is not None
        assert self.right_GRn is not None
        return self.left_GmR[g, :, : self.used_G[g]], self.right_GRn[g, : self.used_G[g]]
