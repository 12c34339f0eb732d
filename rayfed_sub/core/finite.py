"""Numbers that are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayfed_sub.core.types import Tensors


def not_finite(tensors: Tensors) -> str | None:
    """The first tensor with a NaN or an infinity, None where there is none; tensors without data have none.

    >>> not_finite({"a/left": torch.full((2,), 3e38), "a/right": torch.tensor([0.0, float("inf")])})
    'non-finite values in a/right'
    """
    return next((f"non-finite values in {name}" for name, x in tensors.items() if not _finite(x)), None)


def _finite(x: Tensor) -> bool:
    """True where all numbers are finite.  A sum with one that is not is not finite either, and costs a twentieth of a
    mask over all; finite numbers whose sum overflows are looked at one by one."""
    return x.is_meta or math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
