"""FRLoRA by hand: the weight's main component is trained, and the averages' change goes into the weight."""

from __future__ import annotations

import math

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import changed, walked

SHAPE = ModelShape((Layer("up", m=3, n=2),))
W = torch.tensor([[8.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # singular values 8 and 1
WEIGHTS = {0: 1.0, 1: 1.0}


def test_two_rounds_by_hand() -> None:
    """s = 2, so B0 = A0^T = sqrt(8 / 2) e0 = 2 e0.  The clients end with B = 3 e0, 2 e1 and A = 2 e0, 4 e0: B' = 1.5 e0
    + e1 and A' = 3 e0, so s (B'A' - B0 A0) has 2 (4.5 - 4) = 1 and 2 * 3 = 6 in column 0.  The mean of the changes has
    2 (6 + 0) / 2 - 8 = -2 and 2 (0 + 8) / 2 = 8 there: FedIT's cross term is between."""
    method = build({"name": "frlora", "rank": 1, "alpha": 2.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    torch.testing.assert_close(changed(method, SHAPE, server, "up", W), torch.zeros(3, 2))
    sign = float(server.tensors["up/right"][0, 0].sign())  # of the singular vectors
    B0, A0 = sign * server.tensors["up/left"], sign * server.tensors["up/right"]
    torch.testing.assert_close((B0.flatten(), A0.flatten()), (torch.tensor([2.0, 0, 0]), torch.tensor([2.0, 0])))
    ends = {
        0: {"up/left": [[3 * sign], [0], [0]], "up/right": [[2 * sign, 0]]},
        1: {"up/left": [[0], [2 * sign], [0]], "up/right": [[4 * sign, 0]]},
    }
    moved = torch.tensor([[1.0, 0], [6, 0], [0, 0]])
    for n in (1, 2):  # every round begins with B0 and A0, and adds the same again
        done = walked(method, SHAPE, server, ends, WEIGHTS)
        assert torch.equal(done.starts[0].tensors["up/left"], server.tensors["up/left"])
        server = done.server
        torch.testing.assert_close(changed(method, SHAPE, server, "up", W), n * moved)
        assert done.updates[0].wire_bytes == 4 * 5
        assert method.download_bytes(server, SHAPE, Client(0, 0), since=0) == 4 * min(5 * n, 6)
    assert method.download_bytes(server, SHAPE, Client(0, 0), since=1) == 4 * 5
    still = method.aggregate(server, method.accumulator(server, SHAPE), SHAPE)  # a round in which all clients failed
    assert torch.equal(still.tensors["up/weight"], server.tensors["up/weight"])
    assert method.download_bytes(still, SHAPE, Client(0, 0), since=2) == 0


def test_scale_divides_the_components() -> None:
    """s B0 A0 is the component, whatever s is: with alpha = 8 both factors are sqrt(8 / 8)."""
    method = build({"name": "frlora", "rank": 1, "alpha": 8.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    assert math.isclose(float(server.tensors["up/left"].norm()), 1.0, rel_tol=1e-6)
    torch.testing.assert_close(server.tensors["up/weight"], torch.tensor([[0.0, 0], [0, 1], [0, 0]]))
