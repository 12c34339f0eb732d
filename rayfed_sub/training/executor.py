"""Local training of a pack: G clients side by side, one optimiser step of each at a time.

The frozen layers see the tokens of the whole pack; every target layer adds its clients' own terms with products that
clients of equal shape share.  The pack's loss is the sum of the clients' own means, so no client feels another, and a
client's result has the same bits in any pack (ARCHITECTURE.md says on which models).  Clients with fewer steps leave
the pack when they are done.

Legend: G clients of a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import LocalResult, LocalStep, ModelShape, Start
from rayfed_sub.data.batching import Batch, Batches
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.training import optimizers
from rayfed_sub.training.client_errors import drawn
from rayfed_sub.training.dropout import Dropout, dropouts
from rayfed_sub.training.galore import Refresh, renew
from rayfed_sub.training.layers import Bound, Capture, Captures, PackLinear, Terms, bound, runs
from rayfed_sub.training.losses import client_losses
from rayfed_sub.training.optimizers import pull
from rayfed_sub.training.passes import AnyPass, passes
from rayfed_sub.training.stacks import Stack, Trainee, stacks_of, trainee_of, without_finished

GradientHooks = Callable[[str, Sequence[int]], list[Capture]]
"""(layer, clients) -> backward hooks."""


@dataclass(frozen=True)
class ClientWork:
    """A client's local training: its start, and a batch for each of its optimiser steps; taken: local steps of its life
    before these."""

    client: int
    start: Start
    batches: Batches
    taken: int = 0


@dataclass(frozen=True)
class LocalRule:
    """The rule of a round's local training, for all clients alike.  lr: the round's learning rate; seed: the run's;
    pad: the token that fills rows up; proximal: FedProx's mu (see `optimizers.pull`)."""

    optimizer: Optimizer
    lr: float
    seed: int
    pad: int
    proximal: float = 0.0


@dataclass(frozen=True)
class PackResult:
    """results: in the given order.  tokens: of all rows (of images, their number); computed: those that linear layers
    saw, with what only fills up."""

    results: list[LocalResult]
    tokens: int | None = None
    computed: int | None = None


@dataclass
class _Step:
    """A stack's part in a step: trained leaves, scales, and the refresh if any client's own step count asks for one;
    own_scales: of layers that have their own; captures: by layer; gradients: summed over the passes."""

    leaves: dict[str, Tensor]
    scale_G: Tensor
    own_scales: dict[str, Tensor]
    base_scale_G: Tensor | None
    refresh: Refresh | None
    captures: dict[str, Captures]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def train_pack(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    works: Sequence[ClientWork],
    rule: LocalRule,
    gradient_hooks: GradientHooks | None = None,
) -> PackResult:
    """Trains every client from its start, one optimiser step for each of its batches.

    model: the frozen model with `layers` installed; layers' weights are the round's base weights.  Ranks, scales, step
    counts and numbers of steps may differ between clients; `trained`, `decays_base`, `dropout`, the kind of
    subspace and whether there is a hook may not.
    gradient_hooks: backward hooks of a layer in the first local step, given its name and a stack's clients.
    A client whose batch cannot be drawn, or whose loss, gradient or result is not finite, leaves the pack, the others
    unharmed, and comes back with `failure` set; what it holds besides that and its metrics means nothing.
    """
    device = next(iter(layers.values())).weight.device
    trainees = [trainee_of(work.client, work.start, work.batches, device, work.taken) for work in works]
    stacks = stacks_of(trainees, shape, rule.optimizer, device, anchored=rule.proximal > 0)
    results: dict[int, LocalResult] = {}
    tokens = computed = 0
    for t in range(max(len(work.batches) for work in works)):
        batches = _draw(stacks, t)
        stacks = [left for stack in stacks if (left := without_finished(stack, t, shape, results)).trainees]
        if not stacks:  # all have failed
            break
        own = [batches[trainee.client] for stack in stacks for trainee in stack.trainees]
        turns = [one.to(device) for one in passes(own, pass_rule(model), rule.pad)]
        _step(model, layers, shape, stacks, turns, rule, gradient_hooks if t == 0 else None)
        tokens += sum(one.tokens[0] for one in turns)
        computed += sum(one.tokens[1] for one in turns)
    for stack in stacks:
        without_finished(stack, None, shape, results)
    return PackResult([results[work.client] for work in works], tokens, computed)


def _draw(stacks: Sequence[Stack], t: int) -> dict[int, Batch]:
    """Batch number t of the clients that have one; a client whose data raise has failed."""
    found = {}
    for trainee in (trainee for stack in stacks for trainee in stack.trainees):
        if trainee.failure is None and t < len(trainee.batches):
            batch = drawn(trainee.batches, t)
            if isinstance(batch, str):
                trainee.failure = batch
            else:
                found[trainee.client] = batch
    return found


def _step(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    stacks: Sequence[Stack],
    turns: Sequence[AnyPass],
    rule: LocalRule,
    gradient_hooks: GradientHooks | None,
) -> None:
    """Runs a step's forward and backward passes, then an optimiser step of every client."""
    steps = [_begun(stack, shape, rule.seed, len(turns), gradient_hooks) for stack in stacks]
    count_G = torch.stack([one.counts() for one in turns]).sum(0)
    loss_G = torch.zeros(len(count_G), device=count_G.device)
    trainees = [trainee for stack in stacks for trainee in stack.trainees]
    clients, rate = [(one.client, one.taken + len(one.losses)) for one in trainees], trainees[0].start.dropout
    for turn in turns:
        dropped = dropouts(shape, turn.where, clients, rule.seed, rate)
        with bound(layers, _terms(shape, stacks, steps, turn, dropped)):
            losses = client_losses(model, turn, count_G)
            _differentiate(losses.sum(), steps)
        loss_G += losses.detach()
        for capture in (capture for step in steps for capture in step.captures.values()):
            capture.passes -= 1
    for step in steps:
        for capture in step.captures.values():
            capture.finish()
    for trainee, loss, count in zip(trainees, loss_G.tolist(), count_G.tolist(), strict=True):
        trainee.tokens += count
        trainee.losses.append(loss)
        if not math.isfinite(loss):
            trainee.failure = trainee.failure or f"non-finite loss at local step {len(trainee.losses) - 1}"
    for stack, step in zip(stacks, steps, strict=True):
        _penalise(stack, step)
        _move(stack, step, shape, rule)


def _begun(stack: Stack, shape: ModelShape, seed: int, turns: int, gradient_hooks: GradientHooks | None) -> _Step:
    device = next(iter(stack.tensors.values())).device
    scale_G = torch.tensor([trainee.start.scale for trainee in stack.trainees], device=device)
    own_scales = {
        name: torch.tensor([trainee.start.scale_of(name) for trainee in stack.trainees], device=device)
        for name in stack.trainees[0].start.scales
    }
    base_scales = [trainee.base_scale for trainee in stack.trainees]
    base_scale_G = torch.tensor(base_scales, device=device) if any(c != 1.0 for c in base_scales) else None
    leaves = {name: stack.tensors[name].detach().requires_grad_() for name in stack.trainees[0].start.trained}
    refresh, clients = _refresh(stack, seed), [trainee.client for trainee in stack.trainees]
    captures = {}
    for layer in shape.targets:
        hooks = [] if refresh is None else [refresh.capture(layer)]
        hooks += [] if gradient_hooks is None else gradient_hooks(layer.name, clients)
        if hooks:
            captures[layer.name] = Captures(hooks, turns)
    return _Step(leaves, scale_G, own_scales, base_scale_G, refresh, captures)


def _terms(
    shape: ModelShape, stacks: Sequence[Stack], steps: Sequence[_Step], turn: AnyPass, dropped: Mapping[str, Dropout]
) -> dict[str, Bound]:
    """What every layer adds for its clients in one pass; dropped: by layer."""
    begins, first = [], 0  # each stack's clients and first row in the pass
    for stack in stacks:
        begins.append((slice(first, first + len(stack.trainees)), sum(turn.parts[:first])))
        first += len(stack.trainees)
    terms: dict[str, list[Terms]] = {layer.name: [] for layer in (*shape.targets, *shape.head)}
    for stack, step, (clients, begin) in zip(stacks, steps, begins, strict=True):
        tensors, parts = {**stack.tensors, **step.leaves}, turn.parts[clients]
        rows = runs(parts, begin)
        for layer in shape.targets:
            closed = stack.closed[layer.name]
            terms[layer.name].append(
                Terms(
                    rows=runs(parts, begin, closed.used_G) if closed.used_G else rows,
                    weight_Gmn=tensors.get(f"{layer.name}/weight"),
                    left_Gmr=tensors.get(f"{layer.name}/left"),
                    right_Grn=tensors.get(f"{layer.name}/right"),
                    core_Grr=tensors.get(f"{layer.name}/core"),
                    scale_G=step.own_scales.get(layer.name, step.scale_G),
                    closed=closed,
                    base_scale_G=step.base_scale_G,
                    captures=step.captures.get(layer.name),
                )
            )
        for layer in shape.head:
            weight, bias = tensors[f"{layer.name}/weight"], tensors.get(f"{layer.name}/bias")
            terms[layer.name].append(Terms(rows=rows, weight_Gmn=weight, bias_Gm=bias))
    return {name: Bound(turn.size, tuple(own), dropped.get(name)) for name, own in terms.items()}


def _differentiate(loss: Tensor, steps: Sequence[_Step]) -> None:
    """Adds a pass's gradients to the steps'."""
    leaves = [(step, name, leaf) for step in steps for name, leaf in step.leaves.items()]
    if loss.requires_grad:  # else there is no label in any client's batch
        found = torch.autograd.grad(loss, [leaf for _, _, leaf in leaves], allow_unused=True)
        for (step, name, _), gradient in zip(leaves, found, strict=True):
            if gradient is not None and name in step.gradients:
                step.gradients[name] += gradient
            elif gradient is not None:
                step.gradients[name] = gradient


def _penalise(stack: Stack, step: _Step) -> None:
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


def _move(stack: Stack, step: _Step, shape: ModelShape, rule: LocalRule) -> None:
    """The optimiser step of a stack's clients, and the new periods of those that begin one."""
    optimizer, lr, grads, scale_G = rule.optimizer, rule.lr, step.gradients, step.scale_G
    trainees, first = stack.trainees, stack.trainees[0].start
    factors = [name for name in first.trained if name.endswith(("/left", "/right", "/core"))]
    if first.subspace is not None:
        for name in factors:  # R = G Q^T = (1 / scale) dLoss/dL: GaLore's projected gradient
            grads[name] = grads[name] / scale_G[:, None, None]
    if step.refresh is not None:
        _new_period(stack, shape, step.refresh, grads, scale_G, optimizer)
    if rule.proximal:
        pull(rule.proximal, shape, first, stack.tensors, stack.anchors, stack.closed, grads, scale_G)
    if optimizer.clip_norm is not None:
        optimizers.clip(list(grads.values()), optimizer.clip_norm)
    if first.correct is not None:
        _correct(stack, grads, lr)
    step_G = [trainee.step for trainee in trainees]
    since_G = step_G
    if first.subspace is not None and first.subspace.moments == "reset":  # bias correction starts anew with the moments
        since_G = [trainee.step % (_period(trainee) or trainee.step + 1) for trainee in trainees]
    others = [name for name in first.trained if name not in factors]
    for names, taken_G in ((factors, since_G), (others, step_G)):
        moments = {role: [tensors[name] for name in names] for role, tensors in stack.moments.items()}
        params = [stack.tensors[name] for name in names]
        optimizers.step(optimizer, lr, params, [grads[name] for name in names], moments, taken_G)
    if first.decays_base and optimizer.weight_decay:
        for closed in stack.closed.values():
            closed.decay(optimizers.decay(optimizer, lr))
    for trainee in trainees:
        trainee.step += 1
        trainee.periods += not trainee.touched
        trainee.touched = True
        if first.decays_base:
            trainee.base_scale *= optimizers.decay(optimizer, lr)


def _correct(stack: Stack, grads: dict[str, Tensor], lr: float) -> None:
    """Replaces the gradients by those of the clients' hooks: each client by itself and on copies that begin and lie in
    memory as if it were alone, so that its bits depend on no other."""
    found = []
    for g, trainee in enumerate(stack.trainees):
        start, number = trainee.start, len(trainee.losses) - 1
        own, now = (
            {name: given[name][g].clone(memory_format=torch.contiguous_format) for name in start.trained}
            for given in (grads, stack.tensors)
        )
        assert start.correct is not None
        given, trainee.memory = start.correct(trainee.memory, LocalStep(now, own, number, lr))
        found.append(given)
    for name in stack.trainees[0].start.trained:
        grads[name] = torch.stack([given[name] for given in found])


def _period(trainee: Trainee) -> int:
    return 0 if trainee.start.subspace is None else trainee.start.subspace.refresh_every


def _refresh(stack: Stack, seed: int) -> Refresh | None:
    """The refresh of this step, if any client's own step count asks for one."""
    subspaces = [trainee.start.subspace for trainee in stack.trainees if trainee.start.subspace is not None]
    due_G = [bool(_period(t)) and t.step % _period(t) == 0 for t in stack.trainees]
    if not any(due_G):
        return None
    return Refresh(subspaces, due_G, [(seed, t.client, t.step) for t in stack.trainees], stack.tensors)


def _new_period(
    stack: Stack,
    shape: ModelShape,
    refresh: Refresh,
    grads: dict[str, Tensor],
    scale_G: Tensor,
    optimizer: Optimizer,
) -> None:
    """Closes the due clients' open blocks (if they were stepped in this round) and opens new ones."""
    closing_G = [due and trainee.touched for due, trainee in zip(refresh.due_G, stack.trainees, strict=True)]
    step_G = [trainee.step for trainee in stack.trainees]
    for layer in shape.targets:
        if any(closing_G):
            left, right = stack.tensors[f"{layer.name}/left"], stack.tensors[f"{layer.name}/right"]
            stack.closed[layer.name].close(left, right, scale_G, closing_G)
        renew(layer, refresh, stack.tensors, grads, stack.moments, step_G, optimizer)
    for g, trainee in enumerate(stack.trainees):
        trainee.touched = trainee.touched and not refresh.due_G[g]
        trainee.failure = trainee.failure or refresh.failures.get(g)
