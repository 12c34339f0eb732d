"""FLoRIST: one global pair of factors whose rank follows from the mean's spectrum (Ramesh, Dass, arXiv 2506.09199).

Rule: the mean dW = sum_k p_k s_k B_k A_k is factorised, dW = U diag(sigma) V^T, from the clients' stacked factors; the
server keeps the least number p of singular values whose squares make up `threshold` of the sum of all squares, and all
clients receive that one pair: s B = U diag(sigma), A = V^T.  A client of rank r_k trains the first r_k components, and
where p < r_k zeros stand for the others, which stay zeros.  Not exact: the server errs by sqrt(sum of the dropped
sigma^2), and in the next round, even in one that trains nothing, goes what is beyond the clients' ranks.
Read in the abstract and as in TrgPhan/VASTLoRA, a reimplementation after the paper's equations 1 to 4 and algorithm 1,
which decomposes either stack and then the core; here QR takes the place of the stacks' decompositions, with the same
product.  A dW of zero leaves the pair as it is.
Singular vectors are another basis every round, in which kept Adam moments would mean nothing: they are reset.
Wire, numbers per layer: up r_k (m + n), down p (m + n); neither more than m n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import padded
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
from rayfed_sub.methods import averaging, factor_stacks, lora


@dataclass(frozen=True)
class FLoRIST:
    name: ClassVar[str] = "florist"
    paper: ClassVar[str] = "arXiv 2506.09199"
    trained: ClassVar[str] = "LoRA's A and B, r per client, of a global rank p that the server finds"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / min(m n, p (m + n))"
    departs: ClassVar[str] = "Adam's moments are reset, the threshold's default is ours (the paper tunes it)"
    alerts: ClassVar[frozenset[str]] = frozenset({"truncation"})

    rank: lora.LargestRank = 8
    client_ranks: lora.ClientRanks = None
    alpha: lora.OwnAlpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    threshold: Annotated[
        float, Field(gt=0, le=1, description="Share of the mean change's squared norm that the server keeps.")
    ] = 0.9

    check = lora.check_ranks
    init_server = lora.init_factors
    broadcast = averaging.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        pairs = ((layer, server.tensors[f"{layer.name}/right"]) for layer in shape.targets)
        numbers = sum(min(layer.m * layer.n, len(right) * (layer.m + layer.n)) for layer, right in pairs)
        return 4 * numbers + wire_bytes(averaging.head(shape, server.tensors))

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        filled = {**broadcast.tensors}
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            rank = max(lora.layer_rank(self, layer), len(filled[right]))
            filled |= {left: padded(filled[left], (layer.m, rank)), right: padded(filled[right], (rank, layer.n))}
        return lora.start_cut(self, replace(broadcast, tensors=filled), state, client, shape)

    upload = lora.upload_products
    client_state = averaging.no_client_state
    accumulator = averaging.accumulator
    accumulate = factor_stacks.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        if not total.weight:
            return server.advance({})
        changed = {name: total.tensors[name] / total.weight for name in shape.head_names}
        for layer in shape.targets:
            left, sigma, right = factor_stacks.spectrum(*factor_stacks.factors(layer, total.tensors))
            rank = factor_stacks.kept_rank(sigma, self.threshold)
            if rank:
                left = left[:, :rank] / (total.weight * lora.layer_scale(self, layer))
                changed |= {f"{layer.name}/left": left, f"{layer.name}/right": right[:rank].clone()}
        return server.advance(changed)

    model = lora.lora_model
    personal_model = averaging.no_personal_model

    def at_most(self) -> Self:
        """With this threshold the pair has the rank of the stacks."""
        return replace(self, threshold=1.0)
