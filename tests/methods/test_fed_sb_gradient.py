"""Fed-SB's gradient start: round 0 by hand, the gradient against autograd, and the pass that moves nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, LocalResult, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.fed_sb_gradient import moving
from tests.helpers.by_hand import changed, walked
from tests.helpers.tiny_models import distance, gpt2, llama, run_pack, run_reference
from tests.methods.test_protocol import OPTIMIZER, clients_data

SHAPE = ModelShape((Layer("up", m=2, n=3),))


def test_two_clients_by_hand() -> None:
    """One layer of 2 x 3, rank 1, s = alpha / r = 2, p = 1/4, 3/4, eta = 1/2, two local steps."""
    method = build({"name": "fed-sb-gradient", "rank": 1, "alpha": 2.0, "start_lr": 0.5})
    server = method.init_server({"up/weight": torch.ones(2, 3)}, SHAPE, seed=0)
    broadcast, total = method.broadcast(server), method.accumulator(server, SHAPE)
    sums = {0: [[8.0, -8.0, 8.0], [0.0, 0.0, 0.0]], 1: [[0.0, 0.0, 0.0], [8.0, -8.0, 8.0]]}
    for client, weight in ((0, 1.0), (1, 3.0)):
        start = method.start_client(broadcast, None, Client(client, 0), SHAPE)
        assert start.trained == ("up/right",)  # the longer side
        memory = {"up/right/gradient": torch.tensor(sums[client])}
        result = LocalResult(client, start.tensors, {}, 2, {}, 1.0, 1, {}, trained=start.trained, memory=memory)
        update = method.upload(broadcast, result, weight, SHAPE)
        assert torch.equal(update.tensors["up/gradient"], torch.tensor(sums[client]) / 2)
        assert update.wire_bytes == 4 * 2 * 3
        assert method.client_state(broadcast, result, SHAPE) == {}
        total = method.accumulate(total, update, SHAPE)
    server = method.aggregate(server, total, SHAPE)
    # Of the mean [[1, -1, 1], [3, -3, 3]] the sign: D = -1/2 [[1, -1, 1], [1, -1, 1]], of rank 1, all of which is kept.
    D = -0.5 * torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]])
    assert torch.allclose(changed(method, SHAPE, server, "up", torch.zeros(2, 3)), D, atol=1e-6)
    assert server.tensors["up/core"].item() == pytest.approx(0.5 * 6**0.5 / 2)  # |D| / s
    # r (m + n + r) = 6 numbers to a client without the factors, then the core alone.
    assert [method.download_bytes(server, SHAPE, Client(0, 0), since) for since in (-1, 0, 1)] == [24, 24, 4]
    done = walked(method, SHAPE, server, {0: {"up/core": [[4.0]]}}, {0: 1.0})
    assert done.server.tensors["up/core"].tolist() == [[4.0]]
    assert torch.equal(done.server.tensors["up/left"], server.tensors["up/left"])


def test_pass_sends_no_head() -> None:
    """Round 0 trains nothing: a head stays what the seed has made it."""
    shape = ModelShape(SHAPE.targets, (Layer("score", 2, 2),))
    method = build({"name": "fed-sb-gradient", "rank": 1})
    server = method.init_server({"up/weight": torch.ones(2, 3), "score/weight": torch.ones(2, 2)}, shape, seed=0)
    broadcast = method.broadcast(server)
    start = method.start_client(broadcast, None, Client(0, 0), shape)
    result = LocalResult(0, start.tensors, {}, 1, {}, 1.0, 1, {}, trained=start.trained, memory=start.memory)
    update = method.upload(broadcast, result, 3.0, shape)
    assert update.wire_bytes == 4 * 2 * 3
    after = method.aggregate(server, method.accumulate(method.accumulator(server, shape), update, shape), shape)
    assert torch.equal(after.tensors["score/weight"], torch.ones(2, 2))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_pass_sends_the_mean_gradient_and_moves_nothing(make: object) -> None:
    tiny, method = make(), build({"name": "fed-sb-gradient", "rank": 2})  # type: ignore[operator]
    broadcast = method.broadcast(method.init_server(tiny.weights, tiny.shape, seed=0))
    start = method.start_client(broadcast, None, Client(0, 0), tiny.shape)
    data = clients_data(tiny, 2)
    both = run_pack(tiny, [start, start], data, OPTIMIZER, lr=0.1)
    (alone,) = run_pack(tiny, [start], data[:1], OPTIMIZER, lr=0.1)
    (theirs,) = run_reference(tiny, [start], data[:1], OPTIMIZER, lr=0.1)
    assert all(torch.equal(both[0].tensors[name], start.tensors[name]) for name in start.trained)
    assert all(torch.equal(both[0].memory[name], alone.memory[name]) for name in start.memory)
    sent = method.upload(broadcast, both[0], 1.0, tiny.shape).tensors
    model = copy.deepcopy(tiny.model).float().requires_grad_()
    for batch in data[0]:
        labels = batch["labels"][:, 1:]
        rows = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**rows).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for layer in tiny.shape.targets:
        stored = model.get_submodule(layer.name)
        full_mn = stored.weight.grad if isinstance(stored, torch.nn.Linear) else stored.weight.grad.T
        assert distance(sent[f"{layer.name}/gradient"], full_mn / len(data[0])) < 1e-4
        name = f"{moving(layer)}/gradient"
        assert distance(theirs.memory[name], both[0].memory[name]) < 1e-4


def test_pass_is_repeated_if_nobody_ended_it() -> None:
    method = build({"name": "fed-sb-gradient", "rank": 1})
    server = method.init_server({"up/weight": torch.ones(2, 3)}, SHAPE, seed=0)
    server = method.aggregate(server, method.accumulator(server, SHAPE), SHAPE)
    assert server.round == 1
    assert method.start_client(method.broadcast(server), None, Client(0, 0), SHAPE).correct is not None
