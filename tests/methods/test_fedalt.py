"""FedALT by hand: every client's own adapter over the mean of the others'."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=2),))


def test_three_rounds_by_hand() -> None:
    """One layer of 2 x 2, rank 1, s = alpha / r = 2, own share 1/4, p = 1/4, 1/4, 1/2."""
    method = build({"name": "fedalt", "rank": 1, "alpha": 2.0, "share": 0.25})
    W = torch.ones(2, 2)
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    returned = {
        0: {"up/left": [[8], [0]], "up/right": [[1, 0]]},
        1: {"up/left": [[0], [4]], "up/right": [[0, 4]]},
        2: {"up/left": [[4], [0]], "up/right": [[2, 0]]},
    }
    done = walked(method, SHAPE, server, returned, {0: 5.0, 1: 5.0, 2: 10.0})
    assert all(start.scale_of("up") == 0.5 for start in done.starts.values())  # share s
    assert all(not start.frozen["up/left"].any() for start in done.starts.values())  # nobody has sent anything yet
    assert done.updates[2].wire_bytes == method.download_bytes(done.server, SHAPE, Client(2, 0), since=0) == 4 * 4

    # Of the others: client 0 has ((0, 4) + 2 (4, 0)) / 3 and ((0, 4) + 2 (2, 0)) / 3, client 2 ((8, 0) + (0, 4)) / 2
    # and ((1, 0) + (0, 4)) / 2; client 3, which is new, the mean of all: (4, 1) and (1.25, 1).
    again = walked(method, SHAPE, done.server, {k: {} for k in range(4)}, dict.fromkeys(range(4), 1.0), done.states)
    for client, left, right in ((0, [8, 4], [4, 4]), (2, [12, 6], [1.5, 6]), (3, [12, 3], [3.75, 3])):
        frozen = again.starts[client].frozen
        assert torch.allclose(frozen["up/left"].flatten(), 1.5 * torch.tensor(left) / 3.0)  # (1 - share) s = 1.5
        assert torch.allclose(frozen["up/right"].flatten(), torch.tensor(right) / 3.0)
    assert again.starts[0].tensors["up/left"].tolist() == [[8.0], [0.0]]  # its own goes on
    assert again.starts[3].tensors["up/left"].tolist() == [[0.0], [0.0]]

    # W + s (share B_k A_k + (1 - share) B_R A_R), and without a client the others' part.
    own = method.personal_model(done.server, done.states[2], SHAPE)["up"].apply(W) - W
    expected = 0.5 * torch.tensor([[8.0, 0.0], [0.0, 0.0]]) + 1.5 * torch.tensor([[4.0], [2.0]]) @ torch.tensor(
        [[0.5, 2]]
    )
    assert torch.allclose(own, expected)
    whole = method.model(done.server, SHAPE)["up"].apply(W) - W
    assert torch.allclose(whole, 1.5 * torch.tensor([[4.0], [1.0]]) @ torch.tensor([[1.25, 1.0]]))

    # Alone in a round a client has no others; one that took no part in the last round has all of that.
    alone = walked(method, SHAPE, again.server, {0: {}}, {0: 1.0}, again.states)
    both = walked(method, SHAPE, alone.server, {0: {}, 1: {}}, {0: 1.0, 1: 1.0}, {**again.states, **alone.states})
    assert both.starts[0].frozen["up/left"].shape == (2, 0)
    assert torch.equal(both.starts[1].frozen["up/right"], torch.tensor([[1.0, 0.0]]))
