"""FedProx's pull to where the round began: mu times the way from there (Li et al., arXiv 1812.06127).

GaLore's way is that of the whole weight, in the subspace: W - W0 = (c - 1) W0 + closed blocks + open block, with c what
weight decay has left of W0.

Legend: G clients of a stack, g of them, m, n layer sizes, r rank, k projected side (n on the right, m on the left).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayfed_sub.core.devices import onto
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.models.frozen_linear import product
from rayfed_sub.training.blocks import multiplied
from rayfed_sub.training.layers import PackLinear
from rayfed_sub.training.stacks import Stack


def pull(
    mu: float,
    shape: ModelShape,
    layers: Mapping[str, PackLinear],
    stack: Stack,
    gradients: dict[str, Tensor],
    scale_G: Tensor,
) -> None:
    """Adds the pull to the clients' `gradients` (G, ...) in place."""
    start, tensors = stack.trainees[0].start, stack.tensors
    projected = {sides(layer)[1]: layer for layer in shape.targets} if start.subspace is not None else {}
    for name in start.trained:
        if name in projected:
            way = _projected(projected[name], layers, stack, scale_G)
        else:
            way = tensors[name] - stack.anchors[name]
        gradients[name] = gradients[name] + mu * way


def _projected(layer: Layer, layers: Mapping[str, PackLinear], stack: Stack, scale_G: Tensor) -> Tensor:
    """The way of GaLore's weight, shaped like the trained factor: (W - W0) Q^T, or Q^T (W - W0) on the left."""
    fixed, trained = sides(layer)
    right, fixed_G = fixed.endswith("/right"), stack.tensors[fixed].mT
    way = scale_G[:, None, None] * stack.tensors[trained]  # the open block in its own basis: R = dW Q^T = scale L
    for first, last in stack.closed[layer.name].alike():
        if (blocks := stack.closed[layer.name].between(first, last)) is None:
            continue
        (left, closed_right), some = blocks, slice(first, last)
        if right:
            way[some] += multiplied(left, multiplied(closed_right, fixed_G[some]))
        else:
            way[some] += multiplied(multiplied(fixed_G[some], left), closed_right)
    lost = [trainee.clock_of(layer).base_scale - 1 for trainee in stack.trainees]
    if any(lost):
        weight = layers[layer.name].weight if right else layers[layer.name].weight.mT
        rows_Grk = stack.tensors[fixed] if right else fixed_G
        # One by one, and on copies that begin in memory as if alone: a client has the same bits in any pack.
        alone = (rows_rk.clone(memory_format=torch.contiguous_format) for rows_rk in rows_Grk)
        base = torch.stack([product(rows_rk, weight) for rows_rk in alone])
        way += onto(lost, way.device)[:, None, None] * (base.mT if right else base)
    return way
