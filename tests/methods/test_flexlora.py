"""FlexLoRA: the truncated mean is the best one, and clients of any rank get their part of it."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.lowrank import signed, truncated
from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from tests.helpers.by_hand import changed, factors, walked
from tests.helpers.tiny_models import distance


def column(m: int, **entries: float) -> list[float]:
    """A vector of m numbers: column(3, e2=5.0) is [0, 5, 0]."""
    return [entries.get(f"e{i + 1}", 0.0) for i in range(m)]


def test_two_clients_by_hand() -> None:
    """6 x 5, ranks 1 and 2, alpha 2: s = 2 and 1, and 1 at the server.  p = 1/4, 3/4."""
    shape, W = ModelShape((Layer("up", m=6, n=5),)), torch.zeros(6, 5)
    method = build({"name": "flexlora", "rank": 2, "client_ranks": [1, 2], "alpha": 2.0})
    server = method.init_server({"up/weight": W}, shape, seed=0)
    left = torch.tensor([column(6, e2=4.0), column(6, e3=8.0)]).T.tolist()
    ends = {
        0: factors("up", [[x] for x in column(6, e1=4.0)], [column(5, e1=1.0)]),
        1: factors("up", left, [column(5, e2=1.0), column(5, e3=1.0)]),
    }
    done = walked(method, shape, server, ends, {0: 1.0, 1: 3.0})
    # s B A: 2 * 4 = 8 at (1, 1), times 1/4 is 2; 4 at (2, 2) and 8 at (3, 3), times 3/4 are 3 and 6.  The 2 is dropped.
    kept = torch.diag(torch.tensor(column(6, e2=3.0, e3=6.0)))[:, :5]
    torch.testing.assert_close(changed(method, shape, done.server, "up", W), kept)
    assert [update.wire_bytes for update in done.updates.values()] == [11 * 4, 22 * 4]
    # Client 0 gets the largest, 6 = s B A with s = 2, so B A = 3, all of it in B; client 1 gets 6 and 3.
    again = walked(method, shape, done.server, {0: {}, 1: {}}, {0: 1.0, 1: 1.0}, done.states)
    B, A = (again.starts[0].tensors[f"up/{role}"] for role in ("left", "right"))
    torch.testing.assert_close(B @ A, torch.diag(torch.tensor(column(6, e3=3.0)))[:, :5])
    torch.testing.assert_close((B.norm(), A.norm()), (torch.tensor(3.0), torch.tensor(1.0)))
    B, A = (again.starts[1].tensors[f"up/{role}"] for role in ("left", "right"))
    torch.testing.assert_close(again.starts[1].scale * B @ A, kept)
    assert [method.download_bytes(done.server, shape, Client(k, 0), since=0) for k in (0, 1, 2)] == [44, 88, 44]
    # No training: the mean of diag(0, 0, 6) and diag(0, 3, 6) has lost half of the 3.
    lost = torch.diag(torch.tensor(column(6, e2=1.5, e3=6.0)))[:, :5]
    torch.testing.assert_close(changed(method, shape, again.server, "up", W), lost)


def test_two_orthogonal_directions_cannot_both_be_kept() -> None:
    """The mean of e1 e1^T and e2 e2^T is diag(1/2, 1/2); at rank 1 its error is exactly 1/2."""
    shape, W = ModelShape((Layer("up", m=2, n=2),)), torch.zeros(2, 2)
    method = build({"name": "flexlora", "rank": 1, "alpha": 1.0})
    server = method.init_server({"up/weight": W}, shape, seed=0)
    ends = {k: factors("up", [[1.0 - k], [float(k)]], [[1.0 - k, float(k)]]) for k in (0, 1)}
    done = walked(method, shape, server, ends, {0: 1.0, 1: 1.0})
    gap = changed(method, shape, done.server, "up", W) - torch.diag(torch.tensor([0.5, 0.5]))
    assert float(gap.norm()) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("clients", "form"), [(4, "left"), (8, "weight")])
def test_truncation_is_the_best_approximation(clients: int, form: str) -> None:
    """On 40 x 30 at rank 3: stacks of 4 * 3 * 70 = 840 numbers stay stacks, 8 * 3 * 70 = 1,680 > 1,200 do not. The
    result is that of the dense mean's SVD, and A -> M^-1 A, B -> B M do not change it."""
    shape, rng = ModelShape((Layer("up", m=40, n=30),)), torch.Generator().manual_seed(0)
    method = build({"name": "flexlora", "rank": 3, "alpha": 6.0})  # s = 2
    server = method.init_server({"up/weight": torch.zeros(40, 30)}, shape, seed=0)
    B, A, M = (torch.randn(clients, *size, generator=rng) for size in ((40, 3), (3, 30), (3, 3)))
    M = M + 4 * torch.eye(3)  # well away from singular
    weights = {k: k + 1.0 for k in range(clients)}
    mean = sum(weights[k] * 2 * B[k].double() @ A[k].double() for k in weights) / sum(weights.values())
    sigma = torch.linalg.svdvals(mean)
    results = []
    for lefts, rights in ((B, A), (B @ M, torch.linalg.inv(M) @ A)):
        total = method.accumulator(server, shape)
        ends = {k: {"up/left": lefts[k], "up/right": rights[k]} for k in weights}
        done = walked(method, shape, server, ends, weights)
        for update in done.updates.values():
            total = method.accumulate(total, update, shape)
        assert f"up/{form}" in total.tensors
        change = changed(method, shape, done.server, "up", torch.zeros(40, 30)).double()
        torch.testing.assert_close((change - mean).norm(), sigma[3:].square().sum().sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            2 * done.server.tensors["up/left"].norm(dim=0).double(), sigma[:3], rtol=1e-5, atol=0
        )
        results.append(done.server.tensors)
    assert distance(results[0]["up/left"], results[1]["up/left"]) < 1e-4  # including signs
    assert distance(results[0]["up/right"], results[1]["up/right"]) < 1e-4


def test_truncation_of_narrow_and_zero_factors() -> None:
    left, right = truncated(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]), rank=2)
    assert (left.shape, right.shape) == ((2, 1), (1, 3))
    torch.testing.assert_close(left @ right, torch.tensor([[0.0, 6.0, 0.0], [0.0, 8.0, 0.0]]))
    left, right = truncated(torch.zeros(4, 2), torch.zeros(2, 3), rank=2)
    assert not left.any()
    assert torch.isfinite(right).all()


def test_equal_products_have_equal_signs() -> None:
    """A library may flip any pair of singular vectors; a fixed reference vector decides."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(10):
        _, right = truncated(torch.randn(5, 3, generator=rng), torch.randn(3, 4, generator=rng), rank=3)
        assert torch.equal(signed(right, None), right)


def test_spare_components_stay_trainable() -> None:
    """Only the client of rank 1 took part: the server's other components keep B = 0 and their A."""
    shape = ModelShape((Layer("up", m=6, n=5),))
    method = build({"name": "flexlora", "rank": 3, "client_ranks": [1, 3]})
    server = method.init_server({"up/weight": torch.zeros(6, 5)}, shape, seed=0)
    end = factors("up", [[x] for x in column(6, e1=4.0)], [column(5, e1=1.0)])
    done = walked(method, shape, server, {0: end}, {0: 1.0})
    assert not done.server.tensors["up/left"][:, 1:].any()
    assert torch.equal(done.server.tensors["up/right"][1:], server.tensors["up/right"][1:])
    assert (done.server.tensors["up/right"].norm(dim=1) > 0.1).all()
