"""FLoRIST by hand: the rank follows from the spectrum of the mean, and clients get what fits them."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.own_failures import Reported
from tests.helpers.by_hand import changed, factors, walked

SHAPE = ModelShape((Layer("up", m=9, n=8),))
W = torch.zeros(9, 8)
WEIGHTS = {0: 1.0, 1: 1.0}


def diagonal(*values: float) -> torch.Tensor:
    full = torch.zeros(9, 8)
    full.diagonal()[: len(values)] = torch.tensor(values)
    return full


@pytest.mark.parametrize(("threshold", "rank"), [(0.7, 1), (0.8, 2), (0.97, 2), (0.98, 3), (1.0, 3)])
def test_one_round_by_hand(threshold: float, rank: int) -> None:
    """Clients of ranks 2 and 1 with s = 1 and 2: dW = (s_0 B_0 A_0 + s_1 B_1 A_1) / 2 = diag(6, 1, 3) / 2 in columns 0,
    1 and 2.  Of 36 + 9 + 1 = 46 quarters the largest alone has 0.783, both of the largest 0.978."""
    method = build({"name": "florist", "rank": 2, "client_ranks": [2, 1], "alpha": 2.0, "threshold": threshold})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    unit = torch.eye(9)
    ends = {
        0: factors("up", unit[:, :2].tolist(), diagonal(6, 1)[:2].tolist()),
        1: factors("up", unit[:, 2:3].tolist(), (1.5 * unit[2:3, :8]).tolist()),
    }
    done = walked(method, SHAPE, server, ends, WEIGHTS)
    assert [done.starts[k].scale for k in (0, 1)] == [1.0, 2.0]
    assert [done.updates[k].wire_bytes for k in (0, 1)] == [4 * 2 * 17, 4 * 17]
    kept = {1: diagonal(3), 2: diagonal(3, 0, 1.5), 3: diagonal(3, 0.5, 1.5)}[rank]
    torch.testing.assert_close(changed(method, SHAPE, done.server, "up", W), kept)
    assert done.server.tensors["up/right"].shape == (rank, 8)
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 4 * rank * 17  # one pair for all
    again = {k: method.start_client(method.broadcast(done.server), None, Client(k, 0), SHAPE) for k in (0, 1)}
    given = [again[k].scale * again[k].tensors["up/left"] @ again[k].tensors["up/right"] for k in (0, 1)]
    torch.testing.assert_close(given[0], kept if rank < 3 else diagonal(3, 0, 1.5))  # rank 2 has the first two
    torch.testing.assert_close(given[1], diagonal(3))
    assert again[0].tensors["up/left"].shape == (9, 2)  # filled with zeros where the pair has rank 1
    assert method.at_most().threshold == 1.0
    assert Reported(method).at_most().method == method.at_most()  # a method of the caller's own is planned alike


def test_round_without_a_change_leaves_the_pair() -> None:
    """B = 0 has no spectrum, and A is still needed."""
    method = build({"name": "florist", "rank": 2})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    done = walked(method, SHAPE, server, {0: {}}, {0: 1.0})
    assert torch.equal(done.server.tensors["up/right"], server.tensors["up/right"])


def test_pair_of_a_large_rank_costs_no_more_than_the_matrix() -> None:
    """Five clients of rank 1, orthogonal: p = 5, and 5 * 17 = 85 > 72 = m n."""
    method = build({"name": "florist", "rank": 1, "alpha": 1.0, "threshold": 1.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    unit = torch.eye(9)
    ends = {k: factors("up", unit[:, k : k + 1].tolist(), unit[k : k + 1, :8].tolist()) for k in range(5)}
    done = walked(method, SHAPE, server, ends, dict.fromkeys(range(5), 1.0))
    assert done.server.tensors["up/right"].shape == (5, 8)
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 4 * 72
