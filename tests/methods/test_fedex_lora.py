"""FedEx-LoRA: the averages' error is added to the frozen weight, and returning clients download it later."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import changed, factors, walked
from tests.helpers.tiny_models import distance, llama
from tests.methods.test_protocol import clients_data, walk

SHAPE = ModelShape((Layer("up", m=2, n=3),))
W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_two_clients_by_hand() -> None:
    """2 x 3, rank 1, alpha 2: s = 2.  p = 1/4, 3/4."""
    method = build({"name": "fedex-lora", "rank": 1, "alpha": 2.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    ends = {
        0: factors("up", [[4.0], [0.0]], [[4.0, 0.0, 0.0]]),
        1: factors("up", [[0.0], [4.0]], [[0.0, 4.0, 0.0]]),
    }
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 3.0})
    # B' = [4, 0]/4 + 3 [0, 4]/4 = [1, 3], A' = [1, 3, 0]; B'A' = [[1, 3, 0], [3, 9, 0]].
    assert done.server.tensors["up/left"].flatten().tolist() == [1.0, 3.0]
    assert done.server.tensors["up/right"].tolist() == [[1.0, 3.0, 0.0]]
    # Mean product: 16/4 = 4 at (0, 0), 3 * 16/4 = 12 at (1, 1).  Residual, times s = 2:
    residual = 2 * torch.tensor([[3.0, -3.0, 0.0], [-3.0, 3.0, 0.0]])
    assert torch.equal(done.server.tensors["up/weight"], W + residual)
    assert torch.linalg.matrix_rank(residual) == 1  # (N - 1) r
    # The model has moved by s times the mean product.
    expected = torch.tensor([[8.0, 0.0, 0.0], [0.0, 24.0, 0.0]])
    assert torch.equal(changed(method, SHAPE, done.server, "up", W), expected)
    # r (m + n) = 5 numbers up; down the same and a residual of rank 1.
    assert done.updates[0].wire_bytes == 5 * 4
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == (5 + 5) * 4
    # The next round trains A' and B' over the new weight; a second round of one client leaves no residual.
    again = walked(method, SHAPE, done.server, {0: {}}, {0: 1.0}, done.states)
    assert torch.equal(again.starts[0].tensors["up/right"], done.server.tensors["up/right"])
    assert torch.equal(again.server.tensors["up/weight"], W + residual)
    assert method.download_bytes(again.server, SHAPE, Client(0, 0), since=1) == 5 * 4
    assert method.download_bytes(again.server, SHAPE, Client(0, 0), since=0) == (5 + 5) * 4


def test_residual_is_the_cross_term() -> None:
    """It equals s sum p_k (B_k - B')(A_k - A'), of rank (N - 1) r = 4 for three clients of rank 2."""
    method, tiny = build({"name": "fedex-lora", "rank": 2}), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    done = walk(method, tiny, server, clients_data(tiny, 3), weights=[1, 2, 5])
    for t in tiny.shape.targets:
        B, A = ([r.tensors[f"{t.name}/{role}"].double() for r in done.results] for role in ("left", "right"))
        B_mean, A_mean = ((x[0] + 2 * x[1] + 5 * x[2]) / 8 for x in (B, A))
        cross = sum(p / 8 * (b - B_mean) @ (a - A_mean) for p, b, a in zip((1, 2, 5), B, A, strict=True))
        moved = done.server.tensors[f"{t.name}/weight"].double() - tiny.weights[f"{t.name}/weight"].double()
        assert distance(moved, 16 / 2 * cross) < 1e-3  # the float32 weight holds the difference
        assert torch.linalg.matrix_rank(cross, rtol=1e-6) == 4
        assert not torch.equal(done.server.tensors[f"{t.name}/weight"], server.tensors[f"{t.name}/weight"])


def test_returning_client_gets_the_residuals_it_missed() -> None:
    """Rank 2, rounds of two clients: residuals of rank (2 - 1) * 2 each; r (m + n) for A' and B' every time."""
    method, tiny = build({"name": "fedex-lora", "rank": 2}), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    for seed in range(6):
        server = walk(method, tiny, server, clients_data(tiny, 2, seed=10 * seed), weights=[1, 1]).server
    for since, rounds in ((-1, 6), (0, 6), (3, 3), (5, 1), (6, 0)):
        numbers = sum(
            2 * (t.m + t.n) + min(t.m * t.n, 2 * rounds * (t.m + t.n)) for t in tiny.shape.targets
        )  # o_proj, 16 x 16: from four rounds on the matrix itself
        assert method.download_bytes(server, tiny.shape, Client(0, 0), since) == 4 * numbers
