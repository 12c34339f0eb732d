"""Changes that wait to be added together: the sum, when they are added, and its bits."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from rayfed_sub.core.types import Accumulator, Layer, ModelShape, Update
from rayfed_sub.methods import averaging

SHAPE = ModelShape((Layer("wide", 96, 640), Layer("square", 300, 300), Layer("small", 12, 10)))


def updates(count: int) -> list[Update]:
    """Clients of ranks 3, 5, 8 by turns; the small layer's change is sent as a matrix."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for k in range(count):
        rank, tensors = (3, 5, 8)[k % 3], {"small/weight": torch.randn(12, 10, generator=draw)}
        for layer in SHAPE.targets[:2]:
            tensors[f"{layer.name}/left"] = torch.randn(layer.m, rank, generator=draw)
            tensors[f"{layer.name}/right"] = torch.randn(rank, layer.n, generator=draw)
        found.append(Update(k, 0.5 + k, tensors, {}))
    return found


def mean(sent: list[Update]) -> dict[str, Tensor]:
    total = Accumulator(0.0, {})
    for update in sent:
        total = averaging.add_changes(averaging.add(total, {}, update.weight), update, SHAPE)
    return averaging.mean(total)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_mean_is_that_of_the_products(count: int) -> None:
    sent = updates(count)
    found, weight = mean(sent), sum(update.weight for update in sent)
    assert set(found) == {"wide/weight", "square/weight", "small/weight"}
    for name in ("wide", "square"):
        products = (
            update.weight * (update.tensors[f"{name}/left"].double() @ update.tensors[f"{name}/right"].double())
            for update in sent
        )
        assert torch.allclose(found[f"{name}/weight"].double(), sum(products) / weight, atol=2e-5)  # type: ignore[arg-type]


def test_factors_wait_until_their_ranks_are_worth_a_product() -> None:
    """Up to 128, or half of the sum's memory: 42 of 96 x 640 (2 R (96 + 640) >= 96 * 640), 75 of 300 x 300."""
    total, most = Accumulator(0.0, {}), dict.fromkeys(("wide/weight", "square/weight"), 0)
    for update in updates(60):
        total = averaging.add_changes(averaging.add(total, {}, update.weight), update, SHAPE)
        for name in most:
            most[name] = max(most[name], sum(left.shape[1] for left, _ in total.waiting.get(name, ())))
    assert 34 <= most["wide/weight"] < 42
    assert 67 <= most["square/weight"] < 75
    assert total.counts == {"wide": 320.0, "square": 320.0, "small": 600.0}


def test_bits_do_not_depend_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, found = updates(40), []
    for cores in ({0}, {0, 1}, {0, 1, 2, 3}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        found.append(mean(sent))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])
