"""A client's result has the same bits in any pack: alone, with others, first or last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import LocalResult, Start, Subspace
from tests.helpers.tiny_models import (
    Tiny,
    bent,
    bert,
    core_start,
    dense_start,
    dinov2,
    draw_batches,
    galore_start,
    gpt2,
    llama,
    lora_start,
    run_pack,
    vit,
)

LR = 5e-2
PACKS = [
    [[0], [1], [2], [3], [4], [5], [6], [7]],
    [[0, 1], [2, 3], [4, 5], [6, 7]],
    [[7, 2, 5], [0, 6, 1], [4, 3]],
    [[0, 1, 2, 3, 4, 5, 6, 7]],
]


def starts(tiny: Tiny, kind: str) -> list[Start]:
    """Eight clients that differ in rank, scale and, under GaLore, in the steps taken: at any step only some refresh,
    and closed blocks are unequal."""
    ranks, steps = (1, 2, 3, 2, 1, 3, 2, 4), (0, 1, 2, 3, 4, 0, 5, 7)
    if kind == "dense":
        return [dense_start(tiny)] * 8
    if kind == "core":
        return [core_start(tiny, rank, scale=0.2 * rank) for rank in ranks]
    if kind == "lora":
        return [lora_start(tiny, rank, scale=0.2 * rank) for rank in ranks]
    projector, _, moments = kind.partition("+")
    return [
        galore_start(tiny, Subspace(rank, 3, projector, moments or "keep"), scale=0.2 * rank, step=step)
        for rank, step in zip(ranks, steps, strict=True)
    ]


def batches(tiny: Tiny, *, equal: bool = False) -> list[list[dict[str, Tensor]]]:
    """Different numbers of local steps, rows and tokens; or equal ones."""
    # Rows of 16 and 17: alone they lie as attention sees them, beside others they do not.
    steps, rows, tokens = (5, 4, 5, 2, 4, 5, 1, 3), (3, 1, 2, 3, 1, 3, 1, 3), (9, 17, 6, 9, 16, 29, 16, 10)
    if equal:
        steps, rows, tokens = (4,) * 8, (2,) * 8, (11,) * 8
    return [
        draw_batches(tiny, seed, s, rows=b, tokens=t)
        for seed, (s, b, t) in enumerate(zip(steps, rows, tokens, strict=True))
    ]


def trained(
    tiny: Tiny,
    given: Sequence[Start],
    data: list[list[dict[str, Tensor]]],
    optimizer: Optimizer,
    packs: list[list[int]],
) -> dict[int, LocalResult]:
    found = {}
    for pack in packs:
        results = run_pack(tiny, [given[k] for k in pack], [data[k] for k in pack], optimizer, lr=LR, clients=pack)
        found |= {result.client: result for result in results}
    return found


def bits(result: LocalResult) -> dict[str, Tensor | object]:
    blocks = {f"{name} {i}": block for name, both in result.blocks.items() for i, block in enumerate(both)}
    return {**result.tensors, **result.moments, **blocks, "metrics": result.metrics, "failure": result.failure}


def apart(ours: LocalResult, theirs: LocalResult) -> list[str]:
    """What differs, by name."""
    a, b = bits(ours), bits(theirs)
    assert a.keys() == b.keys()
    return [n for n in a if not (torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n])]  # type: ignore[arg-type]


def narrow(make: Callable[[], Tiny]) -> Tiny:
    tiny = make()
    return replace(tiny, model=copy.deepcopy(tiny.model).bfloat16())


KINDS = ["exact", "exact+rotate", "exact+reset", "svd", "randomized", "random", "lora", "core", "dense"]
MODELS = {"llama": llama, "gpt2": gpt2, "gemma2": lambda: bent("gemma2"), "bert": bert, "vit": vit, "dinov2": dinov2}


EVERY = [(model, kind, clip) for model in MODELS for kind in KINDS for clip in (None, 0.05)]
OFTEN = {
    *(("llama", kind, 0.05) for kind in KINDS),
    *(("gpt2", "exact", None), ("gemma2", "lora", None), ("bert", "exact", None), ("bert", "dense", None)),
    *(("vit", "exact", None), ("vit", "dense", None), ("dinov2", "lora", None)),
}
"""Every kind, model and way to clip."""


@pytest.mark.parametrize(
    ("model", "kind", "clip"),
    [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow) for case in EVERY],
)
def test_client_has_the_same_bits_in_any_pack(model: str, kind: str, clip: float | None) -> None:
    tiny = MODELS[model]()
    given, data = starts(tiny, kind), batches(tiny)
    optimizer = Optimizer(weight_decay=0.1, clip_norm=clip)
    first, *others = (trained(tiny, given, data, optimizer, packs) for packs in PACKS)
    for packs, other in zip(PACKS[1:], others, strict=True):
        assert not [(k, name) for k in first for name in apart(other[k], first[k])], packs


@pytest.mark.parametrize(("model", "kind"), [("llama", "exact"), ("gpt2", "lora"), ("llama", "dense")])
def test_so_it_has_over_a_bfloat16_backbone(model: str, kind: str) -> None:
    tiny = narrow(MODELS[model])
    given, data = starts(tiny, kind), batches(tiny)
    first, *others = (trained(tiny, given, data, Optimizer(clip_norm=0.05), packs) for packs in PACKS)
    for packs, other in zip(PACKS[1:], others, strict=True):
        assert not [(k, name) for k in first for name in apart(other[k], first[k])], packs


@pytest.mark.parametrize("model", ["llama", "vit"])
def test_clients_of_equal_shape_take_as_many_calls_as_one(model: str) -> None:
    """Kernel calls of a pack of two and of eight, with ranks and tokens alike."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += any(part in str(func) for part in ("mm", "linear", "attention"))
            return func(*args, **(kwargs or {}))

    tiny, found = MODELS[model](), []
    data = batches(tiny, equal=True)
    run_pack(tiny, [lora_start(tiny, 2)], data[:1], Optimizer(), lr=LR)  # what is done once
    for clients in (2, 8):
        with Counted() as counted:
            run_pack(tiny, [lora_start(tiny, 2)] * clients, data[:clients], Optimizer(), lr=LR)
        found.append(counted.products)
    assert found[0] == found[1] > 0
