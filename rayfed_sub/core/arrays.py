"""Tensors as numpy arrays that processes share without a copy, and guards against writes to them.

Ray's object store hands numpy arrays to every process of a node without copying them; torch tensors it would pickle.
Records that travel pickle their tensors as arrays (`as_arrays`): the same record comes out at the other end, over the
same memory.  Shared arrays are writable to torch, so they are guarded: by torch's own version counters in the process
that uses them, and by a checksum of the bytes in the coordinator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayfed_sub.core.errors import RunError

Packed = dict[str, tuple[str, "np.ndarray[Any, Any]"]]
"""Tensor name -> (torch dtype's name, array); bfloat16, which numpy lacks, travels as int16 bits."""


_ALIGNMENT = 64  # torch's own allocations; matrix products give other bits on differently aligned inputs


def packed(tensors: Mapping[str, Tensor]) -> Packed:
    """The tensors as contiguous numpy arrays (a torch view of a large storage would drag all of it along)."""
    out: Packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
        out[name] = (str(plain.dtype).removeprefix("torch."), bits.numpy())
    return out


def unpacked(arrays: Packed) -> dict[str, Tensor]:
    """The tensors over the same memory, aligned to 64 bytes (copied where they are not)."""
    out = {}
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, which torch cannot express; `Guard` watches instead.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, (dtype, array) in arrays.items():
            tensor = torch.from_numpy(array)
            if tensor.data_ptr() % _ALIGNMENT:
                tensor = tensor.clone()
            out[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    return out


def settled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the layout in which a file or another process gives them back, contiguous and aligned: equal
    inputs, equal bits."""
    return unpacked(packed(tensors))


def as_arrays(record: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The value of `__reduce__` for a dataclass with a field `tensors`: pickle takes these as arrays, which Ray shares
    between processes, where it would copy tensors."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return _from_arrays, (type(record), packed(values.pop("tensors")), values)


def _from_arrays(kind: Callable[..., Any], arrays: Packed, values: dict[str, Any]) -> Any:
    return kind(tensors=unpacked(arrays), **values)


class Guard:
    """Detects in-place writes to shared tensors through torch's version counters (views share their base's counter).

    >>> shared = torch.zeros(3); guard = Guard({"w": shared}.items())
    >>> guard.check(); _ = shared[1:].add_(1)
    >>> guard.check()
    Traceback (most recent call last):
    rayfed_sub.core.errors.RunError: shared memory: tensor w was written in place; shared tensors are read-only
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._versions = [(name, tensor, tensor._version) for name, tensor in tensors]

    def check(self) -> None:
        """Raises RunError naming the first tensor that was written since the guard was set."""
        for name, tensor, version in self._versions:
            if tensor._version != version:
                cause = f"tensor {name} was written in place; shared tensors are read-only"
                raise RunError("shared memory", cause, resume=None)


def checksum(arrays: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> int:
    """A sum over the bytes, to detect writes that bypass torch's counters; about 10 GB/s."""
    total = 0
    for name in sorted(arrays):
        flat = np.ascontiguousarray(arrays[name][1]).reshape(-1).view(np.uint8)
        body = len(flat) // 8 * 8
        total += int(flat[:body].view(np.uint64).sum(dtype=np.uint64)) + int(flat[body:].sum(dtype=np.uint64))
    return total % 2**64


def matrices_checksum(arrays: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> str:
    """`checksum` in hex, without vectors: rotary frequencies are computed, and may differ in a bit between versions of
    torch."""
    return f"{checksum({name: array for name, array in arrays.items() if array[1].ndim > 1}):016x}"


def add_to_digest(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Adds names and bits of tensors, in their order, to a digest of hashlib's: the form of `weights_sha256`."""
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
