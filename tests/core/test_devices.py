"""Numbers on their way to a GPU, with stand-ins for what only a GPU has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rayfed_sub.core.devices import onto, sent, stacked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def crossings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was pinned, and what was sent and how; tensors stay where they are."""
    seen = list[tuple[Any, ...]]()
    to = Tensor.to

    def pinned(tensor: Tensor) -> Tensor:
        seen.append(("pinned", tuple(tensor.shape)))
        return tensor

    def sent_there(tensor: Tensor, *args: Any, **how: Any) -> Tensor:
        if args[0] != CUDA:
            return to(tensor, *args, **how)
        seen.append(("sent", tuple(tensor.shape), how))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", sent_there)
    return seen


def test_what_goes_to_a_gpu_is_pinned_and_sent_without_a_wait(crossings: list[tuple[Any, ...]]) -> None:
    assert onto([1.0, 2.0], CUDA).tolist() == [1, 2]
    assert crossings == [("pinned", (2,)), ("sent", (2,), {"non_blocking": True})]
    crossings.clear()
    there = torch.ones(3)
    assert sent(there, CPU) is there
    assert crossings == []


def test_clients_tensors_cross_over_together(crossings: list[tuple[Any, ...]]) -> None:
    """Two clients that come back and a new one are one copy, of (3, 2); a pack is as on the processor."""
    given = [torch.ones(2), None, torch.full((2,), 2.0, dtype=torch.bfloat16)]
    assert stacked(given, (2,), CUDA).tolist() == stacked(given, (2,), CPU).tolist() == [[1, 1], [0, 0], [2, 2]]
    assert crossings == [("pinned", (3, 2)), ("sent", (3, 2), {"non_blocking": True})]


def test_new_clients_zeros_are_made_where_they_are_used() -> None:
    assert stacked([None, None], (3, 2), torch.device("meta")).shape == (2, 3, 2)
    assert stacked([None, None], (3, 2), torch.device("meta")).is_meta
