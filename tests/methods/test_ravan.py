"""Ravan by hand: heads with scales, their product on the wire, and orthonormal outer factors."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.ravan import bases
from tests.helpers.by_hand import changed, walked
from tests.helpers.tiny_models import distance, llama, run_pack, run_reference
from tests.methods.test_protocol import OPTIMIZER, clients_data

SHAPE = ModelShape((Layer("up", m=2, n=3),))


def test_two_clients_by_hand() -> None:
    """One layer of 2 x 3, two heads of rank 1, s = alpha / r = 3, p = 1/4, 3/4."""
    method = build({"name": "ravan", "rank": 1, "heads": 2, "alpha": 3.0})
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, SHAPE, seed=0)
    assert server.tensors["up/core"].tolist() == [[[0.0]], [[0.0]]]
    server = server.advance({"up/left": torch.eye(2), "up/right": torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])})
    ends = {
        0: {"up/core": [[[4]], [[2]]], "up/heads": [2, 1]},
        1: {"up/core": [[[4]], [[4]]], "up/heads": [1, -1]},
    }
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 3.0})
    assert done.starts[0].trained == ("up/core", "up/heads")
    assert done.starts[0].tensors["up/heads"].tolist() == [1.0, 1.0]
    # s_i H_i: 8 and 2 of client 0, 4 and -4 of client 1; H' = (8 + 3 * 4) / 4 = 5 and (2 - 3 * 4) / 4 = -2.5.
    assert set(done.updates[0].tensors) == {"up/core"}
    assert done.server.tensors["up/core"].flatten().tolist() == [5.0, -2.5]
    change = changed(method, SHAPE, done.server, "up", torch.zeros(2, 3))
    assert change.tolist() == [[15.0, 0.0, 0.0], [0.0, -7.5, 0.0]]
    # h r^2 = 2 numbers up and down; the scales begin anew.
    assert done.updates[0].wire_bytes == method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 2 * 4
    again = walked(method, SHAPE, done.server, {0: {}}, {0: 1.0}, done.states)
    assert again.starts[0].tensors["up/heads"].tolist() == [1.0, 1.0]


def test_outer_factors_are_orthonormal_over_as_many_heads_as_fit() -> None:
    layer = Layer("up", 10, 7)
    rows = bases(0, "A", layer, rank=3, heads=3, size=7)  # 2 heads fit, the third begins anew
    gram = rows @ rows.T
    assert torch.allclose(gram[:6, :6], torch.eye(6), atol=1e-6)
    assert torch.allclose(gram[6:, 6:], torch.eye(3), atol=1e-6)
    assert gram[6:, :6].abs().max() > 1e-3
    assert not torch.allclose(rows[:, :7], bases(0, "B", layer, rank=3, heads=3, size=7))


@pytest.mark.parametrize("rank", [1, 5])
def test_scales_train_alike_in_any_pack_and_in_the_reference(rank: int) -> None:
    """A core that is zero gives its scale no gradient: the second round's do."""
    tiny, method = llama(), build({"name": "ravan", "rank": rank, "heads": 3})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    rng = torch.Generator().manual_seed(1)
    cores = {n: 0.1 * torch.randn(t.shape, generator=rng) for n, t in server.tensors.items() if n.endswith("/core")}
    server = server.advance(cores)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape)
    data = [batches[:2] for batches in clients_data(tiny, 2)]
    optimizer = OPTIMIZER.model_copy(update={"eps": 1e-4})
    together = run_pack(tiny, [start] * 2, data, optimizer, lr=0.01)
    for k, other in enumerate(together):
        (alone,) = run_pack(tiny, [start], [data[k]], optimizer, lr=0.01, clients=[k])
        assert all(torch.equal(alone.tensors[name], other.tensors[name]) for name in start.trained)
    (theirs,) = run_reference(tiny, [start], data[:1], optimizer, lr=0.01)
    for name in start.trained:
        moved = together[0].tensors[name] - start.tensors[name]
        assert moved.abs().max() > 0
        assert distance(moved, theirs.tensors[name] - start.tensors[name]) < 1e-4
