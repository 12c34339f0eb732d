"""FlexLoRA: federated LoRA by truncating the mean product (Bai et al., arXiv 2402.11505).

Rule: the mean dW = sum_k p_k s_k B_k A_k is factorised, dW = U diag(sigma) V^T; the server keeps its r largest singular
values, client i receives its r_i largest: s_i B = U diag(sigma), with all of sigma in B, and A = V^T.  Not exact: the
server errs by sqrt(sum of the dropped sigma^2), a client of lower rank by what it does not receive; with unequal ranks
even a round that trains nothing loses the tail.  Where dW has less than r factors, the spare rows of A stay as they
were and their B is zero: they change nothing and can be trained.
Singular vectors are another basis every round, in which kept Adam moments would mean nothing: they are reset.
Wire, numbers per layer: up r_i (m + n), never more than m n; down r_i (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from rayfed_sub.core.lowrank import truncated
from rayfed_sub.core.types import (
    Accumulator,
    ModelShape,
    ServerState,
)
from rayfed_sub.methods import averaging, factor_stacks, lora


@dataclass(frozen=True)
class FlexLoRA:
    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "arXiv 2402.11505"
    trained: ClassVar[str] = "LoRA's A and B, r per client"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "Adam's moments are reset after the SVD, ranks follow client_ranks by turns"
    alerts: ClassVar[frozenset[str]] = frozenset({"truncation"})

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.OwnAlpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_ranks
    init_server = lora.init_factors
    broadcast = averaging.broadcast
    download_bytes = lora.download_cut
    received = lora.received_cut
    start_client = lora.start_cut
    upload = lora.upload_products
    client_state = averaging.no_client_state
    accumulator = averaging.accumulator
    accumulate = factor_stacks.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        if not total.weight:
            return server.advance({})
        changed = {name: total.tensors[name] / total.weight for name in shape.head_names}
        for layer in shape.targets:
            rank, alpha = lora.layer_rank(self, layer), lora.layer_alpha(self, layer)
            left, right = truncated(*factor_stacks.factors(layer, total.tensors), rank)
            left = pad(left / (total.weight * alpha / lora.divisor(self, rank)), (0, rank - len(right)))
            spare = server.tensors[f"{layer.name}/right"][len(right) :]
            changed |= {f"{layer.name}/left": left, f"{layer.name}/right": torch.cat([right, spare])}
        return server.advance(changed)

    model = lora.lora_model
    personal_model = averaging.no_personal_model
