"""Fed-SB by hand, and its outer factors against torch's SVD."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.fed_sb import outer_factors
from tests.helpers.by_hand import walked


def test_one_round_by_hand() -> None:
    """W has the singular values 3 and 2; rank 1 takes the 3 at (0, 0), whichever sign u and v have.  s = alpha / r = 4,
    p = 1/4, 3/4: C' = 1/4 + 3 * 2/4 = 7/4, and the change is 4 * 7/4 u v^T."""
    W = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    shape = ModelShape((Layer("up", m=3, n=2),))
    method = build({"name": "fed-sb", "rank": 1, "alpha": 4.0})
    server = method.init_server({"up/weight": W}, shape, seed=0)
    assert torch.equal(method.model(server, shape)["up"].apply(W), W)
    done = walked(method, shape, server, {0: {"up/core": [[1]]}, 1: {"up/core": [[2]]}}, {0: 5.0, 1: 15.0})
    assert done.server.tensors["up/core"].tolist() == [[1.75]]
    assert done.updates[0].wire_bytes == 1 * 4  # r^2
    assert method.download_bytes(done.server, shape, Client(0, 0), since=-1) == 1 * 4  # U_r, V_r from the backbone
    change = method.model(done.server, shape)["up"].apply(W) - W
    torch.testing.assert_close(change, torch.tensor([[7.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    for role in ("left", "right"):
        assert done.server.tensors[f"up/{role}"] is server.tensors[f"up/{role}"]


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (6, 6)])
def test_outer_factors_are_the_top_singular_vectors(m: int, n: int) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    left, right = outer_factors(W, 3)
    U, s, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(left @ torch.diag(s[:3]) @ right, U[:, :3] @ torch.diag(s[:3]) @ Vh[:3])
    for rows in (left.T, right):
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(left.T @ W @ right.T, torch.diag(s[:3]))  # in order, u and v of one sign
    # Rounding must not flip a sign: server and client compute them separately, perhaps on different processors.
    again = outer_factors(W * (1 + 1e-6 * torch.randn(m, n, generator=torch.Generator().manual_seed(1))), 3)
    torch.testing.assert_close(again[0], left, atol=1e-4, rtol=0)
    torch.testing.assert_close(again[1], right, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9)])
def test_weight_of_lower_rank_gives_zeros(m: int, n: int) -> None:
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(m, 2, generator=rng) @ torch.randn(2, n, generator=rng)
    left, right = outer_factors(W, 4)
    assert (left[:, 2:].any(), right[2:].any()) == (False, False)
    torch.testing.assert_close(left @ left.T @ W, W, atol=1e-5, rtol=1e-5)  # the first two span W
    zero = outer_factors(torch.zeros(m, n), 2)
    assert (zero[0].any(), zero[1].any()) == (False, False)
