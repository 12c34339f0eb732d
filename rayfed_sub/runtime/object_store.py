"""Values that the processes of a run share: in Ray's object store, or by value where they are small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rayfed_sub.core.types import ClientState, wire_bytes

_SMALL = 100_000
"""Bytes below which a state travels by value; Ray, too, sends objects of that size along with a call."""


@dataclass(frozen=True)
class Shared:
    """Handles of the inputs of a run's workers: specification, backbone, data.  References into the object store are
    owned by the process that started the run, so that they outlive the coordinator.  A record, because Ray replaces
    bare references in a call by their values."""

    spec: Any
    backbone: Any
    dataset: Any


def put(state: ClientState) -> Any:
    """Handle for `get`: a reference into the object store, or a copy of a small state.  An object in the store costs
    almost a millisecond whatever its size, and a view into it keeps all of it in memory."""
    if wire_bytes(state.tensors) < _SMALL:
        return replace(state, tensors={name: tensor.clone() for name, tensor in state.tensors.items()})
    import ray

    return ray.put(state)


def get(handle: Any, timeout: float | None = None) -> Any:
    """The value of a handle: what a reference into the object store refers to, or the handle itself.  Raises ray's
    GetTimeoutError after `timeout` seconds."""
    import ray

    return ray.get(handle, timeout=timeout) if isinstance(handle, ray.ObjectRef) else handle
