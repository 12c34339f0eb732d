"""FedSVD by hand, and the invariants of a factorisation."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape, ServerState
from rayfed_sub.methods import build
from rayfed_sub.methods.fedsvd import factorised
from tests.helpers.by_hand import walked

SHAPE = ModelShape((Layer("up", m=2, n=3),))
MOMENTS = {0: {"up/left/m1": torch.ones(2, 1)}, 1: {"up/left/m1": torch.ones(2, 1)}}


def test_two_rounds_of_one_period_by_hand() -> None:
    """One layer of 2 x 3, rank 1, s = alpha / r = 2, A = [0, 2, 0], p = 1/4, 3/4, a factorisation every 2 rounds."""
    method = build({"name": "fedsvd", "rank": 1, "alpha": 2.0, "period": 2})
    server = ServerState(0, {"up/left": torch.zeros(2, 1), "up/right": torch.tensor([[0.0, 2.0, 0.0]])})
    weights = {0: 5.0, 1: 15.0}

    # Round 0: B' = [4, 8]/4 + 3 [0, 0]/4 = [1, 2]; A stays, so the next download is r m numbers.
    first = walked(method, SHAPE, server, {0: {"up/left": [[4], [8]]}, 1: {"up/left": [[0], [0]]}}, weights)
    assert first.server.tensors["up/left"].tolist() == [[1.0], [2.0]]
    assert first.server.tensors["up/right"].tolist() == [[0.0, 2.0, 0.0]]
    assert first.updates[0].wire_bytes == 2 * 4
    assert method.download_bytes(first.server, SHAPE, Client(0, 0), since=0) == 2 * 4

    # Round 1: B' = [12, 16]/4 = [3, 4], B'A = [[0, 6, 0], [0, 8, 0]] = S u v^T, S = 10, u = [.6, .8], v = [0, 1, 0].
    returned = {0: {"up/left": [[12], [16]]}, 1: {"up/left": [[0], [0]]}}
    second = walked(method, SHAPE, first.server, returned, weights, states=first.states, moments=MOMENTS)
    left, right = second.server.tensors["up/left"], second.server.tensors["up/right"]
    sign = right[0, 1].sign()
    torch.testing.assert_close(sign * right, torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(sign * left, torch.tensor([[6.0], [8.0]]))  # all of S is in B
    change = method.model(second.server, SHAPE)["up"].apply(torch.zeros(2, 3))
    torch.testing.assert_close(change, 2 * torch.tensor([[0.0, 6.0, 0.0], [0.0, 8.0, 0.0]]))
    # r (m + n) numbers for a client with the old A; r m for a client of the current period.
    for since in (-1, 0, 1):
        assert method.download_bytes(second.server, SHAPE, Client(0, 0), since) == (2 + 3) * 4
    third = walked(method, SHAPE, second.server, returned, weights)
    assert method.download_bytes(third.server, SHAPE, Client(0, 0), since=2) == 2 * 4


def test_new_basis_resets_kept_moments() -> None:
    method = build({"name": "fedsvd", "rank": 1, "period": 2})
    server = method.init_server({"up/weight": torch.zeros(2, 3)}, SHAPE, seed=0)
    returned, states, early, steps = {0: {"up/left": [[1], [2]]}}, {}, {}, []
    for n in range(5):
        done = walked(method, SHAPE, server, returned, {0: 1.0}, states=states, moments=MOMENTS)
        assert bool(done.starts[0].moments) == bool(done.starts[0].step)
        steps.append(done.starts[0].step)
        server, states = done.server, done.states
        early = done.states if n == 0 else early
    assert steps == [0, 1, 0, 1, 0]  # rounds 2 and 4 begin with another A
    # In round 5: a client of round 4, and one absent since round 0, whose moments belong to the first A.
    for before, step in ((states, 1), (early, 0)):
        assert walked(method, SHAPE, server, returned, {0: 1.0}, states=before).starts[0].step == step


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (5, 7, 3), (6, 6, 6)])
def test_product_is_kept_and_the_rows_are_orthonormal(m: int, n: int, rank: int) -> None:
    rng = torch.Generator().manual_seed(0)
    B, A = torch.randn(m, rank, generator=rng), torch.randn(rank, n, generator=rng)
    left, right = factorised(B, A)
    torch.testing.assert_close(left @ right, B @ A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right @ right.T, torch.eye(rank), atol=1e-6, rtol=0)
    # B = U S: orthogonal columns as long as the singular values, the largest first.
    torch.testing.assert_close(left.T @ left, torch.diag(torch.linalg.svdvals(B @ A)[:rank] ** 2), atol=1e-4, rtol=1e-4)
    # The same product from other factors (A -> M^-1 A, B -> B M) gives the same answer, signs included.
    M = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=rng)
    again = factorised(B @ M, torch.linalg.inv(M) @ A)
    torch.testing.assert_close(again[0], left, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again[1], right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank_of_b", [0, 1])
def test_product_of_lower_rank_still_gives_a_full_basis(rank_of_b: int) -> None:
    """B = 0 before anything is learned, or of rank 1: the rows of A span the rest."""
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(3, 5, generator=rng)
    B = torch.randn(7, rank_of_b, generator=rng) @ torch.randn(rank_of_b, 3, generator=rng)
    left, right = factorised(B, A)
    torch.testing.assert_close(left @ right, B @ A, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right @ right.T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(A @ right.T @ right, A, atol=1e-5, rtol=1e-5)
