"""Clients in training whose tensors have equal shapes, side by side, so that all share their calls.

Legend: G clients of a stack, m, n layer sizes, R summed rank of closed blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Layer, LocalResult, ModelShape, Start, Tensors
from rayfed_sub.data.batching import Batches
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed
from rayfed_sub.training.client_errors import not_finite


@dataclass
class Clock:
    """Optimiser steps that layers have taken.  touched: whether the open block has been stepped in this round."""

    step: int
    touched: bool = False
    periods: int = 0
    base_scale: float = 1.0

    def advance(self, decay: float) -> None:
        """Counts a step that shrinks the weight by `decay`."""
        self.step += 1
        self.periods += not self.touched
        self.touched = True
        self.base_scale *= decay


@dataclass
class Trainee:
    """A client in training.  clock: of all its layers but experts' matrices, which have one each, by name; losses: of
    its steps so far, nats; memory: its hook's, of its own; taken: local steps of its life before this round."""

    client: int
    start: Start
    batches: Batches
    clock: Clock
    experts: dict[str, Clock]
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    failure: str | None = None
    memory: Tensors = field(default_factory=dict)
    taken: int = 0

    def clock_of(self, layer: Layer) -> Clock:
        """The clock of a target layer."""
        return self.experts[layer.name] if layer.expert else self.clock


@dataclass
class Stack:
    """Clients still training whose tensors have equal shapes, and these (G, ...): private copies that change in
    place."""

    trainees: list[Trainee]
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    closed: dict[str, Closed]
    anchors: dict[str, Tensor]  # the trained tensors as the round began; empty without FedProx


def trainee_of(
    client: int, start: Start, batches: Batches, shape: ModelShape, device: torch.device, taken: int
) -> Trainee:
    """A client before its first step."""
    memory = {name: tensor.to(device) for name, tensor in start.memory.items()}
    experts = {layer.name: Clock(expert_step(start, layer)) for layer in shape.experts}
    return Trainee(client, start, batches, Clock(start.step), experts, memory=memory, taken=taken)


def expert_step(start: Start, layer: Layer) -> int:
    """Steps that an expert's matrix has taken; a mean over clients counts the nearest number."""
    taken = start.moments.get(f"{layer.name}/step")
    return 0 if taken is None else round(float(taken))


def stacks_of(
    trainees: Sequence[Trainee], shape: ModelShape, optimizer: Optimizer, device: torch.device, *, anchored: bool
) -> list[Stack]:
    """The clients in stacks of equal shapes, in the order of each stack's first."""
    alike: dict[tuple[tuple[int, ...], ...], list[Trainee]] = {}
    for trainee in trainees:
        alike.setdefault(tuple(tuple(t.shape) for t in trainee.start.tensors.values()), []).append(trainee)
    return [_stack(some, shape, optimizer, device, anchored=anchored) for some in alike.values()]


def _stack(
    trainees: list[Trainee], shape: ModelShape, optimizer: Optimizer, device: torch.device, *, anchored: bool
) -> Stack:
    """The clients' tensors side by side, in fresh memory: equal packs, equal bits."""
    starts = [trainee.start for trainee in trainees]

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.float() for tensor in tensors]).to(device)

    tensors = {name: stacked([start.tensors[name] for start in starts]) for name in starts[0].tensors}
    moments = {
        role: {
            name: stacked([s.moments.get(f"{name}/{role}", torch.zeros_like(s.tensors[name])) for s in starts])
            for name in starts[0].trained
        }
        for role in optimizers.moment_roles(optimizer)
    }
    closed = {layer.name: Closed.begun(layer, [start.frozen for start in starts], device) for layer in shape.targets}
    anchors = {name: tensors[name].clone() for name in starts[0].trained} if anchored else {}
    return Stack(trainees, tensors, moments, closed, anchors)


def without_finished(stack: Stack, t: int | None, shape: ModelShape, results: dict[int, LocalResult]) -> Stack:
    """The stack without the clients that failed or have no batch number t; their results are noted.  t = None: all are
    done."""
    kept = [g for g, x in enumerate(stack.trainees) if t is not None and t < len(x.batches) and x.failure is None]
    if len(kept) == len(stack.trainees):
        return stack
    for g in set(range(len(stack.trainees))) - set(kept):
        results[stack.trainees[g].client] = _result(stack, g, shape)
    index = torch.tensor(kept, dtype=torch.long, device=next(iter(stack.tensors.values())).device)
    for closed in stack.closed.values():
        closed.select(index)
    return Stack(
        [stack.trainees[g] for g in kept],
        {name: tensor[index] for name, tensor in stack.tensors.items()},
        {role: {name: tensor[index] for name, tensor in tensors.items()} for role, tensors in stack.moments.items()},
        stack.closed,
        {name: tensor[index] for name, tensor in stack.anchors.items()},
    )


def _result(stack: Stack, g: int, shape: ModelShape) -> LocalResult:
    """Client g's round, on the CPU."""
    trainee = stack.trainees[g]
    start, losses = trainee.start, trainee.losses
    periods = max(1, trainee.clock.periods, *(clock.periods for clock in trainee.experts.values()))
    tensors = {name: tensor[g].cpu().clone() for name, tensor in stack.tensors.items()}
    moved = {
        f"{name}/{role}": at[name][g].cpu().clone() for role, at in stack.moments.items() for name in start.trained
    }
    moments = {**start.moments, **moved}  # of a factor at rest they stay as they were
    for name, clock in trainee.experts.items():
        moments[f"{name}/step"] = torch.tensor(float(clock.step), dtype=torch.float64)
    blocks = {}
    if start.subspace is not None:
        for layer in shape.targets:
            left, right = start.scale * tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"]
            closed = stack.closed[layer.name]
            if closed.left_GmR is not None:
                closed_left, closed_right = (x.cpu() for x in closed.of(g))
                left, right = torch.cat([closed_left, left], dim=1), torch.cat([closed_right, right])
            blocks[layer.name] = (left, right)
    metrics = {
        "loss": sum(losses) / max(1, len(losses)),
        "loss_last": losses[-1] if losses else 0.0,
        "labels": float(trainee.tokens),
        "steps": float(len(losses)),
        "periods": float(periods),
    }
    return LocalResult(
        client=trainee.client,
        tensors=tensors,
        moments=moments,
        step=trainee.clock.step,
        blocks=blocks,
        base_scale=trainee.clock.base_scale,
        periods=periods,
        metrics=metrics,
        failure=trainee.failure or not_finite(tensors),
        trained=start.trained,
        memory={name: tensor.cpu() for name, tensor in trainee.memory.items()},
        base_scales={name: clock.base_scale for name, clock in trainee.experts.items() if start.decays_base},
    )
