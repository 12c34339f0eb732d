"""A model's frozen linear layers, multiplied by oneDNN.

On a processor torch multiplies float32 matrices with MKL, which knows AVX512 on Intel's processors only; oneDNN, which
comes with torch as well, uses whatever the processor has.  On an AMD EPYC with AVX512 it is 2.3 times as fast, kept to
AVX2 a tenth; a call costs some 10 us more, which tiny packs of tiny models notice.  torch has it behind an operator of
its compiler's, which takes a transposed view as it lies.

Legend: N tokens, m outputs, n inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayfed_sub.core.devices import kind_of

_EMULATES = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
_FEW = 8
"""Fewer rows are filled up to so many: one row takes another path in oneDNN, up to five in torch's own products, with
other bits."""
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight_mn: Tensor, bias_m: Tensor | None = None) -> Tensor:
    """x W^T + bias, (..., n) -> (..., m), in x's dtype, with a gradient for x alone: W and bias are frozen, and must
    not ask for one.  A weight of another dtype is cast for the moment, forward and back, and the copy is not kept.  Of
    a float32 weight, which a start's changes made so, no digit is lost: its product is float32's, rounded once.

    oneDNN's kernel for float32 on a processor, torch's for all else, also where W lies with gaps: with those oneDNN
    takes a thousand times as long.  On a processor without instructions for bfloat16 such products are float32's,
    rounded once: emulated, they take 8 (forward) to 35 times as long.
    """
    by_torch = x.dtype == weight_mn.dtype and not (_for_onednn(x, weight_mn) or _emulated(x))
    if x.requires_grad and torch.is_grad_enabled() and not by_torch:
        y: Tensor = _Product.apply(x, weight_mn, bias_m)  # type: ignore[no-untyped-call]
        return y
    return _multiplied(x, weight_mn, bias_m)


class _Product(torch.autograd.Function):
    """`product` with its gradient d W, by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_mn: Tensor, bias_m: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_mn)
        return _multiplied(x, weight_mn, bias_m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight_mn,) = ctx.saved_tensors
        return _multiplied(outputs[0], weight_mn.mT, None), None, None


def _multiplied(x: Tensor, weight_mn: Tensor, bias_m: Tensor | None) -> Tensor:
    if _emulated(x) or (weight_mn.dtype == torch.float32 and x.dtype != torch.float32):
        return _multiplied(x.float(), weight_mn, bias_m).to(x.dtype)
    rows = x.shape[:-1].numel()
    if 0 < rows < _FEW:
        filled = functional.pad(x.reshape(rows, -1), (0, 0, 0, _FEW - rows))
        # A copy, for a view of what autograd's function returns may not be changed in place, as Longformer does.
        return _multiplied(filled, weight_mn, bias_m)[:rows].reshape(*x.shape[:-1], -1).clone()
    weight_mn, bias_m = weight_mn.to(x.dtype), None if bias_m is None else bias_m.to(x.dtype)
    if not _for_onednn(x, weight_mn):
        return functional.linear(x, weight_mn, bias_m)
    y_Nm = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight_mn, bias_m, "none", [], "")
    y: Tensor = torch.ops.aten._unsafe_view(y_Nm, (*x.shape[:-1], len(weight_mn)))  # a plain view may not be added to
    return y


def _for_onednn(x: Tensor, weight_mn: Tensor) -> bool:
    dense = weight_mn.is_contiguous() or weight_mn.mT.is_contiguous()
    return _ONEDNN and dense and x.dtype == weight_mn.dtype == torch.float32 and x.device.type == "cpu"


def _emulated(x: Tensor) -> bool:
    """True where products of x's type are emulated, as they are on this processor."""
    return _EMULATES and x.dtype == torch.bfloat16 and kind_of(x.device) == "cpu"


class FrozenLinear(nn.Module):
    """A linear layer whose own parameters, those of the layer it stands for, have no gradient."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.transposed = transposed  # stored as (n, m), as GPT-2's Conv1D does
        # As nn.Linear has them: a module may ask.
        self.out_features, self.in_features = weight.shape[::-1] if transposed else weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T if self.transposed else self.weight, self.bias)


def freeze(module: nn.Module) -> None:
    """Puts a FrozenLinear in the place of every linear layer, over the same parameters; the names stay as they were.  A
    subclass of linear layers, which may do more than multiply, is left as it is."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) in (nn.Linear, Conv1D):
            parent, _, child = name.rpartition(".")
            module.get_submodule(parent).register_module(
                child, FrozenLinear(layer.weight, layer.bias, transposed=type(layer) is Conv1D)
            )
