"""The loss under a frozen output matrix, in float32."""

from __future__ import annotations

import math

import pytest
import torch

from rayfed_sub.training.losses import _HeadLoss


@pytest.mark.parametrize("behind", [1.0, 8.0, 12.0])
def test_the_loss_of_a_sure_prediction_keeps_its_digits(behind: float) -> None:
    """Two tokens' logits, 20 and 20 - behind: the loss of the first is ln(1 + e^-behind), 6.1e-6 for 12, where floats
    near 20 lie 1.9e-6 apart."""
    head_V1, hidden_L1 = torch.tensor([[20.0], [20.0 - behind]]), torch.ones(1, 1)
    loss = _HeadLoss.apply(hidden_L1, head_V1, torch.tensor([0]), None)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-behind)), rel=0.02)


def test_the_loss_of_a_wrong_prediction_is_what_it_lies_behind() -> None:
    """Logits 20 and 8, the second is right: 12 + ln(1 + e^-12)."""
    loss = _HeadLoss.apply(torch.ones(1, 1), torch.tensor([[20.0], [8.0]]), torch.tensor([1]), None)
    assert loss.item() == pytest.approx(12.0000061, rel=1e-6)
