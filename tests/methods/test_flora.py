"""FLoRA: stacks add up exactly for any ranks; every round begins anew; downloads of returning clients."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import changed, factors, walked
from tests.helpers.tiny_models import distance, llama
from tests.methods.test_protocol import clients_data, effective, local_change, walk

SHAPE = ModelShape((Layer("up", m=4, n=3),))
W = torch.arange(12.0).reshape(4, 3)


def test_two_clients_by_hand() -> None:
    """4 x 3, ranks 1 and 2, alpha 2: s = 2 and 1.  p = 1/4, 3/4."""
    method = build({"name": "flora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    ends = {
        0: factors("up", [[1.0], [0.0], [0.0], [0.0]], [[0.0, 4.0, 0.0]]),
        1: factors("up", [[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 8.0]]),
    }
    done = walked(method, SHAPE, server, ends, {0: 5.0, 1: 15.0})
    # s B A: 2 * 4 = 8 at (0, 1), times 1/4; 1 * 4 at (1, 0) and 1 * 8 at (2, 2), times 3/4.
    expected = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 6.0], [0.0, 0.0, 0.0]])
    assert torch.equal(changed(method, SHAPE, done.server, "up", W), expected)
    assert torch.equal(done.server.tensors["up/weight"], W + expected)
    # Up: 1 * 7 numbers, and 2 * 7 = 14, which is more than the matrix's 12.
    assert [done.updates[k].wire_bytes for k in (0, 1)] == [7 * 4, 12 * 4]
    # Down: the stack of both would be (1 + 3) * 7 numbers (a matrix counts as rank 3): the matrix.
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 12 * 4


def test_every_round_begins_with_zero_and_its_own_draw() -> None:
    method = build({"name": "flora", "rank": 2, "client_ranks": [1, 2]})
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    assert method.download_bytes(server, SHAPE, Client(0, 0), since=-1) == 0  # A is drawn, B is zero, W is pretrained
    first = walked(method, SHAPE, server, {0: {}, 1: {}, 3: {}}, {0: 1.0, 1: 1.0, 3: 1.0})
    second = walked(method, SHAPE, first.server, {1: {}}, {1: 1.0}, first.states)
    rights = [first.starts[0], first.starts[1], first.starts[3], second.starts[1]]
    drawn = [start.tensors["up/right"] for start in rights]
    assert [tuple(A.shape) for A in drawn] == [(1, 3), (2, 3), (2, 3), (2, 3)]  # client 3 has entry 3 mod 2
    assert not any(torch.equal(drawn[1], other) for other in drawn[2:])
    assert not any(start.tensors["up/left"].any() for start in rights)
    assert [start.scale for start in rights] == [16.0, 8.0, 8.0, 8.0]
    assert first.states[0].tensors == {}
    again = walked(method, SHAPE, server, {1: {}}, {1: 1.0})
    assert torch.equal(again.starts[1].tensors["up/right"], drawn[1])


def test_returning_client_gets_the_stacks_it_missed() -> None:
    """Two clients of ranks 1 and 2: summed rank 3 a round, for each of the small Llama's targets."""
    method, tiny = build({"name": "flora", "rank": 2, "client_ranks": [1, 2]}), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    for seed in range(3):
        server = walk(method, tiny, server, clients_data(tiny, 2, seed=10 * seed), weights=[1, 1]).server
    for since, rounds in ((-1, 3), (0, 3), (1, 2), (2, 1), (3, 0)):
        numbers = sum(min(t.m * t.n, 3 * rounds * (t.m + t.n)) for t in tiny.shape.targets)
        assert method.download_bytes(server, tiny.shape, Client(0, 0), since) == 4 * numbers


def test_unequal_ranks_average_exactly() -> None:
    """Exact with ranks 1, 2, 3, so s = 16, 8, 16/3, and p = (1, 2, 5) / 8."""
    method, tiny = build({"name": "flora", "rank": 3, "client_ranks": [1, 2, 3]}), llama()
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    done = walk(method, tiny, server, clients_data(tiny, 3), weights=[1, 2, 5])
    after = effective(method, tiny, done.server)
    for t in tiny.shape.targets:
        assert [start.tensors[f"{t.name}/left"].shape[1] for start in done.starts] == [1, 2, 3]
        mean = sum(p / 8 * local_change(tiny, server, done, k, t.name) for k, p in enumerate([1, 2, 5]))
        assert distance(after[t.name] - tiny.weights[f"{t.name}/weight"], mean) < 1e-5


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "florist", "raflora"])
def test_ranks_of_clients_are_checked(name: str) -> None:
    shape = ModelShape((Layer("up", m=4, n=3),))
    build({"name": name, "rank": 3, "client_ranks": [1, 3]}).check(shape)
    with pytest.raises(UserError, match=r"method\.client_ranks: got \(1, 4\); allowed: ranks from 1 to method\.rank=3"):
        build({"name": name, "rank": 3, "client_ranks": [1, 4]}).check(shape)
    with pytest.raises(UserError, match=r"method\.rank: got 4; allowed: 1 to 3"):
        build({"name": name, "rank": 4}).check(shape)
    for wrong in ([], [0], [1.5], 2):
        with pytest.raises(UserError, match=r"method\.client_ranks"):
            build({"name": name, "client_ranks": wrong})
