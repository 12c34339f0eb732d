"""FedProx's pull towards where the round began (Li et al., arXiv 1812.06127): mu (w - w_start) on the gradient.

For GaLore w is the whole weight: its change so far, closed periods and the open one, projected like the gradient.
Weight decay's shrinking of the base is not part of the pull, and the basis is the data gradient's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.types import ModelShape, Start, Tensors
from rayfed_sub.training.galore import Closed


def pull(
    mu: float,
    shape: ModelShape,
    start: Start,
    tensors: Tensors,
    anchors: Tensors,
    closed: Mapping[str, Closed],
    gradients: dict[str, Tensor],
    scale_G: Tensor,
) -> None:
    """Adds the pull to `gradients` in place.  All tensors (G, ...); anchors: the trained tensors as the round began."""
    projected = {sides(layer)[1]: layer for layer in shape.targets} if start.subspace is not None else {}
    for name in start.trained:
        if name not in projected:
            gradients[name] = gradients[name] + mu * (tensors[name] - anchors[name])
            continue
        layer = projected[name]
        change = scale_G[:, None, None] * tensors[name]  # the open block in its own basis: R = dW Q^T = scale L
        left, right = closed[layer.name].left_GmR, closed[layer.name].right_GRn
        if left is not None and right is not None:
            fixed = tensors[sides(layer)[0]]
            if name.endswith("/left"):
                change = change + torch.bmm(left, torch.bmm(right, fixed.transpose(1, 2)))
            else:
                change = change + torch.bmm(torch.bmm(fixed.transpose(1, 2), left), right)
        gradients[name] = gradients[name] + mu * change
