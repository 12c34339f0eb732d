"""Clients in training whose tensors have equal shapes, side by side, so that all share their calls.

Legend: G clients of a stack, m, n layer sizes, R summed rank of closed blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayfed_sub.core.devices import fetched, onto, sent, stacked
from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.types import Layer, LocalResult, ModelShape, OptimizerRule, Start, Tensors
from rayfed_sub.data.batching import Batches
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed


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
    """A client in training.  clock: of all its layers but experts' matrices, which have one each, by name; steps: local
    steps so far, empty: those without a row; losses: of steps that have been read from the device, nats; tokens: labels
    of these; memory: its hook's, of its own; taken: local steps of its life before this round."""

    client: int
    start: Start
    batches: Batches
    clock: Clock
    experts: dict[str, Clock]
    steps: int = 0
    empty: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    failure: str | None = None
    memory: Tensors = field(default_factory=dict)
    taken: int = 0

    def clock_of(self, layer: Layer) -> Clock:
        """The clock of a target layer."""
        return self.experts[layer.name] if layer.expert else self.clock

    def number_of(self, layer: Layer) -> int:
        """The number of a target's next step in the client's life, also where its clock begins every round anew."""
        return self.taken - self.start.step + self.clock_of(layer).step


@dataclass
class Stack:
    """Clients still training whose tensors have equal shapes, and these (G, ...): private copies on the device that
    change in place.  A client may have none: then it computes its losses."""

    device: torch.device
    trainees: list[Trainee]
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    closed: dict[str, Closed]
    anchors: dict[str, Tensor]  # the trained tensors as the round began; empty without FedProx


def trainee_of(
    client: int, start: Start, batches: Batches, shape: ModelShape, device: torch.device, taken: int
) -> Trainee:
    """A client before its first step."""
    memory = {name: sent(tensor, device) for name, tensor in start.memory.items()}
    experts = {layer.name: Clock(expert_step(start, layer)) for layer in shape.experts}
    return Trainee(client, start, batches, Clock(start.step), experts, memory=memory, taken=taken)


def expert_step(start: Start, layer: Layer) -> int:
    """Steps that an expert's matrix has taken; a mean over clients counts the nearest number."""
    taken = start.moments.get(f"{layer.name}/step")
    return 0 if taken is None else round(float(taken))


def stacks_of(
    trainees: Sequence[Trainee], shape: ModelShape, optimizer: OptimizerRule, device: torch.device, *, anchored: bool
) -> list[Stack]:
    """The clients in stacks of equal shapes, in the order of each stack's first."""
    alike: dict[tuple[tuple[int, ...], ...], list[Trainee]] = {}
    for trainee in trainees:
        alike.setdefault(tuple(tuple(t.shape) for t in trainee.start.tensors.values()), []).append(trainee)
    return [_stack(some, shape, optimizer, device, anchored=anchored) for some in alike.values()]


def _stack(
    trainees: list[Trainee], shape: ModelShape, optimizer: OptimizerRule, device: torch.device, *, anchored: bool
) -> Stack:
    """The clients' tensors side by side, in fresh memory: equal packs, equal bits.  Those of clients that come back lie
    on the CPU, others where the broadcast lies."""
    starts = [trainee.start for trainee in trainees]
    shapes = {name: tensor.shape for name, tensor in starts[0].tensors.items()}
    tensors = {name: stacked([start.tensors[name] for start in starts], own, device) for name, own in shapes.items()}
    moments = {
        role: {
            name: stacked([start.moments.get(f"{name}/{role}") for start in starts], shapes[name], device)
            for name in starts[0].trained
        }
        for role in optimizers.moment_roles(optimizer)
    }
    closed = {layer.name: Closed.begun(layer, [start.frozen for start in starts], device) for layer in shape.targets}
    anchors = {name: tensors[name].clone() for name in starts[0].trained} if anchored else {}
    return Stack(device, trainees, tensors, moments, closed, anchors)


def without_finished(stack: Stack, t: int) -> tuple[Stack, Stack | None]:
    """The stack without the clients that failed or have no batch number t, and these clients; None without any."""
    kept = [g for g, x in enumerate(stack.trainees) if t < len(x.batches) and x.failure is None]
    if len(kept) == len(stack.trainees):
        return stack, None
    if not kept:
        return Stack(stack.device, [], {}, {}, {}, {}), stack
    others = sorted(set(range(len(stack.trainees))) - set(kept))
    return _some(stack, kept), _some(stack, others)


def _some(stack: Stack, kept: Sequence[int]) -> Stack:
    """The clients at these positions."""
    index = onto(kept, stack.device, torch.long)
    return Stack(
        stack.device,
        [stack.trainees[g] for g in kept],
        {name: tensor[index] for name, tensor in stack.tensors.items()},
        {role: {name: tensor[index] for name, tensor in tensors.items()} for role, tensors in stack.moments.items()},
        {name: closed.some(kept, index) for name, closed in stack.closed.items()},
        {name: tensor[index] for name, tensor in stack.anchors.items()},
    )


def results_of(stack: Stack, shape: ModelShape) -> list[LocalResult]:
    """The clients' rounds, on the CPU."""
    sides = {"left": "left_GmR", "right": "right_GRn"}
    closed = {
        f"closed/{layer}/{side}": tensor
        for layer, blocks in stack.closed.items()
        for side, field in sides.items()
        if (tensor := getattr(blocks, field)) is not None
    }
    moments = {f"moment/{role}/{name}": x for role, at in stack.moments.items() for name, x in at.items()}
    memory = {f"memory/{g}/{name}": x for g, one in enumerate(stack.trainees) for name, x in one.memory.items()}
    given = {f"tensor/{name}": x for name, x in stack.tensors.items()} | moments | closed | memory
    here = fetched(given)
    blocks = {
        layer: Closed(here.get(f"closed/{layer}/left"), here.get(f"closed/{layer}/right"), own.used_G)
        for layer, own in stack.closed.items()
    }
    at_home = Stack(
        torch.device("cpu"),
        stack.trainees,
        {name: here[f"tensor/{name}"] for name in stack.tensors},
        {role: {name: here[f"moment/{role}/{name}"] for name in at} for role, at in stack.moments.items()},
        blocks,
        {},
    )
    for g, one in enumerate(stack.trainees):
        one.memory = {name: here[f"memory/{g}/{name}"] for name in one.memory}
    return [_result(at_home, g, shape) for g in range(len(stack.trainees))]


def _result(stack: Stack, g: int, shape: ModelShape) -> LocalResult:
    """Client g's round, of a stack on the CPU."""
    trainee = stack.trainees[g]
    start, losses = trainee.start, trainee.losses
    periods = max(1, trainee.clock.periods, *(clock.periods for clock in trainee.experts.values()))
    tensors = {name: tensor[g].clone() for name, tensor in stack.tensors.items()}
    moved = {f"{name}/{role}": at[name][g].clone() for role, at in stack.moments.items() for name in start.trained}
    moments = {**start.moments, **moved}  # of a factor at rest they stay as they were
    for name, clock in trainee.experts.items():
        moments[f"{name}/step"] = torch.tensor(float(clock.step), dtype=torch.float64)
    blocks = {}
    if start.subspace is not None:
        for layer in shape.targets:
            left, right = start.scale * tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"]
            closed = stack.closed[layer.name]
            if closed.left_GmR is not None:
                closed_left, closed_right = closed.of(g)
                left, right = torch.cat([closed_left, left], dim=1), torch.cat([closed_right, right])
            blocks[layer.name] = (left, right)
    metrics = {
        "loss": sum(losses) / max(1, len(losses)),
        "loss_last": losses[-1] if losses else 0.0,
        "labels": float(trainee.tokens),
        "steps": float(len(losses) + trainee.empty),
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
        memory=trainee.memory,
        base_scales={name: clock.base_scale for name, clock in trainee.experts.items() if start.decays_base},
    )
