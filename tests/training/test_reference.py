"""The pack executor against the libraries that it replaces: galore_torch, peft and torch.optim.

The comparison is of the change of every weight, since 1e-5 of a weight can hide 1 % of its change.  All is float32.
The language models' batches have 6 x 8 labelled tokens, more than min(m, n) = 16: a gradient of full rank with
separated singular values; otherwise rounding would turn torch's basis or flip its signs, which `svd` does not fix."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.lowrank import sides
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import LocalResult, Start, Subspace
from rayfed_sub.models.positions import forget_rows
from tests.helpers.tiny_models import (
    Tiny,
    albert,
    bent,
    bert,
    change,
    dense_start,
    distance,
    draw_batches,
    galore_start,
    gpt2,
    llama,
    lora_start,
    next_start,
    product,
    run_pack,
    run_reference,
    start_of,
    vit,
    worst,
)

STEPS = 7  # with a refresh every 3 steps: two closed periods and an open one
FULL = {"rows": 6, "labels": 8}
OPTIMIZERS = {
    "adamw": (Optimizer(), 1e-2),
    "decay": (Optimizer(weight_decay=0.1), 1e-2),
    "clip": (Optimizer(clip_norm=0.05, weight_decay=0.1), 1e-2),
    "sgd": (Optimizer(name="sgd"), 0.2),
    "momentum": (Optimizer(name="sgd", momentum=0.9, weight_decay=0.1, clip_norm=0.5), 0.2),
}


def moved_weights(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The weights of a later round, different from those of the built model."""
    rng = torch.Generator().manual_seed(9)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=rng)
        for name, tensor in tiny.weights.items()
        if name not in tiny.shape.head_names
    }


def compare(
    tiny: Tiny, start: Start, optimizer: Optimizer, lr: float, seed: int = 5
) -> tuple[LocalResult, LocalResult]:
    """Train one client both ways, assert that they agree, and return both results."""
    weights, batches = moved_weights(tiny), [draw_batches(tiny, seed, STEPS, **FULL)]
    (ours,) = run_pack(tiny, [start], batches, optimizer, lr=lr, weights=weights)
    (theirs,) = run_reference(tiny, [start], batches, optimizer, lr=lr, weights=weights)
    assert ours.failure is None
    assert theirs.failure is None
    assert_equal(tiny, start, ours, theirs, weights)
    return ours, theirs


def assert_equal(tiny: Tiny, start: Start, ours: LocalResult, theirs: LocalResult, weights) -> None:
    error = worst(change(tiny, start, ours, weights), change(tiny, start, theirs, weights))
    assert error < 1e-4
    if start.subspace is None:
        assert worst(ours.tensors, theirs.tensors) < 1e-4
    elif start.subspace.moments == "keep" or start.subspace.projector != "svd":
        fixed = [sides(layer)[0] for layer in tiny.shape.targets]
        error = max(distance(ours.tensors[name], theirs.tensors[name]) for name in fixed)
        assert error < 1e-3  # float32 turns a basis by rounding / gap
        assert worst(ours.moments, theirs.moments) < 1e-3
    assert (ours.client, ours.step, ours.periods) == (theirs.client, theirs.step, theirs.periods)
    assert ours.base_scale == theirs.base_scale
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.moments.keys() == theirs.moments.keys()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_fedftg_s_trajectory_matches_galore_torch(decay, seed):
    """The library alone, unmodified, on a plain model: 5 periods on layers with m > n, m < n and m = n."""
    from galore_torch import GaLoreAdamW

    tiny = llama()
    batches = draw_batches(tiny, seed, 13, **FULL)
    start = galore_start(tiny, Subspace(2, 3, "svd"), scale=0.25)
    (ours,) = run_pack(tiny, [start], [batches], Optimizer(weight_decay=decay), lr=1e-2)

    model = copy.deepcopy(tiny.model)
    parameters = {layer.name: model.get_submodule(layer.name).weight for layer in tiny.shape.targets}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    group = {"params": parameters.values(), "rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], lr=1e-2, weight_decay=decay, no_deprecation_warning=True)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    deltas = change(tiny, start, ours)
    for layer in tiny.shape.targets:
        parameter = parameters[layer.name]
        assert distance(deltas[layer.name], parameter.detach() - tiny.weights[f"{layer.name}/weight"]) < 1e-4
        fixed, moving = sides(layer)
        state = optimizer.state[parameter]
        assert distance(ours.tensors[fixed], state["projector"].ortho_matrix) < 1e-3
        assert distance(ours.moments[f"{moving}/m1"], state["exp_avg"]) < 1e-3
        assert distance(ours.moments[f"{moving}/m2"], state["exp_avg_sq"]) < 1e-3
        assert ours.step == state["step"]
    assert ours.periods == 5


def every_pair():
    """Every kind with every optimizer on one model, and on the others with optimizers in turn, so that every two of the
    three meet in a quick test; the other threes are slow."""
    kinds = ["lora", "ffa", "core", "dense", "exact", "shared"]
    for model, make in enumerate([llama, gpt2, bert, vit]):
        for kind, start in enumerate(kinds):
            for number, name in enumerate(OPTIMIZERS):
                quick = make is llama or (model + kind) % len(OPTIMIZERS) == number
                yield pytest.param(make, start, name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("make", "kind", "name"), every_pair())
def test_pack_matches_the_reference(make, kind, name):
    tiny = make()
    start = galore_start(tiny, Subspace(2, 3)) if kind == "exact" else start_of(kind, tiny)
    ours, _ = compare(tiny, start, *OPTIMIZERS[name])
    assert ours.periods == (3 if kind == "exact" else 1)
    assert all(delta.norm() > 1e-3 for delta in change(tiny, start, ours, moved_weights(tiny)).values())


# `svd` only if G has full rank: a classifier's last layer has six tokens, and signs then depend on rounding.
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_svd_projector_matches_galore_torch(make, name):
    tiny = make()
    compare(tiny, galore_start(tiny, Subspace(2, 3, "svd")), *OPTIMIZERS[name])


@pytest.mark.parametrize("projector", ["exact", "randomized", "random"])
@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("make", [llama, vit])
def test_moments_at_a_refresh(make, moments, projector):
    tiny = make()
    start = galore_start(tiny, Subspace(2, 3, projector, moments))
    for name in ("clip", "momentum"):
        compare(tiny, start, *OPTIMIZERS[name])


@pytest.mark.parametrize("projector", ["randomized", "random"])
def test_random_projectors_draw_by_client_layer_and_step(projector):
    tiny = gpt2()
    start = galore_start(tiny, Subspace(2, 3, projector))
    compare(tiny, start, *OPTIMIZERS["decay"])
    batches = [draw_batches(tiny, 0, 1)] * 2
    one, other = run_pack(tiny, [start] * 2, batches, Optimizer(), lr=1e-2, clients=[1, 2])
    apart = [distance(one.tensors[fixed], other.tensors[fixed]) for fixed, _ in map(sides, tiny.shape.targets)]
    assert (min(apart) > 0.1) == (projector == "random")


@pytest.mark.parametrize("run", [run_pack, run_reference])
def test_random_bases_are_new_in_every_round_that_begins_anew(run):
    """Four steps into a client's life: other rows than in its first round where its clock begins anew, and those of
    step 4 whether or not the clock has gone on."""
    tiny = gpt2()
    begun, kept = (galore_start(tiny, Subspace(2, 1, "random"), step=step) for step in (0, 4))
    (first,), (again,), (on,) = (
        run(tiny, [start], [draw_batches(tiny, 0, 1)], Optimizer(), lr=1e-2, taken=taken)
        for start, taken in ((begun, 0), (begun, 4), (kept, 4))
    )
    for layer in tiny.shape.targets:
        fixed = sides(layer)[0]
        one, other, same = (result.tensors[fixed] for result in (first, again, on))
        numbers = stream(0, "projector", layer.name, 0, 4).standard_normal((2, min(layer.m, layer.n)))
        drawn = torch.linalg.qr(torch.from_numpy(numbers).T).Q.T
        assert distance(one.abs(), other.abs()) > 0.1
        for rows in (other, same):
            assert distance((rows if fixed.endswith("/right") else rows.T).abs(), drawn.abs()) < 1e-6


def test_reset_restarts_bias_correction():
    """With a refresh at every step each step is Adam's first: every entry of the trained factor is lr up to eps, and so
    are all columns of the blocks: 4 closed and 1 open."""
    tiny = llama(r"up_proj$")
    start = galore_start(tiny, Subspace(2, 1, moments="reset"), scale=1.0)
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 5)], Optimizer(eps=1e-12), lr=1e-2)
    for left, _ in result.blocks.values():
        assert left.shape == (24, 5 * 2)
        assert torch.allclose(left.abs(), torch.full_like(left, 1e-2), rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "moments"),
    [(kind, rule) for kind in ("exact", "svd") for rule in ("keep", "rotate", "reset")]
    + [("lora", "keep"), ("dense", "keep")],
)
def test_state_kept_over_two_rounds(kind, moments):
    """4 + 3 steps in two rounds, the boundary inside a period: the same as the reference in two rounds, and the same as
    7 steps in one (the second round begins with the weights of the first one)."""
    tiny, (optimizer, lr) = llama(), OPTIMIZERS["decay"]
    first = galore_start(tiny, Subspace(2, 3, kind, moments)) if kind in ("exact", "svd") else start_of(kind, tiny)
    batches = draw_batches(tiny, 5, STEPS, **FULL)
    begun = tiny.weights
    ends = {}
    for run in (run_pack, run_reference):
        weights, start, total = begun, first, {}
        for part in (batches[:4], batches[4:]):
            (result,) = run(tiny, [start], [part], optimizer, lr=lr, weights=weights)
            deltas = change(tiny, start, result, weights)
            total = {name: total.get(name, 0) + delta for name, delta in deltas.items()}
            if start.subspace is not None:
                weights = {f"{name}/weight": weights[f"{name}/weight"] + delta for name, delta in deltas.items()}
            start = next_start(start, result, tiny)
        ends[run] = (total, result)
    (once,) = run_pack(tiny, [first], [batches], optimizer, lr=lr)
    (ours, last), (theirs, _) = ends[run_pack], ends[run_reference]
    assert worst(ours, theirs) < 1e-4
    assert worst(ours, change(tiny, first, once)) < 1e-4
    assert last.step == once.step == STEPS
    assert worst(last.moments, once.moments) < 1e-3


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_ranks_up_to_the_matrix(rank):
    tiny = llama()
    compare(tiny, galore_start(tiny, Subspace(rank, 3, "random"), scale=1.0), *OPTIMIZERS["adamw"])
    compare(tiny, lora_start(tiny, rank, scale=2.0), *OPTIMIZERS["adamw"])


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "falcon_h1", "nanochat"])
def test_capped_and_scaled_logits(name):
    """The pack computes labelled logits itself; these models do more than a matrix product."""
    tiny = bent(name)
    compare(tiny, lora_start(tiny, 2), *OPTIMIZERS["adamw"])


@pytest.mark.parametrize("kind", ["lora", "dense", "exact", "randomized", "random"])
def test_layer_used_twice_in_a_forward_pass(kind):
    """ALBERT's blocks are one module: its gradient is the sum over both uses, in the new basis too."""
    tiny = albert()
    start = start_of(kind, tiny) if kind in ("lora", "dense") else galore_start(tiny, Subspace(2, 3, kind))
    compare(tiny, start, *OPTIMIZERS["decay"])


def test_positions_whose_frequencies_follow_from_the_row():
    """Rows of 9, 8 and 7 tokens where frequencies change from the sixth on: each has those of its own length."""
    config = copy.deepcopy(llama().model.config)
    config.max_position_embeddings = 5
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = type(llama().model)(config).eval().requires_grad_(False)
    model.load_state_dict(llama().model.state_dict())
    forget_rows(model)
    tiny = replace(llama(), model=model)
    start, batches = lora_start(tiny, 2), draw_batches(tiny, 5, STEPS)
    (ours,) = run_pack(tiny, [start], [batches], Optimizer(), lr=1e-2)
    (theirs,) = run_reference(tiny, [start], [batches], Optimizer(), lr=1e-2)
    assert_equal(tiny, start, ours, theirs, {})


def test_lora_with_another_rank_in_every_layer_over_weights_of_its_own():
    tiny = gpt2()
    wide, rng = lora_start(tiny, 6), torch.Generator().manual_seed(0)
    tensors = dict(tiny.weights)
    for rank, layer in enumerate(tiny.shape.targets, start=1):
        tensors[f"{layer.name}/left"] = wide.tensors[f"{layer.name}/left"][:, :rank]
        tensors[f"{layer.name}/right"] = wide.tensors[f"{layer.name}/right"][:rank]
        tensors[f"{layer.name}/weight"] = torch.randn(layer.m, layer.n, generator=rng) * 0.3
    compare(tiny, replace(wide, tensors=tensors), *OPTIMIZERS["decay"])


def test_one_period_moves_inside_its_subspace_and_periods_add_rank():
    """Without weight decay (I - P P^T) dW = 0 and rank r within a period, rank 3 r after three."""
    tiny = llama()
    start = galore_start(tiny, Subspace(2, 4, "exact"))
    batches = draw_batches(tiny, 0, 12)
    (one,) = run_pack(tiny, [start], [batches[:4]], Optimizer(), lr=1e-2)
    (three,) = run_pack(tiny, [start], [batches], Optimizer(), lr=1e-2)
    for layer in tiny.shape.targets:
        delta_mn = one.blocks[layer.name][0] @ one.blocks[layer.name][1]
        fixed = one.tensors[sides(layer)[0]]
        if layer.m >= layer.n:  # right: fixed is Q (r, n)
            outside, gram = delta_mn - delta_mn @ fixed.T @ fixed, fixed @ fixed.T
        else:  # left: fixed is P (m, r)
            outside, gram = delta_mn - fixed @ fixed.T @ delta_mn, fixed.T @ fixed
        assert torch.allclose(gram, torch.eye(2), atol=1e-5)
        assert outside.norm() < 1e-5 * delta_mn.norm()
        assert torch.linalg.matrix_rank(delta_mn, rtol=1e-5) == 2
        left, right = three.blocks[layer.name]
        assert (left.shape[1], right.shape[0]) == (6, 6)
        assert torch.linalg.matrix_rank(left @ right, rtol=1e-5) == 6
    assert (one.periods, three.periods) == (1, 3)


def test_first_step_has_length_lr_scale_sqrt_r_max():
    """6 x 10, r = 2, scale 0.25, lr 0.01 gives 0.01 * 0.25 * sqrt(2 * 10) = 0.01118."""
    tiny = llama(r"up_proj$", hidden=10, inner=6)
    assert (tiny.shape.targets[0].m, tiny.shape.targets[0].n) == (6, 10)
    start = galore_start(tiny, Subspace(2, 5, "exact"), scale=0.25)
    (result,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 1)], Optimizer(eps=1e-12), lr=0.01)
    for left, right in result.blocks.values():
        assert float((left @ right).norm()) == pytest.approx(0.01118, rel=1e-3)


@pytest.mark.parametrize("run", [run_pack, run_reference])
@pytest.mark.parametrize("make", [llama, bert])
def test_full_rank_galore_with_sgd_is_sgd(make, run):
    """Rank min(m, n) and scale 1; projection on the full space changes nothing.  24 rows, so that every gradient has
    full rank: the basis is complete and valid for the step after its refresh too."""
    tiny, optimizer = make(), Optimizer(name="sgd", weight_decay=0.1)
    galore, dense = galore_start(tiny, Subspace(16, 2, "exact"), scale=1.0), dense_start(tiny)
    batches = [draw_batches(tiny, 0, 6, rows=24)]
    (ours,) = run(tiny, [galore], batches, optimizer, lr=0.2)
    (theirs,) = run_pack(tiny, [dense], batches, optimizer, lr=0.2)
    error = worst(change(tiny, galore, ours), change(tiny, dense, theirs))
    assert error < 1e-4


def test_side_is_chosen_on_the_canonical_shape():
    """GPT-2 stores (n, m): c_fc (32 x 16) must be projected on the right, mlp.c_proj (16 x 32) on the left, and the
    square attn.c_proj on the right, by both executors."""
    tiny = gpt2()
    start = galore_start(tiny, Subspace(2, 3, "exact"))
    expected = {"attn.c_proj": (2, 16), "mlp.c_fc": (2, 16), "mlp.c_proj": (16, 2)}
    for result in compare(tiny, start, *OPTIMIZERS["adamw"]):
        for layer in tiny.shape.targets:
            short = ".".join(layer.name.split(".")[-2:])
            assert result.tensors[sides(layer)[0]].shape == expected[short]
            assert sides(layer)[0].endswith("/left" if short == "mlp.c_proj" else "/right")


def test_reference_does_not_modify_the_model():
    tiny = gpt2()
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    kinds = {name: type(module) for name, module in tiny.model.named_modules()}
    for kind in ("lora", "dense", "galore"):
        run_reference(tiny, [start_of(kind, tiny)], [draw_batches(tiny, 0, 2)], Optimizer(), lr=1e-2)
    assert {name: type(module) for name, module in tiny.model.named_modules()} == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())


@pytest.mark.parametrize("kind", ["lora", "dense", "galore"])
def test_failures_and_idle_clients_match_the_pack(kind):
    tiny = vit()
    start, batches = start_of(kind, tiny), [draw_batches(tiny, 0, 4), draw_batches(tiny, 1, 4, labels=0)]
    batches[0][3]["pixel_values"][0] = float("nan")
    ours = run_pack(tiny, [start] * 2, batches, Optimizer(), lr=1e-2)
    theirs = run_reference(tiny, [start] * 2, batches, Optimizer(), lr=1e-2)
    assert ours[0].failure == theirs[0].failure == "non-finite loss at local step 3"
    assert ours[1].failure is theirs[1].failure is None
    assert all(not delta.any() for delta in change(tiny, start, theirs[1]).values())
    assert ours[1].metrics == theirs[1].metrics


def test_fixed_basis_is_kept_and_returns_the_trained_factor():
    """Step 0 is a refresh under any other rule.  Both executors return Q unchanged, and the trained L."""
    tiny = llama()
    start = replace(start_of("shared", tiny), step=0)
    for result in compare(tiny, start, *OPTIMIZERS["adamw"]):
        deltas = change(tiny, start, result, moved_weights(tiny))
        for layer in tiny.shape.targets:
            fixed, moving = sides(layer)
            assert torch.equal(result.tensors[fixed], start.tensors[fixed])
            assert result.tensors[moving].norm() > 1e-3
            assert distance(start.scale * product(layer, result.tensors), deltas[layer.name]) < 1e-4
        assert result.periods == 1


def test_lora_start_is_not_zero():
    """Both factors must have a gradient in the comparisons above, or half of the comparisons would be of zeros."""
    tiny = llama()
    start = lora_start(tiny, 2)
    assert all(product(layer, start.tensors).norm() > 0.1 for layer in tiny.shape.targets)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("start", [galore_start, lora_start], ids=["galore", "lora"])
def test_numbers_and_several_labels_as_labels(several: bool, start: Any) -> None:
    """Squared errors of the one output, and binary cross-entropies of three, in packs and in the libraries."""
    tiny = bert()
    begun = start(tiny, Subspace(2, 3)) if start is galore_start else start(tiny, 2)
    if not several:  # the head's first output alone
        own = {name: tensor[:1] if name.startswith("classifier/") else tensor for name, tensor in begun.tensors.items()}
        begun = replace(begun, tensors=own)
        head = tuple(replace(layer, m=1) for layer in tiny.shape.head)
        model: Any = copy.deepcopy(tiny.model)
        model.classifier.weight = torch.nn.Parameter(model.classifier.weight[:1].clone())
        model.classifier.bias = torch.nn.Parameter(model.classifier.bias[:1].clone())
        tiny = replace(tiny, model=model, shape=replace(tiny.shape, head=head))
    rng = torch.Generator().manual_seed(8)
    batches = draw_batches(tiny, 5, STEPS)
    for batch in batches:
        rows = len(batch["labels"])
        batch["labels"] = torch.rand(rows, 3, generator=rng).round() if several else torch.randn(rows, 1, generator=rng)
    optimizer, lr = OPTIMIZERS["adamw"]
    (ours,) = run_pack(tiny, [begun], [batches], optimizer, lr=lr)
    (theirs,) = run_reference(tiny, [begun], [batches], optimizer, lr=lr)
    assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    assert worst(change(tiny, begun, ours), change(tiny, begun, theirs)) < 1e-3
