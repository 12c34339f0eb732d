"""Experts of a mixture as layers: routed by the model, stepped one by one, judged by peft and galore-torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.types import ModelShape, Subspace
from rayfed_sub.methods import build
from rayfed_sub.models.experts import experts_of
from rayfed_sub.training.pack_experts import PackExperts, install
from tests.helpers.tiny_models import (
    PAD,
    Batch,
    change,
    distance,
    draw_batches,
    galore_start,
    lora_start,
    mixture,
    next_start,
    run_pack,
    run_reference,
    start_of,
    worst,
)
from tests.methods.test_protocol import effective, walk

ADAM = Optimizer(weight_decay=0.1, clip_norm=1.0)


def one_token(token: int, rows: int = 2, tokens: int = 6) -> Batch:
    """Rows of one token over and over: attention mixes equal values, so that all go to the same experts."""
    ids = torch.full((rows, tokens), token)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def steps_of(result: object, names: list[str]) -> list[int]:
    return [int(result.moments[f"{name}/step"]) for name in names]  # type: ignore[attr-defined]


def names_of(name: str, key: str) -> list[list[str]]:
    """The layers of each block's experts."""
    places = experts_of(mixture(name).model).values()
    return [list(matrix.names) for one in places for matrix in one.matrices if matrix.parameter.endswith(key)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "galore"), ("mixtral", "lora"), ("mixtral", "core"), ("gpt_oss", "galore"), ("gpt_oss", "lora")],
)
def test_experts_are_as_the_libraries_have_them(name: str, kind: str) -> None:
    """FedFTG by galore-torch for each expert, FedIT by peft's `target_parameters`; weight decay and clipping on."""
    tiny, start = mixture(name), start_of(kind, mixture(name))
    batches = [one_token(5), *draw_batches(tiny, 3, 2, rows=2), one_token(9), *draw_batches(tiny, 4, 1)]
    for _ in range(2):
        (ours,) = run_pack(tiny, [start], [batches], ADAM, lr=1e-2)
        (theirs,) = run_reference(tiny, [start], [batches], ADAM, lr=1e-2)
        assert ours.failure is None
        assert theirs.failure is None
        assert worst(change(tiny, start, ours), change(tiny, start, theirs)) < 2e-4  # Adam's steps carry roundings on
        names = [layer.name for layer in tiny.shape.experts]
        assert steps_of(ours, names) == steps_of(theirs, names)
        assert ours.base_scales == pytest.approx(theirs.base_scales)
        assert len(set(steps_of(ours, names))) > 1  # some were skipped
        start = next_start(start, ours, tiny)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mixtral", {"name": "fedit", "alpha_pattern": {"experts.down_proj": 64.0}}),
        ("mixtral", {"name": "fedit", "rank_pattern": {"experts.gate_up_proj": 4}, "use_rslora": True}),
        ("mixtral", {"name": "fed-sb", "alpha_pattern": {"down_proj": 400.0}}),
        ("gpt_oss", {"name": "fedit", "rank_pattern": {"gate_up_proj.1": 3}, "alpha_pattern": {"down_proj.2": 64.0}}),
    ],
)
def test_experts_with_ranks_and_scales_of_their_own(name: str, fields: dict[str, Any]) -> None:
    tiny, method = mixture(name), build({"rank": 2, **fields})
    method.check(tiny.shape)
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    data, optimizer = [draw_batches(tiny, 3, 3, rows=2)], Optimizer(eps=1e-4)
    ours, theirs = (
        walk(method, tiny, server, data, weights=[1], optimizer=optimizer, trainer=trainer)
        for trainer in (run_pack, run_reference)
    )
    start, found = ours.starts[0], [change(tiny, done.starts[0], done.results[0]) for done in (ours, theirs)]
    assert worst(*found) < 1e-4
    assert len({start.scale_of(layer.name) for layer in tiny.shape.targets}) > 1


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_moved_moments_of_experts(moments: str) -> None:
    tiny = mixture()
    start = galore_start(tiny, Subspace(2, 2, moments=moments))
    batches = [one_token(5), *draw_batches(tiny, 3, 2, rows=2), one_token(9), *draw_batches(tiny, 4, 2)]
    (ours,) = run_pack(tiny, [start], [batches], ADAM, lr=1e-2)
    (theirs,) = run_reference(tiny, [start], [batches], ADAM, lr=1e-2)
    assert worst(change(tiny, start, ours), change(tiny, start, theirs)) < 1e-4


def test_expert_without_tokens_is_skipped() -> None:
    """Of the four experts two take the token; the others have no step, moment, decay or basis, and then a first step
    of their own."""
    tiny, start = mixture(), galore_start(mixture(), Subspace(2, 3))
    (first,) = run_pack(tiny, [start], [[one_token(5)]], ADAM, lr=1e-2)
    for names in names_of("mixtral", "down_proj"):
        assert sorted(steps_of(first, names)) == [0, 0, 1, 1]
        for name, steps in zip(names, steps_of(first, names), strict=True):
            layer = next(layer for layer in tiny.shape.targets if layer.name == name)
            fixed, trained = sides(layer)
            assert bool(first.tensors[fixed].any()) == bool(first.moments[f"{trained}/m1"].any()) == bool(steps)
            assert first.base_scales[name] == pytest.approx(0.999 if steps else 1.0)  # 1 - lr decay
            left, right = first.blocks[name]
            assert bool((left @ right).any()) == bool(steps)
    (second,) = run_pack(tiny, [next_start(start, first, tiny)], [draw_batches(tiny, 3, 1)], ADAM, lr=1e-2)
    names = [name for block in names_of("mixtral", "down_proj") for name in block]
    assert sorted(set(steps_of(second, names))) == [1, 2]
    assert all(second.tensors[sides(layer)[0]].any() for layer in tiny.shape.experts if layer.name in names)


def test_experts_take_dense_weights_and_momentum() -> None:
    tiny, start = mixture(), start_of("dense", mixture())
    optimizer = Optimizer(name="sgd", momentum=0.5, weight_decay=0.1)
    batches = [one_token(5), *draw_batches(tiny, 3, 2, rows=2)]
    (ours,) = run_pack(tiny, [start], [batches], optimizer, lr=0.1)
    (theirs,) = run_reference(tiny, [start], [batches], optimizer, lr=0.1)
    assert worst(change(tiny, start, ours), change(tiny, start, theirs)) < 1e-4


@pytest.mark.parametrize("name", ["fedftg", "shared-galore"])
def test_server_keeps_each_experts_own_decay(name: str) -> None:
    """Two clients, of which one sends its token to two of the four experts: the mean of what each has left."""
    tiny, method = mixture(), build({"name": name, "rank": 2})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    data = [[one_token(5)], draw_batches(tiny, 3, 2)]
    done = walk(method, tiny, server, data, weights=[1, 2], optimizer=ADAM)
    before, after = effective(method, tiny, server), effective(method, tiny, done.server)
    changes = [change(tiny, start, result) for start, result in zip(done.starts, done.results, strict=True)]
    assert len({*done.results[0].base_scales.values()}) == 2
    for layer in tiny.shape.targets:
        mean = (changes[0][layer.name] + 2 * changes[1][layer.name]) / 3
        assert distance(after[layer.name] - before[layer.name], mean) < 1e-5
    sent = {name for name in done.updates[0].tensors if name.endswith("/base_scale")}
    assert sent == {f"{name}/base_scale" for name, scale in done.results[0].base_scales.items() if scale != 1.0}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_clients_of_a_pack_are_as_alone(name: str) -> None:
    """Ranks, row lengths and experts' phases of GaLore's periods differ."""
    tiny = mixture(name)
    galore = galore_start(tiny, Subspace(2, 2))
    ahead = {f"{layer.name}/step": torch.tensor(1.0) for layer in tiny.shape.experts[::2]}
    for starts in (
        [lora_start(tiny, rank) for rank in (1, 2, 2)],
        [galore, replace(galore_start(tiny, Subspace(2, 2), step=1), moments=ahead), galore],
    ):
        data = [draw_batches(tiny, k, 3, rows=1 + k, tokens=(16, 9, 21)[k]) for k in range(3)]
        for k, result in enumerate(run_pack(tiny, starts, data, ADAM, lr=1e-2)):
            (alone,) = run_pack(tiny, [starts[k]], [data[k]], ADAM, lr=1e-2, clients=[k])
            assert result.failure is None
            assert worst(change(tiny, starts[k], result), change(tiny, starts[k], alone)) < 1e-5
            names = [layer.name for layer in tiny.shape.experts]
            assert steps_of(result, names) == steps_of(alone, names)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_untrained_experts_give_the_models_own_logits(name: str) -> None:
    tiny = mixture(name)
    (batch,) = draw_batches(tiny, 1, 1)
    ids: Tensor = batch["input_ids"]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits for model in (tiny.packed[0], tiny.model))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert PAD in ids


def test_experts_that_a_start_made_float32_keep_their_digits_without_being_targets() -> None:
    """Rounded to bfloat16 all numbers of a row were equal, and its sums with changing signs zero.  Without a float32
    parameter the class of transformers stays."""
    tiny = mixture("mixtral")
    place = next(iter(experts_of(tiny.model)))
    module = copy.deepcopy(tiny.model).bfloat16()
    install(module, ModelShape(()))
    assert not isinstance(module.get_submodule(place), PackExperts)
    exact: Any = copy.deepcopy(tiny.model.get_submodule(place))
    exact.gate_up_proj.data = 1 + torch.arange(16).expand_as(exact.gate_up_proj) / 2**14
    module.get_submodule(place).gate_up_proj = nn.Parameter(exact.gate_up_proj.detach(), requires_grad=False)
    install(module, ModelShape(()))
    assert isinstance(module.get_submodule(place), PackExperts)
    x, routes = torch.tensor([[1.0, -1.0] * 8] * 3), (torch.zeros(3, 1).long(), torch.ones(3, 1))
    y, wide = module.get_submodule(place)(x.bfloat16(), *routes), exact(x, *routes)
    assert y.dtype == torch.bfloat16
    assert 0 < float((y.float() - wide).norm()) < 1e-2 * float(wide.norm())
