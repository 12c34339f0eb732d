"""Optimiser steps of experts' matrices, which take them one by one: where a client's loss depends on none of the tokens
that it sends to an expert, that expert stays as it is, with its moments, its count of steps and its weight.

Legend: G clients of a stack, g those whose step it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rayfed_sub.core.types import ModelShape, OptimizerRule
from rayfed_sub.training import optimizers
from rayfed_sub.training.galore import Refresh
from rayfed_sub.training.stacks import Clock, Stack, Trainee

ROLES = ("weight", "left", "right", "core", "heads")
"""Tensors of a target that may be trained."""


def sent(
    shape: ModelShape, stack: Stack, gradients: Mapping[str, Tensor], refresh: Refresh | None
) -> dict[str, list[bool]]:
    """By expert's matrix, of each client, whether its loss has a gradient there.

    gradients: of the losses alone.  Where a basis is due, the gradient in the old one, which may be none, says nothing,
    and that in the new one counts.
    """
    found: list[Tensor] = []
    zeros_G = torch.zeros(len(stack.trainees), dtype=torch.bool, device=stack.device)
    for layer in shape.experts:
        own = [gradients[name] for role in ROLES if (name := f"{layer.name}/{role}") in gradients]
        sent_G = torch.stack([_any(x) for x in own]).any(0) if own else zeros_G
        if refresh is not None and layer.name in refresh.due:
            due_G, new = torch.tensor(refresh.due[layer.name]), refresh.gradients.get(layer.name)
            sent_G = torch.where(due_G.to(zeros_G.device), zeros_G if new is None else _any(new), sent_G)
        found.append(sent_G)
    rows: list[list[bool]] = torch.stack(found).tolist() if found else []
    return dict(zip((layer.name for layer in shape.experts), rows, strict=True))


def _any(x: Tensor) -> Tensor:
    return (x != 0).flatten(1).any(1)


def period(trainee: Trainee) -> int:
    """Steps between two bases; 0: never."""
    return 0 if trainee.start.subspace is None else trainee.start.subspace.refresh_every


def since(trainees: Sequence[Trainee], clocks: Sequence[Clock]) -> list[int]:
    """Steps that the moments of GaLore's factors have seen, by which Adam corrects their bias: it starts anew with them
    where they are reset."""
    subspace = trainees[0].start.subspace
    if subspace is None or subspace.moments != "reset":
        return [clock.step for clock in clocks]
    pairs = zip(trainees, clocks, strict=True)
    return [clock.step % (period(trainee) or clock.step + 1) for trainee, clock in pairs]


def step_experts(
    stack: Stack,
    shape: ModelShape,
    gradients: Mapping[str, Tensor],
    sent: Mapping[str, Sequence[bool]],
    optimizer: OptimizerRule,
    lr: float,
    decay: float,
) -> None:
    """The step of the experts' matrices of the clients that have one; decay: of the whole weight, 1 for methods that
    do not shrink it."""
    names, places, steps = list[str](), list[Tensor](), list[list[int]]()
    trained = set(stack.trainees[0].start.trained)
    for layer in shape.experts:
        at = [g for g, there in enumerate(sent[layer.name]) if there]
        if not at:
            continue
        trainees = [stack.trainees[g] for g in at]
        clocks = [trainee.clock_of(layer) for trainee in trainees]
        taken_g = since(trainees, clocks)
        for name in (f"{layer.name}/{role}" for role in ROLES):
            if name in trained:
                names.append(name)
                places.append(torch.tensor(at, device=stack.tensors[name].device))
                steps.append(taken_g)
        closed = stack.closed[layer.name]
        if decay != 1.0 and closed.left_GmR is not None:
            factors = [decay if there else 1.0 for there in sent[layer.name]]
            closed.decay(torch.tensor(factors, device=closed.left_GmR.device)[:, None, None])
        for clock in clocks:
            clock.advance(decay)
    pairs = list(zip(names, places, strict=True))
    params = [stack.tensors[name][g] for name, g in pairs]
    moments = {role: [tensors[name][g] for name, g in pairs] for role, tensors in stack.moments.items()}
    optimizers.step(optimizer, lr, params, [gradients[name][g] for name, g in pairs], moments, steps)
    for (name, g), param in zip(pairs, params, strict=True):
        stack.tensors[name][g] = param
    for role, tensors in stack.moments.items():
        for (name, g), moment in zip(pairs, moments[role], strict=True):
            tensors[name][g] = moment
