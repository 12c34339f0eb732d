"""Products and closed blocks of many clients."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.training.blocks import Closed, add_product, multiplied


@pytest.mark.parametrize("size", [(1, 5, 7), (7, 5, 1), (1, 5, 1), (24, 1, 16), (56, 1, 24), (4, 9, 6)])
def test_client_s_product_has_the_same_bits_beside_others(size: tuple[int, int, int]) -> None:
    i, j, k = size
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, i, j, generator=rng), torch.randn(5, j, k, generator=rng)
    y = torch.randn(5, i, k, generator=rng)
    together, added = multiplied(a, b), y.clone()
    torch.testing.assert_close(together, torch.bmm(a, b))
    add_product(added, a, b)
    torch.testing.assert_close(added, y + together)
    for g in range(5):
        one = slice(g, g + 1)
        alone = y[one].clone()
        add_product(alone, a[one].clone(), b[one].clone())
        assert torch.equal(multiplied(a[one].clone(), b[one].clone()), together[one])
        assert torch.equal(alone, added[one])


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (5, 5)])
def test_closed_blocks_keep_the_sum_of_their_products(m: int, n: int) -> None:
    """Client 0 closes rank 2 three times (6 > 5: folded), client 1 once, client 2 never."""
    rng = torch.Generator().manual_seed(0)
    closed, dense = Closed(), torch.zeros(3, m, n)
    for closing in ((True, False, False), (True, True, False), (True, False, False)):
        left, right = torch.randn(3, m, 2, generator=rng), torch.randn(3, 2, n, generator=rng)
        closed.close(left, right, torch.tensor([0.5, 2.0, 1.0]), closing)
        closed.decay(0.9)
        for g, (closes, scale) in enumerate(zip(closing, (0.5, 2.0, 1.0), strict=True)):
            dense[g] = 0.9 * (dense[g] + closes * scale * left[g] @ right[g])
    assert closed.left_GmR is not None
    assert closed.right_GRn is not None
    assert torch.allclose(torch.bmm(closed.left_GmR, closed.right_GRn), dense, atol=1e-6)
    assert closed.used_G == [5, 2, 0]
    assert list(closed.alike()) == [(0, 1), (1, 2), (2, 3)]
    assert closed.between(2, 3) is None
    left_1, right_1 = closed.between(1, 2) or pytest.fail("client 1 has a closed block")
    assert left_1.shape == (1, m, 2)
    torch.testing.assert_close(left_1[0] @ right_1[0], dense[1])
    some = closed.some([1], torch.tensor([1]))
    torch.testing.assert_close(some.of(0)[0] @ some.of(0)[1], dense[1])
    assert some.of(0)[0].shape == (m, 2)
