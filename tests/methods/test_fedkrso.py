"""FedKRSO by hand: what clients of one subspace and of several add to the weight, and the bytes that are missed."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.fedkrso import drawn, projection
from tests.helpers.by_hand import changed, walked

SHAPE = ModelShape((Layer("up", m=2, n=40),))


def test_three_clients_by_hand() -> None:
    """One layer of 2 x 40, rank 1, K = 2, p = 1/4, 1/4, 1/2; two clients have drawn one subspace, one the other."""
    method = build({"name": "fedkrso", "rank": 1, "subspaces": 2})
    server = method.init_server({"up/weight": torch.ones(2, 40)}, SHAPE, seed=0)
    numbers = {k: drawn(0, 0, k, 2) for k in range(8)}
    first, second = [k for k in numbers if numbers[k] == 0][:2]
    other = next(k for k in numbers if numbers[k] == 1)
    ends = {first: {"up/left": [[4], [0]]}, second: {"up/left": [[0], [8]]}, other: {"up/left": [[2], [2]]}}
    done = walked(method, SHAPE, server, ends, {first: 1.0, second: 1.0, other: 2.0})
    P = [projection(0, 0, j, SHAPE.targets[0], 1) for j in (0, 1)]
    for k in ends:
        start = done.starts[k]
        assert torch.equal(start.tensors["up/right"], P[numbers[k]])
        assert (start.scale, start.trained, start.moments) == (1.0, ("up/left",), {})
        assert done.updates[k].wire_bytes == 2 * 4  # r m
    change = torch.tensor([[1.0], [2.0]]) @ P[0] + torch.tensor([[1.0], [1.0]]) @ P[1]  # sum_k p_k B_k P_j(k)
    assert torch.allclose(changed(method, SHAPE, done.server, "up", torch.ones(2, 40)), change, atol=1e-6)
    # Two subspaces had clients: 2 r m numbers, twice that after another such round, and never more than m n.
    again = walked(method, SHAPE, done.server, {k: {} for k in range(8)}, dict.fromkeys(range(8), 1.0))
    assert len({drawn(0, 1, k, 2) for k in range(8)}) == 2
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=-1) == 4 * 2 * 2
    assert [method.download_bytes(again.server, SHAPE, Client(0, 0), since) for since in (0, 1)] == [32, 16]
    assert not torch.equal(projection(0, 1, 0, SHAPE.targets[0], 1), P[0])


def test_projections_keep_lengths_in_the_mean() -> None:
    """E[P^T P] = I: over 400 draws of rank 4 the mean's entries deviate by about sqrt(2 / (400 * 4)) = 0.035."""
    layer = Layer("up", 3, 5)
    draws = [projection(0, n, 0, layer, 4) for n in range(400)]
    mean = torch.stack([P.T @ P for P in draws]).mean(0)
    assert torch.allclose(mean, torch.eye(5), atol=0.15)
