"""SCAFFOLD: control variates against client drift (Karimireddy et al., arXiv 1910.06378, Algorithm 1, Option II).

Rule: client i steps along g_i(y) - c_i + c, from c_i = 0; after its round c_i+ = c_i - c + (x - y_i) / (K eta).  The
server takes c <- c + |S| / N mean(c_i+ - c_i), from c = 0, with |S| clients in the round, N in the federation, and the
run's weights in the mean: clients' weights are normalised within a cohort, so this c goes with the objective that the
server's own steps follow.  A client that was never sampled has c_i = 0.

Computed is the mean of the gradients g_i(y_k) over the client's K steps of the round.  For SGD that is Option II
itself, as x - y_i = eta sum_k (g_i(y_k) - c_i + c); but x - y_i loses digits where steps are small beside the weights,
and K eta is 0 in a round whose learning rate is 0.  So every client counts its own K steps, the schedule cancels,
weight decay and momentum stay outside, and a clipped gradient counts as clipped, before the correction.  The head of a
classification is trained, and has control variates too.

With optimizer.name=adamw the corrected gradients go into AdamW, of which the paper says nothing: control variates stay
gradients, and are no differences of Adam's steps, whose length does not depend on that of the gradients.
Wire, numbers beside the method's own: as many as its trained tensors have, up and down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import LocalStep, Tensors
from rayfed_sub.methods.hooks import CohortMean

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config


@dataclass(frozen=True)
class Scaffold:
    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "arXiv 1910.06378"
    wire: ClassVar[str] = "t / t"
    departs: ClassVar[str] = "with optimizer.name=adamw: the paper's rule is for SGD, AdamW gets corrected gradients"
    keeps_mean: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        mu = config.federation.proximal
        if mu:
            allowed = "0 with hook.name=scaffold, whose control variates would hold the pull as well"
            raise UserError("federation.proximal", mu, allowed, "remove one of them")

    def init_server(self, trained: Tensors) -> Tensors:
        return {f"{name}/c": torch.zeros_like(tensor) for name, tensor in trained.items()}

    def broadcast(self, server: Tensors) -> Tensors:
        return server

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        memory = dict[str, Tensor]()
        for name, tensor in trained.items():
            own = kept.get(f"{name}/c", torch.zeros_like(tensor))
            shift = received[f"{name}/c"] - own
            memory |= {f"{name}/c": own, f"{name}/shift": shift, f"{name}/sum": torch.zeros_like(tensor)}
        return memory

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        sums = {f"{name}/sum": memory[f"{name}/sum"] + gradient for name, gradient in step.gradients.items()}
        corrected = {name: gradient + memory[f"{name}/shift"] for name, gradient in step.gradients.items()}
        return corrected, {**memory, **sums}

    def upload(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        return {f"{name}/c": memory[f"{name}/sum"] / steps - memory[f"{name}/c"] for name in ended}

    def client_state(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        return {f"{name}/c": memory[f"{name}/sum"] / steps for name in ended}

    def aggregate(self, server: Tensors, mean: CohortMean) -> tuple[Tensors, Tensors]:
        share = mean.trained / mean.clients
        return {name: c + share * mean.sent[name] for name, c in server.items()}, {}
