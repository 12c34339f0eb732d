"""Activation checkpointing: a block keeps its input alone, and is computed once more on the way back.

The second pass sees what the first one saw, so gradients have the same bits: counters of how often a layer was called,
by which dropout draws and a refresh counts what is still to come, and the rows' places in a flat pass are those of the
first.  A refresh's hooks are called by the gradient, which comes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.flat_rows import same_rows
from rayfed_sub.models.weights import through_modules
from rayfed_sub.training.layers import PackLinear

Context = Callable[[], AbstractContextManager[Any]]


def blocks_of(model: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """The blocks of the lists in which the targets lie: the outermost `ModuleList` on the way to each, or `Sequential`
    of a module of the caller's own; empty where there is none."""
    found: dict[int, nn.Module] = {}
    for layer in shape.targets:
        parts = layer.name.split(".")
        for end in range(1, len(parts)):
            parent = model.get_submodule(".".join(parts[:end]))
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                found |= {id(block): block for block in parent}
                break
    return list(found.values())


@contextmanager
def recomputed(model: nn.Module, shape: ModelShape, *, on: bool) -> Iterator[None]:
    """Within it a forward pass with gradients keeps no more of a block than its inputs, if `on`."""
    blocks = blocks_of(model, shape) if on else []
    own = vars(model).get("own_loss") is not None  # may draw numbers on the way
    for block in blocks:
        layers = [part for part in block.modules() if isinstance(part, PackLinear)]
        block.forward = partial(_forward, model, block.forward, layers, own)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _forward(
    model: nn.Module, forward: Callable[..., Any], layers: Sequence[PackLinear], own: bool, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    counters = [_counters(layer) for layer in layers]
    contexts = partial(_contexts, (same_rows(model), *_modes()), layers, counters)
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": own, "context_fn": contexts}
    return checkpoint(forward, *args, **how, **kwargs)


def _modes() -> list[Context]:
    """The function modes of now: of a plan, which torch takes away while it calls autograd."""
    return [partial(_itself, mode) for mode in _get_current_function_mode_stack()]


def _itself(mode: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    return mode


Counters = tuple[int | None, tuple[int, ...]]
"""Uses of a layer's dropout, and of each stack's captures, so far."""


def _counters(layer: PackLinear) -> Counters:
    bound = layer.bound
    if bound is None:
        return None, ()
    captures = (terms.captures for terms in bound.stacks)
    return bound.dropout.uses if bound.dropout else None, tuple(one.uses if one else 0 for one in captures)


def _set(layer: PackLinear, counters: Counters) -> None:
    bound, (dropped, captured) = layer.bound, counters
    if bound is None:
        return
    if bound.dropout is not None and dropped is not None:
        bound.dropout.uses = dropped
    for terms, uses in zip(bound.stacks, captured, strict=True):
        if terms.captures is not None:
            terms.captures.uses = uses


def _contexts(
    around: Sequence[Context], layers: Sequence[PackLinear], counters: Sequence[Counters]
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass, and around the second."""
    return nullcontext(), _again(around, layers, counters)


@contextmanager
def _again(around: Sequence[Context], layers: Sequence[PackLinear], counters: Sequence[Counters]) -> Iterator[None]:
    now = [_counters(layer) for layer in layers]
    for layer, then in zip(layers, counters, strict=True):
        _set(layer, then)
    try:
        with ExitStack() as stack:
            for context in (*around, through_modules):
                stack.enter_context(context())
            yield
    finally:
        for layer, then in zip(layers, now, strict=True):
            _set(layer, then)
