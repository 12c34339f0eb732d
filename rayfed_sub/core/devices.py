"""Numbers on their way to a device and back, without waiting for it.

A GPU runs behind the processor that gives it work.  Whoever asks it for a number, or copies to it in the blocking way,
waits until all work before is done; so nothing in a local step does, but for privacy of single rows and experts as
targets, and what is learned is read once, at the end.

A plan runs the same code on torch's `meta` device, which has no data and stands for the device of the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_META: ContextVar[str] = ContextVar("what the meta device stands for", default="cpu")


@contextmanager
def meta_as(kind: str) -> Iterator[None]:
    """Within it the meta device stands for `cpu` or `cuda`."""
    token = _META.set(kind)
    try:
        yield
    finally:
        _META.reset(token)


def kind_of(device: torch.device) -> str:
    """The device's type; of `meta` that for which it stands."""
    return _META.get() if device.type == "meta" else device.type


def free_to_read(device: torch.device) -> bool:
    """Whether numbers on the device may be asked for at any time."""
    return kind_of(device) == "cpu"


def deterministic() -> None:
    """Makes this process take algorithms that give the same bits each time, for good; before its first work on a GPU.
    Attention is then products and a softmax: none of the fused ones adds up gradients in a fixed order on all GPUs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where the device can read it by itself, if that is a GPU: memory that is not pinned is copied aside
    first, behind all work that was given to the GPU before."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without a wait; one that lies there already is itself."""
    return pinned(tensor, device).to(device, non_blocking=True)


def onto(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on the device.

    >>> onto([1.0, 2.0], torch.device("cpu"))
    tensor([1., 2.])
    """
    return sent(torch.tensor(values, dtype=dtype), device)


def stacked(tensors: Sequence[Tensor | None], shape: Sequence[int], device: torch.device) -> Tensor:
    """The tensors (G, ...) side by side on the device, float32, in fresh memory; None stands for zeros of that shape.
    Those of the host cross over together."""
    if all(x is None for x in tensors):
        return torch.zeros(len(tensors), *shape, device=device)
    home = torch.device("cpu")
    if device != home and all(x is None or x.device == home for x in tensors):
        return sent(stacked(tensors, shape, home), device)
    return torch.stack([torch.zeros(*shape, device=device) if x is None else sent(x.float(), device) for x in tensors])


def fetched(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, with one wait for all of them; those that lie there already are themselves."""
    found = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return found
