"""GaLore's projector periods in a stack of clients of equal rank (arXiv 2403.03507, the dual form of ARCHITECTURE.md).

Within a period a client's weight is W0 + scale * left @ right, with one factor fixed (the gradient's own singular
basis) and the other trained from zero.  At a refresh the old block is closed and a new one opened; the same backward
pass gives the new basis and the first projected gradient in it, from the layer's input x and output gradient d.

Legend: G clients, g those that are renewed, m, n layer sizes, r rank, k projected side (n on the right, m on the
left), l the other side, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from torch import Tensor

from rayfed_sub.core.devices import free_to_read, onto, sent
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, OptimizerRule, Subspace, Tensors
from rayfed_sub.training.blocks import multiplied
from rayfed_sub.training.layers import Capture, Part
from rayfed_sub.training.projectors import bases, extremes


@dataclass
class Refresh:
    """A refresh: the due clients, and the results of the backward pass for them.

    due: per layer that has any, whether each client is due; draws: per layer and client (seed, client, step of its
    life), which names the random projectors' streams.  rows: per layer the new bases (G, r, k), zero for clients that
    are not due.  gradients: per layer the projected gradient in the new basis, shaped like the trained factor.  sound:
    per layer, as they come, positions of due clients, and whether the gradient of each is finite.
    """

    subspaces: Sequence[Subspace]
    due: Mapping[str, Sequence[bool]]
    draws: Mapping[str, Sequence[tuple[int, ...]]]
    tensors: Tensors
    rows: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sound: list[tuple[str, Sequence[int], Tensor]] = field(default_factory=list)

    def capture(self, layer: Layer) -> Capture:
        """The layer's backward hook."""
        fixed, trained = sides(layer)
        right = fixed.endswith("/right")
        old_Grk = as_rows(layer, self.tensors[fixed])

        def hook(parts: Sequence[Part]) -> None:
            rows_Grk, gradient = torch.zeros_like(old_Grk), torch.zeros_like(self.tensors[trained])
            for first, *pair in parts:
                due_g = self.due[layer.name][first : first + len(pair[0])]
                renewed, device = [g for g, due in enumerate(due_g) if due], pair[0].device
                if not renewed:
                    continue
                at = [first + g for g in renewed]
                index = None if len(renewed) == len(due_g) else onto(renewed, device)
                x_gNn, d_gNm = self._sound(layer, at, *(x if index is None else x[index] for x in pair))
                near_gNk, far_gNl = (x_gNn, d_gNm) if right else (d_gNm, x_gNn)

                def draw(position: int, at: Sequence[int] = at) -> Generator:
                    seed, *names = self.draws[layer.name][at[position]]
                    return stream(seed, "projector", layer.name, *names)

                kind, place_g = self.subspaces[0].projector, onto(at, device)
                rows_grk = bases(kind, near_gNk, far_gNl, old_Grk[place_g], draw, swapped=not right)
                R_glr = multiplied(far_gNl.mT, multiplied(near_gNk, rows_grk.mT))
                rows_Grk[place_g], gradient[place_g] = rows_grk, R_glr if right else R_glr.mT
            self.rows[layer.name], self.gradients[layer.name] = rows_Grk, gradient

        return hook

    def _sound(self, layer: Layer, at: Sequence[int], x_gNn: Tensor, d_gNm: Tensor) -> tuple[Tensor, Tensor]:
        """x and d in float32, zeros for clients with a number that is not finite: their factorisation might raise."""
        ends_22gN = torch.stack([extremes(x) for x in (x_gNn, d_gNm)])
        sound_g = ends_22gN.isfinite().all(dim=3).all(dim=1).all(dim=0)
        self.sound.append((layer.name, at, sound_g))
        if not (free_to_read(x_gNn.device) and sound_g.all()):
            x_gNn, d_gNm = (torch.where(sound_g[:, None, None], x, 0.0) for x in (x_gNn, d_gNm))
        return x_gNn.float(), d_gNm.float()


def as_rows(layer: Layer, fixed: Tensor) -> Tensor:
    """A fixed factor, (G, r, n) on the right or (G, m, r) on the left, as rows (G, r, k)."""
    return fixed if layer.m >= layer.n else fixed.transpose(1, 2)


def renew(
    layer: Layer,
    refresh: Refresh,
    tensors: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: Mapping[str, dict[str, Tensor]],
    due_G: Sequence[bool],
    step_G: Sequence[int],
    optimizer: OptimizerRule,
) -> None:
    """Opens the layer's new period of the due clients: basis replaced, trained factor zeroed, gradient and moments
    moved.

    A layer that saw no gradient at all (no label in any client's batch) gets a basis of zeros and stays put.
    """
    fixed, trained = sides(layer)
    device = tensors[fixed].device
    due_G11 = onto(list(due_G), device)[:, None, None]
    old_Grk = as_rows(layer, tensors[fixed])
    new_Grk = refresh.rows.get(layer.name, torch.zeros_like(old_Grk))
    zero = torch.zeros_like(tensors[trained])
    rule = refresh.subspaces[0].moments
    if rule != "keep":
        turn_Grr = multiplied(new_Grk, old_Grk.transpose(1, 2))
        for role, moved in moved_moments(layer, rule, turn_Grr, moments, trained, step_G, optimizer).items():
            moments[role][trained] = torch.where(due_G11, moved, moments[role][trained])
    new_fixed = new_Grk if fixed.endswith("/right") else new_Grk.transpose(1, 2)
    tensors[fixed] = torch.where(due_G11, new_fixed, tensors[fixed])
    tensors[trained] = torch.where(due_G11, zero, tensors[trained])
    gradients[trained] = torch.where(due_G11, refresh.gradients.get(layer.name, zero), gradients[trained])


def moved_moments(
    layer: Layer,
    rule: str,
    turn_Grr: Tensor,
    moments: Mapping[str, Mapping[str, Tensor]],
    trained: str,
    step_G: Sequence[int],
    optimizer: OptimizerRule,
) -> dict[str, Tensor]:
    """Adam's moments in the new basis, C = Q_new Q_old^T: `reset` gives zeros, `rotate` is LDAdam's rule (arXiv
    2410.16103): m <- C m and v <- (1 - b2^t) |C^2 (v' - m'^2) + (C m')^2| with v', m' bias-corrected."""
    if rule == "reset":
        return {role: torch.zeros_like(tensors[trained]) for role, tensors in moments.items()}

    def turned(C_Grr: Tensor, x: Tensor) -> Tensor:  # x is (G, m, r) on the right side, (G, r, n) on the left
        return multiplied(x, C_Grr.transpose(1, 2)) if layer.m >= layer.n else multiplied(C_Grr, x)

    moved = {role: turned(turn_Grr, tensors[trained]) for role, tensors in moments.items()}
    if "m2" in moments:
        b1, b2 = optimizer.betas
        t_G = torch.tensor(step_G, dtype=torch.float64).clamp_min(1)  # before the first step all moments are zero
        seen1_G, seen2_G = (sent((1 - b**t_G).to(turn_Grr.dtype), turn_Grr.device)[:, None, None] for b in (b1, b2))
        mean, square = moments["m1"][trained] / seen1_G, moments["m2"][trained] / seen2_G
        moved["m2"] = (
            seen2_G * (turned(turn_Grr.square(), square - mean.square()) + turned(turn_Grr, mean).square()).abs()
        )
    return moved
