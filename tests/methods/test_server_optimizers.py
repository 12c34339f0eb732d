"""Server optimizers, FedNova and FedProx: against arithmetic and against each other."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.config.schema import Optimizer, Privacy, Server
from rayfed_sub.core.types import Client, Layer, ModelShape, ServerState, Subspace
from rayfed_sub.methods import build
from rayfed_sub.methods.downloads import mixed_bytes, mixes
from rayfed_sub.methods.server_optimizers import advance, nova_factor, nova_length
from rayfed_sub.training.executor import train_pack
from rayfed_sub.training.optimizers import step
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers.tiny_models import (
    PAD,
    change,
    distance,
    draw_batches,
    galore_start,
    installed,
    llama,
    run_pack,
    start_of,
    works,
)

OLD = ServerState(0, {"up/weight": torch.tensor([[1.0, 2.0]]), "seed": torch.tensor(7), "step": torch.tensor(3.0)})
NEW = OLD.advance({"up/weight": torch.tensor([[2.0, 2.0]]), "step": torch.tensor(4.0)})  # d = [1, 0]


def test_plain_at_rate_one_is_bit_identical() -> None:
    after, memory = advance(Server(), OLD, NEW, {})
    assert after is NEW
    assert memory == {}


def test_server_learning_rate_scales_the_change_alone() -> None:
    after, _ = advance(Server(lr=0.5), OLD, NEW, {})
    assert after.tensors["up/weight"].tolist() == [[1.5, 2.0]]  # 1 + d / 2
    assert float(after.tensors["step"]) == 4.0  # a counter is no weight
    assert after.round == 1


def test_momentum_by_hand() -> None:
    """Two rounds whose mean change is d = [1, 0], momentum 1/2: v = 1, then 1.5; W = 2, then 3.5."""
    rule = Server(optimizer="momentum", momentum=0.5)
    first, memory = advance(rule, OLD, NEW, {})
    assert first.tensors["up/weight"].tolist() == [[2.0, 2.0]]
    moved = first.advance({"up/weight": first.tensors["up/weight"] + torch.tensor([[1.0, 0.0]])})
    second, memory = advance(rule, first, moved, memory)
    assert second.tensors["up/weight"].tolist() == [[3.5, 2.0]]
    assert memory["up/weight/v"].tolist() == [[1.5, 0.0]]


def test_adam_by_hand() -> None:
    """d = [1, 0] in two rounds, betas (0, 3/4), tau 1: v begins at tau^2 = 1 and stays there while d^2 = 1, m = d and
    the step d / (1 + 1) = 1/2; for d = 0 nothing moves, and v falls from 1 to 3/4, then 9/16."""
    rule = Server(optimizer="adam", tau=1.0, betas=(0.0, 0.75))
    first, memory = advance(rule, OLD, NEW, {})
    assert first.tensors["up/weight"].tolist() == [[1.5, 2.0]]
    assert memory["up/weight/v"].tolist() == [[1.0, 0.75]]
    again = first.advance({"up/weight": first.tensors["up/weight"] + torch.tensor([[1.0, 0.0]])})
    second, memory = advance(rule, first, again, memory)
    assert second.tensors["up/weight"].tolist() == [[2.0, 2.0]]
    assert memory["up/weight/v"].tolist() == [[1.0, 0.5625]]


def test_adam_s_first_step_is_damped_by_tau() -> None:
    """betas (0.9, 0.99), tau 0.1, d = 1: m = 0.1, v = 0.99 * 0.01 + 0.01 = 0.0199, step 0.1 / (0.14107 + 0.1) = 0.4148;
    from v = 0 it would have been 0.1 / (0.1 + 0.1) = 0.5."""
    after, memory = advance(Server(optimizer="adam", tau=0.1), OLD, NEW, {})
    assert after.tensors["up/weight"][0].tolist() == pytest.approx([1.4148, 2.0], abs=1e-4)
    assert memory["up/weight/m"][0].tolist() == pytest.approx([0.1, 0.0])


def test_fednova_averages_the_changes_per_step() -> None:
    """w = (1, 3), tau = (2, 4), changes 2 and 8, so 1 and 2 a step.  tau_eff = (2 + 12) / 4 = 3.5 and
    tau_eff sum p_k d_k = 3.5 (1/4 * 1 + 3/4 * 2) = 6.125."""
    raw = [1 / 2, 3 / 4]  # w_k / tau_k
    mean = (raw[0] * 2 + raw[1] * 8) / sum(raw)
    assert mean * nova_factor([1.0, 3.0], [2, 4]) == pytest.approx(6.125)
    assert nova_factor([1.0, 3.0], [4, 4]) == 1.0  # equal steps: nothing to normalise


def test_fednova_s_normaliser_by_hand() -> None:
    """The path of w in units of lr under gradients of 1.  Momentum 1/2: buffers 1, 3/2, 7/4, sum 17/4.  lr mu = 1/2: 1,
    then 1 - 1/2 = 1/2, then 1 - 3/4 = 1/4, sum 7/4.  Both: 1; 1/2 + 1 - 1/2 = 1; 1/2 + 1 - 1 = 1/2; sum 5/2."""
    plain, heavy = Optimizer(name="sgd"), Optimizer(name="sgd", momentum=0.5)
    assert [nova_length(plain, 0.1, 0.0, steps) for steps in (1, 3, 10)] == [1.0, 3.0, 10.0]
    assert nova_length(heavy, 0.1, 0.0, 3) == 17 / 4
    assert nova_length(plain, 0.25, 2.0, 3) == 7 / 4
    assert nova_length(heavy, 0.25, 2.0, 3) == 5 / 2


@pytest.mark.parametrize(("momentum", "mu"), [(0.0, 0.0), (0.9, 0.0), (0.0, 2.0), (0.9, 2.0)])
def test_fednova_s_normaliser_matches_the_path_of_training(momentum: float, mu: float) -> None:
    """Our SGD on one number whose gradient is always 1, with FedProx's pull, lr 0.1, four steps from 0."""
    optimizer, lr = Optimizer(name="sgd", momentum=momentum), 0.1
    w, buffer = torch.zeros(1, 1), torch.zeros(1, 1)
    for t in range(4):
        step(optimizer, lr, [w], [torch.ones(1, 1) + mu * w], {"m1": [buffer]}, [[t]])
    assert nova_length(optimizer, lr, mu, 4) == pytest.approx(-float(w) / lr, rel=1e-6)


def test_changed_dense_weight_is_downloaded_in_full() -> None:
    """After momentum, Adam or noise the change is no longer a sum of the cohort's blocks."""
    shape = ModelShape((Layer("up", 3, 5),))
    assert mixed_bytes({"up/weight": torch.zeros(3, 5)}, shape, 12) == 3 * 5 * 4
    assert mixed_bytes({"up/left": torch.zeros(3, 1)}, shape, 12) == 12
    method = build({"name": "fedftg"})
    assert not mixes(method, Server(lr=2.0), Privacy())
    assert mixes(method, Server(optimizer="adam"), Privacy())
    assert mixes(method, Server(), Privacy(clip=1.0, noise=1.0))


def pulled(kind: str, mu: float, steps: int = 4, weight_decay: float = 0.0):
    """One client's change with FedProx's mu under SGD."""
    tiny = llama()
    start = galore_start(tiny, Subspace(16, 2), scale=1.0) if kind == "galore" else start_of(kind, tiny)
    model, layers = installed(tiny)
    work = works([start], [draw_batches(tiny, 0, steps, rows=8)])
    rule = LocalRule(Optimizer(name="sgd", weight_decay=weight_decay), 0.1, 0, PAD, mu)
    (result,) = train_pack(model, layers, tiny.shape, work, rule).results
    return change(tiny, start, result)


def test_pull_shortens_the_path_and_vanishes_with_mu() -> None:
    for kind in ("dense", "lora", "galore"):
        free, weak, strong = (pulled(kind, mu) for mu in (0.0, 1e-6, 2.0))
        for layer in free:
            assert distance(weak[layer], free[layer]) < 1e-4
            assert strong[layer].norm() < 0.95 * free[layer].norm()


def test_full_rank_galore_has_the_same_pull_as_the_dense_weight() -> None:
    """With FedProx: r = min(m, n) = 16, SGD, scale 1, a refresh in between: GaLore's change is SGD's, also where decay
    shrinks the weight itself."""
    for decay in (0.0, 0.5):
        galore, dense = (pulled(kind, 1.0, weight_decay=decay) for kind in ("galore", "dense"))
        for layer in galore:
            assert distance(galore[layer], dense[layer]) < 1e-3


def test_pull_with_decay_has_the_same_bits_beside_other_clients() -> None:
    tiny = llama()
    model, layers = installed(tiny)
    starts, rule = [galore_start(tiny, Subspace(9, 2))] * 3, LocalRule(Optimizer(weight_decay=0.5), 0.1, 0, PAD, 1.0)
    work = works(starts, [draw_batches(tiny, k, 3, rows=4) for k in range(3)])
    packed = train_pack(model, layers, tiny.shape, work, rule).results
    for k, one in enumerate(work):
        (alone,) = train_pack(model, layers, tiny.shape, [one], rule).results
        assert all(torch.equal(tensor, packed[k].tensors[name]) for name, tensor in alone.tensors.items())


def test_one_round_of_pull_by_hand() -> None:
    """SGD, lr 1/10, mu 1: the second step's pull is lr mu times the first step: W2 = W1 - lr g2 - lr (W1 - W0)."""
    free, held = pulled("dense", 0.0, steps=1), pulled("dense", 1.0, steps=1)
    for layer in free:
        assert torch.equal(free[layer], held[layer])  # the first step starts at the pull's centre


def test_penalty_adds_its_gradient() -> None:
    """lr 1/10, SGD, one step, penalty 3 sum(B): B ends 0.3 lower than without."""
    tiny, method = llama(), build({"name": "fedit", "rank": 2})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    from dataclasses import replace

    name = f"{tiny.shape.targets[0].name}/left"
    ends = []
    for penalty in (None, lambda tensors: 3 * tensors[name].sum()):
        begun = replace(start, penalty=penalty)
        (result,) = run_pack(tiny, [begun], [draw_batches(tiny, 0, 1)], Optimizer(name="sgd"), lr=0.1)
        ends.append(result.tensors[name])
    torch.testing.assert_close(ends[1], ends[0] - 0.3)
