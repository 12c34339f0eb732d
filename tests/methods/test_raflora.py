"""raFLoRA by hand: a component that one client has is not divided among those that do not have it."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.protocol import Method
from tests.helpers.by_hand import changed, factors, walked

SHAPE = ModelShape((Layer("up", m=4, n=3),))
W = torch.zeros(4, 3)
UNIT = torch.eye(4)
WEIGHTS = {0: 3.0, 1: 1.0}  # of ranks 1 and 2, with s = 2 and 1
ENDS = {
    0: factors("up", (2 * UNIT[:, :1]).tolist(), UNIT[:1, :3].tolist()),  # s B A = 4 e0 e0^T
    1: factors("up", (UNIT[:, :2] * torch.tensor([8.0, 4.0])).tolist(), UNIT[:2, :3].tolist()),  # 8 e0 e0^T + 4 e1 e1^T
}


def fresh(**fields: object) -> Method:
    return build({"name": "raflora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0, **fields})


def test_one_round_by_hand() -> None:
    """The first component is averaged over both, (3 * 4 + 8) / 4 = 5, the second over its owner alone: 4, where
    FlexLoRA has 1.  B = A^T = diag(sqrt(5), sqrt(4)) with s = 1."""
    method = fresh()
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    done = walked(method, SHAPE, server, ENDS, WEIGHTS)
    torch.testing.assert_close(changed(method, SHAPE, done.server, "up", W).diagonal(), torch.tensor([5.0, 4.0, 0.0]))
    for side in (done.server.tensors["up/left"][:3], done.server.tensors["up/right"].T):
        torch.testing.assert_close(side.norm(dim=0), torch.tensor([5.0, 4.0]).sqrt())
    assert [done.updates[k].wire_bytes for k in (0, 1)] == [4 * 7, 4 * 2 * 7]
    assert [method.download_bytes(done.server, SHAPE, Client(k, 0), since=0) for k in (0, 1)] == [4 * 7, 4 * 2 * 7]
    again = method.start_client(method.broadcast(done.server), None, Client(0, 0), SHAPE)
    given = again.scale * again.tensors["up/left"] @ again.tensors["up/right"]
    torch.testing.assert_close(given.diagonal(), torch.tensor([5.0, 0.0, 0.0]))
    flexlora = build({"name": "flexlora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0})
    plain = walked(flexlora, SHAPE, server, ENDS, WEIGHTS).server
    torch.testing.assert_close(changed(flexlora, SHAPE, plain, "up", W).diagonal(), torch.tensor([5.0, 1.0, 0.0]))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_round_without_the_clients_of_a_component(weight: float) -> None:
    """Where only client 0 counts, nothing has the second component: its B is zero, its A stays."""
    method = fresh()
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    ends = ENDS if weight == 0.0 else {0: ENDS[0]}
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 0.0})
    torch.testing.assert_close(changed(method, SHAPE, done.server, "up", W).diagonal(), torch.tensor([4.0, 0.0, 0.0]))
    assert torch.equal(done.server.tensors["up/right"][1], server.tensors["up/right"][1])


def test_partitions_of_large_cohorts_become_matrices() -> None:
    """Ten clients of rank 1 in a 4 x 3 layer: 10 * 7 > 12 numbers; the mean stays the mean."""
    method = fresh()
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    ends = {2 * k: ENDS[0] for k in range(10)} | {1: ENDS[1]}
    done = walked(method, SHAPE, server, ends, dict.fromkeys(ends, 1.0))
    expected = torch.tensor([(10 * 4 + 8) / 11, 4.0, 0.0])
    torch.testing.assert_close(changed(method, SHAPE, done.server, "up", W).diagonal(), expected)
