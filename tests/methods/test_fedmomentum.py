"""FedMomentum by hand: the main component in the factors, the next in the weight, the last one dropped."""

from __future__ import annotations

import math

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import changed, factors, walked

SHAPE = ModelShape((Layer("up", m=9, n=8),))
W = torch.ones(9, 8)
UNIT = torch.eye(9)
# s = 2 and p = 1/3 each: dW = 2/3 diag(24, 12, 3) = diag(16, 8, 2)
SIZES = (24.0, 12.0, 3.0)
ENDS = {k: factors("up", (SIZES[k] * UNIT[:, k : k + 1]).tolist(), UNIT[k : k + 1, :8].tolist()) for k in range(3)}


@pytest.mark.parametrize(("energy", "rest"), [(0.7, 0), (0.98, 1), (1.0, 2)])
def test_one_round_by_hand(energy: float, rest: int) -> None:
    """Of 256 + 64 + 4 = 324 the first has 0.790 and the first two 0.988.  B = A^T = sqrt(16 / 2) e_0."""
    method = build({"name": "fedmomentum", "rank": 1, "alpha": 2.0, "energy": energy})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    done = walked(method, SHAPE, server, ENDS, dict.fromkeys(range(3), 1.0))
    for side in (done.server.tensors["up/left"].flatten()[:8], done.server.tensors["up/right"].flatten()):
        torch.testing.assert_close(side.abs(), math.sqrt(8) * UNIT[0, :8])
    residual = (done.server.tensors["up/weight"] - W).diagonal()[:3]
    torch.testing.assert_close(residual, torch.tensor([0.0, 8.0 * (rest > 0), 2.0 * (rest > 1)]))
    change = changed(method, SHAPE, done.server, "up", W)
    torch.testing.assert_close(change.diagonal()[:3], torch.tensor([16.0, *(8.0, 2.0)[:rest], *[0.0] * (2 - rest)]))
    torch.testing.assert_close(change.norm(), change.diagonal().norm())  # and nothing beside the diagonal
    assert done.updates[0].wire_bytes == 4 * 17
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 4 * 17 * (1 + rest)
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=1) == 4 * 17
    assert method.at_most().energy == 1.0


def test_missed_residuals_add_up_and_the_next_round_begins_with_the_factors() -> None:
    """After two rounds of rank 2 each, 4 * 17 = 68 numbers; the third would make 102 > 72 = m n."""
    method = build({"name": "fedmomentum", "rank": 1, "alpha": 2.0, "energy": 1.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    for n in range(1, 4):
        server = walked(method, SHAPE, server, ENDS, dict.fromkeys(range(3), 1.0)).server
        assert method.download_bytes(server, SHAPE, Client(0, 0), since=0) == 4 * (17 + min(2 * n * 17, 72))
    start = method.start_client(method.broadcast(server), None, Client(0, 0), SHAPE)
    assert (start.step, start.moments) == (0, {})
    torch.testing.assert_close(
        2 * start.tensors["up/left"] @ start.tensors["up/right"], 16.0 * UNIT[:, :1] @ UNIT[:1, :8]
    )


def test_spare_rows_of_a_can_be_trained() -> None:
    """One client of rank 1 in factors of rank 2: the second row of A stays as it was, its B is zero."""
    method = build({"name": "fedmomentum", "rank": 2, "alpha": 2.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    end = {"up/left": [[2.0, 0.0], *[[0.0, 0.0]] * 8]}
    done = walked(method, SHAPE, server, {0: end}, {0: 1.0})
    assert torch.equal(done.server.tensors["up/right"][1], server.tensors["up/right"][1])
    assert not done.server.tensors["up/left"][:, 1].any()
    assert torch.equal(done.server.tensors["up/weight"], W)
    unchanged = walked(method, SHAPE, server, {0: {}}, {0: 1.0}).server  # B = 0: no component at all
    assert torch.equal(unchanged.tensors["up/right"], server.tensors["up/right"])
