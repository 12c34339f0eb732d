"""Fed-SB with its paper's start: outer factors and core from the first gradient (Singhal et al., arXiv 2502.15436).

Rule: as `fed_sb.py`, but for the factors.  Round 0 is a pass over the clients' data that trains nothing: client k sends
G_k, the mean gradient of the pretrained weight W over its local steps' batches.  The server takes the first step of
AdamW, D = -eta sign(sum_k p_k G_k), its best approximation of rank r, U S V^T, and begins with B = U, A = V^T and the
core s^-1 S, so that round 1 starts from W + U S V^T.  From then on clients train the core C alone, and C' = sum_k p_k
C_k.  Exact in these rounds.  Read in the public code of Fed-SB, which takes the gradient over rows of all clients at
once; here each client's part of it travels.
eta = `start_lr` is there the first learning rate of a warm-up.  Round 0 costs what dense FedAvg does, in bytes, memory
and time.  Privacy of clients and server optimisers are refused: G_k would be released without noise (with that of
single rows G_k is a mean of gradients that have it).  A round 0 that nobody ends is repeated.  G_k are gradients as
optimizer.clip_norm leaves them.  A layer, or an expert, whose gradient is zero in round 0 has no factors, and never
moves.
Wire, numbers per layer: m n up in round 0, then r^2; down r (m + n + r) to a client that has not yet got the factors,
then r^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    Layer,
    LocalResult,
    LocalStep,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
    wire_bytes,
)
from rayfed_sub.methods import averaging, fed_sb, lora

_SUM = "gradient"  # memory `<trained tensor>/gradient` of the pass; on the wire `<layer>/gradient`
_BEGUN = "begun"  # server tensor int64: the round from which on there are factors; 0: not yet


@dataclass(frozen=True)
class FedSBGradient:
    name: ClassVar[str] = "fed-sb-gradient"
    paper: ClassVar[str] = "arXiv 2502.15436"
    trained: ClassVar[str] = "an r x r core between the first gradient's top singular vectors"
    exact: ClassVar[bool] = True
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    wire: ClassVar[str] = "m n first, then r^2 / r (m + n + r) first, then r^2"
    departs: ClassVar[str] = (
        "each client sends its part of the gradient in round 0, which moves the model and is no mean of changes"
    )

    rank: Annotated[averaging.Rank, Field(description="Side r of the trained core.")] = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    start_lr: Annotated[
        averaging.Positive,
        Field(description="Length of the first step along the gradient's sign, with which the core begins."),
    ] = 1e-4
    optimizer_state: averaging.Memory = "keep"

    check = lora.check_rank
    broadcast = averaging.broadcast
    accumulator = averaging.accumulator
    accumulate = averaging.accumulate
    personal_model = averaging.no_personal_model

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        tensors = {**averaging.head(shape, weights), _BEGUN: torch.tensor(0)}
        for layer in shape.targets:
            rank = lora.layer_rank(self, layer)
            tensors[f"{layer.name}/left"] = torch.zeros(layer.m, rank)
            tensors[f"{layer.name}/core"] = torch.zeros(rank, rank)
            tensors[f"{layer.name}/right"] = torch.zeros(rank, layer.n)
        return ServerState(0, tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        has = 0 < int(server.tensors[_BEGUN]) <= since
        roles = ("core",) if has else ("left", "core", "right")
        return wire_bytes({name: server.tensors[name] for name in averaging.tensor_names(shape, *roles)})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        begun = int(broadcast.tensors[_BEGUN])
        if not begun:
            return gathering(broadcast, shape)
        own = state if state is not None and state.round > begun else None  # the pass leaves no moments
        return fed_sb.start_client(self, broadcast, own, shape)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        begun = int(broadcast.tensors[_BEGUN])
        sent = averaging.head(shape, result.tensors) if begun else {}
        for layer in shape.targets:
            if begun:
                sent[f"{layer.name}/core"] = result.tensors[f"{layer.name}/core"]
            else:
                sent[f"{layer.name}/{_SUM}"] = result.memory[f"{moving(layer)}/{_SUM}"] / result.step
        return Update(result.client, weight, sent, result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        begun = int(broadcast.tensors[_BEGUN])
        return averaging.moments_to_keep(self.optimizer_state, result) if begun else {}

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        changed = averaging.mean(total)
        if int(server.tensors[_BEGUN]) or not changed:
            return server.advance(changed)
        for layer in shape.targets:
            step_mn = -self.start_lr * changed.pop(f"{layer.name}/{_SUM}").sign()
            left_mr, right_rn = fed_sb.outer_factors(step_mn, lora.layer_rank(self, layer))
            core_rr = left_mr.T @ step_mn @ right_rn.T / lora.layer_scale(self, layer)
            changed |= {f"{layer.name}/left": left_mr, f"{layer.name}/core": core_rr, f"{layer.name}/right": right_rn}
        return server.advance({**changed, _BEGUN: torch.tensor(server.round + 1)})

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return fed_sb.core_model(self, server, shape)


def gathering(received: Broadcast, shape: ModelShape) -> Start:
    """The start of the pass: a dense change of every target, the longer factor beside a unit matrix, that stays zero
    while its gradients are added up."""
    tensors = averaging.head(shape, received.tensors)
    for layer in shape.targets:
        zeros_mn, unit = torch.zeros(layer.m, layer.n), torch.eye(min(layer.m, layer.n))
        left, right = (zeros_mn, unit) if moving(layer).endswith("/left") else (unit, zeros_mn)
        tensors |= {f"{layer.name}/left": left, f"{layer.name}/right": right}
    trained = tuple(moving(layer) for layer in shape.targets)
    memory = {f"{name}/{_SUM}": torch.zeros_like(tensors[name]) for name in trained}
    return Start(tensors, trained, correct=gathered, memory=memory)


def moving(layer: Layer) -> str:
    """The factor of the pass that is as large as the weight."""
    return f"{layer.name}/left" if layer.n <= layer.m else f"{layer.name}/right"


def gathered(memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
    """No gradient for the optimizer, and the sum with this step's."""
    sums = {f"{name}/{_SUM}": memory[f"{name}/{_SUM}"] + gradient for name, gradient in step.gradients.items()}
    return {name: torch.zeros_like(gradient) for name, gradient in step.gradients.items()}, sums
