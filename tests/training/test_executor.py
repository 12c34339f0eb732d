"""A pack gives each client its result alone: clients do not affect each other, and the shared backbone is never
written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Start, Subspace
from rayfed_sub.training import executor, projectors
from rayfed_sub.training.executor import train_pack
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers.tiny_models import (
    bert,
    change,
    dense_start,
    distance,
    draw_batches,
    galore_start,
    gpt2,
    installed,
    llama,
    lora_start,
    run_pack,
    run_reference,
    start_of,
    vit,
    works,
    worst,
)
from tests.training.test_any_pack import batches as eight_batches
from tests.training.test_any_pack import starts

LR = 5e-2


def test_equal_packs_give_equal_bits_in_the_given_order():
    tiny = llama()
    given, batches, order = starts(tiny, "exact"), eight_batches(tiny), [40, 7, 3, 19, 2, 8, 0, 33]
    once, again = (run_pack(tiny, given, batches, Optimizer(), lr=LR, clients=order) for _ in range(2))
    assert [result.client for result in once] == order
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        assert all(torch.equal(a.blocks[layer][i], b.blocks[layer][i]) for layer in a.blocks for i in (0, 1))


def test_clients_without_a_trained_tensor_give_their_losses():
    """A method that trains nothing: the model is at rest, and one whose steps end earlier leaves the pack."""
    tiny = llama()
    batches = [draw_batches(tiny, seed, steps) for seed, steps in ((0, 2), (1, 1))]
    idle = run_pack(tiny, [Start({}, ())] * 2, batches, Optimizer(), lr=LR)
    untouched = run_pack(tiny, [lora_start(tiny, 2, scale=0.0)] * 2, batches, Optimizer(), lr=0.0)
    assert [result.metrics["steps"] for result in idle] == [2, 1]
    for ours, theirs in zip(idle, untouched, strict=True):
        assert ours.failure is None
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["galore", "lora", "dense"])
@pytest.mark.parametrize("where", ["inputs", "tensors"])
def test_client_with_nan_fails_alone(kind, where):
    tiny = vit()
    batches = [draw_batches(tiny, seed, 5) for seed in range(3)]
    start = start_of(kind, tiny)
    starts = [start] * 3
    good = run_pack(tiny, starts, batches, Optimizer(clip_norm=0.5), lr=LR)
    if where == "inputs":
        batches[1][2]["pixel_values"][0, 0, 0, 0] = float("nan")
        step = 2
    else:
        poisoned = {name: tensor.clone() for name, tensor in start.tensors.items()}
        poisoned["classifier/weight"][0, 0] = float("nan")
        starts[1] = replace(start, tensors=poisoned)
        step = 0
    first, bad, last = run_pack(tiny, starts, batches, Optimizer(clip_norm=0.5), lr=LR)
    assert bad.failure == f"non-finite loss at local step {step}"
    for ours, theirs in ((first, good[0]), (last, good[2])):
        assert ours.failure is None
        error = worst(change(tiny, start, ours), change(tiny, start, theirs))
        assert error < 1e-6


class Torn(list):
    """Batches of which number `at` and all later ones cannot be read."""

    at = 0

    def __getitem__(self, index):
        if index >= self.at:
            raise ValueError("row 17:\n  not UTF-8")
        return super().__getitem__(index)


def torn(batches: list[dict[str, torch.Tensor]], at: int) -> Torn:
    out = Torn(batches)
    out.at = at
    return out


@cache
def undisturbed(kind, run):
    """A start, the batches of three clients that have it, and their results."""
    tiny = llama()
    start, whole = start_of(kind, tiny), [draw_batches(tiny, seed, 5) for seed in range(3)]
    return start, whole, run(tiny, [start] * 3, whole, Optimizer(clip_norm=0.5), lr=LR)


@pytest.mark.parametrize("run", [run_pack, run_reference])
@pytest.mark.parametrize("kind", ["galore", "lora", "dense"])
@pytest.mark.parametrize("at", [0, 2])
def test_client_whose_data_raise_fails_alone(kind, at, run):
    tiny, optimizer = llama(), Optimizer(clip_norm=0.5)
    start, whole, good = undisturbed(kind, run)
    cut = [whole[0], torn(whole[1], at), whole[2]]
    first, bad, last = run(tiny, [start] * 3, cut, optimizer, lr=LR)
    assert bad.failure == f"batch of local step {at}: ValueError: row 17: not UTF-8"
    assert bad.metrics["steps"] == at
    # Its loss stays the mean of the steps that it took.
    (short,) = run(tiny, [start], [whole[1][:at]], optimizer, lr=LR)
    assert bad.metrics["loss"] == pytest.approx(short.metrics["loss"], rel=1e-5)
    for ours, theirs in ((first, good[0]), (last, good[2])):
        assert ours.failure is None
        error = worst(change(tiny, start, ours), change(tiny, start, theirs))
        assert error < 1e-5
    again = run(tiny, [start] * 3, cut, optimizer, lr=LR)
    for ours, theirs in zip((first, last), again[::2], strict=True):  # same failure, same composition, same bits
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


@pytest.mark.parametrize("run", [run_pack, run_reference])
def test_pack_whose_clients_all_fail_ends(run):
    tiny = llama()
    whole = [draw_batches(tiny, seed, 5) for seed in range(2)]
    whole[0][1]["labels"] = torch.full_like(whole[0][1]["labels"], 10**6)  # would raise: must not be reached
    cut = [torn(whole[0], 1), torn(whole[1], 0)]
    one, two = run(tiny, [lora_start(tiny, 2)] * 2, cut, Optimizer(), lr=LR)
    assert [one.metrics["steps"], two.metrics["steps"]] == [1, 0]
    assert one.failure.startswith("batch of local step 1")
    assert two.failure.startswith("batch of local step 0")


def test_client_with_nan_leaves_the_pack():
    """Its later batches are not even drawn."""
    tiny = vit()
    batches = [draw_batches(tiny, seed, 5) for seed in range(2)]
    batches[1][1]["pixel_values"][0] = float("nan")
    _, bad = run_pack(tiny, [lora_start(tiny, 2)] * 2, [batches[0], torn(batches[1], 2)], Optimizer(), lr=LR)
    assert bad.failure == "non-finite loss at local step 1"
    assert bad.metrics["steps"] == 2


@pytest.mark.parametrize("kind", ["galore", "lora", "dense"])
@pytest.mark.parametrize("make", [llama, bert])
def test_client_without_labels_does_not_change(make, kind):
    tiny = make()
    start = start_of(kind, tiny)
    batches = [draw_batches(tiny, 0, 5), draw_batches(tiny, 1, 5, labels=0), draw_batches(tiny, 2, 5)]
    full = [*batches[:1], draw_batches(tiny, 3, 5), *batches[2:]]
    good = run_pack(tiny, [start] * 3, full, Optimizer(), lr=LR)
    first, idle, last = run_pack(tiny, [start] * 3, batches, Optimizer(), lr=LR)
    assert idle.failure is None
    assert (idle.metrics["labels"], idle.metrics["loss"], idle.step) == (0.0, 0.0, 5)
    assert all(not delta.any() for delta in change(tiny, start, idle).values())
    assert all(not moment.any() for moment in idle.moments.values())
    for ours, theirs in ((first, good[0]), (last, good[2])):
        error = worst(change(tiny, start, ours), change(tiny, start, theirs))
        assert error < 1e-6
    # No client in the pack has a label: there is no loss to differentiate.
    (lonely,) = run_pack(tiny, [start], batches[1:2], Optimizer(), lr=LR)
    assert lonely.failure is None
    assert all(not delta.any() for delta in change(tiny, start, lonely).values())


def test_client_without_steps_returns_unchanged():
    tiny = llama()
    start = galore_start(tiny, Subspace(2, 3), step=4)
    idle, busy = run_pack(tiny, [start] * 2, [[], draw_batches(tiny, 0, 2)], Optimizer(weight_decay=0.1), lr=LR)
    assert (idle.step, idle.base_scale, idle.periods) == (4, 1.0, 1)
    assert all(torch.equal(idle.tensors[name], start.tensors[name]) for name in start.tensors)
    assert busy.step == 6


def test_folding_closed_blocks_keeps_the_change():
    """12 refreshes of rank 3 exceed min(m, n) = 16 twice over; the reference never folds."""
    tiny = llama()
    start, batches = galore_start(tiny, Subspace(3, 1)), [draw_batches(tiny, 0, 12)]
    optimizer = Optimizer(weight_decay=0.1)
    (ours,) = run_pack(tiny, [start], batches, optimizer, lr=LR)
    (theirs,) = run_reference(tiny, [start], batches, optimizer, lr=LR)
    error = worst(change(tiny, start, ours), change(tiny, start, theirs))
    assert error < 1e-4
    for layer in tiny.shape.targets:
        left, right = ours.blocks[layer.name]
        # Closing at 3, 6, 9, 12, 15; 18 > 16 folds into 16; 16 + 3 folds again...; then the open block of 3.
        assert (left.shape, right.shape) == ((layer.m, 16 + 3), (16 + 3, layer.n))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_lr_zero_is_a_fixed_point(name):
    tiny = bert()
    optimizer = Optimizer(name=name, momentum=0.9, weight_decay=0.1)
    for start in (galore_start(tiny, Subspace(2, 2)), lora_start(tiny, 2), dense_start(tiny)):
        (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 5)], optimizer, lr=0.0)
        assert result.base_scale == 1.0
        assert all(not delta.any() for delta in change(tiny, start, result).values())
        assert any(moment.any() for moment in result.moments.values())  # the projector did run


def test_clipping_is_per_client():
    """Plain SGD with lr 1: the step is the gradient, so a clipped client moves by exactly clip_norm.  The other one's
    gradients are below the bound (its scale is tiny), and it must not be affected."""
    tiny, sgd = llama(), Optimizer(name="sgd")
    loud, quiet = lora_start(tiny, 2, roles=("left",)), lora_start(tiny, 2, roles=("left",), scale=1e-5)
    batches = [draw_batches(tiny, seed, 1) for seed in range(2)]

    def moves(optimizer: Optimizer) -> list[float]:
        results = run_pack(tiny, [loud, quiet], batches, optimizer, lr=1.0)
        return [
            sum(float((r.tensors[n] - s.tensors[n]).square().sum()) for n in s.trained) ** 0.5
            for s, r in zip((loud, quiet), results, strict=True)
        ]

    free, clipped = moves(sgd), moves(replace_clip(sgd, 0.01))
    assert free[0] > 0.1
    assert clipped[0] == pytest.approx(0.01, rel=1e-3)  # norm / (norm + 1e-6) short of it
    assert 0 < free[1] < 0.01
    assert clipped[1] == free[1]


def replace_clip(optimizer: Optimizer, norm: float) -> Optimizer:
    return optimizer.model_copy(update={"clip_norm": norm})


@pytest.mark.parametrize("kind", ["galore", "lora", "dense"])
def test_shared_backbone_is_never_written(kind):
    tiny = gpt2()
    model, layers = installed(tiny)
    shared = {**dict(model.named_parameters()), **{name: layer.weight for name, layer in layers.items()}}
    shared |= {f"{name}/bias": layer.bias for name, layer in layers.items()}
    copies = {name: (tensor._version, tensor.detach().clone()) for name, tensor in shared.items()}
    start = start_of(kind, tiny)
    kept = {name: tensor.clone() for name, tensor in start.tensors.items()}
    batches = [draw_batches(tiny, seed, 4) for seed in range(2)]
    optimizer = Optimizer(weight_decay=0.1)
    train_pack(model, layers, tiny.shape, works([start] * 2, batches), LocalRule(optimizer, LR, seed=0, pad=0))
    for name, (version, content) in copies.items():
        assert shared[name]._version == version
        assert torch.equal(shared[name], content)
        assert shared[name].grad is None
    assert all(torch.equal(start.tensors[name], kept[name]) for name in kept)  # a Start may be in shared memory too
    assert all(layer.bound is None for layer in layers.values())


def test_distance_detects_a_small_change():
    assert distance(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-3])) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["galore", "lora"])
def test_losses_read_at_the_end_tell_the_same(kind, monkeypatch):
    """A device that is not asked in between: a client with a NaN at step 1 is trained to the end, and forgotten."""
    tiny = vit()
    batches = [draw_batches(tiny, seed, 4) for seed in range(3)]
    batches[1][1]["pixel_values"][0, 0, 0, 0] = float("nan")
    batches[2] = torn(batches[2], 3)
    given = [start_of(kind, tiny)] * 3
    soon = run_pack(tiny, given, batches, Optimizer(clip_norm=0.5), lr=LR)
    monkeypatch.setattr(executor, "free_to_read", lambda device: False)
    late = run_pack(tiny, given, batches, Optimizer(clip_norm=0.5), lr=LR)
    assert [one.failure for one in late] == [one.failure for one in soon]
    assert late[1].failure == "non-finite loss at local step 1"
    for one, other in zip(soon, late, strict=True):
        ours, theirs = ([x.metrics[name] for name in ("loss", "labels", "steps")] for x in (one, other))
        assert ours[1:] == theirs[1:]
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6, nan_ok=True)
    assert worst(change(tiny, given[0], soon[0]), change(tiny, given[0], late[0])) < 1e-6


@pytest.mark.parametrize("make", [llama, bert])
def test_galore_in_float32_s_bases_is_galore(make, monkeypatch):
    """Three steps with two refreshes in bases as a GPU finds them change the weights by the same, to 1e-4."""
    tiny = make()
    batches, given = [draw_batches(tiny, seed, 3, rows=4) for seed in range(2)], [start_of("galore", tiny)] * 2
    exact = run_pack(tiny, given, batches, Optimizer(), lr=LR)
    monkeypatch.setattr(projectors, "free_to_read", lambda device: False)
    monkeypatch.setattr(projectors, "eigen_dtype", lambda device: torch.float32)
    close = run_pack(tiny, given, batches, Optimizer(), lr=LR)
    for ours, theirs in zip(close, exact, strict=True):
        assert worst(change(tiny, given[0], ours), change(tiny, given[0], theirs)) < 1e-4
