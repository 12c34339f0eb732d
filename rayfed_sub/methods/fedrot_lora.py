"""FedRot-LoRA: factors turned towards the last means before they are averaged (Zhang et al., arXiv 2602.23638).

Rule: a client turns its finished factors by a rotation R, (B, A) -> (B R, R^T A), which leaves B A as it is; the server
averages B and A apart.  In odd rounds R* minimises |R^T A - A'|, in even ones |B R - B'|, with A' and B' the means that
the client began with and det R* = 1; R is the rotation nearest to (1 - rotation) I + rotation R*, and with rotation 0
this is FedIT.  Not in round 0, whose B' is zero.  As in the authors' code (haoran-zh/FedRot-LoRA, client.py and
rotation_alignment_tools.py), with its `initialshare: A`.  Not exact: what is left of
FedIT's cross term stays.
Adam's moments are those of factors before their turn: they begin anew every round, or are kept as they are.
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import Broadcast, Layer, LocalResult, ModelShape, Update
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FedRotLoRA:
    name: ClassVar[str] = "fedrot-lora"
    paper: ClassVar[str] = "arXiv 2602.23638"
    trained: ClassVar[str] = "LoRA's A and B, turned towards the last means before upload"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = ""

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    rotation: Annotated[
        float,
        Field(ge=0, le=1, description="How far factors are turned: 0 not at all, 1 onto the means."),
    ] = 0.5
    optimizer_state: averaging.Memory = "reset"

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast
    download_bytes = averaging.download_all

    start_client = lora.start_unaligned

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = averaging.head(shape, result.tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            R_rr = turn(broadcast, result, layer, self.rotation)
            tensors |= {left: result.tensors[left] @ R_rr, right: R_rr.T @ result.tensors[right]}
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate
    model = lora.lora_model
    personal_model = averaging.no_personal_model


def turn(broadcast: Broadcast, result: LocalResult, layer: Layer, share: float) -> Tensor:
    """R (r, r) of a client's factors at a layer: towards A' in odd rounds, towards B' in even ones but the first."""
    if broadcast.round % 2:
        return towards(result.tensors[f"{layer.name}/right"].T, broadcast.tensors[f"{layer.name}/right"].T, share)
    left = f"{layer.name}/left"
    return towards(result.tensors[left], broadcast.tensors[left], share if broadcast.round else 0.0)


def towards(moving_kr: Tensor, reference_kr: Tensor, share: float) -> Tensor:
    """The rotation R (r, r), float32, nearest to (1 - share) I + share R*, where R* minimises |moving R* - reference|
    (orthogonal Procrustes with det R* = 1).  I where the reference is zero, which has no direction.

    >>> towards(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]), 0.5).round(decimals=4)  # half of 90 degrees
    tensor([[ 0.7071, -0.7071],
            [ 0.7071,  0.7071]])
    """
    I_rr = torch.eye(moving_kr.shape[1], dtype=torch.float64)
    if not share or not reference_kr.any():
        return I_rr.float()
    R_rr = _nearest(moving_kr.double().T @ reference_kr.double())
    return _nearest((1 - share) * I_rr + share * R_rr).float()


def _nearest(M_rr: Tensor) -> Tensor:
    """The rotation that is nearest to M; where a reflection would be nearer, the least singular vector is turned."""
    U_rr, _, V_rr = torch.linalg.svd(M_rr)
    sign_r = torch.ones(len(M_rr), dtype=M_rr.dtype)
    sign_r[-1] = torch.linalg.det(U_rr @ V_rr).sign()
    found: Tensor = (U_rr * sign_r) @ V_rr
    return found
