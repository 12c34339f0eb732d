"""The records that travel between the layers: plain, frozen, made of named tensors.

Shape legend (used in every file):
    m, n   output and input size of a target layer; its weight is (m, n) whatever the library stores
    r      rank            R  summed rank of several blocks
    G      clients of a pack    B  rows of a client's batch    T  tokens of a row    N = B * T

Tensor names are `<module>/<role>`, where module is the layer's dotted name in the model and role is one of
    weight  dense matrix (m, n)          bias   dense vector (m,)
    left    factor (m, r)                right  factor (r, n)            core  factor (r, r)
    heads   scales (h,) of the cores of h heads: `core` is then (h, r, r), one on the diagonal for every r components
A low-rank change of a layer is `scale * left @ core @ right` (core: identity when absent).  LoRA's B is
`left`, its A is `right`; GaLore's basis is the one of the two that is not trained.  A hook's tensors stand beside a
method's as `hook/<name>` (`methods/hooked.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rayfed_sub.core.arrays import as_arrays

Tensors = Mapping[str, Tensor]

HOOK = "hook/"
"""Prefix of a hook's tensors in records."""


@dataclass(frozen=True)
class Layer:
    """A linear layer whose weight is (m, n) = (out, in).

    expert: the matrix of one expert, named `<parameter>.<number>`, which sees only the tokens that are sent to it.  It
    takes a step where a client's loss depends on one of these, and has its own count of steps.
    """

    name: str
    m: int
    n: int
    bias: bool = False
    expert: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model for methods: its target layers and its dense trained head (often empty)."""

    targets: tuple[Layer, ...]
    head: tuple[Layer, ...] = ()

    @property
    def experts(self) -> tuple[Layer, ...]:
        """Targets that are matrices of experts."""
        return tuple(layer for layer in self.targets if layer.expert)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Tensor names of the head: every weight, and the bias where there is one."""
        return tuple(f"{layer.name}/{role}" for layer in self.head for role in ("weight", "bias")[: 1 + layer.bias])


@dataclass(frozen=True)
class Block:
    """A low-rank term `scale * left @ core @ right`; left (m, r), right (r, n), core (r, r) or None."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    core: Tensor | None = None

    def dense(self) -> Tensor:
        """The (m, n) matrix."""
        left = self.left if self.core is None else self.left @ self.core
        return self.scale * (left @ self.right)


@dataclass(frozen=True)
class Change:
    """A layer's weight relative to a given W (m, n): `base_scale * W + sum of blocks`, or `dense` in its place.

    >>> W = torch.eye(2); u = torch.tensor([[1.0], [0.0]])
    >>> Change(base_scale=0.5, blocks=(Block(u, u.T, scale=2.0),)).apply(W)
    tensor([[2.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    base_scale: float = 1.0
    blocks: tuple[Block, ...] = ()
    dense: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """The blocks, one at least, side by side: left (m, R) and right (R, n), scale and core folded into left."""
        lefts = [b.scale * (b.left if b.core is None else b.left @ b.core) for b in self.blocks]
        return torch.cat(lefts, dim=1), torch.cat([block.right for block in self.blocks], dim=0)

    def apply(self, W: Tensor) -> Tensor:
        """The changed weight, (m, n), a new float32 tensor (W itself is never written)."""
        out = (W if self.dense is None else self.dense).float() * self.base_scale
        for block in self.blocks:
            out = out + block.dense()
        return out


@dataclass(frozen=True)
class Subspace:
    """GaLore's rule for the fixed factor: where it comes from and how often it is renewed.

    refresh_every counts the client's own optimiser steps; 0: never, the Start's fixed factor stays as it is.
    moments: rule for Adam's moments at a refresh (`keep` as galore-torch, `rotate` as LDAdam, `reset`).
    """

    rank: int
    refresh_every: int
    projector: str = "exact"
    moments: str = "keep"


class OptimizerRule(Protocol):
    """Settings of the clients' optimizer that a local step reads; `optimizer` of a configuration has these, and what
    each means."""

    @property
    def name(self) -> Literal["adamw", "sgd"]: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip_norm(self) -> float | None: ...


@dataclass(frozen=True)
class LocalStep:
    """A client's local step as a hook sees it (`methods/hooks.py`), after the backward pass and clipping.

    tensors: the trained tensors before the step; gradients: of the client's loss, by the same names, both float32 and
    the hook's own, to be written where it likes.  GaLore's gradients are those in the subspace.  number: of the round's
    steps, from 0; lr: learning rate of the round.
    """

    tensors: Tensors
    gradients: Tensors
    number: int
    lr: float


Correction = Callable[[Tensors, LocalStep], tuple[Tensors, Tensors]]
"""(memory, step) -> the gradients that the optimizer gets, and the memory after the step."""


@dataclass(frozen=True)
class Start:
    """Start of one client's round, chosen by the method.

    tensors: every local tensor by name (both factors of a block, dense weights, the head); trained: those the
    optimiser steps; scale multiplies every block, or what `scales` has for its layer (never with a subspace);
    moments: `<name>/m1`, `<name>/m2` (absent = zeros); step: optimiser steps already taken with these moments, those of
    an expert's matrix among the moments as `<layer>/step` (absent = 0); subspace: set for GaLore (the fixed factor may
    be all zeros at step 0, whose refresh fills it; a zero row moves nothing until the next refresh).
    dropout: share of the numbers in a block's input that training drops (`training/dropout.py`).
    decays_base: weight decay shrinks the whole weight, as GaLore's does, and not only what is trained.
    penalty: a term of the client's own local loss, from its own tensors (by name, as in `tensors`) to a scalar.
    frozen: blocks `<layer>/left` (m, R) and `<layer>/right` (R, n), the scale in left, with which the client trains as
    if their product were in the weight, and which nobody trains; never with a subspace.
    aligned: False where component i of the factors is another one at each client, or is turned before it is averaged,
    so that factors averaged one by one say nothing of the method.
    correct: a change of every step's gradients, a hook's or, where hooks are refused, the method's own; memory: the
    tensors with which it begins, named `<trained tensor>/<kind>`.
    """

    tensors: Tensors
    trained: tuple[str, ...]
    scale: float = 1.0
    moments: Tensors = field(default_factory=dict)
    step: int = 0
    subspace: Subspace | None = None
    decays_base: bool = False
    penalty: Callable[[Tensors], Tensor] | None = None
    correct: Correction | None = None
    memory: Tensors = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    frozen: Tensors = field(default_factory=dict)
    aligned: bool = True

    def scale_of(self, layer: str) -> float:
        """The scale of the layer's block."""
        return self.scales.get(layer, self.scale)


@dataclass(frozen=True)
class LocalResult:
    """Result of one client's round, whichever executor trained it.

    tensors, moments, step: as in `Start`, after the round.  blocks: per target layer the whole change of the
    round as (left (m, R), right (R, n)), scale folded into left, closed and open periods alike; empty for
    methods without a subspace.  base_scale: the factor c that weight decay left on the weight the round began with;
    base_scales: of experts' matrices by layer, where it is their own.
    periods: projector periods touched, at least 1.  trained: as in `Start`.  memory: a hook's, after the last step.
    """

    client: int
    tensors: Tensors
    moments: Tensors
    step: int
    blocks: Mapping[str, tuple[Tensor, Tensor]]
    base_scale: float
    periods: int
    metrics: Mapping[str, float]
    failure: str | None = None
    trained: tuple[str, ...] = ()
    memory: Tensors = field(default_factory=dict)
    base_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """A client: its number and the run's seed, for draws that server and client share without sending."""

    id: int
    seed: int


@dataclass(frozen=True)
class ClientState:
    """State of a client between rounds: tensors only, so it can be stored, moved, hashed and spilled.

    cursor: local steps ever taken; it selects the next batch and survives an optimiser reset.
    """

    round: int
    cursor: int
    step: int
    tensors: Tensors

    def __reduce__(self) -> Any:
        return as_arrays(self)


@dataclass(frozen=True)
class Update:
    """Update of a client: the tensors a real deployment would upload, its raw weight, its metrics.

    failure: why a client failed; it then has weight 0, no tensors, and of its metrics those that are finite.
    """

    client: int
    weight: float
    tensors: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    def __reduce__(self) -> Any:
        return as_arrays(self)

    @property
    def wire_bytes(self) -> int:
        return wire_bytes(self.tensors)


@dataclass(frozen=True)
class Broadcast:
    """Server tensors in shared memory, put there once a round; every client of the round reads the same."""

    round: int
    tensors: Tensors

    def __reduce__(self) -> Any:
        return as_arrays(self)


@dataclass(frozen=True)
class ServerState:
    """The server between rounds.  `round` counts finished rounds.  Names ending in `/weight` of a target layer
    hold its current dense weight (float32), so that the backbone itself never changes."""

    round: int
    tensors: Tensors

    def advance(self, tensors: Tensors) -> ServerState:
        """The next round's state, with `tensors` replacing those of the same name."""
        return replace(self, round=self.round + 1, tensors={**self.tensors, **tensors})


@dataclass(frozen=True)
class Accumulator:
    """A running weighted sum: total weight and per name the sum of weight * tensor (normalised at the end).  Its
    tensors belong to it alone, so that the next sum, and the mean, may take their memory.

    waiting: by name, terms left (m, r) @ right (r, n) of the sum that are not yet in its tensor, in their order
    (`averaging.add_changes`)."""

    weight: float
    tensors: Tensors
    counts: Mapping[str, float] = field(default_factory=dict)
    waiting: Mapping[str, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict)


def wire_bytes(tensors: Tensors) -> int:
    """Bytes of the tensors as sent.

    >>> import torch
    >>> wire_bytes({"a/left": torch.zeros(3, 2), "a/right": torch.zeros(2, 5)})  # (6 + 10) * 4
    64
    """
    return sum(t.numel() * t.element_size() for t in tensors.values())
