"""Client states in Ray's object store, or by value where they are small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rayfed_sub.core.types import ClientState, wire_bytes

_SMALL = 100_000
"""Bytes of a state below which it travels by itself: Ray, too, sends objects of that size along with a call."""


def put(state: ClientState) -> Any:
    """Handle for `get`: a reference into the object store, or, of a small one, itself in memory of
    its own.  An object in the store costs most of a millisecond whatever its size; a view into one keeps all of it."""
    if wire_bytes(state.tensors) < _SMALL:
        return replace(state, tensors={name: tensor.clone() for name, tensor in state.tensors.items()})
    import ray

    return ray.put(state)


def get(stored: Any, timeout: float | None = None) -> ClientState:
    """The state behind what `put` gave.  Raises ray's GetTimeoutError after so many seconds."""
    if isinstance(stored, ClientState):
        return stored
    import ray

    state: ClientState = ray.get(stored, timeout=timeout)
    return state
