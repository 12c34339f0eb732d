"""A bfloat16 backbone costs nothing of what is learned: every method's small change gains what it gains in float32.

The weights lie on bfloat16's grid, as pretrained ones do, where two neighbours are 2^-8 to 2^-7 of a number apart.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Change
from rayfed_sub.methods import METHODS, build
from rayfed_sub.methods.protocol import Method
from rayfed_sub.training.blocks import Closed
from rayfed_sub.training.inference import global_model
from rayfed_sub.training.layers import Bound, PackLinear, Terms, based_on, bound
from rayfed_sub.training.losses import predicted
from rayfed_sub.training.pass_rows import runs
from tests.helpers.tiny_models import Tiny, draw_batches, installed, llama
from tests.methods.test_protocol import KINDS_OF_TRAINING, walk

CLIENTS, STEPS = 3, 6
RATES = {
    **{"fedavg": 2e-4, "fedftg": 2e-3, "shared-galore": 3e-3, "fedsub": 3e-3, "fedkrso": 3e-4},
    **{"fed-sb": 3e-2, "ravan": 2e-3},
}
"""Learning rates that move a method's weights by 2e-4 to 2e-3 on average, where neighbours lie 1e-3 to 4e-3 apart."""


@cache
def on_the_grid() -> tuple[Tiny, Tiny]:
    """A model whose weights are bfloat16's, in float32 and in bfloat16."""
    tiny = llama(hidden=64, inner=96)
    narrow = copy.deepcopy(tiny.model).bfloat16()
    return replace(tiny, model=copy.deepcopy(narrow).float()), replace(tiny, model=narrow)


def rows(tiny: Tiny) -> list[list[dict[str, Tensor]]]:
    return [draw_batches(tiny, client, STEPS, rows=16, tokens=16, labels=12) for client in range(CLIENTS)]


def trained(method: Method, tiny: Tiny) -> dict[str, Change]:
    """A round's change of every target (of the first client's, if each has a model of its own)."""
    weights = {name: tensor.float() for name, tensor in tiny.weights.items()}
    begun, lr = method.init_server(weights, tiny.shape, seed=0), RATES.get(method.name, 1e-3)
    done = walk(method, tiny, begun, rows(tiny), weights=[1, 1, 1], lr=lr, optimizer=Optimizer(lr=lr))
    if method.personal:
        return dict(method.personal_model(done.server, done.states[0], tiny.shape))
    return dict(method.model(done.server, tiny.shape))


@cache
def loss_before(tiny: Tiny) -> float:
    """Mean loss (nats) of the model as it is."""
    return loss(tiny, {})


def loss(tiny: Tiny, changes: dict[str, Change]) -> float:
    """Mean loss (nats) over all rows of the changed model."""
    model, layers = installed(tiny)
    with global_model(layers, tiny.shape, changes, {}):
        losses = [predicted(model, batch).loss_L for batches in rows(tiny) for batch in batches]
    return float(torch.cat(losses).double().mean())


EACH = [pytest.param(name, marks=() if name in KINDS_OF_TRAINING else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", EACH)
def test_small_change_lowers_the_loss_as_in_float32(name: str) -> None:
    """The same change over both backbones, and one that was trained over the bfloat16 one."""
    own = {"fedavg": {}, "fed-sb-gradient": {"rank": 2, "start_lr": 5e-4}}
    method = build({"name": name, **own.get(name, {"rank": 2})})
    wide, narrow = on_the_grid()
    change = trained(method, wide)
    gain, kept, again = (
        loss_before(tiny) - loss(tiny, changes)
        for tiny, changes in ((wide, change), (narrow, change), (narrow, trained(method, narrow)))
    )
    assert gain > 0.01
    assert kept == pytest.approx(gain, rel=0.05)
    assert again == pytest.approx(gain, rel=0.05)


KINDS = ["dense", "left", "core", "closed", "decayed", "bias"]


def terms(kind: str, m: int, n: int, rows: tuple[int, ...] = (7, 7)) -> Terms:
    """Two clients' terms of one kind, a thousandth of a weight in size."""
    rng = torch.Generator().manual_seed(1)

    def small(*shape: int) -> Tensor:
        return 1e-3 * torch.randn(2, *shape, generator=rng)

    pairs = {
        "dense": {"weight_Gmn": torch.ones(2, m, n) + small(m, n)},
        "left": {"left_Gmr": small(m, 2), "right_Grn": small(2, n) * 1e3, "scale_G": torch.tensor([1.0, 2.0])},
        "core": {"left_Gmr": small(m, 2) * 1e3, "right_Grn": small(2, n) * 1e3, "core_Grr": small(2, 2)},
        "closed": {"closed": Closed(small(m, 3), small(3, n) * 1e3, [3, 3])},
        "decayed": {"base_scale_G": torch.tensor([1 - 1e-4, 1 - 2e-4])},
        "bias": {"bias_Gm": torch.ones(2, m) + small(m)},
    }
    return Terms(runs(rows), **pairs[kind])  # type: ignore[arg-type]


def test_float32_base_weight_is_used_without_a_copy() -> None:
    """W0 + dW as the server holds it, without a copy: the round's broadcast is in shared memory."""
    layer, weight = PackLinear(torch.ones(6, 5).bfloat16(), None), torch.full((6, 5), 1.001)
    with based_on({"up": layer}, {"up": weight}):
        assert layer.weight.data_ptr() == weight.data_ptr()
        y = layer(torch.ones(1, 1, 5).bfloat16() * 1024)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.full((1, 1, 6), 5 * 1024 * 1.001).bfloat16())  # 5125.1; without dW it is 5120


@pytest.mark.parametrize("kind", KINDS)
def test_sum_is_float32_and_rounded_once(kind: str) -> None:
    """Against the layer over the same weights in float32; also for the gradient that goes to the layers below."""
    m, n = 6, 5
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(m, n, generator=rng).bfloat16(), torch.randn(m, generator=rng).bfloat16()
    x = torch.randn(2, 7, n, generator=rng).bfloat16()
    results = []
    for wide in (True, False):
        layer = PackLinear(weight.float(), bias.float()) if wide else PackLinear(weight, bias)
        layer.bound = Bound(14, (terms(kind, m, n),))
        leaf = (x.float() if wide else x.clone()).requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y.float().square().sum() if not wide else _once(y), leaf)))
    (y_wide, d_wide), (y_narrow, d_narrow) = results
    assert y_narrow.dtype == d_narrow.dtype == torch.bfloat16
    assert torch.equal(y_narrow, y_wide.bfloat16())
    assert torch.equal(d_narrow, d_wide.bfloat16())


def _once(y: Tensor) -> Tensor:
    """The same loss of the output rounded once, whose gradient 2 y is rounded too."""
    return y.bfloat16().float().square().sum()


@pytest.mark.parametrize("rows", [(4, 4), (3, 8), (0, 5)])
@pytest.mark.parametrize("trained", [("left",), ("right",), ("left", "right"), ("weight",), ("bias",), ()])
def test_gradients_match_the_dense_change(trained: tuple[str, ...], rows: tuple[int, int]) -> None:
    """Whole numbers, whose sums are exact: y_k = c_k x_k W^T + x_k (s_k L_k R_k + C_k D_k)^T, or x_k W_k^T + b_k; rows
    that only fill the pass up take the base product alone."""
    m, n, filler = 6, 5, 2
    rng = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=rng).float()

    W, S = whole(m, n), sum(rows) + filler
    x = whole(S, n).requires_grad_()
    own = {"left": whole(2, m, 2), "right": whole(2, 2, n), "weight": whole(2, m, n), "bias": whole(2, m)}
    leaves = {name: own[name].requires_grad_() for name in trained}
    closed_left, closed_right = whole(2, m, 3), whole(2, 3, n)
    scale, base = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])
    dense = bool({"weight", "bias"} & set(trained))
    if dense:
        given = Terms(runs(rows), weight_Gmn=own["weight"], bias_Gm=own["bias"])
    else:
        closed = Closed(closed_left, closed_right, [3, 3])
        pair = {"left_Gmr": own["left"], "right_Grn": own["right"], "scale_G": scale}
        given = Terms(runs(rows), **pair, base_scale_G=base, closed=closed)
    layer = PackLinear(W, None)
    with bound({"up": layer}, {"up": Bound(S, (given,))}):
        ours = layer(x[None])[0]
    theirs, begin = [], 0
    for k, count in enumerate(rows):
        x_k, begin = x[begin : begin + count], begin + count
        W_k = base[k] * W + scale[k] * own["left"][k] @ own["right"][k] + closed_left[k] @ closed_right[k]
        theirs.append(x_k @ own["weight"][k].T + own["bias"][k] if dense else x_k @ W_k.T)
    theirs.append(torch.zeros(filler, m) if dense else x[begin:] @ W.T)
    expected = torch.cat(theirs)
    assert torch.equal(ours, expected)
    d, wanted = whole(S, m), [x, *leaves.values()]
    found = torch.autograd.grad(ours, wanted, d)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, d, allow_unused=True), strict=True):
        assert torch.equal(a, torch.zeros_like(a) if b is None else b)
