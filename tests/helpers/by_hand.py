"""One round of a method without training: the clients return the tensors that the test gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayfed_sub.core.types import Client, ClientState, LocalResult, ModelShape, ServerState, Start, Tensors, Update
from rayfed_sub.methods.protocol import Method


@dataclass(frozen=True)
class Walked:
    """The outcome of one round, by client where it belongs to the client."""

    server: ServerState
    starts: dict[int, Start]
    updates: dict[int, Update]
    states: dict[int, ClientState]


def walked(
    method: Method,
    shape: ModelShape,
    server: ServerState,
    ends: Mapping[int, Mapping[str, Any]],
    weights: Mapping[int, float],
    states: Mapping[int, ClientState] | None = None,
    moments: Mapping[int, Tensors] | None = None,
) -> Walked:
    """ends: per client the trained tensors by name (or nested lists); other tensors keep their initial values.
    moments: Adam's, which a client returns after one more step."""
    broadcast, total = method.broadcast(server), method.accumulator(server, shape)
    starts, updates, kept = {}, {}, {}
    for client, given in ends.items():
        end = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in given.items()}
        state = (states or {}).get(client)
        starts[client] = start = method.start_client(broadcast, state, Client(client, 0), shape)
        assert set(end) <= set(start.trained)
        assert all(end[name].shape == start.tensors[name].shape for name in end)
        tensors, left, step = {**start.tensors, **end}, (moments or {}).get(client, {}), start.step + 1
        result = LocalResult(client, tensors, left, step, {}, 1.0, 1, {}, trained=start.trained)
        updates[client] = method.upload(broadcast, result, weights[client], shape)
        kept[client] = ClientState(server.round + 1, step, step, method.client_state(broadcast, result, shape))
        total = method.accumulate(total, updates[client], shape)
    return Walked(method.aggregate(server, total, shape), starts, updates, kept)


def factors(layer: str, left: list[list[float]], right: list[list[float]]) -> dict[str, Tensor]:
    """LoRA's B as (m, r) rows, its A as (r, n) rows."""
    return {f"{layer}/left": torch.tensor(left), f"{layer}/right": torch.tensor(right)}


def changed(method: Method, shape: ModelShape, server: ServerState, layer: str, W: Tensor) -> Tensor:
    """The global model's change of a pretrained weight."""
    return method.model(server, shape)[layer].apply(W) - W
