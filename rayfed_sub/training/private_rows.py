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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayfed_sub.core.devices import onto
from rayfed_sub.data.batching import Batch
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.flat_rows import PassRule
from rayfed_sub.training import optimizers
from rayfed_sub.training.blocks import Closed
from rayfed_sub.training.passes import Labelled, Pass, labelled_passes
from rayfed_sub.training.stacks import Stack

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
        found = []
        for one in labelled_passes(self.batches, rule, pad):
            where = one.where.clone()
            where[:, 1] = number_R[where[:, 0]]
            found.append(replace(one, where=where))
        return found


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
