"""LoRA-FAIR by hand, and the correction against the objective that it minimises, formed here as (m, n) matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.lora_fair import corrected
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=2),))
RETURNED = {0: {"up/left": [[1], [0]], "up/right": [[1, 0]]}, 1: {"up/left": [[0], [1]], "up/right": [[0, 1]]}}
WEIGHTS = {0: 6.0, 1: 2.0}  # p = 3/4, 1/4


@pytest.mark.parametrize(("penalty", "left"), [(0.0, [63 / 82, 7 / 82]), (1e9, [0.75, 0.25])])
def test_one_round_by_hand(penalty: float, left: list[float]) -> None:
    """B' = A'^T = [3/4, 1/4] and dW = diag(3/4, 1/4).  dW A'^T = [9, 1]/16 is the best direction; of its multiples
    t [9, 1] the nearest to B' has t = (27/4 + 1/4) / (81 + 1) = 7/82.  A large penalty leaves B' as it is."""
    method = build({"name": "lora-fair", "rank": 1, "alpha": 2.0, "penalty": penalty})
    server = method.init_server({"up/weight": torch.zeros(2, 2)}, SHAPE, seed=0)
    done = walked(method, SHAPE, server, RETURNED, WEIGHTS)
    torch.testing.assert_close(done.server.tensors["up/right"], torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(done.server.tensors["up/left"].flatten(), torch.tensor(left))
    assert set(done.server.tensors) == {"up/left", "up/right"}
    assert done.updates[0].wire_bytes == (2 + 2) * 4
    assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == (2 + 2) * 4
    # cos before: 28 / (10 sqrt 10) = 0.885; after: |dW a| / |dW| with a = A'/|A'|, sqrt(82) / 10 = 0.906.
    change = method.model(done.server, SHAPE)["up"].apply(torch.zeros(2, 2))
    expected = 82**0.5 / 10 if penalty == 0 else 28 / (10 * 10**0.5)
    assert cosine(torch.diag(torch.tensor([0.75, 0.25])), change) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("lefts", "rights", "mean"),
    [
        (([[0], [0]], [[0], [0]]), ([[1, 0]], [[0, 1]]), [0.0, 0.0]),  # dW = 0, as before anything is learned
        (([[4], [0]], [[-12], [0]]), ([[1, 1]], [[1, 1]]), [0.0, 0.0]),  # dW = 0: the clients cancel
        (([[4], [0]], [[-12], [0]]), ([[1, 0]], [[0, 1]]), [0.0, 0.0]),  # B' = 0: no multiple of it is near dW
        (([[1], [2]], [[1], [2]]), ([[1, 0]], [[-3, 0]]), [1.0, 2.0]),  # A' = 0
    ],
)
def test_no_direction_gives_no_correction(lefts, rights, mean) -> None:  # type: ignore[no-untyped-def]
    method = build({"name": "lora-fair", "rank": 1})
    server = method.init_server({"up/weight": torch.zeros(2, 2)}, SHAPE, seed=0)
    returned = {k: {"up/left": lefts[k], "up/right": rights[k]} for k in (0, 1)}
    done = walked(method, SHAPE, server, returned, WEIGHTS)
    torch.testing.assert_close(done.server.tensors["up/left"].flatten(), torch.tensor(mean), atol=1e-6, rtol=0)


def cosine(X: Tensor, Y: Tensor) -> float:
    return float((X.double() * Y.double()).sum() / (X.double().norm() * Y.double().norm()))


def cohort(size: float, m: int = 12, n: int = 9, rank: int = 3) -> tuple[Tensor, ...]:
    """B' (m, r), A' (r, n) and the stacks of 4 clients, p = (1, 2, 3, 4) / 10, whose B has entries of about `size`."""
    rng = torch.Generator().manual_seed(3)
    B = [size * torch.randn(m, rank, generator=rng) for _ in range(4)]
    A = [torch.randn(rank, n, generator=rng) for _ in range(4)]
    p = [0.1, 0.2, 0.3, 0.4]
    means = [sum(w * x for w, x in zip(p, xs, strict=True)) for xs in (B, A)]
    return *means, torch.cat([w * x for w, x in zip(p, B, strict=True)], dim=1), torch.cat(A)


def objective(X: Tensor, B: Tensor, A: Tensor, L: Tensor, R: Tensor, penalty: float) -> Tensor:
    """The paper's formula, with (m, n) matrices."""
    dW, change = L.double() @ R.double(), X.double() @ A.double()
    return 1 - (dW * change).sum() / (dW.norm() * change.norm()) + penalty * (X.double() - B.double()).square().sum()


@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.parametrize("penalty", [0.0, 0.01, 1.0, 100.0])
def test_objective_falls_to_a_stationary_point(penalty: float, size: float) -> None:
    stacks = cohort(size)
    X = corrected(*stacks, penalty)
    at = {}
    for name, point in (("before", stacks[0]), ("after", X)):
        leaf = point.double().requires_grad_()
        value = objective(leaf, *stacks, penalty)
        (slope,) = torch.autograd.grad(value, leaf)
        at[name] = value.item(), slope.norm().item()
    assert at["after"][0] < at["before"][0]
    assert at["after"][1] < 1e-3 * at["before"][1]  # X is float32
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):  # and a minimum: every neighbour is higher
        near = X + 0.1 * X.norm() * torch.nn.functional.normalize(torch.randn(X.shape, generator=rng), dim=None)
        assert objective(near, *stacks, penalty) > at["after"][0]


def test_cosine_without_penalty_is_the_best_in_the_row_space() -> None:
    """X A' = dW A'^+ A' is the projection of dW on the rows of A': cos = |dW Q| / |dW|, Q an orthonormal basis."""
    stacks = cohort(1.0)
    _, A, L, R = stacks
    dW, Q = L.double() @ R.double(), torch.linalg.qr(A.double().T).Q
    best = float((dW @ Q).norm() / dW.norm())
    reached = [cosine(dW, corrected(*stacks, penalty) @ A) for penalty in (10.0, 1.0, 0.1, 1e-3, 0.0)]
    assert reached == sorted(reached)
    assert best - reached[0] > 1e-3
    assert best - reached[-2] < 1e-4
    assert best - reached[-1] < 1e-9


def test_one_client_needs_no_correction() -> None:
    """cos = 1 from the start."""
    rng = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 2, generator=rng), torch.randn(2, 5, generator=rng)
    torch.testing.assert_close(corrected(B, A, B, A, 0.01), B, atol=1e-6, rtol=1e-6)


def test_mean_change_of_rounding_error_gives_no_direction() -> None:
    """Two clients that cancel, B A and -B A: in floating point the rest of dW is noise, not zero."""
    rng = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 2, generator=rng), torch.randn(2, 5, generator=rng)
    mean = torch.randn(6, 2, generator=rng)
    assert torch.equal(corrected(mean, A, torch.cat([B, -B], dim=1), torch.cat([A, A]), 0.01), mean)
