"""The rank of the server's change: by hand, from factors, from a sketch and from the full matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayfed_sub.core.types import Block, Change
from rayfed_sub.diagnostics import server_change as module
from rayfed_sub.diagnostics.server_change import (
    ServerChange,
    add_ranks,
    change_rank,
    moved_rank,
    sent_rank,
    server_change,
)


def directions(size: int, count: int, seed: int) -> Tensor:
    """Orthonormal columns (size, count)."""
    draw = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def product(m: int, n: int, sigma: list[float], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Factors of a matrix with these singular values, float32."""
    k = len(sigma)
    left, right = directions(m, k, seed), directions(n, k, seed + 1).T
    return (left * torch.tensor(sigma)).float(), right.float().contiguous()


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the matrices whose eigenvalues were counted."""
    seen, real = list[tuple[int, ...]](), torch.linalg.ldl_factor

    def watched(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(matrix.shape))
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "ldl_factor", watched)
    return seen


@pytest.mark.parametrize(("m", "n"), [(400, 300), (300, 400)])
def test_dense_change_is_sketched(m: int, n: int, whole: list[tuple[int, ...]]) -> None:
    """Singular values 10^0 to 10^-4 in even steps, 12 of them, all above rounding: |W| is 0.1 at most, so the threshold
    is at most 2 * 1.2e-7 * 0.1 * (20 + 17.4) = 9e-7."""
    left, right = product(m, n, torch.logspace(0, -4, 12).tolist())
    before = weight(m, n)
    after = before + left @ right
    assert change_rank(before, after, expected=12) == 12
    assert change_rank(before, after, expected=40) == 12  # clients that share directions
    assert whole == []
    assert change_rank(before, after) == 12
    assert whole == [(300, 300)]


def test_part_of_a_sum_has_its_rank(whole: list[tuple[int, ...]]) -> None:
    """A part of 1.25 * 12 + 16 rows and columns; where clients share directions, a sketch."""
    left, right = product(400, 300, torch.logspace(0, -4, 12).tolist())
    before = weight(400, 300)
    after = before + left @ right
    assert change_rank(before, after, expected=12, sums=True) == 12
    assert change_rank(before, after, expected=40, sums=True) == 12
    assert whole == [(31, 31), (66, 66)]


def test_small_decay_is_no_sum() -> None:
    """Every direction moves by little more than rounding, which a part does not show beside the blocks."""
    left, right = product(400, 300, [1.0, 0.5])
    before = weight(400, 300)
    after = (1 - 3e-6) * before + left @ right
    assert change_rank(before, after, expected=2) == change_rank(before, after) > 2


def test_a_part_that_lacks_a_direction_is_not_believed(whole: list[tuple[int, ...]]) -> None:
    """Of two directions one moves a single entry, in a row that the part of 1.25 * 2 + 16 rows has not."""
    left, right = product(400, 300, [1.0])
    before = weight(400, 300)
    after = before + left @ right
    after[1, 1] += 1.0  # of rows 0, 22, 44, ...
    assert change_rank(before, after, expected=2, sums=True) == 2
    assert whole == [(18, 18)]  # a sketch did the rest


@pytest.mark.parametrize("rank", [0, 1, 7, 30])
def test_inertia_counts_singular_values(rank: int) -> None:
    """Against LAPACK's singular values, thresholds between them, whose squares float64 tells apart."""
    left, right = product(40, 30, [1.5**-i for i in range(rank)]) if rank else product(40, 30, [0.0])
    matrix = left.double() @ right.double()
    for kept in range(rank + 1):
        cut = 1.5**-kept * 1.2
        assert module._above(matrix, cut) == int((torch.linalg.svdvals(matrix) > cut).sum()) == kept


def test_rank_above_the_sketch_uses_the_full_matrix(whole: list[tuple[int, ...]]) -> None:
    """Rank 30 where 12 were expected: all 28 columns are above the threshold.  Weight decay: every direction moves."""
    left, right = product(400, 300, [1.0] * 30)
    before = weight(400, 300)
    assert change_rank(before, before + left @ right, expected=12) == 30
    assert change_rank(before, 0.99 * before, expected=12) == 300
    assert whole == [(300, 300)] * 2


def test_direction_below_rounding_does_not_count() -> None:
    """1 and 1e-3 count; 1e-8 is below half a unit in the last place of weights of 0.02 and more."""
    left, right = product(400, 300, [1.0, 1e-3, 1e-8])
    before = weight(400, 300)
    for expected in (None, 3):
        assert change_rank(before, before + left @ right, expected) == 2
    change = Change(blocks=(Block(left, right),))
    assert moved_rank(Change(), change, before, change.apply(before)) == 2
    assert change_rank(before, before.clone(), 3) == 0


def test_rank_of_blocks_follows_from_their_factors(
    whole: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B A before, B' A after with one A of rank 2: rank 2, not 4.  With another A: 4.  A core of rank 1 between fixed
    outer factors: 1.  Nothing before: 2; the same before and after: 0."""
    monkeypatch.setattr(module, "change_rank", None)
    W = weight(40, 30)
    (B, A), (B_new, A_new) = product(40, 30, [1.0, 0.5], seed=1), product(40, 30, [0.7, 0.6], seed=5)
    core = torch.tensor([[1.0, 2.0], [2.0, 4.0]])

    def rank(before: Change, after: Change) -> int:
        return moved_rank(before, after, W, after.apply(W))

    old = Change(blocks=(Block(B, A, 2.0),))
    assert rank(old, Change(blocks=(Block(B_new, A, 2.0),))) == 2
    assert rank(old, Change(blocks=(Block(B_new, A_new, 2.0),))) == 4
    assert rank(Change(blocks=(Block(B, A, 2.0, torch.zeros(2, 2)),)), Change(blocks=(Block(B, A, 2.0, core),))) == 1
    assert rank(Change(), old) == 2
    assert rank(old, old) == 0
    assert rank(Change(), Change()) == 0
    assert whole == []


def test_blocks_over_a_dense_weight_and_over_another_multiple_of_it() -> None:
    """FedEx-LoRA's model: the weight absorbs the residual.  diag(1, 2, 0) -> diag(1, 2, 3) beside one block."""
    unit, W = torch.eye(3), torch.zeros(3, 3)
    block = Block(unit[:, :1], unit[:1])
    before = Change(dense=torch.diag(torch.tensor([1.0, 2.0, 0.0])))
    after = Change(dense=torch.diag(torch.tensor([1.0, 2.0, 3.0])), blocks=(block,))
    assert moved_rank(before, after, W, after.apply(W)) == 2
    shrunk = Change(base_scale=0.5)
    assert moved_rank(Change(), shrunk, unit, shrunk.apply(unit)) == 3


def test_the_rank_of_factors_in_an_update() -> None:
    """Both factors, one alone (a shared basis), the matrix itself, a core, and another layer's."""
    tensors = {"a/left": torch.zeros(6, 2), "a/right": torch.zeros(2, 4), "b/right": torch.zeros(3, 4)}
    tensors |= {"c/weight": torch.zeros(6, 4), "d/core": torch.zeros(2, 2), "e/left": torch.zeros(6, 5)}
    assert [sent_rank(tensors, name) for name in "abcdef"] == [2, 3, None, None, 5, None]


def test_ranks_add_up_until_an_update_has_no_rank() -> None:
    factors = {"a/left": torch.zeros(6, 2), "b/right": torch.zeros(3, 4)}
    once = add_ranks({"a": 0, "b": 0}, factors)
    assert once == {"a": 2, "b": 3}
    assert add_ranks(once, {"a/left": torch.zeros(6, 5)}) == {"a": 7, "b": None}
    assert add_ranks({"b": None}, factors) == {"b": None}


def test_dense_change_of_unknown_rank_waits_for_an_evaluation() -> None:
    W = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    dense = Change(dense=W + torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert server_change(Change(), dense, W, None, dense=False) is None
    for found in (
        server_change(Change(), dense, W, None, dense=True),
        server_change(Change(), dense, W, 1, dense=False),
    ):
        assert found == ServerChange(1, pytest.approx(0.2))  # |W| = 5, one away from it
