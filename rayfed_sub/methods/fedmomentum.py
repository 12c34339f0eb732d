"""FedMomentum: the mean product's main components as factors, the others in the weight (Yan et al., arXiv 2603.08014).

Rule: the mean dW = sum_k p_k s B_k A_k is factorised, dW = U diag(sigma) V^T.  Its r largest components become the next
factors, with the root of sigma on either side: sqrt(s) B = U diag(sqrt(sigma)), sqrt(s) A = diag(sqrt(sigma)) V^T; of
the others those that `energy` of the sum of all sigma^2 asks for go into the frozen weight, W <- W + U diag(sigma) V^T.
What is left is dropped: exact with energy 1.
Read in the abstract and as in weizimei24/FedLLM-Factory-main (alg/fedmomentum.py, with its energy of 0.9999), whose
product has no scale s and so puts another residual than dW's into the weight; here it has.  Its SVD is randomised, with
a sketch as wide as the stacks, which finds the same components.
Where dW has less than r components, the spare rows of A stay as they were and their B is zero.  Singular vectors are
another basis every round: Adam's moments are reset.
Wire, numbers per layer: up r (m + n), never more than m n; down r (m + n), and the residuals missed since the client
last synchronised, in factors, together never more than m n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    ModelShape,
    ServerState,
    Start,
    Tensors,
)
from rayfed_sub.methods import averaging, factor_stacks, lora


@dataclass(frozen=True)
class FedMomentum:
    name: ClassVar[str] = "fedmomentum"
    paper: ClassVar[str] = "arXiv 2603.08014"
    trained: ClassVar[str] = "LoRA's A and B, over a weight that takes up what rank r cannot hold"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n) + min(m n, residuals missed)"
    departs: ClassVar[str] = (
        "an exact SVD in place of a randomised one of full width; the factors keep rank r whatever the energy"
    )
    layerwise: ClassVar[bool] = True

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    energy: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of the mean change's squared norm up to which the weight takes what rank r leaves over; "
            "1: all.",
        ),
    ] = 0.9999

    check = lora.check_rank
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        factors = lora.init_factors(self, weights, shape, seed).tensors
        return ServerState(0, {**weights, **factors, **averaging.no_history(shape)})

    download_bytes = averaging.download_factors_and_missed

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        names = averaging.tensor_names(shape, "left", "right")
        return lora.start(self, shape, {name: broadcast.tensors[name] for name in names}, names)

    upload = lora.upload_products
    client_state = averaging.no_client_state
    accumulator = averaging.accumulator
    accumulate = factor_stacks.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed = {name: total.tensors[name] / total.weight for name in shape.head_names if total.weight}
        ranks: dict[str, float] = {}
        for layer in shape.targets if total.weight else ():
            left, sigma, right = factor_stacks.spectrum(*factor_stacks.factors(layer, total.tensors))
            names = {role: f"{layer.name}/{role}" for role in ("left", "right", "weight")}
            spare, scale = server.tensors[names["right"]], lora.layer_scale(self, layer) * total.weight
            B_mr, A_rn = factor_stacks.balanced(left / scale, sigma / scale, right, spare)
            changed |= {names["left"]: B_mr, names["right"]: A_rn}
            rest = slice(len(spare), factor_stacks.kept_rank(sigma, self.energy))
            if rest.start < rest.stop:
                ranks[layer.name] = rest.stop - rest.start
                changed[names["weight"]] = torch.addmm(
                    server.tensors[names["weight"]], left[:, rest], right[rest], alpha=1 / total.weight
                )
        return server.advance({**changed, **averaging.longer_history(server, replace(total, counts=ranks), shape)})

    model = lora.model_over_weight
    personal_model = averaging.no_personal_model

    def at_most(self) -> Self:
        """With all of the energy the residual has the rank of the stacks, less r."""
        return replace(self, energy=1.0)
