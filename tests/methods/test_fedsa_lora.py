"""FedSA-LoRA by hand: A is sent, B is not."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=3),))


def test_two_rounds_by_hand() -> None:
    """One layer of 2 x 3, rank 1, s = alpha / r = 2, p = 1/4, 3/4."""
    method = build({"name": "fedsa-lora", "rank": 1, "alpha": 2.0})
    W = torch.ones(2, 3)
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    assert set(server.tensors) == {"up/right"}

    returned = {
        0: {"up/left": [[1], [0]], "up/right": [[4, 0, 0]]},
        1: {"up/left": [[0], [5]], "up/right": [[0, 4, 0]]},
    }
    done = walked(method, SHAPE, server, returned, {0: 5.0, 1: 15.0})
    assert done.starts[0].tensors["up/left"].tolist() == [[0.0], [0.0]]
    # A' = [4, 0, 0]/4 + 3 [0, 4, 0]/4 = [1, 3, 0]; r n numbers up and down; B is in no message.
    assert {name: t.tolist() for name, t in done.server.tensors.items()} == {"up/right": [[1.0, 3.0, 0.0]]}
    assert set(done.updates[1].tensors) == {"up/right"}
    assert done.updates[1].wire_bytes == 3 * 4
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 3 * 4

    # Each client's model is W + s B_k A'; without a client there is no B.
    first, second = (method.personal_model(done.server, done.states[k], SHAPE)["up"].apply(W) - W for k in (0, 1))
    assert first.tolist() == [[2.0, 6.0, 0.0], [0.0, 0.0, 0.0]]
    assert second.tolist() == [[0.0, 0.0, 0.0], [10.0, 30.0, 0.0]]
    for changes in (method.model(done.server, SHAPE), method.personal_model(done.server, None, SHAPE)):
        assert torch.equal(changes["up"].apply(W), W)

    # The next round begins with the client's own B and the common A; client 2 is new.
    returned = {k: {"up/left": [[1], [1]], "up/right": [[1, 1, 1]]} for k in range(3)}
    again = walked(method, SHAPE, done.server, returned, dict.fromkeys(range(3), 1.0), states=done.states)
    assert [again.starts[k].tensors["up/left"].flatten().tolist() for k in range(3)] == [[1, 0], [0, 5], [0, 0]]
    assert [again.starts[k].tensors["up/right"].tolist() for k in range(3)] == [[[1.0, 3.0, 0.0]]] * 3


def test_b_is_kept_even_if_moments_are_reset() -> None:
    method = build({"name": "fedsa-lora", "rank": 1, "optimizer_state": "reset"})
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, SHAPE, seed=0)
    returned = {0: {"up/left": [[1], [2]], "up/right": [[0, 0, 0]]}}
    moments = {0: {"up/left/m1": torch.ones(2, 1)}}
    done = walked(method, SHAPE, server, returned, {0: 1.0}, moments=moments)
    assert {name: t.flatten().tolist() for name, t in done.states[0].tensors.items()} == {"up/left": [1.0, 2.0]}


def test_scale_is_alpha_over_rank_in_training_and_in_the_model() -> None:
    """Rank 2, alpha 6: B A = [[1, 0, 0], [0, 1, 0]], three times."""
    method = build({"name": "fedsa-lora", "rank": 2, "alpha": 6.0})
    W = torch.zeros(2, 3)
    server = method.init_server({"up/weight": W}, SHAPE, seed=0)
    ends = {0: {"up/left": [[1, 0], [0, 1]], "up/right": [[1, 0, 0], [0, 1, 0]]}}
    done = walked(method, SHAPE, server, ends, {0: 1.0})
    assert done.starts[0].scale == 3.0
    changed = method.personal_model(done.server, done.states[0], SHAPE)["up"].apply(W)
    assert changed.tolist() == [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
