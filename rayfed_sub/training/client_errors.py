"""Causes of a client's own failure, one line each, for both executors and the worker."""

from __future__ import annotations

import math
import textwrap

import torch
from torch import Tensor

from rayfed_sub.core.types import Tensors
from rayfed_sub.data.batching import Batches

_LENGTH = 300  # characters; an error message may hold whole records


def drawn(batches: Batches, t: int) -> Tensors | str:
    """Batch number t, or why it cannot be drawn: a client's data may raise, and that is the client's failure alone.

    >>> drawn([{}, {}], 2)
    'batch of local step 2: IndexError: list index out of range'
    """
    try:
        return batches[t]
    except Exception as error:
        return textwrap.shorten(f"batch of local step {t}: {type(error).__name__}: {error}", _LENGTH)


def not_finite(tensors: Tensors) -> str | None:
    """The first tensor with a NaN or an infinity, None where there is none.

    >>> not_finite({"a/left": torch.full((2,), 3e38), "a/right": torch.tensor([0.0, float("inf")])})
    'non-finite values in a/right'
    """
    return next((f"non-finite values in {name}" for name, x in tensors.items() if not _finite(x)), None)


def _finite(x: Tensor) -> bool:
    """True where all numbers are finite.  A sum with one that is not is not finite either, and costs a twentieth of a
    mask over all; finite numbers whose sum overflows are looked at one by one."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
