"""Values that the processes of a run share: in Ray's object store, by value where they are small, or in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rayfed_sub.core.types import ClientState, wire_bytes

_SMALL = 100_000
"""Bytes of a state below which it travels by itself: Ray, too, sends objects of that size along with a call."""


@dataclass(frozen=True)
class Shared:
    """Handles of what a run's workers are made from: specification, backbone, data.  References into the object store
    are owned by the process that started the run, so that they outlive the coordinator.  A record, because Ray would
    replace bare references in a call by what they refer to."""

    spec: Any
    backbone: Any
    dataset: Any


def put(state: ClientState) -> Any:
    """Handle for `get`: a reference into the object store, or, of a small one, itself in memory of
    its own.  An object in the store costs most of a millisecond whatever its size; a view into one keeps all of it."""
    if wire_bytes(state.tensors) < _SMALL:
        return replace(state, tensors={name: tensor.clone() for name, tensor in state.tensors.items()})
    import ray

    return ray.put(state)


def get(handle: Any, timeout: float | None = None) -> Any:
    """The value behind a reference into the object store; anything else is its own.  Raises ray's GetTimeoutError after
    so many seconds."""
    import ray

    return ray.get(handle, timeout=timeout) if isinstance(handle, ray.ObjectRef) else handle
