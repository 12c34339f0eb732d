"""One optimiser step of a pack: the passes of all of its clients' rows, and then every client's own step.

Legend: G clients of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayfed_sub.core.devices import onto
from rayfed_sub.core.lowrank import inner_core
from rayfed_sub.core.types import LocalStep, ModelShape, OptimizerRule
from rayfed_sub.privacy.examples import RowPrivacy
from rayfed_sub.training import optimizers
from rayfed_sub.training.dropout import Dropout, dropouts
from rayfed_sub.training.expert_steps import ROLES, period, sent, since, step_experts
from rayfed_sub.training.galore import Refresh, renew
from rayfed_sub.training.layers import Bound, Capture, Captures, PackLinear, Terms, bound
from rayfed_sub.training.losses import client_losses
from rayfed_sub.training.passes import AnyPass
from rayfed_sub.training.proximal import pull
from rayfed_sub.training.stacks import Clock, Stack, Trainee

GradientHooks = Callable[[str, Sequence[int]], list[Capture]]
"""(layer, clients) -> backward hooks."""


@dataclass(frozen=True)
class LocalRule:
    """The rule of a round's local training, for all clients alike.  lr: the round's learning rate; seed: the run's;
    pad: the token that fills rows up; proximal: FedProx's mu (see `proximal.py`); micro_batch: rows of a client
    that go through the model at a time, all where it is None; recompute: whether blocks keep no activations; privacy:
    of the clients' single rows, for starts without a refresh and models without experts among their targets."""

    optimizer: OptimizerRule
    lr: float
    seed: int
    pad: int
    proximal: float = 0.0
    micro_batch: int | None = None
    recompute: bool = False
    privacy: RowPrivacy | None = None


@dataclass
class Step:
    """A stack's part in a step: trained leaves, scales, and the refresh if any client's own step count asks for one;
    own_scales: of layers that have their own; captures: by layer; gradients: summed over the passes; expert_scales,
    sent: by expert's matrix, the clients' base scales, and whose losses depend on it."""

    leaves: dict[str, Tensor]
    scale_G: Tensor
    own_scales: dict[str, Tensor]
    base_scale_G: Tensor | None
    expert_scales: dict[str, Tensor | None]
    refresh: Refresh | None
    captures: dict[str, Captures]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, list[bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """What a step's device knows of its clients: their losses, and of layers with a refresh whose gradients are finite;
    count_G: their labels."""

    trainees: Sequence[Trainee]
    count_G: Sequence[int]
    loss_G: Tensor
    sound: Sequence[tuple[str, Sequence[Trainee], Tensor]]


def step_pack(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    stacks: Sequence[Stack],
    turns: Sequence[AnyPass],
    rule: LocalRule,
    gradient_hooks: GradientHooks | None,
) -> Told:
    """Runs a step's forward and backward passes, then an optimiser step of every client."""
    steps = [begun(stack, shape, rule.seed, len(turns), gradient_hooks) for stack in stacks]
    trainees = [trainee for stack in stacks for trainee in stack.trainees]
    clients = [(one.client, one.taken + one.steps) for one in trainees]
    loss_G, labels = passed(model, layers, shape, stacks, steps, turns, rule.seed, clients)
    for step in steps:
        for capture in step.captures.values():
            capture.finish()
    for stack, step in zip(stacks, steps, strict=True):
        step.sent = sent(shape, stack, step.gradients, step.refresh)
        penalise(stack, step)
        move(stack, step, shape, layers, rule)
    for trainee in trainees:
        trainee.steps += 1
    sound = [
        (layer, [stack.trainees[g] for g in at], sound_g)
        for stack, step in zip(stacks, steps, strict=True)
        if step.refresh is not None
        for layer, at, sound_g in step.refresh.sound
    ]
    return Told(trainees, labels, loss_G, sound)


def passed(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    stacks: Sequence[Stack],
    steps: Sequence[Step],
    turns: Sequence[AnyPass],
    seed: int,
    clients: Sequence[tuple[int, int]],
) -> tuple[Tensor, list[int]]:
    """The step's passes, whose gradients are added to those of `steps`; loss (G,) and labels of the stacks' clients.
    clients: number and local step of each."""
    device = stacks[0].device
    labels = [sum(own) for own in zip(*(one.counts for one in turns), strict=True)]
    count_G, loss_G = onto(labels, device), torch.zeros(len(labels), device=device)
    rate = stacks[0].trainees[0].start.dropout
    for turn in turns:
        dropped = dropouts(shape, turn.seen_by, clients, seed, rate)
        with bound(layers, _terms(shape, stacks, steps, turn, dropped)):
            losses = client_losses(model, turn, count_G)
            _differentiate(losses.sum(), steps)
        loss_G += losses.detach()
        for capture in (capture for step in steps for capture in step.captures.values()):
            capture.passes -= 1
    return loss_G, labels


def begun(stack: Stack, shape: ModelShape, seed: int, turns: int, gradient_hooks: GradientHooks | None) -> Step:
    """A stack's part in a step that takes `turns` passes, before the first of them."""
    device = stack.device
    scale_G = onto([trainee.start.scale for trainee in stack.trainees], device)
    own_scales = {
        name: onto([trainee.start.scale_of(name) for trainee in stack.trainees], device)
        for name in stack.trainees[0].start.scales
    }
    base_scale_G = _base_scales([trainee.clock for trainee in stack.trainees], device)
    expert_scales = {
        layer.name: _base_scales([trainee.clock_of(layer) for trainee in stack.trainees], device)
        for layer in shape.experts
    }
    leaves = {name: stack.tensors[name].detach().requires_grad_() for name in stack.trainees[0].start.trained}
    refresh, clients = _refresh(stack, shape, seed), [trainee.client for trainee in stack.trainees]
    captures = {}
    for layer in shape.targets:
        hooks = [] if refresh is None or layer.name not in refresh.due else [refresh.capture(layer)]
        hooks += [] if gradient_hooks is None else gradient_hooks(layer.name, clients)
        if hooks:
            captures[layer.name] = Captures(hooks, turns)
    return Step(leaves, scale_G, own_scales, base_scale_G, expert_scales, refresh, captures)


def _base_scales(clocks: Sequence[Clock], device: torch.device) -> Tensor | None:
    scales = [clock.base_scale for clock in clocks]
    return onto(scales, device) if any(c != 1.0 for c in scales) else None


def _terms(
    shape: ModelShape, stacks: Sequence[Stack], steps: Sequence[Step], turn: AnyPass, dropped: Mapping[str, Dropout]
) -> dict[str, Bound]:
    """What every layer adds for its clients in one pass; dropped: by layer."""
    begins, first = [], 0  # each stack's clients, and the first of them
    for stack in stacks:
        begins.append(slice(first, first + len(stack.trainees)))
        first += len(stack.trainees)
    terms: dict[str, list[Terms]] = {layer.name: [] for layer in (*shape.targets, *shape.head)}
    for stack, step, clients in zip(stacks, steps, begins, strict=True):
        tensors = {**stack.tensors, **step.leaves}
        rows = {seen: seen.runs(clients) for seen in {turn.seen_by(name) for name in terms}}
        for layer in shape.targets:
            closed, seen = stack.closed[layer.name], turn.seen_by(layer.name)
            terms[layer.name].append(
                Terms(
                    rows=seen.runs(clients, closed.used_G) if closed.used_G else rows[seen],
                    weight_Gmn=tensors.get(f"{layer.name}/weight"),
                    left_Gmr=tensors.get(f"{layer.name}/left"),
                    right_Grn=tensors.get(f"{layer.name}/right"),
                    core_Grr=inner_core(tensors, layer.name),
                    scale_G=step.own_scales.get(layer.name, step.scale_G),
                    closed=closed,
                    base_scale_G=step.expert_scales.get(layer.name, step.base_scale_G),
                    captures=step.captures.get(layer.name),
                )
            )
        for layer in shape.head:
            weight, bias = tensors[f"{layer.name}/weight"], tensors.get(f"{layer.name}/bias")
            terms[layer.name].append(Terms(rows[turn.seen_by(layer.name)], weight_Gmn=weight, bias_Gm=bias))
    return {name: Bound(turn.seen_by(name).size, tuple(own), dropped.get(name)) for name, own in terms.items()}


def _differentiate(loss: Tensor, steps: Sequence[Step]) -> None:
    """Adds a pass's gradients to the steps'."""
    leaves = [(step, name, leaf) for step in steps for name, leaf in step.leaves.items()]
    if loss.requires_grad:  # else there is no label in any client's batch
        found = torch.autograd.grad(loss, [leaf for _, _, leaf in leaves], allow_unused=True)
        for (step, name, _), gradient in zip(leaves, found, strict=True):
            if gradient is not None and name in step.gradients:
                step.gradients[name] += gradient
            elif gradient is not None:
                step.gradients[name] = gradient


def penalise(stack: Stack, step: Step) -> None:
    """Adds the gradients of the clients' own penalties; zeros where a tensor took no part in a loss."""
    tensors = {**stack.tensors, **step.leaves}
    terms = [
        trainee.start.penalty({name: tensors[name][g] for name in trainee.start.tensors})
        for g, trainee in enumerate(stack.trainees)
        if trainee.start.penalty is not None
    ]
    if terms:
        _differentiate(torch.stack(terms).sum(), [step])
    for name, leaf in step.leaves.items():
        step.gradients.setdefault(name, torch.zeros_like(leaf))


def move(stack: Stack, step: Step, shape: ModelShape, layers: Mapping[str, PackLinear], rule: LocalRule) -> None:
    """The optimiser step of a stack's clients, and the new periods of those that begin one."""
    optimizer, lr, grads, scale_G = rule.optimizer, rule.lr, step.gradients, step.scale_G
    trainees, first = stack.trainees, stack.trainees[0].start
    factors = [name for name in first.trained if name.endswith(("/left", "/right", "/core"))]
    if first.subspace is not None:
        for name in factors:  # R = G Q^T = (1 / scale) dLoss/dL: GaLore's projected gradient
            grads[name] = grads[name] / scale_G[:, None, None]
    if step.refresh is not None:
        _new_period(stack, shape, step, optimizer)
    if rule.proximal:
        pull(rule.proximal, shape, layers, stack, grads, scale_G)
    if optimizer.clip_norm is not None:
        optimizers.clip(list(grads.values()), optimizer.clip_norm)
    if first.correct is not None:
        _correct(stack, grads, lr)
    clocks = [trainee.clock for trainee in trainees]
    own = {f"{layer.name}/{role}" for layer in shape.experts for role in ROLES}
    shared, others = [name for name in factors if name not in own], [name for name in first.trained if name not in own]
    others = [name for name in others if name not in shared]
    for names, taken_G in ((shared, since(trainees, clocks)), (others, [clock.step for clock in clocks])):
        moments = {role: [tensors[name] for name in names] for role, tensors in stack.moments.items()}
        params = [stack.tensors[name] for name in names]
        optimizers.step(optimizer, lr, params, [grads[name] for name in names], moments, [taken_G] * len(names))
    decay = optimizers.decay(optimizer, lr) if first.decays_base else 1.0
    step_experts(stack, shape, grads, step.sent, optimizer, lr, decay)
    if decay != 1.0:
        for layer in shape.targets:
            if not layer.expert:
                stack.closed[layer.name].decay(decay)
    for clock in clocks:
        clock.advance(decay)


def _correct(stack: Stack, grads: dict[str, Tensor], lr: float) -> None:
    """Replaces the gradients by those of the clients' hooks: each client by itself and on copies that begin and lie in
    memory as if it were alone, so that its bits depend on no other."""
    found = []
    for g, trainee in enumerate(stack.trainees):
        start, number = trainee.start, trainee.steps
        own, now = (
            {name: given[name][g].clone(memory_format=torch.contiguous_format) for name in start.trained}
            for given in (grads, stack.tensors)
        )
        assert start.correct is not None
        given, trainee.memory = start.correct(trainee.memory, LocalStep(now, own, number, lr))
        found.append(given)
    for name in stack.trainees[0].start.trained:
        grads[name] = torch.stack([given[name] for given in found])


def _refresh(stack: Stack, shape: ModelShape, seed: int) -> Refresh | None:
    """The refresh of this step, if any client's own step count, or one of its experts', asks for one."""
    subspaces = [trainee.start.subspace for trainee in stack.trainees if trainee.start.subspace is not None]
    due: dict[str, list[bool]] = {}
    draws: dict[str, list[tuple[int, ...]]] = {}
    for layer in shape.targets:
        step_G = [trainee.clock_of(layer).step for trainee in stack.trainees]
        due_G = [bool(every) and t % every == 0 for t, every in zip(step_G, map(period, stack.trainees), strict=True)]
        if any(due_G):
            due[layer.name] = due_G
            draws[layer.name] = [(seed, one.client, one.number_of(layer)) for one in stack.trainees]
    return Refresh(subspaces, due, draws, stack.tensors) if due else None


def _new_period(stack: Stack, shape: ModelShape, step: Step, optimizer: OptimizerRule) -> None:
    """Closes the due clients' open blocks (if they were stepped in this round) and opens new ones; of experts only
    where a client's loss depends on them."""
    refresh = step.refresh
    assert refresh is not None
    renewed: dict[int, Clock] = {}
    for layer in shape.targets:
        due_G, sent_G = refresh.due.get(layer.name), step.sent.get(layer.name)
        if due_G is not None and sent_G is not None:
            due_G = [due and sent for due, sent in zip(due_G, sent_G, strict=True)]
        if due_G is None or not any(due_G):
            continue
        clocks = [trainee.clock_of(layer) for trainee in stack.trainees]
        closing_G = [due and clock.touched for due, clock in zip(due_G, clocks, strict=True)]
        if any(closing_G):
            left, right = stack.tensors[f"{layer.name}/left"], stack.tensors[f"{layer.name}/right"]
            stack.closed[layer.name].close(left, right, step.scale_G, closing_G)
        step_G = [clock.step for clock in clocks]
        renew(layer, refresh, stack.tensors, step.gradients, stack.moments, due_G, step_G, optimizer)
        renewed |= {id(clock): clock for clock, due in zip(clocks, due_G, strict=True) if due}
    for clock in renewed.values():
        clock.touched = False
