"""raFLoRA: components averaged over the clients that have them (Wu et al., arXiv 2602.13486).

Rule: client ranks cut the components into partitions [l, h).  A partition is averaged over those clients of the round
that have it, r_k >= h, with weights p_k relative to theirs, dW = sum over partitions of sum_k (p_k / P_h) s_k B_k[:,
l:h] A_k[l:h]; a partition that nobody has adds nothing.  dW is factorised, dW = U diag(sigma) V^T, with the root of
sigma in either factor, cut to the largest rank; client k receives the first r_k components.  Not exact: with equal
ranks it is FlexLoRA, whose weights shrink the components of few clients in every round (rank collapse).
Read in the abstract and as in BanBan25/Cap (shared/aggregators/raflora.py), a reimplementation after the paper's
algorithm 1 and equation 8, which has no scale s_k: here a client's is alpha / r_k, as in FlexLoRA.
Where dW has less than r components, the spare rows of A stay as they were and their B is zero.  Singular vectors are
another basis every round: Adam's moments are reset.
Wire, numbers per layer: r_k (m + n) up, r_k (m + n) down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rayfed_sub.core.types import Accumulator, Broadcast, Layer, LocalResult, ModelShape, ServerState, Update
from rayfed_sub.methods import averaging, factor_stacks, lora


@dataclass(frozen=True)
class RaFLoRA:
    name: ClassVar[str] = "raflora"
    paper: ClassVar[str] = "arXiv 2602.13486"
    trained: ClassVar[str] = "LoRA's A and B, r per client, averaged over the clients that have a component"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = "Adam's moments are reset after the SVD"
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

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        # Never their product: the server takes the components apart.
        sent = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            scale = lora.sent_scale(self, layer, result.tensors[left].shape[1])
            sent |= {left: scale * result.tensors[left], right: result.tensors[right]}
        return Update(result.client, weight, sent, result.metrics)

    client_state = averaging.no_client_state
    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        """Every partition's stacks under `<layer>|<l>`, and the weight of its clients in `counts`."""
        added = averaging.add(total, averaging.head(shape, update.tensors), update.weight)
        sums, weights = dict(added.tensors), dict(added.counts)
        for layer in shape.targets:
            left, right = update.tensors[f"{layer.name}/left"], update.tensors[f"{layer.name}/right"]
            for own, low, high in self._partitions(layer):
                if high <= len(right) and update.weight:
                    change = {"left": left[:, low:high], "right": right[low:high]}
                    sums |= factor_stacks.grown(factor_stacks.part(own.name, sums), change, update.weight, own)
                    weights[own.name] = weights.get(own.name, 0.0) + update.weight
        return replace(added, tensors=sums, counts=weights)

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        if not total.weight:
            return server.advance({})
        changed = {name: total.tensors[name] / total.weight for name in shape.head_names}
        for layer in shape.targets:
            lefts, rights = [], []
            for own, _, _ in self._partitions(layer):
                if weight := total.counts.get(own.name):
                    left, right = factor_stacks.factors(own, total.tensors)
                    lefts.append(left / (weight * lora.layer_scale(self, layer)))
                    rights.append(right)
            found = factor_stacks.spectrum(torch.cat(lefts, dim=1), torch.cat(rights))
            names = f"{layer.name}/left", f"{layer.name}/right"
            changed |= dict(zip(names, factor_stacks.balanced(*found, server.tensors[names[1]]), strict=True))
        return server.advance(changed)

    def _partitions(self, layer: Layer) -> Iterator[tuple[Layer, int, int]]:
        """(the layer, under the partition's name, l, h) between the ranks that clients have at a layer."""
        low = 0
        for high in sorted({lora.layer_rank(self, layer, rank) for rank in self.client_ranks or (self.rank,)}):
            yield replace(layer, name=f"{layer.name}|{low}"), low, high
            low = high

    model = lora.lora_model
    personal_model = averaging.no_personal_model
