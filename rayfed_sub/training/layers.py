"""Linear layer for many clients at once: a shared frozen weight, and a small term per client.

The layer computes in float32 whatever the backbone's type.  Pretrained bfloat16 weights lie on bfloat16's grid, so a
small change added to one of them, or to an output of that type, would be rounded away.  The input is cast up, the base
product and all terms are added in float32, and the sum is rounded once, to the input's type.

Legend: G clients, B rows, T tokens, N = B * T, m outputs, n inputs, r rank, R summed rank of closed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.frozen_linear import freeze, product
from rayfed_sub.training.blocks import add_block

Capture = Callable[[Tensor, Tensor], None]


@dataclass
class Terms:
    """Terms that G clients add to one layer.  All tensors float32 and private to the pack; None where not in use.

    output = base_scale * (x W^T) + scale * x (left core right)^T + x (closed_left closed_right)^T + bias
    with x W^T replaced by x weight^T where the clients own a dense weight.
    """

    clients: int
    weight_Gmn: Tensor | None = None
    bias_Gm: Tensor | None = None
    left_Gmr: Tensor | None = None
    right_Grn: Tensor | None = None
    core_Grr: Tensor | None = None
    scale_G: Tensor | None = None
    closed_left_GmR: Tensor | None = None
    closed_right_GRn: Tensor | None = None
    base_scale_G: Tensor | None = None
    captures: Sequence[Capture] = ()
    """Called once in a backward pass with this layer's (x, d), each (G, N, size), the tokens of all its uses."""
    uses: int = 0
    """Forward passes through the layer since the terms were bound: ALBERT's blocks are one module."""
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(x, d) of the uses whose gradient has come, by use, until the captures are called."""

    def finish(self) -> None:
        """Calls the captures with what has come, after the backward pass: a use outside the loss has no gradient."""
        if not self.seen:
            return
        uses = [self.seen.pop(use) for use in sorted(self.seen)]
        x_GNn, d_GNm = uses[0] if len(uses) == 1 else (torch.cat(tokens, dim=1) for tokens in zip(*uses, strict=True))
        for capture in self.captures:
            capture(x_GNn, d_GNm)


class PackLinear(nn.Module):
    """y = x W^T + bias for a frozen shared W (m, n), plus the `terms` of the pack that is bound at the moment.

    Input (G * B, ..., n), client-major; output (G * B, ..., m) in the input's dtype, rounded once from float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes, not parameters: the tensors are shared memory and nothing may collect them for training.
        self.weight, self.bias = weight, bias
        self.terms: Terms | None = None

    def forward(self, x: Tensor) -> Tensor:
        terms = self.terms
        if terms is None:
            return product(x.float(), self.weight, self.bias).to(x.dtype)
        own_GNn = x.reshape(terms.clients, -1, x.shape[-1])
        x_GNn = own_GNn.float()
        y_GNm = with_blocks(self._base(x_GNn, terms), x_GNn, terms)
        if terms.captures and y_GNm.requires_grad:
            y_GNm.register_hook(_seen(terms, own_GNn.detach()))
        return y_GNm.to(x.dtype).reshape(*x.shape[:-1], -1)

    def _base(self, x_GNn: Tensor, terms: Terms) -> Tensor:
        bias = self.bias if terms.bias_Gm is None else terms.bias_Gm[:, None]
        if terms.weight_Gmn is not None:
            y_GNm = torch.bmm(x_GNn, terms.weight_Gmn.transpose(1, 2))
        elif terms.base_scale_G is None and terms.bias_Gm is None:
            return product(x_GNn, self.weight, self.bias)
        else:
            y_GNm = product(x_GNn, self.weight)
        if terms.base_scale_G is not None:
            y_GNm = y_GNm * terms.base_scale_G[:, None, None]
        return y_GNm if bias is None else y_GNm + bias


def _seen(terms: Terms, x_GNn: Tensor) -> Callable[[Tensor], None]:
    """The backward hook of one use of the layer; the last use to have its gradient calls the captures."""
    use, terms.uses = terms.uses, terms.uses + 1

    def hook(d_GNm: Tensor) -> None:
        terms.seen[use] = (x_GNn, d_GNm)
        if len(terms.seen) == terms.uses:
            terms.finish()

    return hook


def with_blocks(y_GNm: Tensor, x_GNn: Tensor, terms: Terms) -> Tensor:
    """y with the terms' low-rank blocks added in place; all float32."""
    if terms.left_Gmr is not None and terms.right_Grn is not None:
        left_Gmr = terms.left_Gmr if terms.core_Grr is None else torch.bmm(terms.left_Gmr, terms.core_Grr)
        y_GNm = add_block(y_GNm, x_GNn, left_Gmr, terms.right_Grn, terms.scale_G)
    if terms.closed_left_GmR is not None and terms.closed_right_GRn is not None:
        y_GNm = add_block(y_GNm, x_GNn, terms.closed_left_GmR, terms.closed_right_GRn)
    return y_GNm


def install(module: nn.Module, shape: ModelShape) -> dict[str, PackLinear]:
    """Replaces the target and head layers of `module` by PackLinear over the same weights (no copy); by layer name.
    All other plain linear layers are frozen.

    GPT-2's Conv1D stores (n, m); its transposed view serves as (m, n).
    """
    layers = {}
    for layer in (*shape.targets, *shape.head):
        parent_name, _, child = layer.name.rpartition(".")
        parent = module.get_submodule(parent_name)
        old = parent.get_submodule(child)
        stored, bias = old.weight, old.bias
        assert isinstance(stored, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        weight = stored.detach() if isinstance(old, nn.Linear) else stored.detach().T
        assert weight.shape == (layer.m, layer.n), layer
        layers[layer.name] = PackLinear(weight, None if bias is None else bias.detach())
        parent.register_module(child, layers[layer.name])
    freeze(module)
    return layers


@contextmanager
def based_on(layers: Mapping[str, PackLinear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the round's base weights (m, n), float32, in place of the backbone's; a layer without one keeps its own.

    The weights stay the given tensors: on a processor they are read where they lie in shared memory.
    """
    frozen = {name: layers[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight = weight.to(frozen[name].device)
        yield
    finally:
        for name, weight in frozen.items():
            layers[name].weight = weight
