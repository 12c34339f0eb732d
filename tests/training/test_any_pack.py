"""A client's result has the same bits in any pack: alone, with others, first or last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayfed_sub.config.schema import Model, Optimizer
from rayfed_sub.core.types import LocalResult, Start, Subspace
from rayfed_sub.models.architecture import architecture, bare_config
from rayfed_sub.models.presets import ANY_PATCHES, CLASSIFIERS_IN_ANY_PACK
from rayfed_sub.models.weights import assemble, load_weights
from tests.helpers.tiny_models import (
    PAD,
    VOCABULARY,
    Tiny,
    bent,
    bert,
    core_start,
    dense_start,
    dinov2,
    draw_batches,
    draw_images,
    draw_sentences,
    galore_start,
    gpt2,
    llama,
    lora_start,
    run_pack,
    vit,
)
from tests.training.test_reference import compare

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
    # Rows of 16: alone they lie as attention sees them, beside others they do not.  Clients 0 and 4, of rank 1, have
    # equally many tokens, as have 1 and 3, of rank 2.
    steps, rows, tokens = (5, 4, 5, 2, 4, 5, 1, 3), (1, 2, 2, 2, 1, 3, 1, 3), (16, 9, 6, 9, 16, 29, 17, 10)
    if equal:
        steps, rows, tokens = (4,) * 8, (2,) * 8, (11,) * 8
    return [
        draw_batches(tiny, seed, s, rows=b, tokens=t)
        for seed, (s, b, t) in enumerate(zip(steps, rows, tokens, strict=True))
    ]


def differing(tiny: Tiny, given: Sequence[Start], data: list[list[dict[str, Tensor]]], clip: float | None) -> list[str]:
    """What a client's result in one of the packs has other than in the first."""
    optimizer = Optimizer(weight_decay=0.1, clip_norm=clip)
    first, *others = (trained(tiny, given, data, optimizer, packs) for packs in PACKS)
    return [f"client {k}, {name}" for other in others for k in first for name in apart(other[k], first[k])]


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
    *(("llama", "exact+rotate", 0.05), ("llama", "randomized", 0.05), ("llama", "lora", None), ("llama", "core", 0.05)),
    *(("gpt2", "exact", 0.05), ("gemma2", "random", None), ("bert", "svd", 0.05), ("bert", "dense", None)),
    *(("vit", "exact+reset", 0.05), ("dinov2", "lora", 0.05)),
}
"""Every kind and every model once, with and without clipping."""


@pytest.mark.parametrize(
    ("model", "kind", "clip"),
    [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow) for case in EVERY],
)
def test_client_has_the_same_bits_in_any_pack(model: str, kind: str, clip: float | None) -> None:
    tiny = MODELS[model]()
    assert not differing(tiny, starts(tiny, kind), batches(tiny), clip)


@pytest.mark.parametrize("rank", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["exact", "lora", "core"])
def test_clients_of_equal_shape_share_calls_and_have_the_same_bits(kind: str, rank: int) -> None:
    tiny = llama()
    one = {
        "exact": galore_start(tiny, Subspace(rank, 3)),
        "lora": lora_start(tiny, rank),
        "core": core_start(tiny, rank),
    }
    assert not differing(tiny, [one[kind]] * 8, batches(tiny, equal=True), 0.05)


@pytest.mark.parametrize("rank", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_cores_of_odd_rank_have_the_same_bits(rank: int) -> None:
    """Of 5 x 5 numbers, so that in a stack only every sixteenth begins where it would alone."""
    tiny = llama()
    assert not differing(tiny, [core_start(tiny, rank)] * 8, batches(tiny), 0.05)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("llama", "exact"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("gpt2", "lora"), ("llama", "dense"))),
    ],
)
def test_so_it_has_over_a_bfloat16_backbone(model: str, kind: str) -> None:
    tiny = narrow(MODELS[model])
    assert not differing(tiny, starts(tiny, kind), batches(tiny), 0.05)


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


SMALL = {
    **{"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, "initializer_range": 0.3, "dim": 24, "hidden_dim": 36, "n_layers": 2},
    **{"n_heads": 2, "embedding_size": 24, "pad_token_id": PAD, "image_size": 8, "patch_size": 2},
}


def classifier(name: str, targets: str = "lower-mlp", **more: int) -> Tiny:
    """A small model of the type as a run has it, for three classes of texts or images; more: sizes."""
    texts = name not in ("beit", "vit", *ANY_PATCHES)
    kind = "text-classification" if texts else "image-classification"
    known = bare_config(Model(path="random", random={"type": name}), kind)
    numbers = {key: value for key, value in {**SMALL, **more}.items() if hasattr(known, key)}
    model = Model(path="random", targets=targets, random={"type": name, **numbers})
    built = architecture(model, kind, "abc", VOCABULARY, PAD)
    weights = load_weights(Model(path="random"), built, seed=0)
    return Tiny(assemble(built, weights), built.shape, draw_sentences if texts else draw_images)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "albert" else pytest.mark.slow) for n in sorted(CLASSIFIERS_IN_ANY_PACK)]
)
def test_classifier_of_every_listed_type_gives_the_same_bits_in_any_pack(name: str) -> None:
    tiny = classifier(name)
    given = [lora_start(tiny, rank) for rank in (1, 2, 3, 2, 1, 3, 2, 4)]
    assert not differing(tiny, given, batches(tiny), 0.05)


@pytest.mark.parametrize(("name", "layer"), [("bert", "bert.pooler.dense"), ("electra", "electra.embeddings_project")])
def test_layers_on_both_sides_of_the_pooling_train_as_with_peft(name: str, layer: str) -> None:
    """Behind it a layer sees one token of each row, before it all of them in one flat row."""
    tiny = classifier(name, "all-linear", embedding_size=16)
    assert layer in [target.name for target in tiny.shape.targets]
    start = replace(lora_start(tiny, 3), dropout=0.2)
    compare(tiny, start, Optimizer(eps=1e-4), 1e-2)
    given = [replace(lora_start(tiny, rank), dropout=0.2) for rank in (1, 2, 3, 2, 1, 3, 2, 4)]
    assert not differing(tiny, given, batches(tiny), None)
