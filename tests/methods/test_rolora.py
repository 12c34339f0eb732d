"""RoLoRA by hand, and its exactness in rounds of both kinds."""

from __future__ import annotations

import torch

from rayfed_sub.core.types import Client, Layer, ModelShape, ServerState
from rayfed_sub.methods import build
from tests.helpers.by_hand import walked
from tests.helpers.tiny_models import distance, llama
from tests.methods.test_protocol import clients_data, local_change, walk

SHAPE = ModelShape((Layer("up", m=2, n=3),))
WEIGHTS = {0: 5.0, 1: 15.0}  # p = 1/4, 3/4


def test_two_rounds_by_hand() -> None:
    """One layer of 2 x 3, rank 1, s = alpha / r = 2."""
    method = build({"name": "rolora", "rank": 1, "alpha": 2.0})
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, SHAPE, seed=0)
    assert server.tensors["up/left"].tolist() == [[0.0], [0.0]]
    assert method.download_bytes(server, SHAPE, Client(0, 0), since=-1) == 0  # B = 0, and A from the seed

    # Round 0 trains B: B' = [1, 0]/4 + 3 [0, 1]/4.
    first = walked(method, SHAPE, server, {0: {"up/left": [[1], [0]]}, 1: {"up/left": [[0], [1]]}}, WEIGHTS)
    assert first.server.tensors["up/left"].flatten().tolist() == [0.25, 0.75]
    assert torch.equal(first.server.tensors["up/right"], server.tensors["up/right"])
    assert first.updates[0].wire_bytes == 2 * 4  # r m
    assert method.download_bytes(first.server, SHAPE, Client(0, 0), since=0) == 2 * 4  # the new B

    # Round 1 trains A: A' = [4, 0, 0]/4 + 3 [0, 4, 0]/4 = [1, 3, 0].
    returned = {0: {"up/right": [[4, 0, 0]]}, 1: {"up/right": [[0, 4, 0]]}}
    second = walked(method, SHAPE, first.server, returned, WEIGHTS, states=first.states)
    assert second.server.tensors["up/right"].tolist() == [[1.0, 3.0, 0.0]]
    assert second.updates[0].wire_bytes == 3 * 4  # r n
    assert method.download_bytes(second.server, SHAPE, Client(0, 0), since=1) == 3 * 4  # the new A
    for since in (-1, 0):  # a client that has neither: both
        assert method.download_bytes(second.server, SHAPE, Client(0, 0), since) == (2 + 3) * 4

    # s B'A' = 2 [1/4, 3/4]^T [1, 3, 0].
    change = method.model(second.server, SHAPE)["up"].apply(torch.zeros(2, 3))
    assert change.tolist() == [[0.5, 1.5, 0.0], [1.5, 4.5, 0.0]]


def test_round_without_clients_sends_no_factor() -> None:
    """Round 0 trains B, round 1 has nobody, round 2 trains B again: A is the seed's all along."""
    method = build({"name": "rolora", "rank": 1})
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, SHAPE, seed=0)
    returned = {0: {"up/left": [[1], [0]]}}
    for clients, bytes_since in ((returned, {-1: 2 * 4, 0: 2 * 4}), ({}, {-1: 2 * 4, 0: 2 * 4, 1: 0})):
        server = walked(method, SHAPE, server, clients, WEIGHTS).server
        for since, sent in bytes_since.items():
            assert method.download_bytes(server, SHAPE, Client(0, 0), since) == sent
        assert set(method.broadcast(server).tensors) == {"up/left", "up/right"}
    server = walked(method, SHAPE, server, returned, WEIGHTS).server
    assert method.download_bytes(server, SHAPE, Client(0, 0), since=0) == 2 * 4


def test_four_rounds_are_exact_and_keep_one_factor_fixed() -> None:
    tiny = llama()
    method = build({"name": "rolora", "rank": 2, "alpha": 6.0})
    server: ServerState = method.init_server(tiny.weights, tiny.shape, seed=0)
    states = None
    for n, (moving, resting) in enumerate([("left", "right"), ("right", "left")] * 2):
        done = walk(method, tiny, server, clients_data(tiny, 3, seed=10 * n), weights=[1, 2, 5], states=states)
        before, after = method.model(server, tiny.shape), method.model(done.server, tiny.shape)
        for layer in (target.name for target in tiny.shape.targets):
            assert torch.equal(done.server.tensors[f"{layer}/{resting}"], server.tensors[f"{layer}/{resting}"])
            assert not torch.equal(done.server.tensors[f"{layer}/{moving}"], server.tensors[f"{layer}/{moving}"])
            mean = sum(p / 8 * local_change(tiny, server, done, k, layer) for k, p in enumerate([1, 2, 5]))
            assert distance(after[layer].blocks[0].dense() - before[layer].blocks[0].dense(), mean) < 1e-5
        assert [(start.step, dict(start.moments)) for start in done.starts] == [(0, {})] * 3  # also in later rounds
        server, states = done.server, done.states
