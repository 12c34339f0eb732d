"""FedSVD: FFA-LoRA whose shared A follows the learned change (Lee et al., arXiv 2505.12805).

Rule: clients train B over one shared A; B' = sum_k p_k B_k; at the end of every `period` rounds the server factorises
B'A = U S V^T and hands out A = V^T (orthonormal rows) and B = U S.  Exact: one A for all, and the factorisation leaves
s B'A as it is.  The rows of V^T span those of A, so training never leaves the row space that was drawn at first; where
B'A has a lower rank, V^T is completed inside it.  Singular vectors are signed by a fixed reference vector.
Adam's moments of B live in the basis of A: a factorisation resets them, and the head's with them (one step count for
all); `optimizer_state: keep` keeps them in between, which asks for a period above 1.
Wire, numbers per layer: r m up; r m down, and r n more where A is another one than at the client's last round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import signed
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora


@dataclass(frozen=True)
class FedSVD:
    name: ClassVar[str] = "fedsvd"
    paper: ClassVar[str] = "arXiv 2505.12805"
    trained: ClassVar[str] = "LoRA's B, over an A that the server factorises anew"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r m / r m, after a factorisation r (m + n)"
    departs: ClassVar[str] = "spare rows of A are completed within its row space"

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    period: Annotated[averaging.Rank, Field(description="Rounds between factorisations.")] = 1
    optimizer_state: Annotated[
        averaging.Memory,
        Field(
            description="Optimizer state at the start of a round within a period: keep the client's own, or reset it."
        ),
    ] = "keep"

    check = lora.check_rank
    init_server = lora.init_factors
    broadcast = averaging.broadcast

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        # The first A comes from the run's shared seed: it never travels.
        stale = max(since, 0) // self.period != server.round // self.period
        roles = ("left", "right") if stale else ("left",)
        return wire_bytes({name: server.tensors[name] for name in averaging.tensor_names(shape, *roles)})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors = {name: broadcast.tensors[name] for name in averaging.tensor_names(shape, "left", "right")}
        if state is not None and (state.round - 1) // self.period != broadcast.round // self.period:
            state = None  # its moments are in the basis of another A
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        return lora.start(self, shape, tensors, averaging.tensor_names(shape, "left"), moments, step)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left")}
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        after = server.advance(averaging.mean(total))
        if after.round % self.period:
            return after
        tensors = dict(after.tensors)
        for layer in shape.targets:
            left, right = f"{layer.name}/left", f"{layer.name}/right"
            tensors[left], tensors[right] = factorised(tensors[left], tensors[right])
        return ServerState(after.round, tensors)

    model = lora.lora_model
    personal_model = averaging.no_personal_model


def factorised(B_mr: Tensor, A_rn: Tensor) -> tuple[Tensor, Tensor]:
    """(U S, V^T) of B A, (m, r) and (r, n) float32, without the (m, n) product: its SVD is that of an (r, r) matrix
    between two orthonormal bases.  float64 inside; A must have full row rank for V^T to have orthonormal rows.

    >>> factorised(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]))[0].norm()  # all of S = 5 * 2 is in B
    tensor(10.)
    """
    Q_mr, T_rr = torch.linalg.qr(B_mr.double())
    P_nr, V_rr = torch.linalg.qr(A_rn.double().T)
    U_rr, S_r, W_rr = torch.linalg.svd(T_rr @ V_rr.T)
    right_rn = W_rr @ P_nr.T
    signed_rn = signed(right_rn, None)
    sign_r = (signed_rn * right_rn).sum(1).sign()
    return ((Q_mr @ U_rr) * (S_r * sign_r)).float(), signed_rn.float()
