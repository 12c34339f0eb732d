"""HetLoRA: padded means weighted by norm, truncation per client, and pruning of a client's rank."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Client, Layer, ModelShape, Tensors
from rayfed_sub.methods import build
from rayfed_sub.methods.hetlora import tail
from tests.helpers.by_hand import factors, walked
from tests.helpers.tiny_models import distance, llama, run_pack, run_reference
from tests.methods.test_protocol import begun, clients_data, walk

SHAPE = ModelShape((Layer("up", m=3, n=2),), (Layer("score", m=1, n=2),))
START = {"up/weight": torch.zeros(3, 2), "score/weight": torch.zeros(1, 2)}


def scored(head: list[float], tensors: Tensors) -> Tensors:
    return {**tensors, "score/weight": torch.tensor([head])}


def test_two_clients_by_hand() -> None:
    """3 x 2, ranks 1 and 2.  p = 1/4, 3/4; ||dW|| = 3 and 1, so q ~ 3/4 and 3/4: one half each."""
    method = build({"name": "hetlora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0})
    server = method.init_server(START, SHAPE, seed=0)
    ends = {
        0: scored([4.0, 0.0], factors("up", [[3.0], [0.0], [0.0]], [[1.0, 0.0]])),
        1: scored([0.0, 4.0], factors("up", [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]])),
    }
    done = walked(method, SHAPE, server, ends, {0: 1.0, 1: 3.0})
    assert [start.scale for start in done.starts.values()] == [1.0, 1.0]  # alpha / r of the server's rank, for both
    assert done.server.tensors["up/left"].tolist() == [[1.5, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert done.server.tensors["up/right"].tolist() == [[0.5, 0.5], [0.5, 0.5]]  # the second row is half a zero
    assert done.server.tensors["score/weight"].tolist() == [[1.0, 3.0]]  # the head by p alone
    # r_k (m + n) = 5 and 10 numbers and the head's 2, both ways.
    assert [update.wire_bytes for update in done.updates.values()] == [28, 48]
    assert [method.download_bytes(done.server, SHAPE, Client(k, 0), since=0) for k in (0, 1)] == [28, 48]
    again = walked(method, SHAPE, done.server, {0: {}, 1: {}}, {0: 1.0, 1: 1.0}, done.states)
    assert again.starts[0].tensors["up/left"].tolist() == [[1.5], [0.5], [0.0]]
    assert again.starts[0].tensors["up/right"].tolist() == [[0.5, 0.5]]
    assert torch.equal(again.starts[1].tensors["up/right"], done.server.tensors["up/right"])


def test_weights_are_p_without_any_change() -> None:
    """All norms zero: A' = (1 [4, 0] + 3 [0, 4]) / 4, and the second row 3/4 of client 1's."""
    method = build({"name": "hetlora", "rank": 2, "client_ranks": [1, 2]})
    server = method.init_server(START, SHAPE, seed=0)
    still = {0: {"up/right": torch.tensor([[4.0, 0.0]])}, 1: {"up/right": torch.tensor([[0.0, 4.0], [4.0, 4.0]])}}
    done = walked(method, SHAPE, server, still, {0: 1.0, 1: 3.0})
    assert done.server.tensors["up/right"].tolist() == [[1.0, 3.0], [3.0, 3.0]]
    assert not done.server.tensors["up/left"].any()


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_unchanged_client_has_no_weight_beside_a_changed_one(order: tuple[int, int]) -> None:
    """Client 1 has a change, client 3 none, in either order."""
    method = build({"name": "hetlora", "rank": 2})
    server = method.init_server(START, SHAPE, seed=0)
    ends = {
        1: factors("up", [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
        3: factors("up", [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [[8.0, 8.0], [8.0, 8.0]]),
    }
    done = walked(method, SHAPE, server, {k: ends[k] for k in order}, {1: 1.0, 3: 5.0})
    for name, tensor in ends[1].items():
        assert torch.equal(done.server.tensors[name], tensor)


def test_client_prunes_a_tail_that_shrank() -> None:
    """gamma 0.99 of rank 2 is 1.98: the tail is the second component.  It begins at 2 * 1 = 2."""
    method = build({"name": "hetlora", "rank": 2})
    right = [[1.0, 0.0], [0.0, 1.0]]
    end = factors("up", [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]], right)
    first = walked(method, SHAPE, method.init_server(START, SHAPE, seed=0), {0: end}, {0: 1.0})
    assert int(first.states[0].tensors["rank"]) == 2  # B began at zero: its norm cannot be smaller
    grown = factors("up", [[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]], right)
    shrunk = factors("up", [[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]], right)
    for end, rank, kept in ((grown, 2, right), (shrunk, 1, [[1.0, 0.0], [0.0, 0.0]])):
        second = walked(method, SHAPE, first.server, {0: end}, {0: 1.0}, first.states)
        assert int(second.states[0].tensors["rank"]) == rank
        assert second.updates[0].wire_bytes == 4 * (rank * 5 + 2)
        assert second.server.tensors["up/right"].tolist() == kept
        assert method.download_bytes(second.server, SHAPE, Client(0, 0), since=1) == 4 * (rank * 5 + 2)
        assert method.download_bytes(second.server, SHAPE, Client(1, 0), since=-1) == 4 * (2 * 5 + 2)
    # It stays at rank 1, and prunes no further: the last component is never a tail.
    less = factors("up", [[1.0], [0.0], [0.0]], [[0.5, 0.0]])
    third = walked(method, SHAPE, second.server, {0: less}, {0: 1.0}, second.states)
    assert third.starts[0].penalty is None
    assert int(third.states[0].tensors["rank"]) == 1
    assert third.server.tensors["up/right"].tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_clients_prune_where_a_pattern_gives_several_ranks_the_same_components() -> None:
    """Rank 8 has 4 components: 7 and 6 have 3, and 5 and 4 have 2, so that below 3 components comes 2."""
    shape = ModelShape((Layer("a.up", m=16, n=16),))
    fields = {"name": "hetlora", "rank": 8, "client_ranks": [7, 6], "rank_pattern": {"up": 4}}
    method, right = build(fields), torch.eye(3, 16)
    server = method.init_server({"a.up/weight": torch.zeros(16, 16)}, shape, seed=0)
    end = {"a.up/left": 2 * torch.eye(16, 3), "a.up/right": right}
    first = walked(method, shape, server, {0: end, 1: end}, {0: 1.0, 1: 1.0})
    ranks = [int(state.tensors["rank"]) for state in first.states.values()]
    assert all(rank <= given for rank, given in zip(ranks, (7, 6), strict=True))
    less = {"a.up/left": torch.eye(16, 3), "a.up/right": right}
    second = walked(method, shape, first.server, {0: less, 1: less}, {0: 1.0, 1: 1.0}, first.states)
    for client in (0, 1):
        assert second.starts[client].penalty is not None
        assert second.starts[client].penalty(second.starts[client].tensors) > 0
        assert second.updates[client].tensors["a.up/left"].shape == (16, 2)
        assert int(second.states[client].tensors["rank"]) < ranks[client]
    one_more = walked(method, shape, second.server, {0: {}, 1: {}}, {0: 1.0, 1: 1.0}, second.states)
    assert one_more.starts[0].tensors["a.up/left"].shape == (16, 2)


def test_gamma_of_one_never_prunes() -> None:
    method = build({"name": "hetlora", "rank": 2, "gamma": 1.0})
    right = [[1.0, 0.0], [0.0, 1.0]]
    end = factors("up", [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]], right)
    first = walked(method, SHAPE, method.init_server(START, SHAPE, seed=0), {0: end}, {0: 1.0})
    less = factors("up", [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]], right)
    second = walked(method, SHAPE, first.server, {0: less}, {0: 1.0}, first.states)
    assert second.starts[0].penalty is None
    assert int(second.states[0].tensors["rank"]) == 2


def test_penalty_by_hand() -> None:
    """Rank 4, gamma 1/2: the tail is components 3 and 4.  ||B_tail|| = |(3, 4)| = 5, ||A_tail|| = 2; times 0.1."""
    shape = ModelShape((Layer("up", m=4, n=4),))
    method = build({"name": "hetlora", "rank": 4, "gamma": 0.5, "penalty": 0.1})
    server = method.init_server({"up/weight": torch.zeros(4, 4)}, shape, seed=0)
    start = method.start_client(method.broadcast(server), None, Client(0, 0), shape)
    assert start.penalty is not None
    left = torch.diag(torch.tensor([7.0, 7.0, 3.0, 4.0])).requires_grad_()
    right = torch.diag(torch.tensor([7.0, 7.0, 2.0, 0.0])).requires_grad_()
    penalty = start.penalty({"up/left": left, "up/right": right})
    assert penalty.item() == pytest.approx(1.0)
    # d/dB = 0.1 * 2 * B_tail / 5, d/dA = 0.1 * 5 * A_tail / 2; nothing before the tail.
    by_left, by_right = torch.autograd.grad(penalty, (left, right))
    torch.testing.assert_close(by_left, torch.diag(torch.tensor([0.0, 0.0, 0.12, 0.16])))
    torch.testing.assert_close(by_right, torch.diag(torch.tensor([0.0, 0.0, 0.5, 0.0])))


def test_penalty_is_trained_and_both_executors_agree() -> None:
    """Ranks 2 and 4 in one pack, large penalties: smaller tails than without, equal to the reference's."""
    tiny, optimizer = llama(), Optimizer(lr=0.01, eps=1e-4)
    fields = {"name": "hetlora", "rank": 4, "client_ranks": [2, 4], "gamma": 0.5}
    free, method = build({**fields, "penalty": 0.0}), build({**fields, "penalty": 50.0})
    server = begun(free, tiny)
    data = clients_data(tiny, 2)
    done, loose, theirs = (
        walk(m, tiny, server, data, weights=[1, 2], optimizer=optimizer, trainer=trainer)
        for m, trainer in ((method, run_pack), (free, run_pack), (method, run_reference))
    )
    for k, rank in enumerate((2, 4)):
        ends = [float(tail(method, walked_.results[k].tensors, tiny.shape, rank // 2)) for walked_ in (done, loose)]
        assert ends[0] < 0.9 * ends[1]
        assert int(done.states[k].tensors["rank"]) == rank // 2
        for name in done.starts[k].trained:
            begin = done.starts[k].tensors[name]
            assert done.results[k].tensors[name].shape == begin.shape
            assert distance(done.results[k].tensors[name] - begin, theirs.results[k].tensors[name] - begin) < 1e-3
    assert [update.tensors[f"{tiny.shape.targets[0].name}/left"].shape[1] for update in done.updates] == [1, 2]
