"""Allocations of a piece of torch code, by running it on tensors of the `meta` device, which have no data.

The code that is measured is the code that runs: a change in it changes the plan.  What a meta tensor cannot answer is
answered so that memory comes out largest: a truth value is true, a mask selects everything.  Integers and small
tensors stay real, so that labels are found where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_aten = torch.ops.aten
_META = torch.device("meta")
_SMALL = 4096  # numbers that may be asked for by value: losses, counts

Event = tuple[int, int]
"""(allocation's number, bytes) when it is made, (its number, -1) when it is gone."""


class Allocations(TorchDispatchMode):
    """Follows every storage that operations make while the mode is on.

    live, peak: bytes of the storages alive now, and at most.  events: allocations and frees in order, for `heap.Heap`.
    known: tensors that are there already and cost nothing.

    >>> x = torch.zeros(10, device="meta")
    >>> with Allocations([x]) as seen: y = (x + 1).sum()
    >>> seen.peak, seen.live  # ten floats and their sum; the sum
    (44, 4)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.events: list[Event] = []
        self._known = [tensor.untyped_storage() for tensor in known]  # held, or another could get their address
        self._numbers = dict.fromkeys((storage._cdata for storage in self._known), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        meta = any(tensor.is_meta for tensor in given)
        if torch.is_inference_mode_enabled():  # operations made of others arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if meta and func is _aten._local_scalar_dense.default:
            return True if given[0].dtype == torch.bool else 1
        if meta and func is _aten.nonzero.default:  # every place: an expert may be given all tokens
            return torch.zeros(given[0].numel(), given[0].ndim, dtype=torch.int64, device=_META)
        if meta and func is _aten.unique_consecutive.default:  # as many ends in each row
            return tuple(torch.zeros(1, dtype=torch.int64, device=_META) for _ in range(3))
        target = kwargs.get("device") if func is _aten._to_copy.default else None
        if target is not None and torch.device(target).type != given[0].device.type:
            if not meta and not given[0].is_floating_point():
                return given[0].clone()
            if meta and given[0].numel() <= _SMALL:
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
            kwargs = {**kwargs, "device": _META}
        if meta and func is _aten.split_with_sizes.default:  # the first of some experts takes all tokens
            first, *others = args[1]
            along = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            args = (args[0], [first + args[0].shape[along] - sum(args[1]), *others], *args[2:])
        if meta and func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _everything(index)], *args[2:])
        if meta and not all(tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_without_data, (args, kwargs))
        grouped = meta and func is _aten._grouped_mm.default
        out = _grouped_product(*given) if grouped else func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._numbers or not size:
            return
        number = self._numbers[key] = len(self.events) + 1
        self.events.append((number, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, number, size).atexit = False

    def _gone(self, key: int, number: int, size: int) -> None:
        self._numbers.pop(key, None)
        self.events.append((number, -1))
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """torch's fused attention, which processors and GPUs take and `meta` does not: no (T, T) matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    mask = None if attn_mask is None else torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
    fused = _aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return out


def _grouped_product(one: Tensor, other: Tensor, offs_E: Tensor) -> Tensor:
    """Experts' products of tokens by expert, (S, k) times (E, k, n), or the gradient of their weights, (k, S) times
    (S, n), empty: on `meta` torch takes bfloat16 alone."""
    shape = (*one.shape[:-1], other.shape[-1])
    return one.new_empty(shape if other.ndim == 3 else (len(offs_E), *shape))


def _everything(index: Tensor | None) -> list[Tensor | None]:
    """All places of a mask, one index for each of its dimensions; any other index as it is."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.arange(index.numel())] * index.ndim


def _without_data(x: Any) -> Any:
    return torch.empty_like(x, device=_META) if isinstance(x, Tensor) and not x.is_meta else x
