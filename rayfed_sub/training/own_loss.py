"""The caller's own loss: one client's batch as a pass, and what the caller's functions make of it.

A pass has one client, so that all of a layer's tokens are that client's, whatever the module does with its rows.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.core.rng import seeded
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.weights import through_modules
from rayfed_sub.training.pass_rows import Seen

LOSS = "held_out_loss"


class OwnCodeError(Exception):
    """Failure of the caller's own code, or of what it returns; its text is the cause."""


@dataclass(frozen=True, eq=False)
class OwnPass:
    """The forward pass of one client's batch; the fields are as in `Pass`, with the batch as a single row."""

    batch: OwnBatch
    device: torch.device | str = "cpu"

    @cached_property
    def seen(self) -> Seen:
        """A single row."""
        return Seen((1,), 1, torch.zeros(1, 3, dtype=torch.int64, device=self.device))

    def seen_by(self, layer: str) -> Seen:
        """The same for every layer."""
        return self.seen

    @property
    def tokens(self) -> tuple[int, int]:
        return self.batch.rows, self.batch.rows

    def pinned(self, device: torch.device) -> OwnPass:
        """The pass as it is: where its tensors lie is the caller's affair."""
        return self

    def to(self, device: torch.device) -> OwnPass:
        """The pass on a device."""
        return OwnPass(self.batch.to(device), device)

    @property
    def counts(self) -> tuple[int]:
        """Rows of the client."""
        return (self.batch.rows,)


@dataclass(frozen=True)
class BatchScores:
    """Means over a held-out batch's rows by name, the loss among them."""

    rows: int
    means: Mapping[str, float]


def own_loss(model: nn.Module, batch: OwnBatch) -> Tensor:
    """The mean loss of a batch, a float32 scalar, by the loss that `ruled` put to the model.

    Raises OwnCodeError where the function raises, or returns anything but one number."""
    loss = _called("loss", vars(model)["own_loss"], model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise OwnCodeError(f"loss returns {what} in place of a scalar tensor")
    return loss.reshape(()).float()


def trained_loss(model: nn.Module, batch: OwnBatch) -> Tensor:
    """As `own_loss`; raises OwnCodeError where it has no gradient too."""
    loss = own_loss(model, batch)
    if not loss.requires_grad:
        cause = "detached, made anew, or model.targets names layers that are not called"
        raise OwnCodeError(f"loss returns a tensor without a gradient to any trained layer: {cause}")
    return loss


@torch.no_grad()
def own_scores(model: nn.Module, batch: OwnBatch) -> BatchScores:
    """The scores of a held-out batch, under the bound global model; NaN of `measure` is none.  Raises OwnCodeError."""
    means = {LOSS: own_loss(model, batch).item()}
    measure = vars(model)["own_measure"]
    if measure is None:
        return BatchScores(batch.rows, means)
    found = _called("measure", measure, model, batch)
    try:
        own = {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise OwnCodeError(f"measure returns no mapping of names to numbers: {error}") from None
    if LOSS in own:
        raise OwnCodeError(f"measure returns {LOSS}, which is the loss")
    return BatchScores(batch.rows, {**means, **{name: value for name, value in own.items() if not math.isnan(value)}})


def _called(name: str, function: Callable[..., Any], model: nn.Module, batch: OwnBatch) -> Any:
    try:
        with through_modules(), seeded(batch.seed):
            return function(model, batch.content)
    except Exception as error:  # the caller's code raises anything
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise OwnCodeError(f"{name} raises {cause}") from error
