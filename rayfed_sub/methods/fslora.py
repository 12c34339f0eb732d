"""FSLoRA: federated sketching LoRA, for clients of different ranks (Fang et al., ICML 2026, arXiv 2501.19389).

Rule: the server has factors of rank r.  In every round client k draws k_k of their components, S_k = r / k_k on these
and 0 elsewhere, so that E[S_k] = I, and trains W + s B S_k A, which moves only these columns of B and rows of A.
B' = B + sum_k p_k (B_k - B), and A alike: for a client that did not draw it a component counts as unmoved.  The model
is W + s B A.  Not exact.  Read in the paper's abstract and in its public code, which trains P = B S and divides it by S
after the round (as it stands its test of a factor's name holds for none of peft's).  One S for both factors of a layer.
s r / k_k = alpha / k_k: client k trains k_k components with LoRA's scale of that rank.
Components change every round, so Adam's moments are reset.
Wire, numbers per layer: k_k (m + n) up, k_k (m + n) down; which ones follows from the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    ModelShape,
    ServerState,
    Start,
    wire_bytes,
)
from rayfed_sub.methods import averaging, components, lora


@dataclass(frozen=True)
class FSLoRA:
    name: ClassVar[str] = "fslora"
    paper: ClassVar[str] = "arXiv 2501.19389"
    trained: ClassVar[str] = "LoRA's A and B, r of their components per client, drawn every round"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "with Adam the public code steps B S, which moves B by k / r of a step"

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None

    check = lora.check_ranks
    init_server = components.init_server
    broadcast = components.broadcast
    client_state = averaging.no_client_state
    accumulator = components.accumulator
    accumulate = components.accumulate
    model = lora.lora_model
    personal_model = averaging.no_personal_model

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        part = lora.cut(self, server.tensors, shape, lora.rank_of(self, client.id))
        return wire_bytes({**part, **averaging.head(shape, server.tensors)})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        start, _ = components.start(self, broadcast, client, shape)
        scales = {}
        for layer in shape.targets:
            sketch = lora.layer_rank(self, layer) / len(start.tensors[f"{layer.name}/right"])
            scales[layer.name] = lora.layer_scale(self, layer) * sketch
        return replace(start, scales=scales)

    upload = components.upload

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        return server.advance(components.mean_over_all(server, total, shape))
