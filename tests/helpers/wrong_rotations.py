"""Four wrong versions of FedRot-LoRA, as methods outside the table: what the conformance suite must find."""

from __future__ import annotations

from dataclasses import dataclass

from rayfed_sub.core.types import Broadcast, LocalResult, ModelShape, Update
from rayfed_sub.methods.fedrot_lora import FedRotLoRA, turn


@dataclass(frozen=True)
class TurnsAWrongly(FedRotLoRA):
    """A is turned by R in place of its transpose: B A changes."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = dict(FedRotLoRA.upload(self, broadcast, result, weight, shape).tensors)
        for layer in shape.targets:
            right = f"{layer.name}/right"
            tensors[right] = turn(broadcast, result, layer, self.rotation) @ result.tensors[right]
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
        tensors = dict(FedRotLoRA.upload(self, broadcast, result, weight, shape).tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            R_rr = turn(broadcast, result, layer, self.rotation)
            tensors |= {left: result.tensors[left] @ R_rr.T, right: R_rr @ result.tensors[right]}
        return Update(result.client, weight, tensors, result.metrics)


@dataclass(frozen=True)
class UploadsTheReference(FedRotLoRA):
    """The reference B' travels with the update, and so the server comes to hold it."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        sent = FedRotLoRA.upload(self, broadcast, result, weight, shape)
        reference = {f"reference/{t.name}": broadcast.tensors[f"{t.name}/left"] for t in shape.targets}
        return Update(sent.client, weight, {**sent.tensors, **reference}, sent.metrics)
