"""Shared-subspace GaLore by hand, as projected SGD, as GaLore in a given basis, and across a change of basis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Client, Layer, ModelShape, ServerState, Subspace
from rayfed_sub.methods import build
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import moved as moved_by_server
from rayfed_sub.methods.shared_galore import basis
from tests.helpers.by_hand import walked
from tests.helpers.tiny_models import distance, llama, run_pack
from tests.methods.test_protocol import clients_data, effective, walk

TALL, WIDE = Layer("up", m=3, n=2), Layer("down", m=2, n=3)
SHAPE = ModelShape((TALL, WIDE))
WEIGHTS = {0: 5.0, 1: 15.0}  # p = 1/4, 3/4
RETURNED = {
    0: {"up/left": [[4], [0], [0]], "down/right": [[4, 0, 0]]},
    1: {"up/left": [[0], [4], [0]], "down/right": [[0, 4, 0]]},
}


def made(**fields: object) -> Method:
    return build({"name": "shared-galore", "rank": 1, **fields})


def begun(method: Method) -> ServerState:
    return method.init_server({"up/weight": torch.ones(3, 2), "down/weight": torch.ones(2, 3)}, SHAPE, seed=0)


def test_three_rounds_by_hand() -> None:
    """Layers of 3 x 2 (Q at the right) and 2 x 3 (left), rank 1, scale 2, a new basis every 2 rounds."""
    method = made(scale=2.0, refresh_every=2)
    server = begun(method)
    assert set(method.broadcast(server).tensors) == {"up/weight", "down/weight"}
    for n, down in enumerate([3, 3, 6]):
        done = walked(method, SHAPE, server, RETURNED, WEIGHTS)
        # The mean L is [1, 3, 0]: W moves by 2 [1, 3, 0]^T Q, and the left one by 2 Q^T [1, 3, 0].
        Q, P = (basis(0, n // 2, layer, 1) for layer in (TALL, WIDE))
        L = torch.tensor([[1.0, 3.0, 0.0]])
        step = {"up/weight": 2 * L.T @ Q, "down/weight": 2 * P.T @ L}
        for name, change in step.items():
            torch.testing.assert_close(done.server.tensors[name] - server.tensors[name], change)
        assert done.starts[0].tensors["up/right"].tolist() == Q.tolist()
        assert done.starts[0].tensors["down/left"].tolist() == P.T.tolist()
        assert done.updates[0].wire_bytes == (3 + 3) * 4  # r max(m, n) for each
        server = done.server
        # Rounds 0 and 1 share Q, so their sum is one L; round 2 has its own: 2 * 3 numbers, as many as m n.
        assert method.download_bytes(server, SHAPE, Client(0, 0), since=-1) == 2 * down * 4
        assert method.download_bytes(server, SHAPE, Client(0, 0), since=n) == 2 * 3 * 4
    assert method.download_bytes(replace(server, round=9), SHAPE, Client(0, 0), since=0) == 2 * 6 * 4  # never more


def test_rounds_without_clients_are_not_charged() -> None:
    """A new basis every round: of five rounds the first and the last had clients, 3 numbers for each of two layers."""
    method, n = made(refresh_every=1), 3 + 3
    server = begun(method)
    for clients in (RETURNED, {}, {}, {}, RETURNED):
        server = walked(method, SHAPE, server, clients, WEIGHTS).server
    for since, times in ((-1, 2), (0, 2), (1, 1), (4, 1)):
        assert method.download_bytes(server, SHAPE, Client(0, 0), since) == 4 * n * times
    idle = walked(method, SHAPE, server, {}, WEIGHTS).server
    assert method.download_bytes(idle, SHAPE, Client(0, 0), since=5) == 0
    assert set(method.broadcast(idle).tensors) == {"up/weight", "down/weight"}


def test_bases_are_orthonormal_and_differ_by_layer_period_and_seed() -> None:
    layer = Layer("up", m=8, n=6)
    Q = basis(0, 0, layer, 3)
    torch.testing.assert_close(Q @ Q.T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.equal(Q, basis(0, 0, layer, 3))
    for other in (basis(1, 0, layer, 3), basis(0, 1, layer, 3), basis(0, 0, replace(layer, name="down"), 3)):
        assert distance(other, Q) > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_t_agg_of_one_with_sgd_is_projected_large_batch_sgd(scale: float) -> None:
    """The mean of two SGD steps in one shared Q is -lr scale G Q^T Q with the mean gradient G, which dense
    FedAvg shows on the same batches."""
    tiny, lr, sgd = llama(), 0.5, Optimizer(name="sgd")
    shared, dense = build({"name": "shared-galore", "rank": 2, "scale": scale}), build({"name": "fedavg"})
    data = [batches[:1] for batches in clients_data(tiny, 2)]
    ends = []
    for method in (shared, dense):
        server = method.init_server(tiny.weights, tiny.shape, seed=0)
        ends.append(walk(method, tiny, server, data, weights=[1, 3], lr=lr, optimizer=sgd).server.tensors)
    for layer in tiny.shape.targets:
        name, Q = f"{layer.name}/weight", basis(0, 0, layer, 2)
        G = (tiny.weights[name] - ends[1][name]) / lr
        projected = G @ Q.T @ Q if layer.m >= layer.n else Q.T @ Q @ G
        assert distance(ends[0][name] - tiny.weights[name], -lr * scale * projected) < 1e-4


def test_shared_galore_is_galore_in_the_shared_basis() -> None:
    """fedftg's own Start with that Q, from step 1 on (step 0 would refresh) and without a refresh: the same bits."""
    tiny = llama()
    method = build({"name": "shared-galore", "rank": 2, "scale": 0.25})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    start = replace(method.start_client(method.broadcast(server), None, Client(0, 0), tiny.shape), step=1)
    galore = replace(start, subspace=Subspace(2, refresh_every=1000))
    optimizer = Optimizer(weight_decay=0.1, clip_norm=0.5)
    (ours,), (theirs,) = (
        run_pack(tiny, [s], clients_data(tiny, 1), optimizer, lr=0.01, weights=dict(tiny.weights))
        for s in (start, galore)
    )
    assert ours.blocks.keys() == theirs.blocks.keys()
    for layer, (left, right) in ours.blocks.items():
        assert (left @ right).norm() > 1e-3
        assert torch.equal(left, theirs.blocks[layer][0])
        assert torch.equal(right, theirs.blocks[layer][1])
    assert (ours.step, ours.base_scale) == (theirs.step, theirs.base_scale)


def test_period_stays_in_its_subspace_and_two_periods_add_up() -> None:
    """Rank r after any number of rounds of one period, rank 2 r with a second one."""
    tiny = llama()
    method = build({"name": "shared-galore", "rank": 2, "refresh_every": 2})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    for n, rank in enumerate([2, 2, 4, 4]):
        server = walk(method, tiny, server, clients_data(tiny, 3, seed=10 * n), weights=[1, 2, 5]).server
        for layer in tiny.shape.targets:
            change = (effective(method, tiny, server)[layer.name] - tiny.weights[f"{layer.name}/weight"]).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == rank
            if n < 2:
                Q = basis(0, 0, layer, 2).double()
                inside = change @ Q.T @ Q if layer.m >= layer.n else Q.T @ Q @ change
                assert distance(inside, change) < 1e-4


@pytest.mark.parametrize("state", ["keep", "average"])
@pytest.mark.parametrize("rule", ["reset", "rotate", "keep"])
def test_moments_when_the_basis_changes(rule: str, state: str) -> None:
    """Rounds 0 and 1 have one basis, round 2 another.  rotate: m C^T and v (C*C)^T at the right, C m and (C*C) v at the
    left, with C = Q_new Q_old^T; with rank 1 that is one number per layer, c and c^2."""
    method = made(refresh_every=2, moments=rule, optimizer_state=state)
    server, states = begun(method), {}
    up, down = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    left = {"up/left/m1": up, "up/left/m2": up + 10, "down/right/m1": down, "down/right/m2": down + 10}
    starts = []
    for _ in range(3):
        done = walked(method, SHAPE, server, RETURNED, WEIGHTS, states=states, moments=dict.fromkeys((0, 1), left))
        starts.append(done.starts[0])
        server, states = done.server, done.states
    assert not starts[0].moments
    assert {name: m.tolist() for name, m in starts[1].moments.items()} == {name: m.tolist() for name, m in left.items()}
    assert [start.step for start in starts] == [0, 1, 0 if rule == "reset" else 2]
    c, d = (float(basis(0, 1, layer, 1) @ basis(0, 0, layer, 1).T) for layer in (TALL, WIDE))
    expected = {
        "reset": {name: torch.zeros_like(m) for name, m in left.items()},
        "keep": left,
        "rotate": {
            "up/left/m1": c * up,
            "up/left/m2": c**2 * (up + 10),
            "down/right/m1": d * down,
            "down/right/m2": d**2 * (down + 10),
        },
    }[rule]
    assert starts[2].moments.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(starts[2].moments[name], moment)
    if state == "average":  # m1 and m2 of 3 numbers in 2 layers, and the step count, up and down
        assert done.updates[0].wire_bytes == (3 + 3) * 4 + 2 * (3 + 3) * 4 + 8
        assert method.download_bytes(server, SHAPE, Client(0, 0), since=2) == (3 + 3) * 4 + 2 * (3 + 3) * 4 + 8


@pytest.mark.parametrize("rule", ["reset", "rotate", "keep"])
def test_averaged_moments_change_their_basis_in_a_round_without_clients(rule: str) -> None:
    """Round 1, the last one of its basis, has nobody: the moments of round 0 go into the new basis all the same, by c
    and c^2 (rank 1) where they are rotated."""
    method = made(refresh_every=2, moments=rule, optimizer_state="average")
    up = torch.tensor([[1.0], [2.0], [3.0]])
    done = walked(
        method,
        SHAPE,
        begun(method),
        RETURNED,
        WEIGHTS,
        moments={client: {"up/left/m1": up, "up/left/m2": up} for client in WEIGHTS},
    )
    empty = method.aggregate(done.server, method.accumulator(done.server, SHAPE), SHAPE)
    c = float(basis(0, 1, TALL, 1) @ basis(0, 0, TALL, 1).T)
    factors = {"reset": (0.0, 0.0), "rotate": (c, c**2), "keep": (1.0, 1.0)}[rule]
    for role, factor in zip(("m1", "m2"), factors, strict=True):
        torch.testing.assert_close(empty.tensors[f"up/left/{role}"], factor * up)
    assert int(empty.tensors["step"]) == (0 if rule == "reset" else 1)
    assert torch.equal(empty.tensors["up/weight"], done.server.tensors["up/weight"])


def test_rotated_moments_match_the_gradient() -> None:
    """Rank 2: m1 of a constant gradient G is G Q^T; rotated it is G Q^T C^T = G Q^T Q Q_new^T, the part of it that
    remains."""
    shape = ModelShape((Layer("up", m=5, n=4),))
    method = build({"name": "shared-galore", "rank": 2, "refresh_every": 1, "moments": "rotate"})
    server = method.init_server({"up/weight": torch.zeros(5, 4)}, shape, seed=0)
    old, new = (basis(0, period, shape.targets[0], 2) for period in (0, 1))
    G = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    returned = {0: {"up/left": torch.zeros(5, 2)}}
    first = walked(method, shape, server, returned, {0: 1.0}, moments={0: {"up/left/m1": G @ old.T}})
    second = walked(method, shape, first.server, returned, {0: 1.0}, states=first.states)
    torch.testing.assert_close(second.starts[0].moments["up/left/m1"], G @ old.T @ old @ new.T)


def test_server_optimizer_changes_the_weights_alone() -> None:
    tiny = llama()
    method = build({"name": "shared-galore", "rank": 2, "refresh_every": 1, "optimizer_state": "average"})
    server = method.init_server(tiny.weights, tiny.shape, seed=0)
    after = walk(method, tiny, server, clients_data(tiny, 1), weights=[1]).server
    assert method.supports_server_optimizer
    assert any(name.endswith("/m1") for name in after.tensors)  # the averaged moments are stored there too
    assert sorted(moved_by_server(server, after)) == sorted(f"{t.name}/weight" for t in tiny.shape.targets)
