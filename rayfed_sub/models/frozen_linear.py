"""A model's frozen linear layers, multiplied by oneDNN.

On a processor torch multiplies float32 matrices with MKL, which knows AVX512 on Intel's processors only; oneDNN, which
comes with torch as well, uses whatever the processor has.  On an AMD EPYC with AVX512 it is 2.3 times as fast, kept to
AVX2 a tenth; a call costs some 10 us more, which tiny packs of tiny models notice.  torch has it behind an operator of
its compiler's, which takes a transposed view as it lies.

A quantised weight is dequantised for each product, forward and back, and its dense copy is not kept: of all layers one
is there at a time, whatever a backward pass is going to need.

Legend: N tokens, m outputs, n inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayfed_sub.core.devices import kind_of
from rayfed_sub.models.quantised import Quantised

_EMULATES = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
_FEW = 8
"""Fewer rows are filled up to so many: one row takes another path in oneDNN, up to five in torch's own products, with
other bits."""
_TILE = 256
"""Rows at a time of bfloat16's products on processors that have them: there a row's bits depend on the rows beside it,
but not in a call of always as many."""
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight_mn: Tensor | Quantised, bias_m: Tensor | None = None) -> Tensor:
    """x W^T + bias, (..., n) -> (..., m), in x's dtype, with a gradient for x alone: W and bias are frozen, and must
    not ask for one.  A weight of another dtype is cast for the moment, forward and back, and the copy is not kept.  Of
    a float32 weight, which a start's changes made so, no digit is lost: its product is float32's, rounded once.  A
    quantised weight is dequantised to x's type.

    oneDNN's kernel for float32 on a processor, torch's for all else, also where W lies with gaps: with those oneDNN
    takes a thousand times as long.  On a processor without instructions for bfloat16 such products are float32's,
    rounded once: emulated, they take 8 (forward) to 35 times as long.
    """
    plain = isinstance(weight_mn, Tensor) and x.dtype == weight_mn.dtype
    by_torch = plain and not (_for_onednn(x, weight_mn) or _emulated(x) or _tiled(x))
    if x.requires_grad and torch.is_grad_enabled() and not by_torch:
        y: Tensor = _Product.apply(x, weight_mn, bias_m)  # type: ignore[no-untyped-call]
        return y
    return _multiplied(x, weight_mn, bias_m)


class _Product(torch.autograd.Function):
    """`product` with its gradient d W, by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_mn: Tensor | Quantised, bias_m: Tensor | None) -> Tensor:
        ctx.weight_mn = weight_mn  # shared and frozen: autograd has nothing to watch
        return _multiplied(x, weight_mn, bias_m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _multiplied(outputs[0], ctx.weight_mn.mT, None), None, None


def _multiplied(x: Tensor, weight_mn: Tensor | Quantised, bias_m: Tensor | None) -> Tensor:
    if isinstance(weight_mn, Quantised):
        weight_mn = weight_mn.dense(x.dtype)
    if _emulated(x) or (weight_mn.dtype == torch.float32 and x.dtype != torch.float32):
        return _multiplied(x.float(), weight_mn, bias_m).to(x.dtype)
    rows, tiled = x.shape[:-1].numel(), _tiled(x)
    if 0 < rows < _FEW and not tiled:
        filled = functional.pad(x.reshape(rows, -1), (0, 0, 0, _FEW - rows))
        # A copy, for a view of what autograd's function returns may not be changed in place, as Longformer does.
        return _multiplied(filled, weight_mn, bias_m)[:rows].reshape(*x.shape[:-1], -1).clone()
    weight_mn, bias_m = weight_mn.to(x.dtype), None if bias_m is None else bias_m.to(x.dtype)
    if tiled:
        y_Nm = _in_tiles(x.reshape(rows, -1), weight_mn, bias_m)
    elif _for_onednn(x, weight_mn):
        y_Nm = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight_mn, bias_m, "none", [], "")
    else:
        return functional.linear(x, weight_mn, bias_m)
    y: Tensor = torch.ops.aten._unsafe_view(y_Nm, (*x.shape[:-1], len(weight_mn)))  # a plain view may not be added to
    return y


def _for_onednn(x: Tensor, weight_mn: Tensor | Quantised) -> bool:
    if isinstance(weight_mn, Quantised):
        return False
    dense = weight_mn.is_contiguous() or weight_mn.mT.is_contiguous()
    return _ONEDNN and dense and x.dtype == weight_mn.dtype == torch.float32 and x.device.type == "cpu"


def _emulated(x: Tensor) -> bool:
    """True where products of x's type are emulated, as they are on this processor."""
    return _EMULATES and x.dtype == torch.bfloat16 and kind_of(x.device) == "cpu"


def _tiled(x: Tensor) -> bool:
    """True where bfloat16's products are the processor's own, and bits the same in any pack: not with several
    threads."""
    own = not _EMULATES and x.dtype == torch.bfloat16 and kind_of(x.device) == "cpu"
    return own and x.shape[:-1].numel() > 0 and torch.get_num_threads() == 1


def _in_tiles(x_Nn: Tensor, weight_mn: Tensor, bias_m: Tensor | None) -> Tensor:
    y_Nm = x_Nn.new_empty(len(x_Nn), len(weight_mn))
    for tile, out in zip(x_Nn.split(_TILE), y_Nm.split(_TILE), strict=True):
        filled = functional.pad(tile, (0, 0, 0, _TILE - len(tile)))
        out.copy_(functional.linear(filled, weight_mn, bias_m)[: len(tile)])
    return y_Nm


class FrozenLinear(nn.Module):
    """A linear layer whose own parameters, those of the layer it stands for, have no gradient.  A quantised weight is
    no parameter."""

    def __init__(self, weight: nn.Parameter | Quantised, bias: nn.Parameter | None, *, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.transposed = transposed  # stored as (n, m), as GPT-2's Conv1D does
        # As nn.Linear has them: a module may ask.
        self.out_features, self.in_features = weight.shape[::-1] if transposed else weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.mT if self.transposed else self.weight, self.bias)


class FrozenEmbedding(nn.Module):
    """An embedding whose rows are dequantised when they are looked up."""

    def __init__(self, weight: Quantised, padding_idx: int | None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


def freeze(module: nn.Module) -> None:
    """Puts a FrozenLinear in the place of every linear layer, over the same parameters; the names stay as they were.  A
    subclass of linear layers, which may do more than multiply, is left as it is."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in (nn.Linear, Conv1D):
            new = FrozenLinear(layer.weight, layer.bias, transposed=type(layer) is Conv1D)
            _replace(module, name, new)


def quantise(module: nn.Module, weights: Mapping[str, Quantised], tied: Mapping[str, str]) -> None:
    """Puts frozen layers over quantised weights, by the parameters' names, in the places of the linear layers and
    embeddings that have these parameters, or parameters tied to them (alias -> name)."""
    owners = {name: [name, *(alias for alias, own in tied.items() if own == name)] for name in weights}
    for name, weight in weights.items():
        for place in owners[name]:
            path = place.removesuffix(".weight")
            old = module.get_submodule(path)
            if isinstance(old, nn.Embedding):
                _replace(module, path, FrozenEmbedding(weight, old.padding_idx))
            else:
                bias = old.bias
                assert bias is None or isinstance(bias, nn.Parameter)
                _replace(module, path, FrozenLinear(weight, bias, transposed=False))


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.get_submodule(parent).register_module(child, new)
