"""The mean change of a round as one product: the clients' factors side by side, for methods that factorise it.

Stacks grow with the cohort; beyond m n numbers their product takes their place.  Factors of the mean come from QR of
the stacks and an SVD of the small core between them (`core/lowrank.py`): the (m, n) matrix is not formed for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayfed_sub.core.lowrank import EPS, padded, truncated
from rayfed_sub.core.types import Accumulator, Layer, ModelShape, Tensors, Update
from rayfed_sub.methods import averaging


def accumulate(method: object, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
    """The update's factors (or matrices) beside those that are there, and its head in the head's sum."""
    heads = Accumulator(total.weight, {name: t for name, t in total.tensors.items() if name in shape.head_names})
    added = averaging.add(heads, averaging.head(shape, update.tensors), update.weight)
    sums = dict(added.tensors)
    for layer in shape.targets:
        sums |= grown(part(layer.name, total.tensors), part(layer.name, update.tensors), update.weight, layer)
    return Accumulator(added.weight, sums)


_SENT = "sent:"  # in the sum: one client's own factors


def accumulate_apart(method: object, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
    """The factors' sums, and beside them every client's own, w_k B_k and A_k, under its number in the sum; a client of
    weight zero has no part in either."""
    added, k = averaging.add(total, update.tensors, update.weight), int(total.counts.get("updates", 0))
    if not update.weight:
        return added
    own: dict[str, Tensor] = {}
    for layer in shape.targets:
        left, right = f"{layer.name}/left", f"{layer.name}/right"
        own[f"{_SENT}{k}/{left}"] = update.weight * update.tensors[left]
        own[f"{_SENT}{k}/{right}"] = update.tensors[right]
    counts = {**total.counts, "updates": k + 1, f"weight {k}": update.weight}
    return Accumulator(added.weight, {**added.tensors, **own}, counts)


def sums(total: Accumulator) -> Accumulator:
    """The sums of `accumulate_apart` alone."""
    return Accumulator(total.weight, {name: x for name, x in total.tensors.items() if not name.startswith(_SENT)})


def sent(total: Accumulator, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The clients' p_k B_k side by side (m, R), their A_k (R, n), and p (K,), in the order of the sum."""
    updates, left, right = range(int(total.counts["updates"])), f"{layer.name}/left", f"{layer.name}/right"
    L_mR = torch.cat([total.tensors[f"{_SENT}{k}/{left}"] for k in updates], dim=1) / total.weight
    R_Rn = torch.cat([total.tensors[f"{_SENT}{k}/{right}"] for k in updates])
    return L_mR, R_Rn, torch.tensor([total.counts[f"weight {k}"] / total.weight for k in updates])


def part(name: str, tensors: Tensors) -> dict[str, Tensor]:
    """A change in the form it has (see `averaging.compact`), by role; name: of its layer."""
    roles = ("left", "right", "weight")
    return {role: tensors[f"{name}/{role}"] for role in roles if f"{name}/{role}" in tensors}


def grown(total: Tensors, change: Tensors, weight: float, layer: Layer) -> dict[str, Tensor]:
    """total (empty at first) + weight * change by name, stacked as long as that is the smaller form."""
    if "weight" in total or "weight" in change:
        so_far = _dense(total) if total else torch.zeros(layer.m, layer.n)
        return {f"{layer.name}/weight": so_far + weight * _dense(change)}
    left, right = weight * change["left"], change["right"]
    if total:
        left, right = torch.cat([total["left"], left], dim=1), torch.cat([total["right"], right])
    return averaging.compact(layer, left, right)


def _dense(change: Tensors) -> Tensor:
    return change["weight"] if "weight" in change else change["left"] @ change["right"]


def factors(layer: Layer, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """left (m, R) and right (R, n) of a layer's change; a matrix is its own product with a unit matrix."""
    change = part(layer.name, tensors)
    if "weight" not in change:
        return change["left"], change["right"]
    unit, matrix = torch.eye(min(layer.m, layer.n)), change["weight"]
    return (matrix, unit) if layer.n <= layer.m else (unit, matrix)


def spectrum(left_mR: Tensor, right_Rn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U diag(sigma) (m, k), sigma (k,), V^T (k, n)) of left @ right without what is rounding: k is its numerical rank.

    >>> left, sigma, right = spectrum(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    >>> sigma, left.shape, right.shape
    (tensor([5.]), torch.Size([2, 1]), torch.Size([1, 2]))
    """
    most = min(left_mR.shape[0], right_Rn.shape[1], right_Rn.shape[0])
    left_mk, right_kn = truncated(left_mR, right_Rn, most)
    sigma_k = left_mk.norm(dim=0)
    rank = int((sigma_k > max(left_mR.shape[0], right_Rn.shape[1]) * EPS * sigma_k[0]).sum())
    return left_mk[:, :rank], sigma_k[:rank], right_kn[:rank]


def kept_rank(sigma_k: Tensor, energy: float) -> int:
    """The least number of singular values, largest first, whose squares make up `energy` of the sum of all squares.

    >>> [kept_rank(torch.tensor([2.0, 1.0]), share) for share in (0.5, 0.8, 0.81, 1.0)]  # 4/5 and 1/5
    [1, 1, 2, 2]
    """
    squares_k = sigma_k.double().square()
    if energy >= 1 or not len(squares_k):
        return len(squares_k)
    share_k = squares_k.cumsum(0) / squares_k.sum()
    return int((share_k < energy - 1e-12).sum()) + 1


def balanced(left_mk: Tensor, sigma_k: Tensor, right_kn: Tensor, spare_rn: Tensor) -> tuple[Tensor, Tensor]:
    """B (m, r) = U diag(sqrt(sigma)) and A (r, n) = diag(sqrt(sigma)) V^T from the parts of `spectrum`, cut to r rows
    or filled up: B with zeros, A with the rows of `spare` that are there, which change nothing and can be trained."""
    rank = len(spare_rn)
    root_k = sigma_k[:rank].sqrt()
    left, right = left_mk[:, :rank] / root_k, root_k[:, None] * right_kn[:rank]
    return padded(left, (len(left), rank)), torch.cat([right, spare_rn[len(right) :]])
