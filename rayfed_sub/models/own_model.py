"""A model that a Python call hands over, in place of one that `model.path` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Loss = Callable[["nn.Module", Any], "Tensor"]
"""(module, batch) -> a scalar tensor: the mean loss of the batch's rows, with a gradient."""
MakeBatch = Callable[[list[Any]], Any]
"""Rows -> a batch: a tensor, or lists, tuples and mappings of tensors; whatever the loss takes."""
Measure = Callable[["nn.Module", Any], Mapping[str, float]]
"""(module, batch) -> means over the batch's rows by name, such as an accuracy."""


@dataclass(frozen=True, eq=False)
class OwnModel:
    """A model of the caller's own, for `run(config, model=OwnModel(...))`, in one of two forms:

    - with `tokenizer`, one of transformers: the module takes `input_ids` (B, T) int64 (of a classification
      `attention_mask` (B, T) too) and returns logits (B, T, V), or (B, C), as a tensor or as the attribute `logits`.
      Tasks and scores are those of a configuration, whether the rows come from files or from `data`.
    - with `loss`, and `batch` where torch's `default_collate` will not do: the rows of `data` are whatever `batch`
      takes.  The score is `held_out_loss`, the mean of `loss` over held-out rows, and what `measure` returns; batches
      of which it returns NaN do not count in the mean.

    module: any torch.nn.Module with initialised tensors, float32 or bfloat16; it is left as it is.  Trained are the
    plain linear layers (nn.Linear, transformers' Conv1D) whose names the regular expression `model.targets` finds, by
    the method.  head: names of linear layers that are trained densely, such as a fresh classifier.  A module runs in
    eval mode, in training too: no dropout, and no running statistics move.  Its tensors lie in shared memory, once per
    node.

    A transformers model with a tokenizer (and no head) trains as `model.path` would.  Of any other module clients train
    one at a time, since nothing says that its layers see the rows of several clients side by side.

    What loss, batch and measure draw from torch's, numpy's and Python's generators follows from seed, client and step.
    They may raise: a client whose loss or batch does has failed (federation.on_client_failure).

    Functions and classes must go through cloudpickle, which takes those of a script or notebook by value; with
    `resources.workers=0` they stay in this process.

    >>> OwnModel(module=..., loss=lambda module, batch: module(batch).mean()).head
    ()
    """

    module: nn.Module
    tokenizer: Any = None
    loss: Loss | None = None
    batch: MakeBatch | None = None
    measure: Measure | None = None
    head: str | Sequence[str] = ()
