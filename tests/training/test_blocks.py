"""Low-rank blocks added to a layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayfed_sub.training.blocks import add_block

G, N, M, K, R = 3, 5, 6, 4, 2


def operands() -> dict[str, Tensor]:
    shapes = {"y": (G, N, M), "x": (G, N, K), "left": (G, M, R), "right": (G, R, K)}
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randint(-3, 4, shape, generator=rng).float() for name, shape in shapes.items()}  # exact sums


def dense(y: Tensor, x: Tensor, left: Tensor, right: Tensor, scale_G: Tensor) -> Tensor:
    """The same with the (m, n) change formed."""
    return y + x @ (scale_G[:, None, None] * left @ right).mT


@pytest.mark.parametrize(
    "trained", [("left",), ("right",), ("left", "right"), ("x", "left"), ("y", "x"), ("x", "right")]
)
def test_gradients_match_the_dense_change(trained: tuple[str, ...]) -> None:
    scale_G = torch.tensor([0.5, 1.0, 2.0])
    d = torch.ones(G, N, M)
    grads = []
    for added in (add_block, dense):
        given = operands()
        leaves = [given[name].requires_grad_() for name in trained]
        given["y"] = given["y"].clone()  # a tensor in the autograd graph may be changed in place, a leaf not
        out = added(*given.values(), scale_G)
        grads.append((out.detach(), *torch.autograd.grad(out, leaves, d)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


def test_default_scale_is_one() -> None:
    given = operands()
    assert torch.equal(add_block(*operands().values()), dense(*given.values(), torch.ones(G)))


def test_block_is_added_in_place() -> None:
    """Autograd tracks the change."""
    given = operands()
    version = given["y"]._version
    assert add_block(*given.values()) is given["y"]
    assert given["y"]._version > version
