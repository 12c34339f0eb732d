"""Gradients of single rows, clipped and summed (`privacy/examples.py`), through the pack's own passes.

Every row stands in a pass as a client of its own, with a copy of its client's tensors, so the gradients of a pass's
leaves are the rows' own, exactly, whatever a layer does with them (factors, cores, heads, dense weights, dropout).  The
other ways were norms by Gram matrices with a second backward pass, or hooks with a rule for each kind of leaf; both
save memory, which here is bounded by taking few rows of a client at a time, and compute the base products no less
often.

A client's rows are added one after the other, in the order of its batch, and how many are taken at a time follows from
the client alone, so its sums have the same bits in any pack.

Legend: G clients of a stack, R rows of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayfed_sub.core.devices import onto
from rayfed_sub.core.types import ModelShape
from rayfed_sub.data.batching import Batch
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.flat_rows import PassRule, pass_rule
from rayfed_sub.privacy.examples import RowPrivacy
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed
from rayfed_sub.training.layers import PackLinear
from rayfed_sub.training.pack_step import LocalRule, begun, move, passed, penalise
from rayfed_sub.training.passes import Labelled, Pass, labelled_passes
from rayfed_sub.training.stacks import Stack, Trainee

_NUMBERS = 2**23
"""Numbers that the copies of one client's tensors may have in a pass, besides one row's: 32 MiB."""


@dataclass(frozen=True)
class RowTurn:
    """Some rows of the clients of all stacks, in their order.  stacks: of their rows, those of clients' stacks that
    have any; of_G: for each of these which stack it comes from, and the place of each row's client in that; words: of
    each row its client's place among all of them, and the row's number in the client's batch."""

    stacks: list[Stack]
    of_G: list[tuple[int, list[int]]]
    batches: list[Labelled]
    words: list[tuple[int, int]]

    def passes(self, rule: PassRule, pad: int) -> list[Pass]:
        """The passes of the rows, whose tokens know the number of their row in the client's batch, as dropout asks."""
        number_R = torch.tensor([number for _, number in self.words])

        def numbered(where: Tensor) -> Tensor:
            client_S, _, place_S = where.unbind(1)
            return torch.stack([client_S, number_R[client_S], place_S], dim=1)

        return [one.moved(numbered) for one in labelled_passes(self.batches, rule, pad)]


def private_step(
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    shape: ModelShape,
    stacks: Sequence[Stack],
    batches: Mapping[int, Batch],
    rule: LocalRule,
    privacy: RowPrivacy,
    expected: Mapping[int, int],
) -> tuple[int, int]:
    """As `step_pack` by the rule of `privacy/examples.py`; returns the tokens of the rows, and those that were
    computed.  expected: by client."""
    steps = [begun(stack, shape, rule.seed, 0, None) for stack in stacks]
    assert not shape.experts, "an expert takes a step where the data ask for it"
    assert all(step.refresh is None for step in steps), "a basis would be computed from gradients without noise"
    trainees = [trainee for stack in stacks for trainee in stack.trainees]
    clients = [(one.client, one.taken + one.steps) for one in trainees]
    device = next(iter(layers.values())).weight.device
    sums = [{name: torch.zeros_like(leaf) for name, leaf in step.leaves.items()} for step in steps]
    tokens = computed = 0
    losses: list[list[float]] = [[] for _ in trainees]
    labels = [0 for _ in trainees]
    for rows in row_turns(stacks, batches, pass_rule(model), rule.micro_batch):
        turns = [one.to(device) for one in rows.passes(pass_rule(model), rule.pad)]
        own = [begun(stack, shape, rule.seed, len(turns), None) for stack in rows.stacks]
        of_R = [clients[place] for place, _ in rows.words]
        loss_R, label_R = passed(model, layers, shape, rows.stacks, own, turns, rule.seed, of_R)
        for (place, _), loss, count in zip(rows.words, loss_R.tolist(), label_R, strict=True):
            losses[place].append(loss)
            labels[place] += count
        for step, (i, place_R) in zip(own, rows.of_G, strict=True):
            add_clipped(sums[i], step.gradients, place_R, privacy.clip)
        tokens += sum(one.tokens[0] for one in turns)
        computed += sum(one.tokens[1] for one in turns)
    number = iter(clients)
    for stack, step, total in zip(stacks, steps, sums, strict=True):
        for g, trainee in enumerate(stack.trainees):
            mine = {name: tensor[g] for name, tensor in total.items()}
            for name, noise in privacy.drawn(rule.seed, *next(number), mine).items():
                mine[name].add_(noise).div_(expected[trainee.client])
        step.gradients = total
        penalise(stack, step)
        move(stack, step, shape, layers, rule)
    _count(trainees, [sum(own) / len(own) if own else None for own in losses], labels)
    return tokens, computed


def _count(trainees: Sequence[Trainee], losses: Sequence[float | None], labels: Sequence[int]) -> None:
    """Notes a step of the clients, with their losses and labels; None: no row was drawn for it."""
    for trainee, loss, count in zip(trainees, losses, labels, strict=True):
        trainee.steps += 1
        trainee.tokens += count
        if loss is None:
            trainee.empty += 1
            continue
        trainee.losses.append(loss)
        if not math.isfinite(loss):
            trainee.failure = trainee.failure or f"non-finite loss at local step {trainee.steps - 1}"


def row_turns(
    stacks: Sequence[Stack], batches: Mapping[int, Batch], rule: PassRule, micro_batch: int | None
) -> Iterator[RowTurn]:
    """The rows of a step, few of each client at a time, `micro_batch` at most; a client without rows has no part in
    it."""
    own = [[rows_of(batches[trainee.client]) for trainee in stack.trainees] for stack in stacks]
    few = [1 if rule.alone else min(_at_a_time(stack), micro_batch or _NUMBERS) for stack in stacks]
    first = [0]
    for stack in stacks:
        first.append(first[-1] + len(stack.trainees))
    for turn in range(max((-(-len(rows) // k) for of, k in zip(own, few, strict=True) for rows in of), default=0)):
        found = RowTurn([], [], [], [])
        for i, (stack, k) in enumerate(zip(stacks, few, strict=True)):
            some = range(turn * k, turn * k + k)
            at = [(g, row) for g, rows in enumerate(own[i]) for row in some if row < len(rows)]
            if at:
                found.stacks.append(_repeated(stack, [g for g, _ in at]))
                found.of_G.append((i, [g for g, _ in at]))
                found.batches.extend(own[i][g][row] for g, row in at)
                found.words.extend((first[i] + g, row) for g, row in at)
        yield found


def rows_of(batch: Batch) -> list[Labelled]:
    """The batch's rows, each as a batch of one."""
    assert not isinstance(batch, OwnBatch), "a batch of the caller's own has no rows"
    return [{name: x[b : b + 1] for name, x in batch.items()} for b in range(len(batch["labels"]))]


def add_clipped(sums: dict[str, Tensor], gradients: Mapping[str, Tensor], place_R: Sequence[int], clip: float) -> None:
    """Adds the rows' gradients (R, ...), which are used up, to the clients' sums (G, ...), each scaled down to norm
    `clip` over all tensors together; place_R: the rows' clients in the stack."""
    optimizers.clip(list(gradients.values()), clip)
    into = [sums[name] for name in gradients]
    for row, g in enumerate(place_R):
        torch._foreach_add_([total[g] for total in into], [gradient[row] for gradient in gradients.values()])


def _at_a_time(stack: Stack) -> int:
    """Rows of a client of the stack that a pass takes."""
    closed = [x for one in stack.closed.values() for x in (one.left_GmR, one.right_GRn) if x is not None]
    numbers = sum(tensor[0].numel() for tensor in (*stack.tensors.values(), *closed))
    return max(1, _NUMBERS // max(1, numbers))


def _repeated(stack: Stack, place_R: list[int]) -> Stack:
    """A stack of rows: the tensors of their clients, once for each row."""
    index = onto(place_R, stack.device)
    closed = {}
    for name, one in stack.closed.items():
        closed[name] = Closed()
        if one.left_GmR is not None and one.right_GRn is not None:
            closed[name] = Closed(one.left_GmR[index], one.right_GRn[index], [one.used_G[g] for g in place_R])
    tensors = {name: tensor[index] for name, tensor in stack.tensors.items()}
    return Stack(stack.device, [stack.trainees[g] for g in place_R], tensors, {}, closed, {})
