"""FedIT: federated LoRA by averaging the factors apart (Zhang et al., arXiv 2305.05644).

Rule: B' = sum_k p_k B_k, A' = sum_k p_k A_k.  Not exact: s B'A' misses the cross term s sum_k p_k (B_k - B')(A_k - A').
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.core.types import Broadcast, Client, ClientState, LocalResult, ModelShape, Start, Update
from rayfed_sub.methods import common


@dataclass(frozen=True)
class FedIT:
    """rank r, and alpha with s = alpha / r.
    optimizer_state: what a new round does to Adam's moments (`average`: the server averages them too)."""

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "arXiv 2305.05644"
    trained: ClassVar[str] = "LoRA's A and B"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = ""

    rank: common.Rank = 8
    alpha: common.Positive = 16.0
    optimizer_state: common.SharedMemory = "keep"

    check = common.check_rank
    init_server = common.init_factors
    broadcast = common.broadcast
    download_bytes = common.download_all

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in common.tensor_names(shape, "left", "right")}
        moments, step = common.moments_to_start(self.optimizer_state, broadcast, state)
        return Start(tensors, common.tensor_names(shape, "left", "right"), self.alpha / self.rank, moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in common.tensor_names(shape, "left", "right")}
        tensors |= common.moments_to_send(self.optimizer_state, result)
        return Update(result.client, weight, tensors, result.metrics)

    client_state = common.client_state
    accumulator = common.accumulator
    accumulate = common.accumulate
    aggregate = common.aggregate
    model = common.lora_model
    personal_model = common.no_personal_model
