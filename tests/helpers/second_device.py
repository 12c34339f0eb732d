"""torch's meta device as a second device beside the CPU: what a GPU would refuse, or wait for.

Code that only ever ran on a processor mixes devices without knowing it, and asks a tensor for its numbers wherever it
likes.  On tensors of the meta device, under this mode, the first raises, and the second is counted."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_aten = torch.ops.aten
_META = torch.device("meta")
_EIGEN = {_aten._linalg_eigh.default, _aten._linalg_svd.default, _aten.linalg_eigh.default}
"""Factorisations that ask the device for their own success."""
_ASKING = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_SIZED = {_aten.nonzero.default, _aten.masked_select.default, _aten.bincount.default, _aten.repeat_interleave.Tensor}
"""Operations whose result has a size that only the device knows."""
_UNSTEADY = {
    *("cumsum", "bincount", "histc", "kthvalue", "median", "put", "put_", "index_reduce", "index_reduce_"),
    *("scatter_reduce", "scatter_reduce_", "nll_loss2d_forward", "resize_", "grid_sampler_2d_backward"),
    *("_embedding_bag_backward", "_ctc_loss_backward", "upsample_bilinear2d_backward", "reflection_pad2d_backward"),
}
"""Operations that torch's deterministic mode refuses on a GPU, of numbers that are not whole."""


@dataclass
class Seen:
    """reads: where numbers of the device were asked for; unsteady: where something was computed that deterministic mode
    refuses; sends: where something was copied to it in the blocking way;
    fetched: tensors that came back without; eigen: factorisations."""

    reads: Counter[str] = field(default_factory=Counter)
    unsteady: Counter[str] = field(default_factory=Counter)
    sends: Counter[str] = field(default_factory=Counter)
    fetched: int = 0
    eigen: int = 0


class SecondDevice(TorchDispatchMode):
    """AssertionError for an operation on tensors of both devices, as on a GPU: only a number of the CPU may take
    part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        meta = any(x.is_meta for x in given)
        if torch.is_inference_mode_enabled():  # operations made of others arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is _aten._to_copy.default:
            return self._copied(func, given[0], args, kwargs)
        if func is _aten.copy_.default and given[0].is_meta != given[1].is_meta:
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
                (self.seen.sends if given[0].is_meta else self.seen.reads)[place()] += 1
            return args[0]
        mixed = meta and any(not x.is_meta and x.dim() for x in given)
        assert not mixed, f"{func} of tensors of two devices: {[(x.device.type, tuple(x.shape)) for x in given]}"
        if not meta:
            return func(*args, **kwargs)
        self.seen.eigen += func in _EIGEN
        if func.overloadpacket.__name__ in _UNSTEADY and given[0].is_floating_point():
            self.seen.unsteady[place()] += 1
        masked = func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func in _ASKING or func in _SIZED or masked:
            self.seen.reads[place()] += 1
        if func is _aten._local_scalar_dense.default:
            return True if given[0].dtype == torch.bool else 1
        if func is _aten.equal.default:
            return True
        if func is _aten.nonzero.default:
            return torch.zeros(given[0].numel(), given[0].ndim, dtype=torch.int64, device=_META)
        if func is _aten.bincount.default:
            return torch.zeros(kwargs.get("minlength", 1), dtype=torch.int64, device=_META)
        return func(*args, **kwargs)

    def _copied(self, func: Any, given: Tensor, args: Any, kwargs: Any) -> Tensor:
        target = kwargs.get("device")
        if target is None or (torch.device(target).type == "meta") == given.is_meta:
            out: Tensor = func(*args, **kwargs)
            return out
        blocking = not kwargs.get("non_blocking", False)
        dtype = kwargs.get("dtype") or given.dtype
        if blocking and given.numel():
            (self.seen.reads if given.is_meta else self.seen.sends)[place()] += 1
        self.seen.fetched += given.is_meta and not blocking
        return torch.ones(given.shape, dtype=dtype, device="cpu" if given.is_meta else _META)


def place() -> str:
    """The line of the package, or of a library, from which torch is called."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "torch" not in path.parts and "helpers" not in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.lineno}"
    return "?"
