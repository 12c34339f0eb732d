"""Activation checkpointing and micro-batches: less memory, the same training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import LocalResult, Start, Subspace
from rayfed_sub.planning.allocations import Allocations
from rayfed_sub.training.executor import train_pack
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers.tiny_models import (
    PAD,
    Tiny,
    albert,
    bert,
    change,
    draw_batches,
    galore_start,
    gpt2,
    llama,
    lora_start,
    mixture,
    start_of,
    works,
    worst,
)

LR = 1e-2


def starts(tiny: Tiny, kind: str) -> list[Start]:
    """Three clients; of GaLore two that have a refresh at another step than the third."""
    if kind == "dropout":
        return [replace(lora_start(tiny, 2), dropout=0.3)] * 3
    if kind == "galore":
        return [galore_start(tiny, Subspace(2, 2), step=step) for step in (0, 2, 1)]
    return [start_of(kind, tiny)] * 3


def trained(tiny: Tiny, given: list[Start], **how: Any) -> list[LocalResult]:
    model, layers = tiny.packed
    batches = [draw_batches(tiny, seed, 3, rows=4, tokens=9 + seed) for seed in range(3)]
    rule = LocalRule(Optimizer(clip_norm=0.5), LR, 0, PAD, **how)
    return train_pack(model, layers, tiny.shape, works(given, batches), rule).results


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *((llama, kind) for kind in ("lora", "galore", "dropout", "dense")),
        (gpt2, "galore"),
        (bert, "dropout"),
        (albert, "galore"),
        (albert, "dropout"),
        (mixture, "galore"),
    ],
)
def test_blocks_computed_twice_change_no_bits(make: Any, kind: str) -> None:
    """ALBERT's blocks are one module, whose uses a refresh and dropout count."""
    tiny = make()
    given = starts(tiny, kind)
    for once, twice in zip(trained(tiny, given), trained(tiny, given, recompute=True), strict=True):
        assert once.failure is None
        assert all(torch.equal(once.tensors[name], twice.tensors[name]) for name in once.tensors)
        assert once.metrics == twice.metrics


@pytest.mark.parametrize(("make", "kind"), [(llama, "galore"), (llama, "dropout"), (bert, "galore"), (bert, "dropout")])
def test_micro_batches_have_the_gradient_of_the_whole(make: Any, kind: str) -> None:
    """Also a refresh, which sees all tokens of the batch, and dropout, which drops the same numbers."""
    tiny = make()
    given = starts(tiny, kind)
    for start, whole, parts in zip(given, trained(tiny, given), trained(tiny, given, micro_batch=3), strict=True):
        assert worst(change(tiny, start, whole), change(tiny, start, parts)) < 2e-4
        assert whole.metrics["labels"] == parts.metrics["labels"]
        assert whole.metrics["loss"] == pytest.approx(parts.metrics["loss"], rel=1e-5)


def test_both_take_less_memory() -> None:
    """Of a model whose activations are most of it."""
    tiny = llama(hidden=64, inner=512)
    given = [lora_start(tiny, 2)]

    def peak(**how: Any) -> int:
        with Allocations() as seen:
            model, layers = tiny.packed
            batch = draw_batches(tiny, 0, 1, rows=16, tokens=32)
            train_pack(model, layers, tiny.shape, works(given, [batch]), LocalRule(Optimizer(), LR, 0, PAD, **how))
        return seen.peak

    whole, blocks, parts = peak(), peak(recompute=True), peak(micro_batch=2)
    assert blocks < 0.75 * whole
    assert parts < 0.3 * whole
