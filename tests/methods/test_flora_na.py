"""FLoRA-NA by hand, and the fitted weights against the dense objective."""

from __future__ import annotations

import pytest
import torch

from rayfed_sub.core.types import Client, Layer, ModelShape
from rayfed_sub.methods import build
from rayfed_sub.methods.flora_na import fitted
from tests.helpers.by_hand import changed, walked

SHAPE = ModelShape((Layer("up", m=2, n=2),))
W = torch.zeros(2, 2)


def test_one_round_by_hand() -> None:
    """B_0 A_0 = 3 e0 e0^T and B_1 A_1 = 3 e0 e1^T: of rank 1 together, dW = (2, 1), which B' = P_0 + 3 P_1 times A' =
    (3 Q_0, Q_1) reaches, while FedIT's B'A' = (5/3)(2, 1/3) does not."""
    ends = {0: {"up/left": [[1], [0]], "up/right": [[3, 0]]}, 1: {"up/left": [[3], [0]], "up/right": [[0, 1]]}}
    weights, dW = {0: 2.0, 1: 1.0}, torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    changes = {}
    for name in ("flora-na", "fedit"):
        method = build({"name": name, "rank": 1, "alpha": 1.0})
        server = method.init_server({"up/weight": W}, SHAPE, seed=0)
        done = walked(method, SHAPE, server, ends, weights)
        changes[name] = changed(method, SHAPE, done.server, "up", W)
        assert done.updates[0].wire_bytes == 4 * 4
        assert method.download_bytes(done.server, SHAPE, Client(0, 0), since=0) == 4 * 4
        assert set(done.server.tensors) == {"up/left", "up/right"}
    torch.testing.assert_close(changes["flora-na"], dW)
    torch.testing.assert_close(changes["fedit"], torch.tensor([[10 / 3, 5 / 9], [0, 0]]))


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_weights_are_a_stationary_point_below_fedit(clients: int) -> None:
    rng = torch.Generator().manual_seed(0)
    B, A = torch.randn(clients, 7, 2, generator=rng), torch.randn(clients, 2, 6, generator=rng)
    p = torch.arange(1.0, clients + 1) / (clients * (clients + 1) / 2)
    L, R = torch.cat([w * x for w, x in zip(p, B, strict=True)], dim=1), torch.cat([*A])
    left, right = fitted(L, R, p)
    dW = (L @ R).double()
    plain = sum(w * x for w, x in zip(p, B, strict=True)) @ sum(w * x for w, x in zip(p, A, strict=True))
    assert torch.dist(left.double() @ right.double(), dW) <= torch.dist(plain.double(), dW) + 1e-6
    # The weights, from the factors, which are independent; the objective's slope there is zero.
    P = torch.linalg.lstsq(B.flatten(1).T.double(), left.double().flatten()).solution.requires_grad_()
    Q = torch.linalg.lstsq(A.flatten(1).T.double(), right.double().flatten()).solution.requires_grad_()
    fit = torch.einsum("k,kmr->mr", P, B.double()) @ torch.einsum("k,krn->rn", Q, A.double())
    slopes = torch.autograd.grad((fit - dW).square().sum(), (P, Q))
    assert max(float(x.abs().max()) for x in slopes) < 1e-3 * float(dW.square().sum())


def test_clients_that_cannot_be_told_apart_keep_their_weights() -> None:
    """B = 0 in all, as before anything is learned, and two clients that are the same one."""
    rng = torch.Generator().manual_seed(0)
    B, A, p = torch.randn(3, 2, generator=rng), torch.randn(2, 4, generator=rng), torch.tensor([0.25, 0.75])
    left, right = fitted(torch.cat([0.25 * B, 0.75 * B], dim=1), torch.cat([A, A]), p)
    torch.testing.assert_close((left, right), (B, A))
    left, right = fitted(torch.zeros(3, 4), torch.cat([A, 3 * A]), p)
    torch.testing.assert_close((left, right), (torch.zeros(3, 2), 2.5 * A))
