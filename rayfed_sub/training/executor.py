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
from dataclasses import dataclass

import torch
from torch import nn

from rayfed_sub.core.devices import free_to_read
from rayfed_sub.core.types import LocalResult, ModelShape, Start
from rayfed_sub.data.batching import Batch, Batches
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.training.ahead import in_turn
from rayfed_sub.training.client_errors import drawn
from rayfed_sub.training.layers import PackLinear
from rayfed_sub.training.pack_step import GradientHooks, LocalRule, Told, step_pack
from rayfed_sub.training.passes import AnyPass, passes
from rayfed_sub.training.private_rows import private_step
from rayfed_sub.training.recompute import recomputed
from rayfed_sub.training.stacks import Stack, results_of, stacks_of, trainee_of, without_finished


@dataclass(frozen=True)
class ClientWork:
    """A client's local training: its start, and a batch for each of its optimiser steps; taken: local steps of its life
    before these.  expected: rows of a batch on average, where they are drawn one by one (`LocalRule.privacy`)."""

    client: int
    start: Start
    batches: Batches
    taken: int = 0
    expected: int = 1


@dataclass(frozen=True)
class PackResult:
    """results: in the given order.  tokens: of all rows (of images, their number); computed: those that linear layers
    saw, with what only fills up."""

    results: list[LocalResult]
    tokens: int | None = None
    computed: int | None = None


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
    trainees = [trainee_of(work.client, work.start, work.batches, shape, device, work.taken) for work in works]
    stacks = stacks_of(trainees, shape, rule.optimizer, device, anchored=rule.proximal > 0)
    ended, unread = list[Stack](), list[Told]()
    tokens = computed = 0
    steps = max(len(work.batches) for work in works)
    make, aside = _maker(model, stacks, rule, device), not (free_to_read(device) or rule.privacy or _own(model))
    for t, (batches, causes, turns) in enumerate(in_turn(make, steps, ahead=aside)):
        for trainee in (trainee for stack in stacks for trainee in stack.trainees if trainee.client in causes):
            trainee.failure = causes[trainee.client]
        parted = [without_finished(stack, t) for stack in stacks]
        stacks = [left for left, _ in parted if left.trainees]
        ended += [gone for _, gone in parted if gone is not None]
        if not stacks:  # all have failed
            break
        if rule.privacy is not None:
            expected = {work.client: work.expected for work in works}
            with recomputed(model, shape, on=rule.recompute):
                seen = private_step(model, layers, shape, stacks, batches, rule, rule.privacy, expected)
            tokens, computed = tokens + seen[0], computed + seen[1]
            continue
        here = [one.to(device) for one in turns]
        with recomputed(model, shape, on=rule.recompute):
            unread.append(step_pack(model, layers, shape, stacks, here, rule, gradient_hooks if t == 0 else None))
        if free_to_read(device):  # else a client that fails is trained to the end of the round
            _read(unread)
        tokens += sum(one.tokens[0] for one in turns)
        computed += sum(one.tokens[1] for one in turns)
    _read(unread)
    results = {one.client: one for stack in (*ended, *stacks) for one in results_of(stack, shape)}
    return PackResult([results[work.client] for work in works], tokens, computed)


def _read(told: list[Told]) -> None:
    """Reads these steps, all at once, and notes clients' losses and the first that went wrong; empties the list."""
    if not told:
        return
    parts = [part for one in told for part in (one.loss_G, *(sound_g.float() for _, _, sound_g in one.sound))]
    numbers = iter(torch.cat(parts).tolist())
    failed = set[int]()
    for one in told:
        for trainee, count in zip(one.trainees, one.count_G, strict=True):
            loss = next(numbers)
            if trainee.client in failed:  # at an earlier step
                continue
            trainee.tokens += count
            trainee.losses.append(loss)
            if not math.isfinite(loss):
                trainee.failure = f"non-finite loss at local step {len(trainee.losses) - 1}"
                failed.add(trainee.client)
        for layer, trainees, sound_g in one.sound:
            for trainee, sound in zip(trainees, [next(numbers) for _ in range(len(sound_g))], strict=True):
                if not sound and trainee.client not in failed:
                    trainee.failure = f"non-finite gradient in {layer}"
                    failed.add(trainee.client)
    told.clear()


Made = tuple[dict[int, Batch], dict[int, str], Sequence[AnyPass]]
"""Batches of a step by client, why clients have none that should, and the step's passes, on the host."""


def _maker(model: nn.Module, stacks: Sequence[Stack], rule: LocalRule, device: torch.device) -> Callable[[int], Made]:
    """Makes the batches and passes of a step by its number, in order, for the clients that are still in training."""
    trainees, how = [trainee for stack in stacks for trainee in stack.trainees], pass_rule(model)
    lost = set[int]()  # before anybody else has heard of it, where steps are made ahead

    def make(t: int) -> Made:
        found, causes = dict[int, Batch](), dict[int, str]()
        for trainee in trainees:
            if trainee.failure is None and trainee.client not in lost and t < len(trainee.batches):
                batch = drawn(trainee.batches, t)
                if isinstance(batch, str):
                    causes[trainee.client] = batch
                else:
                    found[trainee.client] = batch
        lost.update(causes)
        if rule.privacy is not None or not found:  # private rows make their own passes
            return found, causes, ()
        turns = passes(list(found.values()), how, rule.pad, rule.micro_batch)
        return found, causes, [one.pinned(device) for one in turns]

    return make


def _own(model: nn.Module) -> bool:
    """Whether batch and loss are functions of the caller's, which may draw from the process's generators."""
    return vars(model).get("own_loss") is not None
