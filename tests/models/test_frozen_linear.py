"""Frozen linear layers: oneDNN's kernel in place of torch's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rayfed_sub.models import frozen_linear
from rayfed_sub.models.frozen_linear import FrozenLinear, freeze, product


def whole(*shape: int) -> torch.Tensor:
    """Numbers -3 to 3, so that float32 products and sums of them are exact."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@pytest.mark.parametrize("shape", [(4, 5, 8), (8,), (1, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("bias", [None, whole(6)])
def test_product_and_gradient_match_torch(shape: tuple[int, ...], bias: torch.Tensor | None) -> None:
    x, weight = whole(*shape).requires_grad_(), whole(6, 8)
    ours, theirs = product(x, weight, bias), functional.linear(x, weight, bias)
    assert torch.equal(ours, theirs)
    d = whole(*theirs.shape)
    assert torch.equal(torch.autograd.grad(ours, x, d)[0], torch.autograd.grad(theirs, x, d)[0])


VIEWS = {
    "transposed": (whole(8, 6).T, True),
    "every other row": (whole(12, 8)[::2], False),
    "every other column": (whole(6, 16)[:, ::2], False),
    "one row": (whole(1, 8).expand(6, 8), False),
}


@pytest.mark.parametrize(("weight", "dense"), VIEWS.values(), ids=VIEWS)
def test_transposed_view_is_dense_and_others_are_not(weight: torch.Tensor, dense: bool) -> None:
    x = whole(5, 8).requires_grad_()
    y = product(x, weight)
    assert torch.equal(y, functional.linear(x, weight.contiguous()))
    assert y.grad_fn is not None
    assert ("_Product" in y.grad_fn.name()) == (dense and frozen_linear._ONEDNN)


def test_other_dtypes_use_torch() -> None:
    """Six times 1 + 2^-40, which float32 cannot distinguish from 6."""
    x, weight = (
        torch.ones(2, 8, dtype=torch.float64, requires_grad=True),
        torch.ones(6, 8, dtype=torch.float64) + 2**-40,
    )
    product(x, weight).sum().backward()
    assert x.grad is not None
    assert (x.grad == 6 + 6 * 2**-40).all()


def kernel() -> str:
    """Autograd's name of the kernel in use."""
    y = product(whole(2, 8).requires_grad_(), whole(6, 8))
    assert y.grad_fn is not None
    return y.grad_fn.name()


def test_onednn_is_used_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("_Product" in kernel()) == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(frozen_linear, "_ONEDNN", False)
    assert "_Product" not in kernel()


def test_linear_layers_of_both_kinds_are_replaced_and_no_other() -> None:
    class Special(nn.Linear):
        """A subclass with possibly different behaviour."""

    model = nn.ModuleDict({"plain": nn.Linear(8, 6), "turned": Conv1D(6, 8), "special": Special(8, 6)})
    model.requires_grad_(False)
    x, before = whole(3, 8), dict(model.named_parameters())
    outputs = {name: layer(x) for name, layer in model.items()}
    freeze(model)
    assert {name: type(layer) for name, layer in model.items()} == {
        "plain": FrozenLinear,
        "turned": FrozenLinear,
        "special": Special,
    }
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    for name, layer in model.items():
        torch.testing.assert_close(layer(x), outputs[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(48, 16), (48, 172), (576, 1536), (1536, 576)])
@pytest.mark.parametrize("turned", [False, True])
def test_row_has_the_same_bits_beside_any_others(dtype: torch.dtype, m: int, n: int, turned: bool) -> None:
    """Beyond 256 rows too, and with a weight that lies as (n, m), as in a backward pass."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, n, generator=rng).to(dtype), torch.randn(m, n, generator=rng).to(dtype)
    weight = weight.T.contiguous().T if turned else weight
    whole = product(x, weight)
    for first in (0, 7, 21, 35, 250):
        for rows in (1, 2, 3, 5, 8, 13, 33):
            part = product(x[first : first + rows], weight)
            assert torch.equal(part, whole[first : first + rows])


@pytest.mark.parametrize("emulated", [False, True])
def test_bfloat16_is_rounded_once_with_and_without_instructions_for_it(
    emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of 8 small whole numbers are exact in float32; bfloat16 keeps 8 binary digits of them."""
    monkeypatch.setattr(frozen_linear, "_EMULATES", emulated)
    x, weight, bias = whole(2, 5, 8), 37 * whole(6, 8), whole(6)
    narrow = x.bfloat16().requires_grad_()
    y = product(narrow, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(y, (x @ weight.bfloat16().float().T + bias).bfloat16())
    (dx,) = torch.autograd.grad(y.float().sum(), narrow)
    assert torch.equal(dx, weight.bfloat16().float().sum(dim=0).expand(2, 5, 8).bfloat16())


@pytest.mark.parametrize("emulated", [False, True])
def test_float32_weight_keeps_its_digits_under_bfloat16_inputs(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "_EMULATES", emulated)
    x, weight = whole(2, 5, 8), 1 + whole(6, 8) / 1024  # bfloat16 would round most of these to 1
    narrow = x.bfloat16().requires_grad_()
    y = product(narrow, weight)
    assert torch.equal(y, (x @ weight.T).bfloat16())
    (dx,) = torch.autograd.grad(y.float().sum(), narrow)
    assert torch.equal(dx, weight.sum(dim=0).expand(2, 5, 8).bfloat16())


KERNELS_OF_MANY_SHAPES = """
import torch
from rayfed_sub.telemetry.process_memory import few_kernels
from rayfed_sub.models.frozen_linear import product
few_kernels()
weight = torch.ones(64, 64)
for tokens in range(1, 301):
    product(torch.ones(tokens, 64), weight)
ranges = (line.split()[:2] for line in open("/proc/self/maps") if len(line.split()) == 5)  # of no file
code = (ends.split("-") for ends, rights in ranges if "x" in rights)
print(sum(int(end, 16) - int(begin, 16) for begin, end in code))
"""


@pytest.mark.slow
@pytest.mark.skipif(not (frozen_linear._ONEDNN and sys.platform == "linux"), reason="reads /proc, of oneDNN's kernels")
def test_kernels_of_many_shapes_do_not_gather() -> None:
    """300 shapes, each up to 0.65 MB of code: 64 of them take 42 MB at most, all took 196."""
    done = subprocess.run([sys.executable, "-c", KERNELS_OF_MANY_SHAPES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 10**6
