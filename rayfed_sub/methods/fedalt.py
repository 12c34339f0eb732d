"""FedALT, a variant: an adapter of each client's own over the frozen mean of the others' (Bian et al., AAAI 2026, arXiv
2503.11880).

Rule: client k trains its own adapter, which it keeps and never replaces, over the frozen rest of the world: A_R = the
mean of the others' A, B_R of their B; its model is W + s (a B_k A_k + (1 - a) B_R A_R).  It sends its own adapter.  Not
exact: nothing is averaged into it.  Read in the public code and in a summary of the paper, which agree.
That makes it a variant: in the paper a is a softmax of the layer's input, token by token, learned by each client; here
a model is a change of weights, so a = `share` for all tokens, as in the paper's ablation without the mixer (1/2).
The paper's clients all take part in every round: here the others are those of the last round, weighed by p_k
(federation.client_weighting=uniform: plain means); a client that took part in it subtracts its own part.  All begin
with one A.  A client that never trained has the others' part alone, as the global model.  A trained head is averaged.
Wire, numbers per layer: r (m + n) up, r (m + n) down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.fields import Field
from rayfed_sub.core.types import (
    Accumulator,
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

_COHORT = "history/cohort"
"""Server tensor (clients of the last round, 2) float64: a client's number and its p_k.

Other tensors of the past stay at the server.  This one is in the broadcast because the mean of the others is made where
the client's start is, from the broadcast and the client's own state: its own part is (B_k, A_k), which its state has,
at weight p_k over the sum of the cohort's p, which only the server knows once the round is over.  (The state's round
would tell whether it took part, not with which share; and a client whose upload was lost did not.)  A deployment's
server subtracts the client's part itself and sends the difference, two factors: `download_bytes` counts these, and no
client learns who else took part."""
_NUMBER = "client"  # in a client's state: its number


@dataclass(frozen=True)
class FedALT:
    name: ClassVar[str] = "fedalt"
    paper: ClassVar[str] = "arXiv 2503.11880"
    trained: ClassVar[str] = "LoRA's A and B of each client's own, over the frozen mean of the others'"
    exact: ClassVar[bool] = False
    supports_server_optimizer: ClassVar[bool] = False
    personal: ClassVar[bool] = True
    wire: ClassVar[str] = "r (m + n) / r (m + n)"
    departs: ClassVar[str] = (
        "a variant: fixed weights of the two adapters, the paper's ablation, in place of a softmax of every token's "
        "input; the others are those of the last round"
    )

    rank: lora.FactorRank = 8
    alpha: lora.Alpha = 16.0
    dropout: lora.Dropout = 0.0
    use_rslora: lora.UseRslora = False
    rank_pattern: lora.RankPattern = None
    alpha_pattern: lora.AlphaPattern = None
    share: Annotated[
        float, Field(gt=0, lt=1, description="Weight of the client's own adapter; the others' has the rest.")
    ] = 0.5
    optimizer_state: averaging.Memory = "keep"

    check = lora.check_rank

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        factors = lora.init_factors(self, weights, shape, seed).tensors
        return ServerState(0, {**factors, _COHORT: torch.zeros(0, 2, dtype=torch.float64)})

    def broadcast(self, server: ServerState) -> Broadcast:
        return Broadcast(server.round, server.tensors)

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        # A deployment's server would subtract the client's own part itself.
        return wire_bytes({name: server.tensors[name] for name in averaging.tensor_names(shape, "left", "right")})

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        tensors, frozen, scales = averaging.head(shape, broadcast.tensors), dict[str, Tensor](), dict[str, float]()
        for layer in shape.targets:
            left, right, rank = f"{layer.name}/left", f"{layer.name}/right", lora.layer_rank(self, layer)
            if state is None:
                tensors |= {left: torch.zeros(layer.m, rank), right: lora.lora_right(layer, rank, client.seed)}
            else:
                tensors |= {left: state.tensors[left], right: state.tensors[right]}
            scale = lora.layer_scale(self, layer)
            others = self._others(broadcast.tensors, state, layer.name, scale)
            frozen |= {left: others.scale * others.left, right: others.right}
            scales[layer.name] = self.share * scale
        moments, step = averaging.moments_to_start(self.optimizer_state, broadcast, state)
        trained = averaging.tensor_names(shape, "left", "right")
        start = lora.start(self, shape, tensors, trained, moments, step)
        return replace(start, scales=scales, frozen=frozen)

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        tensors = {name: result.tensors[name] for name in averaging.tensor_names(shape, "left", "right")}
        return Update(result.client, weight, tensors, result.metrics)

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        names = [f"{layer.name}/{role}" for layer in shape.targets for role in ("left", "right")]
        own = {name: result.tensors[name] for name in names}
        return {**own, _NUMBER: torch.tensor(result.client), **averaging.moments_to_keep(self.optimizer_state, result)}

    accumulator = averaging.accumulator

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        added, key = averaging.add(total, update.tensors, update.weight), str(update.client)
        return replace(added, counts={**total.counts, key: total.counts.get(key, 0.0) + update.weight})

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        if not total.weight:
            return server.advance({})
        shares = [[float(client), weight / total.weight] for client, weight in sorted(total.counts.items())]
        return server.advance({**averaging.mean(total), _COHORT: torch.tensor(shares, dtype=torch.float64)})

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        return self.personal_model(server, None, shape)

    def personal_model(self, server: ServerState, state: ClientState | None, shape: ModelShape) -> Mapping[str, Change]:
        changes = {}
        for layer in shape.targets:
            scale = lora.layer_scale(self, layer)
            blocks = [self._others(server.tensors, state, layer.name, scale)]
            if state is not None:
                right = state.tensors[f"{layer.name}/right"].to(blocks[0].right)
                blocks.append(Block(state.tensors[f"{layer.name}/left"].to(right), right, self.share * scale))
            changes[layer.name] = Change(blocks=tuple(blocks))
        return changes

    def _others(self, received: Tensors, state: ClientState | None, layer: str, scale: float) -> Block:
        """The frozen part: the mean over the last round's clients without this one; of rank 0 if there is no other."""
        left_mr, right_rn = received[f"{layer}/left"], received[f"{layer}/right"]
        share = own_share(received[_COHORT], state)
        if share > 1 - 1e-9:
            left_mr, right_rn = left_mr[:, :0], right_rn[:0]
        elif share:
            assert state is not None
            own_mr, own_rn = (state.tensors[f"{layer}/{role}"].to(left_mr) for role in ("left", "right"))
            left_mr, right_rn = ((x - share * own) / (1 - share) for x, own in ((left_mr, own_mr), (right_rn, own_rn)))
        return Block(left_mr, right_rn, (1 - self.share) * scale)


def own_share(cohort_n2: Tensor, state: ClientState | None) -> float:
    """p_k of the client in the last round; 0 if it took no part."""
    found = {} if state is None else {int(client): share for client, share in cohort_n2.tolist()}
    return 0.0 if state is None else found.get(int(state.tensors[_NUMBER]), 0.0)
