"""Change of one layer by one client's round, as factors small enough to leave the worker.

Two matrices (m, n) per client and layer, never formed:
    change D   difference of the effective weight over the client's round, without weight decay of the weight itself
    term E     the client's addition to the round's frozen weight at the end
With l, c, r for left, core and right, 1 after and 0 before the round, s the scale:
    GaLore     D = E = left @ right of the round's blocks
    LoRA       D = s (l1 c1 r1 - l0 c0 r0) = s (l1 c1 - l0 c0) r1 + s l0 c0 (r1 - r0),    E = s l1 c1 r1
    dense      D = W1 - W0, no E
The second form of LoRA's D subtracts before it multiplies, so that digits do not cancel after a tiny step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rayfed_sub.core.arrays import as_arrays
from rayfed_sub.core.lowrank import EPS, inner_core, sides
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, LocalResult, Start, Tensors

ROWS = 64
"""Sampled rows of a dense change."""
WIDEST = 128
"""Most columns of a change as factors; wider changes, from many closed blocks of GaLore, are sampled by rows."""


@dataclass(frozen=True)
class ClientChange:
    """Change of a layer in a client's round; float32.

    tensors, as factors: `left` (m, a) and `right` (a, n), and where they are needed `before` (m, b) and `shift` (b, n):
        D = left @ right + before @ shift,    E = (left + before) @ right
    a missing tensor stands for zeros; `shift` comes only with `before`.  For dense changes and those wider than WIDEST
    a sample: `rows` (min(m, ROWS), n), the same rows of D for all clients, times sqrt(m / rows).
    norm: ||D||_F, of all rows.  turned: overlap of the subspaces before and after the round, on the side that GaLore
    projects, ||Q0 Q1^T||_F^2 / min(r0, r1), 1 if equal; None without a subspace before, and for dense changes.
    energy, gradient_rank: share of the squared norm of the first local step's gradient in its strongest directions, and
    its effective rank; None where not measured.
    """

    kind: Literal["galore", "lora", "core", "dense"]
    tensors: Tensors
    norm: float
    turned: float | None = None
    energy: float | None = None
    gradient_rank: float | None = None

    def __reduce__(self) -> Any:
        return as_arrays(self)


def client_change(
    layer: Layer, start: Start, result: LocalResult, gradient: tuple[float, float] | None = None
) -> ClientChange | None:
    """Change of the layer between `start` and `result`; None where the round failed or did not touch the layer.

    gradient: (energy, effective rank) of the first gradient, if measured.
    """
    left, right, core, weight = (f"{layer.name}/{role}" for role in ("left", "right", "core", "weight"))
    energy, gradient_rank = (None, None) if gradient is None else gradient
    if result.failure is not None:
        return None
    if layer.name in result.blocks:
        tensors: Tensors = dict(zip(("left", "right"), result.blocks[layer.name], strict=True))
        if tensors["left"].shape[1] > WIDEST:
            change = tensors["left"] @ tensors["right"]
            tensors, norm = _sample(layer, change, torch.zeros_like(change))
        else:
            norm = _norm(tensors)
        return ClientChange("galore", tensors, norm, _turned(layer, start, result), energy, gradient_rank)
    if left in start.tensors:
        scale = start.scale_of(layer.name)
        l0, l1 = (_left(tensors, layer.name) for tensors in (start.tensors, result.tensors))
        r0, r1 = (tensors[right].double() for tensors in (start.tensors, result.tensors))
        if r0.shape[0] > WIDEST:
            tensors, norm = _sample(layer, scale * (l1 @ r1), scale * (l0 @ r0))
            return ClientChange("dense", tensors, norm, None, energy, gradient_rank)
        tensors = {"left": scale * (l1 - l0), "right": r1}
        if l0.any():
            tensors |= {"before": scale * l0} | ({} if torch.equal(r0, r1) else {"shift": r1 - r0})
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        kind: Literal["lora", "core"] = "lora" if start.aligned and core not in start.tensors else "core"
        return ClientChange(kind, tensors, _norm(tensors), _turned(layer, start, result), energy, gradient_rank)
    if weight in start.tensors:
        tensors, norm = _sample(layer, result.tensors[weight], start.tensors[weight])
        return ClientChange("dense", tensors, norm, None, energy, gradient_rank)
    return None


def rows(layer: Layer, client_change: ClientChange) -> Tensor:
    """The sampled rows of the change, (min(m, ROWS), n) float64, from factors or from the sample."""
    tensors = client_change.tensors
    if "rows" in tensors:
        return tensors["rows"].double()
    index, scale = _chosen(layer)
    sampled = tensors["left"][index].double() @ tensors["right"].double()
    if "shift" in tensors:
        sampled += tensors["before"][index].double() @ tensors["shift"].double()
    return scale * sampled


def _left(tensors: Tensors, layer: str) -> Tensor:
    names = (f"{layer}/{role}" for role in ("left", "core", "heads"))
    own = {name: tensors[name].double() for name in names if name in tensors}
    left_mr, core_rr = own[f"{layer}/left"], inner_core(own, layer)
    return left_mr if core_rr is None else left_mr @ core_rr


def _norm(tensors: Tensors) -> float:
    """||left @ right + before @ shift||_F."""
    pairs = [("left", "right")] + [("before", "shift")] * ("shift" in tensors)
    left_mR = torch.cat([tensors[name].double() for name, _ in pairs], dim=1)
    right_Rn = torch.cat([tensors[name].double() for _, name in pairs])
    return float(((left_mR.T @ left_mR) * (right_Rn @ right_Rn.T)).sum().clamp_min(0).sqrt())


def _sample(layer: Layer, after_mn: Tensor, before_mn: Tensor) -> tuple[dict[str, Tensor], float]:
    """(rows of after - before, scaled, and its norm)."""
    index, scale = _chosen(layer)
    rows_sn = scale * (after_mn[index].float() - before_mn[index].float())
    return {"rows": rows_sn}, float(torch.dist(after_mn.float(), before_mn.float()))


def _chosen(layer: Layer) -> tuple[Tensor, float]:
    """Sorted indices of the sampled rows, and the factor that scales them to all rows."""
    if layer.m <= ROWS:
        return torch.arange(layer.m), 1.0
    drawn = stream(0, "sampled rows", layer.name).choice(layer.m, ROWS, replace=False)
    return torch.from_numpy(drawn).sort().values, (layer.m / ROWS) ** 0.5


def _turned(layer: Layer, start: Start, result: LocalResult) -> float | None:
    fixed = sides(layer)[0]
    before, after = (tensors[fixed].double() for tensors in (start.tensors, result.tensors))
    if not before.any() or not after.any():
        return None
    if torch.equal(before, after):
        return 1.0
    if fixed.endswith("/left"):
        before, after = before.T, after.T
    V0, V1 = _orthonormal(before), _orthonormal(after)
    return float((V0 @ V1.T).square().sum()) / min(len(V0), len(V1))


def _orthonormal(rows_rk: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span."""
    _, sigma, Vh = torch.linalg.svd(rows_rk, full_matrices=False)
    basis: Tensor = Vh[sigma > max(rows_rk.shape) * EPS * sigma[0]]
    return basis
