"""Fed-SB, a variant: an r x r core between two frozen factors (Singhal et al., arXiv 2502.15436).

Rule: dW = s U_r C V_r^T with U_r, V_r the top singular vectors of the pretrained weight; clients train C alone, from
zero, and C' = sum_k p_k C_k.  Exact, for the outer factors are one and the same.  Every client derives them from the
backbone that it holds (float64, signed by a fixed reference vector): they never travel.  That makes it a variant: the
paper takes factors and core from the first step's full gradient (LoRA-SB's initialisation), which needs a pass over
data before round 0 (`fed_sb_gradient.py`); results of this one do not transfer to the paper's.
The basis never changes, so kept or averaged Adam moments stay meaningful.
Wire, numbers per layer: r^2 up, r^2 down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.lowrank import signed
from rayfed_sub.core.types import (
    Block,
    Broadcast,
    Change,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, lora

_CUT = 1e-7  # singular values below this share of the largest are float32 rounding


@dataclass(frozen=True)
class FedSB:
    name: ClassVar[str] = "fed-sb"
    paper: ClassVar[str] = "arXiv 2502.15436"
    trained: ClassVar[str] = "an r x r core between the pretrained weight's top singular vectors"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = True
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "r^2 / r^2"
    departs: ClassVar[str] = "a variant: the paper starts from the singular vectors of the first gradient"

    rank: Annotated[averaging.Rank, Field(description="Side r of the trained core.")] = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    optimizer_state: averaging.SharedMemory = "keep"

    check = lora.check_rank
    broadcast = averaging.broadcast

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        tensors = averaging.head(shape, weights)
        for layer in shape.targets:
            rank = lora.layer_rank(self, layer)
            left, right = outer_factors(weights[f"{layer.name}/weight"], rank)
            core = torch.zeros(rank, rank)
            tensors |= {f"{layer.name}/left": left, f"{layer.name}/core": core, f"{layer.name}/right": right}
        return ServerState(0, tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        sent = {n: t for n, t in server.tensors.items() if not n.endswith(("/left", "/right"))}
        return wire_bytes(sent)

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        return start_client(self, broadcast, state, shape)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "core")}
        tensors |= averaging.moments_to_send(self.optimizer_state, result)
        return Update(result.client, weight, tensors, result.metrics)

    client_state = averaging.client_state
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    aggregate = averaging.aggregate

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return core_model(self, server, shape)

    personal_model = averaging.no_personal_model
    shared_basis = averaging.one_basis
    sent_values = averaging.target_values("core")


def start_client(method: lora.Trains, received: Broadcast, state: ClientState | None, shape: ModelShape) -> Start:
    """The core and the head, trained, from the broadcast between its two factors; Adam's moments by
    `optimizer_state`."""
    tensors = {name: received.tensors[name] for name in averaging.tensor_names(shape, "left", "core", "right")}
    moments, step = averaging.moments_to_start(method.optimizer_state, received, state)
    return lora.start(method, shape, tensors, averaging.tensor_names(shape, "core"), moments, step)


def core_model(method: lora.Trains, server: ServerState, shape: ModelShape) -> dict[str, Change]:
    """The global model of a method whose server holds a core between two factors per target."""
    changes = {}
    for layer in shape.targets:
        left, core, right = (server.tensors[f"{layer.name}/{role}"] for role in ("left", "core", "right"))
        changes[layer.name] = Change(blocks=(Block(left, right, lora.layer_scale(method, layer), core),))
    return changes


def outer_factors(W_mn: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U_r (m, r), V_r^T (r, n)) of W's top singular vectors, float32, from the Gram of its shorter side in float64.

    Where W has a lower rank the missing vectors are zero, and the core has no effect there.

    >>> left, right = outer_factors(torch.tensor([[0.0, 3.0], [0.0, 0.0], [2.0, 0.0]]), 1)
    >>> (left @ right)[0, 1]  # the singular value 3 sits there; u v^T is unique, whatever the signs
    tensor(1.)
    """
    W = W_mn.double()
    tall = W.shape[0] >= W.shape[1]
    W_lk = W if tall else W.T  # l >= k
    _, E_kk = torch.linalg.eigh(W_lk.T @ W_lk)
    short_rk = signed(E_kk.flip(1).T[:rank], None)
    long_lr = W_lk @ short_rk.T
    size_r = long_lr.norm(dim=0)
    kept_r = (size_r > _CUT * size_r[0]).double()
    short_rk, long_lr = kept_r[:, None] * short_rk, long_lr * (kept_r / size_r.clamp_min(torch.finfo(W.dtype).tiny))
    left, right = (long_lr, short_rk) if tall else (short_rk.T, long_lr.T)
    return left.float().contiguous(), right.float().contiguous()
