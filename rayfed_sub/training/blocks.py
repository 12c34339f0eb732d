"""Low-rank terms of a layer's output, one for every client of a pack: y + scale * x (left right)^T.

The (m, n) products are never formed.  Whatever has rank-many columns is computed as its transpose, since a processor's
batched product with few columns takes three to four times as long as one with few rows.

Legend: G clients, N tokens, m outputs, n inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_block(
    y_GNm: Tensor, x_GNn: Tensor, left_Gmr: Tensor, right_Grn: Tensor, scale_G: Tensor | None = None
) -> Tensor:
    """y with its clients' blocks added, in place; all float32."""
    out: Tensor = _Block.apply(y_GNm, x_GNn, left_Gmr, right_Grn, scale_G)  # type: ignore[no-untyped-call]
    return out


class _Block(torch.autograd.Function):
    """`add_block` with its gradients; scale has none."""

    @staticmethod
    def forward(
        ctx: Any, y_GNm: Tensor, x_GNn: Tensor, left_Gmr: Tensor, right_Grn: Tensor, scale_G: Tensor | None
    ) -> Tensor:
        z_GrN = _scaled(torch.bmm(right_Grn, x_GNn.mT), scale_G)
        asked = ctx.needs_input_grad
        ctx.save_for_backward(left_Gmr, right_Grn, scale_G, z_GrN if asked[2] else None, x_GNn if asked[3] else None)
        ctx.mark_dirty(y_GNm)
        return y_GNm.baddbmm_(z_GrN.mT, left_Gmr.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        left_Gmr, right_Grn, scale_G, z_GrN, x_GNn = ctx.saved_tensors
        (d_GNm,) = outputs
        dx_GNn = dleft_Gmr = dright_Grn = None
        if z_GrN is not None:
            dleft_Gmr = torch.bmm(z_GrN, d_GNm).mT.contiguous()
        if x_GNn is not None or ctx.needs_input_grad[1]:
            dz_GrN = _scaled(torch.bmm(left_Gmr.mT, d_GNm.mT), scale_G)
            if ctx.needs_input_grad[1]:
                dx_GNn = torch.bmm(dz_GrN.mT, right_Grn)
            if x_GNn is not None:
                dright_Grn = torch.bmm(dz_GrN, x_GNn)
        return d_GNm, dx_GNn, dleft_Gmr, dright_Grn, None


def _scaled(z_GrN: Tensor, scale_G: Tensor | None) -> Tensor:
    return z_GrN if scale_G is None else z_GrN.mul_(scale_G[:, None, None])
