"""FedIT: federated LoRA by averaging the factors apart (Zhang et al., arXiv 2305.05644).

Rule: B' = sum_k p_k B_k, A' = sum_k p_k A_k.  Not exact: s B'A' misses the cross term s sum_k p_k (B_k - B')(A_k - A').
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FedIT:
    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = "arXiv 2305.05644"
    trained: ClassVar[str] = "LoRA's A and B"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = ""
    alerts: ClassVar[frozenset[str]] = frozenset({"cross term"})

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: averaging.SharedMemory = "keep"

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    start_client = lora.start_client
    upload = lora.upload
    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = lora.lora_model
    personal_model = averaging.no_personal_model
    shared_basis = averaging.one_basis
    sent_values = averaging.target_values("left", "right")
