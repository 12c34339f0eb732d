"""The rank of gradients, against the singular values of the gradient itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Subspace
from rayfed_sub.diagnostics.gradients import GradientWatch, energy
from rayfed_sub.training.executor import train_pack
from rayfed_sub.training.pack_step import LocalRule
from tests.helpers.tiny_models import albert, draw_batches, galore_start, installed, works


def by_hand(x_Nn: Tensor, d_Nm: Tensor, rank: int) -> tuple[float, float]:
    """From the dense gradient in float64."""
    sigma = torch.linalg.svdvals(d_Nm.double().T @ x_Nn.double())
    shares = sigma / sigma.sum()
    return float((sigma[:rank] ** 2).sum() / (sigma**2).sum()), float(torch.special.entr(shares).sum().exp())


# Fewer tokens than the layer's short side: token Grams; more: the gradient itself, tall and wide.
@pytest.mark.parametrize(("N", "n", "m"), [(6, 10, 20), (6, 20, 10), (30, 10, 20), (30, 20, 10), (10, 10, 10)])
def test_share_and_rank_match_the_gradient(N: int, n: int, m: int) -> None:
    torch.manual_seed(N + n)
    x, d = torch.randn(N, n) * torch.logspace(0, -2, N)[:, None], torch.randn(N, m)
    assert energy(x, d, 3) == pytest.approx(by_hand(x, d, 3), rel=1e-4)  # its Grams are float32


def test_tokens_without_a_gradient_and_gradient_scale_have_no_effect() -> None:
    torch.manual_seed(0)
    x, d = torch.randn(8, 12), torch.randn(8, 16)
    d[3:5] = 0
    expected = by_hand(x[d.any(1)], d[d.any(1)], 2)
    assert energy(x, d, 2) == pytest.approx(expected, rel=1e-5)
    assert energy(1e-25 * x, 1e-25 * d, 2) == pytest.approx(expected, rel=1e-5)


def test_equal_tokens_give_a_gradient_of_rank_one() -> None:
    """d d^T is singular then, and has no Cholesky factor."""
    x, d = torch.ones(5, 8), torch.ones(5, 9)
    share, effective = energy(x, d, 1) or (0.0, 0.0)
    assert share == pytest.approx(1.0)
    assert effective == pytest.approx(1.0, abs=1e-3)


def test_no_gradient_gives_no_figures() -> None:
    x = torch.ones(5, 8)
    assert energy(x, torch.zeros(5, 9), 1) is None
    assert energy(x, torch.full((5, 9), torch.nan), 1) is None


def test_only_selected_clients_and_layers_are_measured() -> None:
    watch = GradientWatch({7: 1}, frozenset({"up"}))
    assert watch.hooks("down", [3, 7]) == []
    assert watch.hooks("up", [3, 4]) == []
    (hook,) = watch.hooks("up", [3, 7])
    x, d = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    hook([(0, x, d)])
    assert watch.seen == {(7, "up"): energy(x[1], d[1], 1)}


def test_gradient_covers_all_uses_of_a_layer() -> None:
    """ALBERT's two blocks are one module, whose gradient is the sum over both."""
    tiny = albert()
    (batch,) = draw_batches(tiny, 0, 1)
    watch = GradientWatch({0: 2}, frozenset(layer.name for layer in tiny.shape.targets))
    model, layers = installed(tiny)
    start = galore_start(tiny, Subspace(2, 3))
    rule = LocalRule(Optimizer(), lr=0.1, seed=0, pad=0)
    train_pack(model, layers, tiny.shape, works([start], [[batch]]), rule, watch.hooks)
    plain = copy.deepcopy(tiny.model)
    for layer in tiny.shape.targets:
        weight = plain.get_submodule(layer.name).weight.requires_grad_()
        (G_mn,) = torch.autograd.grad(plain(**batch).loss, weight)
        expected = by_hand(torch.eye(layer.n), G_mn.T, 2)  # x = 1, d = G^T give G
        assert watch.seen[0, layer.name] == pytest.approx(expected, rel=1e-3)
