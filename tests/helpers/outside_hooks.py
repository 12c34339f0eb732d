"""Hooks written outside the package: FedProx's term, an optimizer (Muon without its Nesterov step), and wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rayfed_sub.core.types import LocalStep, Tensors
from rayfed_sub.methods import hooks


@dataclass(frozen=True)
class FedProx:
    """The pull mu (y - x) to where the round began (arXiv 1812.06127)."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "arXiv 1812.06127"
    wire: ClassVar[str] = "0 / 0"
    departs: ClassVar[str] = ""

    mu: float = 0.1

    check = hooks.nothing_refused
    init_server = hooks.nothing_at_server
    broadcast = hooks.nothing_received
    upload = hooks.nothing_kept
    client_state = hooks.nothing_kept
    aggregate = hooks.nothing_moved

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        return {f"{name}/start": tensor for name, tensor in trained.items()}

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        pulled = {n: g + self.mu * (step.tensors[n] - memory[f"{n}/start"]) for n, g in step.gradients.items()}
        return pulled, memory


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., 2024): momentum, made orthogonal; the buffer goes on from round to round at the client."""

    name: ClassVar[str] = "muon"
    paper: ClassVar[str] = "Jordan et al. 2024"
    wire: ClassVar[str] = "0 / 0"
    departs: ClassVar[str] = ""

    momentum: float = 0.9

    check = hooks.nothing_refused
    init_server = hooks.nothing_at_server
    broadcast = hooks.nothing_received
    upload = hooks.nothing_kept
    aggregate = hooks.nothing_moved

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        return {f"{name}/m": kept.get(f"{name}/m", torch.zeros_like(tensor)) for name, tensor in trained.items()}

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        moved = {f"{n}/m": self.momentum * memory[f"{n}/m"] + g for n, g in step.gradients.items()}
        return {n: orthogonal(moved[f"{n}/m"]) for n in step.gradients}, moved

    def client_state(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        return memory


def orthogonal(x: Tensor) -> Tensor:
    """A matrix with singular values near 1, by five steps of Newton and Schulz; a vector of norm 1."""
    if x.dim() == 1:
        return x / (x.norm() + 1e-7)
    x = x / ((x @ x.T).diagonal().sum().sqrt() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@dataclass(frozen=True)
class Contrast:
    """MOON's contrast (arXiv 2103.16257) between models' tensors in place of their representations: near the server's
    x, far from the client's own z of the round before, by -log of the softmax of their cosines with y."""

    name: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "arXiv 2103.16257"
    wire: ClassVar[str] = "0 / 0"
    departs: ClassVar[str] = "tensors in place of representations"

    mu: float = 1.0
    temperature: float = 0.5

    check = hooks.nothing_refused
    init_server = hooks.nothing_at_server
    broadcast = hooks.nothing_received
    upload = hooks.nothing_kept
    aggregate = hooks.nothing_moved

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        last = {f"{name}/last": kept.get(f"{name}/last", tensor) for name, tensor in trained.items()}
        return {**last, **{f"{name}/start": tensor for name, tensor in trained.items()}}

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        def loss(y: Tensors) -> Tensor:
            sides = [cosine(y, {name: memory[f"{name}/{kind}"] for name in y}) for kind in ("start", "last")]
            return -self.mu * torch.log_softmax(torch.stack(sides) / self.temperature, 0)[0]

        term = torch.func.grad(loss)(dict(step.tensors))
        return {name: gradient + term[name] for name, gradient in step.gradients.items()}, memory

    def client_state(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        return {f"{name}/last": tensor for name, tensor in ended.items()}


def cosine(a: Tensors, b: Tensors) -> Tensor:
    """Of all tensors together."""

    def inner(x: Tensors, y: Tensors) -> Tensor:
        return torch.stack([(x[name] * y[name]).sum() for name in x]).sum()

    return inner(a, b) / ((inner(a, a) + 1e-12) * (inner(b, b) + 1e-12)).sqrt()


@dataclass(frozen=True)
class SpectralDescent(FedProx):
    """Steepest descent in the spectral norm (Carlson et al. 2015): the orthogonal factor of the gradient as it is."""

    name: ClassVar[str] = "spectral"

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        return {name: orthogonal(gradient) for name, gradient in step.gradients.items()}, memory


@dataclass(frozen=True)
class WritesTheStart(FedProx):
    """Writes into the round's start, which lies in shared memory."""

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        for name in step.gradients:
            memory[f"{name}/start"].add_(1.0)
        return step.gradients, memory


@dataclass(frozen=True)
class LooksAtValues(FedProx):
    """Decides by a value, which tensors without data have not."""

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        large = any(float(gradient.norm()) > 1 for gradient in step.gradients.values())
        return step.gradients if large else super().correct(memory, step)[0], memory


@dataclass(frozen=True)
class ForgetsATensor(FedProx):
    """Gives the optimizer one gradient too few."""

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        return dict(list(step.gradients.items())[1:]), memory


@dataclass(frozen=True)
class NamesItsOwnWay(FedProx):
    """Puts the kind before the tensor's name."""

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        return {f"start/{name}": tensor for name, tensor in trained.items()}

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        return step.gradients, memory


@dataclass(frozen=True)
class SendsMore(FedProx):
    """Sends what its `wire` leaves out."""

    def upload(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        return {f"{name}/end": tensor for name, tensor in ended.items()}
