"""Linear layer for many clients at once: a shared frozen weight, and small terms of each client's own.

The layer computes in float32 whatever the backbone's type.  Pretrained bfloat16 weights lie on bfloat16's grid, so a
small change added to one of them, or to an output of that type, would be rounded away.  The input is cast up, the base
product and all terms are added in float32, and the sum is rounded once, to the input's type.

The shared weight, which may be quantised, is multiplied with the tokens of the whole pack, the clients' own factors
each with its own tokens; neighbours of equal shape share those calls.  The (m, n) products of factors are never formed.

Legend: G clients of a stack, g of them side by side, S tokens of a pass, N tokens of a client, m outputs, n inputs,
r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.frozen_linear import freeze, product
from rayfed_sub.models.quantised import Quantised
from rayfed_sub.training.blocks import Closed, add_product, multiplied
from rayfed_sub.training.dropout import Dropout
from rayfed_sub.training.pass_rows import Run, runs, token_runs

_TILE = 16
"""The one client of an evaluation has as many tokens as a batch happens to have: they are filled up to a multiple of
this, beyond which products with few ranks have other bits at the end of their tokens."""


Part = tuple[int, Tensor, Tensor]
"""A layer's inputs x (g, N, n) and output gradients d (g, N, m) of g clients with equally many tokens, and the first
one's place in the stack."""
Capture = Callable[[Sequence[Part]], None]


@dataclass
class Captures:
    """Backward hooks of one layer for one stack, called once a step with the tokens of all the layer's uses: ALBERT's
    blocks are one module, and a step may take several passes.

    passes: how many are still to come, the current one included.
    """

    hooks: Sequence[Capture]
    passes: int = 1
    uses: int = 0
    seen: dict[int, tuple[Tensor, Tensor, tuple[Run, ...]]] = field(default_factory=dict)
    """(x, d, runs) of the uses whose gradient has come, by use, until the hooks are called."""

    def take(self, use: int, x_Sn: Tensor, d_Sm: Tensor, found: tuple[Run, ...]) -> None:
        """Takes a use's tokens; with the last one's the hooks are called, so that nothing is held longer."""
        self.seen[use] = (x_Sn, d_Sm, found)
        if self.passes == 1 and len(self.seen) == self.uses:
            self.finish()

    def finish(self) -> None:
        """Calls the hooks with what has come, after the backward pass: a use outside the loss has no gradient."""
        if not self.seen:
            return
        uses = [self.seen.pop(use) for use in sorted(self.seen)]
        parts = _parts(*uses[0]) if len(uses) == 1 else _joined(uses)
        for hook in self.hooks:
            hook(parts)


def _parts(x_Sn: Tensor, d_Sm: Tensor, found: Sequence[Run]) -> list[Part]:
    return [(run.first, run.of(x_Sn), run.of(d_Sm)) for run in found]


def _joined(uses: Sequence[tuple[Tensor, Tensor, tuple[Run, ...]]]) -> list[Part]:
    """Each client's tokens of all uses, one use after the other."""
    own: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for use in uses:
        for first, x_gNn, d_gNm in _parts(*use):
            for g, pair in enumerate(zip(x_gNn, d_gNm, strict=True), start=first):
                own.setdefault(g, []).append(pair)
    whole = {g: tuple(torch.cat(side) for side in zip(*pairs, strict=True)) for g, pairs in sorted(own.items())}
    count_G = [len(whole[g][0]) if g in whole else 0 for g in range(max(whole) + 1)]
    return [
        (
            run.first,
            torch.stack([whole[g][0] for g in range(run.first, run.last)]),
            torch.stack([whole[g][1] for g in range(run.first, run.last)]),
        )
        for run in runs(count_G)
    ]


@dataclass
class Terms:
    """Terms that the G clients of a stack add to one layer.  All tensors float32 and private to the pack; None where
    not in use.

    output = base_scale * (x W^T) + scale * dropout(x) (left core right)^T + x (closed blocks)^T + bias
    with x W^T replaced by x weight^T where the clients own a dense weight.

    rows: the clients' rows in the pass (see `Bound`), a run's clients having equally many closed blocks; None for a
    single client that has all rows.
    """

    rows: tuple[Run, ...] | None = None
    weight_Gmn: Tensor | None = None
    bias_Gm: Tensor | None = None
    left_Gmr: Tensor | None = None
    right_Grn: Tensor | None = None
    core_Grr: Tensor | None = None
    scale_G: Tensor | None = None
    closed: Closed | None = None
    base_scale_G: Tensor | None = None
    captures: Captures | None = None

    def leaves(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient: weight, bias, left (times core), right."""
        left_Gmr = self.left_Gmr
        if left_Gmr is not None and self.core_Grr is not None:
            left_Gmr = _with_core(left_Gmr, self.core_Grr)
        return self.weight_Gmn, self.bias_Gm, left_Gmr, self.right_Grn


def _with_core(left_Gmr: Tensor, core_Grr: Tensor) -> Tensor:
    """left core for every client.  Square products of odd rank above 3 have other bits for a client whose matrices
    begin elsewhere in memory; a column of zeros keeps them, in the gradients too."""
    rank = core_Grr.shape[1]
    if rank <= 3 or rank % 2 == 0:
        return multiplied(left_Gmr, core_Grr)
    wide = functional.pad(left_Gmr, (0, 1))
    return multiplied(wide, functional.pad(core_Grr, (0, 1, 0, 1)))[:, :, :rank]


@dataclass(frozen=True)
class Bound:
    """A pass's terms at a layer.  rows: rows of the pass, of all stacks, those that only fill it up included; a layer
    sees a whole number of tokens for each row (in a flat pass a row is a token).  dropout: of the input of left core
    right, without the base product and closed blocks."""

    rows: int
    stacks: tuple[Terms, ...]
    dropout: Dropout | None = None


class PackLinear(nn.Module):
    """y = x W^T + bias for a frozen shared W (m, n), plus what the clients add that are `bound` at the moment.

    Input (..., n), its tokens client by client; output (..., m) in the input's dtype, rounded once from float32.
    """

    def __init__(self, weight: Tensor | Quantised, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes, not parameters: the tensors are shared memory and nothing may collect them for training.
        self.weight: Tensor | Quantised = weight
        self.bias = bias
        self.out_features, self.in_features = weight.shape  # as nn.Linear has them: a module may ask
        self.bound: Bound | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.bound is None:
            return product(x.float(), self.weight, self.bias).to(x.dtype)
        x_Sn = x.reshape(-1, x.shape[-1]).float()
        S, stacks = len(x_Sn), self.bound.stacks
        if stacks[0].rows is None and S % _TILE:
            x_Sn = functional.pad(x_Sn, (0, 0, 0, -S % _TILE))
        dropout = self.bound.dropout
        kept = None if dropout is None else (dropout.kept(x_Sn), dropout.factor)
        y_Sm = self.summed(x_Sn, tuple(token_runs(terms.rows, len(x_Sn), self.bound.rows) for terms in stacks), kept)
        y_Sm = y_Sm[:S] if len(y_Sm) > S else y_Sm
        return y_Sm.to(x.dtype).reshape(*x.shape[:-1], -1)

    def summed(
        self, x_Sn: Tensor, found: tuple[tuple[Run, ...], ...], kept: tuple[Tensor, float] | None = None
    ) -> Tensor:
        """The outputs (S, m), in the inputs' type, of tokens that lie in these runs of every stack that is bound; kept:
        as in `_Sum`."""
        assert self.bound is not None
        stacks = self.bound.stacks
        leaves = [leaf for terms in stacks for leaf in terms.leaves()]
        given = (x_Sn.float(), self.weight, self.bias, stacks, found, kept)
        y_Sm: Tensor = _Sum.apply(*given, *leaves)  # type: ignore[no-untyped-call]
        return y_Sm.to(x_Sn.dtype)


_LEAVES = 6
"""The place of the first leaf among `_Sum`'s arguments."""


class _Sum(torch.autograd.Function):
    """The base product and all clients' terms, with gradients for the input and the clients' own tensors.  kept: which
    numbers of x the factors read, (S, n) bool, and what these are multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Sn: Tensor,
        weight_mn: Tensor | Quantised,
        bias_m: Tensor | None,
        stacks: tuple[Terms, ...],
        found: tuple[tuple[Run, ...], ...],
        kept: tuple[Tensor, float] | None,
        *leaves: Tensor | None,
    ) -> Tensor:
        owned = [leaves[4 * i : 4 * i + 4] for i in range(len(stacks))]
        dense, scaled = owned[0][0] is not None, any(terms.base_scale_G is not None for terms in stacks)
        own_bias = owned[0][1] is not None
        if dense:
            y_Sm = x_Sn.new_zeros(len(x_Sn), len(weight_mn))
        else:
            y_Sm = product(x_Sn, weight_mn, None if scaled or own_bias else bias_m)
        asked, read_Sn = ctx.needs_input_grad, _dropped(x_Sn, kept)
        projected: list[Tensor] = []  # z of every run whose left factor has a gradient
        for i, (terms, (weight_Gmn, _, left_Gmr, right_Grn)) in enumerate(zip(stacks, owned, strict=True)):
            for run in found[i]:
                g, x_gNn, y_gNm = slice(run.first, run.last), run.of(x_Sn), run.of(y_Sm)
                if weight_Gmn is not None:
                    add_product(y_gNm, x_gNn, weight_Gmn[g].mT)
                if terms.base_scale_G is not None:
                    y_gNm *= terms.base_scale_G[g, None, None]
                if left_Gmr is not None and right_Grn is not None:
                    z_grN = _scaled(multiplied(right_Grn[g], run.of(read_Sn).mT), terms.scale_G, g)
                    add_product(y_gNm, z_grN.mT, left_Gmr[g].mT)
                    if asked[_LEAVES + 4 * i + 2]:
                        projected.append(z_grN)
                if (closed := _closed(terms, run)) is not None:
                    add_product(y_gNm, multiplied(closed[1], x_gNn.mT).mT, closed[0].mT)
        if own_bias:
            for i, terms in enumerate(stacks):
                for run in found[i]:
                    assert terms.bias_Gm is not None
                    y_gNm = run.of(y_Sm)
                    y_gNm += terms.bias_Gm[run.first : run.last, None]
        elif (dense or scaled) and bias_m is not None:
            y_Sm += bias_m
        captures = [terms.captures for terms in stacks]
        ctx.uses = [one.uses if one is not None else 0 for one in captures]
        for one in captures:
            if one is not None and any(asked):
                one.uses += 1
        reads_x = dense or any(one is not None for one in captures) or any(asked[_LEAVES + 3 :: 4])
        keep_Sn, ctx.factor = (None, 1.0) if kept is None else kept
        ctx.save_for_backward(x_Sn if reads_x else None, keep_Sn, *leaves, *projected)
        ctx.weight_mn, ctx.stacks, ctx.found, ctx.leaves = weight_mn, stacks, found, len(leaves)
        return y_Sm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_Sm,) = outputs
        d_Sm = d_Sm.contiguous()
        x_Sn, keep_Sn, *saved = ctx.saved_tensors
        leaves, projected = saved[: ctx.leaves], iter(saved[ctx.leaves :])
        kept = None if keep_Sn is None else (keep_Sn, ctx.factor)
        asked, stacks, found = ctx.needs_input_grad, ctx.stacks, ctx.found
        for use, terms, own_runs in zip(ctx.uses, stacks, found, strict=True):
            if terms.captures is not None:
                terms.captures.take(use, x_Sn, d_Sm, own_runs)
        dx_Sn = None
        if asked[0]:
            dense = leaves[0] is not None
            dx_Sn = d_Sm.new_zeros(len(d_Sm), ctx.weight_mn.shape[1]) if dense else product(d_Sm, ctx.weight_mn.mT)
        grads = [
            _empty(leaf, found[i // 4]) if leaf is not None and asked[_LEAVES + i] else None
            for i, leaf in enumerate(leaves)
        ]
        read_Sn = _dropped(x_Sn, kept) if any(grad is not None for grad in grads[3::4]) else None
        for i, terms in enumerate(stacks):
            weight_Gmn, _, left_Gmr, right_Grn = leaves[4 * i : 4 * i + 4]
            dweight, dbias, dleft, dright = grads[4 * i : 4 * i + 4]
            for run in found[i]:
                g, d_gNm = slice(run.first, run.last), run.of(d_Sm)
                dx_gNn = None if dx_Sn is None else run.of(dx_Sn)
                if dx_gNn is not None and weight_Gmn is not None:
                    add_product(dx_gNn, d_gNm, weight_Gmn[g])
                if dx_gNn is not None and terms.base_scale_G is not None:
                    dx_gNn *= terms.base_scale_G[g, None, None]
                if dweight is not None:
                    dweight[g] = multiplied(d_gNm.mT, run.of(x_Sn))
                if dbias is not None:
                    dbias[g] = d_gNm.sum(1)
                if dleft is not None:
                    dleft[g] = multiplied(next(projected), d_gNm).mT
                if left_Gmr is not None and right_Grn is not None and (dx_gNn is not None or dright is not None):
                    dz_grN = _scaled(multiplied(left_Gmr[g].mT, d_gNm.mT), terms.scale_G, g)
                    if dx_gNn is not None and keep_Sn is None:
                        add_product(dx_gNn, dz_grN.mT, right_Grn[g])
                    elif dx_gNn is not None:
                        dx_gNn += multiplied(dz_grN.mT, right_Grn[g]).mul_(run.of(keep_Sn)).mul_(ctx.factor)
                    if dright is not None:
                        dright[g] = multiplied(dz_grN, run.of(read_Sn))
                if dx_gNn is not None and (closed := _closed(terms, run)) is not None:
                    add_product(dx_gNn, multiplied(closed[0].mT, d_gNm.mT).mT, closed[1])
        return dx_Sn, *[None] * (_LEAVES - 1), *grads


def _dropped(x_Sn: Tensor, kept: tuple[Tensor, float] | None) -> Tensor:
    return x_Sn if kept is None else (x_Sn * kept[0]).mul_(kept[1])


def _closed(terms: Terms, run: Run) -> tuple[Tensor, Tensor] | None:
    return None if terms.closed is None else terms.closed.between(run.first, run.last)


def _scaled(z_grN: Tensor, scale_G: Tensor | None, g: slice) -> Tensor:
    return z_grN if scale_G is None else z_grN.mul_(scale_G[g, None, None])


def _empty(leaf: Tensor, found: Sequence[Run]) -> Tensor:
    """Memory for a stack's gradients: zeros where a client has no tokens in the pass."""
    whole = sum(run.last - run.first for run in found) == len(leaf)
    return torch.empty_like(leaf) if whole else torch.zeros_like(leaf)


def install(module: nn.Module, shape: ModelShape) -> dict[str, PackLinear]:
    """Replaces the target and head layers of `module`, but for experts', by PackLinear over the same weights (no copy);
    by layer name.  All other plain linear layers are frozen.

    GPT-2's Conv1D stores (n, m); its transposed view serves as (m, n).
    """
    layers = {}
    for layer in (layer for layer in (*shape.targets, *shape.head) if not layer.expert):
        parent_name, _, child = layer.name.rpartition(".")
        parent = module.get_submodule(parent_name)
        old = parent.get_submodule(child)
        stored, bias = old.weight, old.bias
        assert isinstance(stored, Tensor | Quantised)
        assert bias is None or isinstance(bias, Tensor)
        if isinstance(stored, Tensor):
            stored = stored.detach() if isinstance(old, nn.Linear) else stored.detach().T
        weight = stored
        assert weight.shape == (layer.m, layer.n), layer
        layers[layer.name] = PackLinear(weight, None if bias is None else bias.detach())
        parent.register_module(child, layers[layer.name])
    freeze(module)
    return layers


@contextmanager
def bound(layers: Mapping[str, PackLinear], terms: Mapping[str, Bound]) -> Iterator[None]:
    """Puts the terms at their layers."""
    try:
        for name, here in terms.items():
            layers[name].bound = here
        yield
    finally:
        for name in terms:
            layers[name].bound = None


@contextmanager
def based_on(
    layers: Mapping[str, PackLinear], weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Puts the round's base weights (m, n) and biases (m,), float32, in place of the backbone's; a layer without one
    keeps its own.

    The weights stay the given tensors: on a processor they are read where they lie in shared memory.
    """
    frozen: dict[str, tuple[Tensor | Quantised, Tensor | None]]
    frozen = {name: (layers[name].weight, layers[name].bias) for name in weights}
    try:
        for name, weight in weights.items():
            layers[name].weight = weight.to(frozen[name][0].device)
        for name, bias in (biases or {}).items():
            layers[name].bias = bias.to(frozen[name][0].device)
        yield
    finally:
        for name, before in frozen.items():
            layers[name].weight, layers[name].bias = before
