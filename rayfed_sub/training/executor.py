"""Local training of a pack: G clients side by side, one forward and one backward pass per local step.

The frozen layers see one big batch (G * B, T); every target layer adds its clients' own terms with batched products;
the pack's loss is the sum of the clients' own means, so no client feels another.  Clients with fewer steps leave the
pack when they are done; smaller ranks are padded with zeros, which stay zero because their gradients are.

Legend: G clients, m, n layer sizes, r rank, R summed rank of closed blocks, N tokens of a client's batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import padded
from rayfed_sub.core.types import LocalResult, ModelShape, Start, Tensors
from rayfed_sub.data.batching import Batches, merge
from rayfed_sub.training import optimizers
from rayfed_sub.training.client_errors import drawn, not_finite
from rayfed_sub.training.galore import Closed, Refresh, renew
from rayfed_sub.training.layers import PackLinear, Terms
from rayfed_sub.training.losses import client_losses
from rayfed_sub.training.optimizers import pull

GradientHooks = Callable[[str, Sequence[int]], list[Callable[[Tensor, Tensor], None]]]
"""(layer, clients) -> backward hooks, which take the layer's inputs (G, N, n) and output gradients (G, N, m)."""


@dataclass(frozen=True)
class ClientWork:
    """A client's local training: its start, and a batch for each of its optimiser steps."""

    client: int
    start: Start
    batches: Batches


@dataclass(frozen=True)
class LocalRule:
    """The rule of a round's local training, for all clients alike.  lr: the round's learning rate; seed: the run's;
    pad: the token that fills rows up; proximal: FedProx's mu (see `optimizers.pull`)."""

    optimizer: Optimizer
    lr: float
    seed: int
    pad: int
    proximal: float = 0.0


@dataclass
class Trainee:
    """A client in training."""

    client: int
    start: Start
    batches: Batches
    step: int
    touched: bool = False  # whether the open block has been stepped in this round
    periods: int = 0
    base_scale: float = 1.0
    tokens: int = 0
    failure: str | None = None


@dataclass
class Pack:
    """The clients still training and their tensors (G, ...), private copies that change in place."""

    trainees: list[Trainee]
    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    closed: dict[str, Closed]
    losses: Tensor  # (steps so far, G)
    anchors: dict[str, Tensor]  # the trained tensors as the round began; empty without FedProx


def train_pack(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    works: Sequence[ClientWork],
    rule: LocalRule,
    gradient_hooks: GradientHooks | None = None,
) -> list[LocalResult]:
    """Trains every client from its start, one optimiser step for each of its batches; results in the given order.

    model: the frozen model with `layers` installed; layers' weights are the round's base weights.  Ranks, scales, step
    counts and numbers of steps may differ between clients; `trained`, `decays_base` and the kind of subspace may not.
    gradient_hooks: backward hooks of a layer in the first local step, given its name and the pack's clients.
    A client whose batch cannot be drawn, or whose loss, gradient or result is not finite, leaves the pack, the others
    unharmed, and comes back with `failure` set; what it holds besides that and its metrics means nothing.
    """
    device = next(iter(layers.values())).weight.device
    trainees = [Trainee(work.client, work.start, work.batches, work.start.step) for work in works]
    pack = _stack(trainees, shape, rule.optimizer, device, anchored=rule.proximal > 0)
    results: dict[int, LocalResult] = {}
    for t in range(max(len(work.batches) for work in works)):
        own_batches = _draw(pack, t)
        pack = _without_finished(pack, t, shape, results)
        if not pack.trainees:  # all have failed
            break
        merged = merge([own_batches[trainee.client] for trainee in pack.trainees], rule.pad)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in merged.items()}
        _step(model, layers, shape, pack, batch, rule, gradient_hooks if t == 0 else None)
    _without_finished(pack, None, shape, results)
    return [results[work.client] for work in works]


def _draw(pack: Pack, t: int) -> dict[int, Tensors]:
    """Batch number t of the clients that have one; a client whose data raise has failed."""
    found = {}
    for trainee in pack.trainees:
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
    pack: Pack,
    batch: Tensors,
    rule: LocalRule,
    gradient_hooks: GradientHooks | None,
) -> None:
    """Runs a forward, backward and optimiser step of every client in the pack."""
    optimizer, lr = rule.optimizer, rule.lr
    trainees, first = pack.trainees, pack.trainees[0].start
    scale_G = torch.tensor([trainee.start.scale for trainee in trainees], device=batch["labels"].device)
    leaves = {name: pack.tensors[name].detach().requires_grad_() for name in first.trained}
    refresh = _refresh(pack, rule.seed)
    _bind(layers, shape, pack, {**pack.tensors, **leaves}, scale_G, refresh, gradient_hooks)
    try:
        loss_G, count_G = client_losses(model, batch, len(trainees))
        grads = _gradients(loss_G.sum() + _penalties(trainees, {**pack.tensors, **leaves}), leaves)
        for layer in layers.values():
            if layer.terms is not None:
                layer.terms.finish()
    finally:
        for layer in layers.values():
            layer.terms = None
    pack.losses = torch.cat([pack.losses, loss_G.detach()[None]])
    for trainee, loss, count in zip(trainees, loss_G.tolist(), count_G.tolist(), strict=True):
        trainee.tokens += count
        if not math.isfinite(loss):
            trainee.failure = trainee.failure or f"non-finite loss at local step {len(pack.losses) - 1}"

    factors = [name for name in first.trained if name.endswith(("/left", "/right", "/core"))]
    if first.subspace is not None:
        for name in factors:  # R = G Q^T = (1 / scale) dLoss/dL: GaLore's projected gradient
            grads[name] = grads[name] / scale_G[:, None, None]
    if refresh is not None:
        _new_period(pack, shape, refresh, grads, scale_G, optimizer)
    if rule.proximal:
        pull(rule.proximal, shape, first, pack.tensors, pack.anchors, pack.closed, grads, scale_G)
    if optimizer.clip_norm is not None:
        optimizers.clip(list(grads.values()), optimizer.clip_norm)
    step_G = [trainee.step for trainee in trainees]
    since_G = step_G
    if first.subspace is not None and first.subspace.moments == "reset":  # bias correction starts anew with the moments
        since_G = [trainee.step % (_period(trainee) or trainee.step + 1) for trainee in trainees]
    others = [name for name in first.trained if name not in factors]
    for names, taken_G in ((factors, since_G), (others, step_G)):
        moments = {role: [tensors[name] for name in names] for role, tensors in pack.moments.items()}
        params = [pack.tensors[name] for name in names]
        optimizers.step(optimizer, lr, params, [grads[name] for name in names], moments, taken_G)
    if first.decays_base and optimizer.weight_decay:
        for closed in pack.closed.values():
            closed.decay(optimizers.decay(optimizer, lr))
    for trainee in trainees:
        trainee.step += 1
        trainee.periods += not trainee.touched
        trainee.touched = True
        if first.decays_base:
            trainee.base_scale *= optimizers.decay(optimizer, lr)


def _period(trainee: Trainee) -> int:
    return 0 if trainee.start.subspace is None else trainee.start.subspace.refresh_every


def _refresh(pack: Pack, seed: int) -> Refresh | None:
    """The refresh of this step, if any client's own step count asks for one."""
    subspaces = [trainee.start.subspace for trainee in pack.trainees if trainee.start.subspace is not None]
    due_G = [bool(_period(t)) and t.step % _period(t) == 0 for t in pack.trainees]
    if not any(due_G):
        return None
    return Refresh(subspaces, due_G, [(seed, t.client, t.step) for t in pack.trainees], pack.tensors)


def _new_period(
    pack: Pack,
    shape: ModelShape,
    refresh: Refresh,
    grads: dict[str, Tensor],
    scale_G: Tensor,
    optimizer: Optimizer,
) -> None:
    """Closes the due clients' open blocks (if they were stepped in this round) and opens new ones."""
    closing_G = [
        subspace.rank if due and trainee.touched else 0
        for subspace, due, trainee in zip(refresh.subspaces, refresh.due_G, pack.trainees, strict=True)
    ]
    step_G = [trainee.step for trainee in pack.trainees]
    for layer in shape.targets:
        if any(closing_G):
            left, right = pack.tensors[f"{layer.name}/left"], pack.tensors[f"{layer.name}/right"]
            pack.closed[layer.name].close(left, right, scale_G, closing_G)
        renew(layer, refresh, pack.tensors, grads, pack.moments, step_G, optimizer)
    for g, trainee in enumerate(pack.trainees):
        trainee.touched = trainee.touched and not refresh.due_G[g]
        trainee.failure = trainee.failure or refresh.failures.get(g)


def _bind(
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    pack: Pack,
    tensors: Tensors,
    scale_G: Tensor,
    refresh: Refresh | None,
    gradient_hooks: GradientHooks | None,
) -> None:
    """Hands every layer its clients' terms for one forward pass."""
    G = len(pack.trainees)
    base_scales = [trainee.base_scale for trainee in pack.trainees]
    base_scale_G = scale_G.new_tensor(base_scales) if any(c != 1.0 for c in base_scales) else None
    clients = [trainee.client for trainee in pack.trainees]
    for layer in shape.targets:
        closed = pack.closed[layer.name]
        hooks = [] if refresh is None else [refresh.capture(layer)]
        hooks += [] if gradient_hooks is None else gradient_hooks(layer.name, clients)
        layers[layer.name].terms = Terms(
            clients=G,
            weight_Gmn=tensors.get(f"{layer.name}/weight"),
            left_Gmr=tensors.get(f"{layer.name}/left"),
            right_Grn=tensors.get(f"{layer.name}/right"),
            core_Grr=tensors.get(f"{layer.name}/core"),
            scale_G=scale_G,
            closed_left_GmR=closed.left_GmR,
            closed_right_GRn=closed.right_GRn,
            base_scale_G=base_scale_G,
            captures=hooks,
        )
    for layer in shape.head:
        weight, bias = tensors[f"{layer.name}/weight"], tensors.get(f"{layer.name}/bias")
        layers[layer.name].terms = Terms(clients=G, weight_Gmn=weight, bias_Gm=bias)


def _penalties(trainees: Sequence[Trainee], tensors: Tensors) -> Tensor | float:
    """The sum of the clients' own penalties, each over its own tensors without padding."""
    terms = [
        trainee.start.penalty({name: own(tensors[name][g], start) for name, start in trainee.start.tensors.items()})
        for g, trainee in enumerate(trainees)
        if trainee.start.penalty is not None
    ]
    return torch.stack(terms).sum() if terms else 0.0


def own(tensor: Tensor, like: Tensor) -> Tensor:
    """A client's tensor without the padding to the pack's largest rank."""
    if tensor.shape == like.shape:
        return tensor
    return tensor[tuple(slice(size) for size in like.shape)]


def _gradients(loss: Tensor, leaves: Tensors) -> dict[str, Tensor]:
    """Gradients of the summed loss; zero where a tensor took no part in it."""
    if not loss.requires_grad:  # no label in any client's batch
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _stack(
    trainees: list[Trainee], shape: ModelShape, optimizer: Optimizer, device: torch.device, *, anchored: bool
) -> Pack:
    """The clients' tensors side by side, padded to the largest rank, in fresh memory: equal packs, equal bits."""
    starts = [trainee.start for trainee in trainees]

    def stacked(tensors: Sequence[Tensor]) -> Tensor:
        largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        return torch.stack([padded(t.float(), largest) for t in tensors]).to(device)

    tensors = {name: stacked([start.tensors[name] for start in starts]) for name in starts[0].tensors}
    moments = {
        role: {
            name: stacked([s.moments.get(f"{name}/{role}", torch.zeros_like(s.tensors[name])) for s in starts])
            for name in starts[0].trained
        }
        for role in optimizers.moment_roles(optimizer)
    }
    closed = {layer.name: Closed() for layer in shape.targets}
    anchors = {name: tensors[name].clone() for name in starts[0].trained} if anchored else {}
    return Pack(list(trainees), tensors, moments, closed, torch.zeros(0, len(trainees), device=device), anchors)


def _without_finished(pack: Pack, t: int | None, shape: ModelShape, results: dict[int, LocalResult]) -> Pack:
    """The pack without the clients that failed or have no batch number t; their results are noted.  t = None: all are
    done."""
    kept = [g for g, x in enumerate(pack.trainees) if t is not None and t < len(x.batches) and x.failure is None]
    if len(kept) == len(pack.trainees):
        return pack
    for g in set(range(len(pack.trainees))) - set(kept):
        results[pack.trainees[g].client] = _result(pack, g, shape)
    index = torch.tensor(kept, dtype=torch.long, device=pack.losses.device)
    for closed in pack.closed.values():
        closed.select(index)
    return Pack(
        [pack.trainees[g] for g in kept],
        {name: tensor[index] for name, tensor in pack.tensors.items()},
        {role: {name: tensor[index] for name, tensor in tensors.items()} for role, tensors in pack.moments.items()},
        pack.closed,
        pack.losses[:, index],
        {name: tensor[index] for name, tensor in pack.anchors.items()},
    )


def _result(pack: Pack, g: int, shape: ModelShape) -> LocalResult:
    """Client g's round, on the CPU, without padding."""
    trainee = pack.trainees[g]
    start = trainee.start

    def alone(name: str, tensor: Tensor) -> Tensor:
        return own(tensor[g], start.tensors[name]).cpu().clone()

    tensors = {name: alone(name, tensor) for name, tensor in pack.tensors.items()}
    moved = {f"{name}/{role}": alone(name, at[name]) for role, at in pack.moments.items() for name in start.trained}
    moments = {**start.moments, **moved}  # of a factor at rest they stay as they were
    blocks = {}
    if start.subspace is not None:
        for layer in shape.targets:
            left, right = start.scale * tensors[f"{layer.name}/left"], tensors[f"{layer.name}/right"]
            closed = pack.closed[layer.name]
            if closed.left_GmR is not None:
                closed_left, closed_right = (x.cpu() for x in closed.of(g))
                left, right = torch.cat([closed_left, left], dim=1), torch.cat([closed_right, right])
            blocks[layer.name] = (left, right)
    losses = pack.losses[:, g].tolist()
    metrics = {
        "loss": sum(losses) / max(1, len(losses)),
        "loss_last": losses[-1] if losses else 0.0,
        "labels": float(trainee.tokens),
        "steps": float(len(losses)),
        "periods": float(max(1, trainee.periods)),
    }
    return LocalResult(
        client=trainee.client,
        tensors=tensors,
        moments=moments,
        step=trainee.step,
        blocks=blocks,
        base_scale=trainee.base_scale,
        periods=max(1, trainee.periods),
        metrics=metrics,
        failure=trainee.failure or not_finite(tensors),
        trained=start.trained,
    )
