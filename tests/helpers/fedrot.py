"""FedRot-LoRA (arXiv 2602.23638, without its softening), as an external method, and four wrong versions of it.

Rule: before upload a client turns its factors by an orthogonal R, (B, A) -> (B R, R^T A), which leaves B A as it is.
Even rounds: R minimises |B R - B'|, odd rounds |R^T A - A'|, with B', A' the last round's means.  The server averages
B and A apart.  Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.types import Broadcast, LocalResult, ModelShape, Update
from rayfed_sub.methods import averaging, lora


def procrustes(moving: Tensor, reference: Tensor) -> Tensor:
    """The orthogonal R (r, r) that minimises |moving R - reference|; both (k, r).  Identity where reference is zero."""
    if not reference.any():
        return torch.eye(moving.shape[1])
    U, _, Vh = torch.linalg.svd(moving.double().T @ reference.double())
    return (U @ Vh).float()


def turn(round: int, B: Tensor, A: Tensor, reference_B: Tensor, reference_A: Tensor) -> Tensor:
    """R of the round: towards B' in even rounds, towards A' in odd ones."""
    return procrustes(A.T, reference_A.T) if round % 2 else procrustes(B, reference_B)


@dataclass(frozen=True)
class FedRotLoRA:
    """rank r, and alpha with s = alpha / r.  The rotation spoils Adam's moments: they begin anew every round."""

    name: ClassVar[str] = "fedrot-lora"
    paper: ClassVar[str] = "arXiv 2602.23638"
    trained: ClassVar[str] = "LoRA's A and B, turned towards the last means before upload"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "no softening"

    rank: averaging.Rank = 8
    alpha: averaging.Positive = 16.0
    optimizer_state: averaging.Memory = "reset"

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast
    download_bytes = averaging.download_all
    start_client = lora.start_client

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            B, A = result.tensors[left], result.tensors[right]
            R = turn(broadcast.round, B, A, broadcast.tensors[left], broadcast.tensors[right])
            tensors |= {left: B @ R, right: R.T @ A}
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = lora.lora_model
    personal_model = averaging.no_personal_model


@dataclass(frozen=True)
class TurnsAWrongly(FedRotLoRA):
    """A is turned by R in place of its transpose: B A changes."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = dict(FedRotLoRA.upload(self, broadcast, result, weight, shape).tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            B, A = result.tensors[left], result.tensors[right]
            tensors[right] = turn(broadcast.round, B, A, broadcast.tensors[left], broadcast.tensors[right]) @ A
        return Update(result.client, weight, tensors, result.metrics)


@dataclass(frozen=True)
class SwapsParity(FedRotLoRA):
    """Even rounds follow A', odd rounds B'."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        return FedRotLoRA.upload(self, Broadcast(broadcast.round + 1, broadcast.tensors), result, weight, shape)


@dataclass(frozen=True)
class TransposesR(FedRotLoRA):
    """(B R^T, R A): B A stays, but nothing is aligned."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            B, A = result.tensors[left], result.tensors[right]
            R = turn(broadcast.round, B, A, broadcast.tensors[left], broadcast.tensors[right])
            tensors |= {left: B @ R.T, right: R @ A}
        return Update(result.client, weight, tensors, result.metrics)


@dataclass(frozen=True)
class UploadsTheReference(FedRotLoRA):
    """The reference B' travels with the update, and so the server comes to hold it."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        sent = FedRotLoRA.upload(self, broadcast, result, weight, shape)
        reference = {f"reference/{t.name}": broadcast.tensors[f"{t.name}/left"] for t in shape.targets}
        return Update(sent.client, weight, {**sent.tensors, **reference}, sent.metrics)
