"""FedSub by hand, and against the rule as published: duals in units of B."""

from __future__ import annotations

import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Client, ClientState, Layer, LocalResult, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.fedsub import basis
from tests.helpers.by_hand import changed
from tests.helpers.tiny_models import llama
from tests.methods.test_protocol import clients_data, walk

UP = Layer("up", m=2, n=3)
SHAPE = ModelShape((UP,))


def test_two_clients_by_hand() -> None:
    """One layer of 2 x 3, rank 1, p = 1/4, 3/4, two local steps, a basis for two rounds: P = +-e_j."""
    method = build({"name": "fedsub", "rank": 1, "refresh_every": 2})
    server = method.init_server({"up/weight": torch.ones(2, 3)}, SHAPE, seed=0)
    ends = {0: ([[8.0], [0.0]], [[4.0], [0.0]]), 1: ([[0.0], [4.0]], [[0.0], [8.0]])}  # B, and the gradients' sum
    broadcast, total, states = method.broadcast(server), method.accumulator(server, SHAPE), {}
    for k, weight in ((0, 1.0), (1, 3.0)):
        start = method.start_client(broadcast, None, Client(k, 0), SHAPE)
        assert not start.memory["up/left/dual"].any()
        tensors = {**start.tensors, "up/left": torch.tensor(ends[k][0])}
        memory = {**start.memory, "up/left/sum": torch.tensor(ends[k][1])}
        result = LocalResult(k, tensors, {}, 2, {}, 1.0, 1, {}, trained=start.trained, memory=memory)
        update = method.upload(broadcast, result, weight, SHAPE)
        assert update.wire_bytes == 2 * 2 * 4  # 2 r m
        states[k] = ClientState(1, 2, 2, method.client_state(broadcast, result, SHAPE))
        total = method.accumulate(total, update, SHAPE)
    server = method.aggregate(server, total, SHAPE)
    P = basis("coordinate", 0, 0, UP, 1)
    # Bbar = (8, 0) / 4 + 3 (0, 4) / 4 = (2, 3); c = (2, 0) / 4 + 3 (0, 4) / 4 = (0.5, 3).
    change = changed(method, SHAPE, server, "up", torch.ones(2, 3))
    assert torch.equal(change, torch.tensor([[2.0], [3.0]]) @ P)
    assert server.tensors["up/dual"].flatten().tolist() == [0.5, 3.0]
    # Round 1 has the same basis: y_0 = c - c_0 = (0.5, 3) - (2, 0), y_1 = (0.5, 3) - (0, 4); p y is zero in the mean.
    duals = {k: method.start_client(method.broadcast(server), states[k], Client(k, 0), SHAPE) for k in states}
    assert duals[0].memory["up/left/dual"].flatten().tolist() == [-1.5, 3.0]
    assert duals[1].memory["up/left/dual"].flatten().tolist() == [0.5, -1.0]
    assert not method.start_client(method.broadcast(server), None, Client(2, 0), SHAPE).memory["up/left/dual"].any()
    # Round 2 has another: y P P'^T.
    server = method.aggregate(server, method.accumulator(server, SHAPE), SHAPE)
    moved = method.start_client(method.broadcast(server), states[0], Client(0, 0), SHAPE).memory["up/left/dual"]
    assert torch.equal(moved, torch.tensor([[-1.5], [3.0]]) @ P @ basis("coordinate", 0, 1, UP, 1).T)
    # Round 0 in one B of r m numbers, and c; round 1 had nobody.
    assert [method.download_bytes(server, SHAPE, Client(0, 0), since) for since in (-1, 0, 1)] == [16, 16, 0]


def test_it_is_the_published_rule_with_sgd_and_all_clients() -> None:
    """Three rounds: lambda <- (lambda + B - Bbar) P P'^T, and steps along g + lambda / (lr tau)."""
    tiny, lr, p = llama(), 0.1, [0.25, 0.75]
    method = build({"name": "fedsub", "rank": 4, "projector": "spherical"})
    server, states = method.init_server(tiny.weights, tiny.shape, seed=0), None
    lambdas = [{t.name: torch.zeros(t.m, 4) for t in tiny.shape.targets} for _ in p]
    for n in range(3):
        data = clients_data(tiny, 2, seed=10 * n)
        done = walk(method, tiny, server, data, weights=[1, 3], states=states, lr=lr, optimizer=Optimizer(name="sgd"))
        for layer in tiny.shape.targets:
            B = [result.tensors[f"{layer.name}/left"] for result in done.results]
            mean = p[0] * B[0] + p[1] * B[1]
            turn = basis("spherical", 0, n, layer, 4) @ basis("spherical", 0, n + 1, layer, 4).T
            for k in (0, 1):
                dual = done.starts[k].memory[f"{layer.name}/left/dual"]
                assert torch.allclose(dual, lambdas[k][layer.name] / (lr * len(data[k])), atol=1e-5)
                lambdas[k][layer.name] = (lambdas[k][layer.name] + B[k] - mean) @ turn
        assert any(x.abs().max() > 1e-4 for x in lambdas[0].values())
        server, states = done.server, done.states


def test_bases_are_rows_of_the_unit_matrix_or_scaled_orthonormal_ones() -> None:
    layer = Layer("up", 4, 8)
    unit = basis("coordinate", 0, 0, layer, 3)
    assert torch.equal(unit @ unit.T, torch.eye(3))
    assert torch.equal(unit.abs().sum(1), torch.ones(3))
    sphere = basis("spherical", 0, 0, layer, 2)
    assert torch.allclose(sphere @ sphere.T, 4 * torch.eye(2), atol=1e-5)
