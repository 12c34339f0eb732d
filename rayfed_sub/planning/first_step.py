"""A trial of a module of the caller's own before the run: one batch, forward and backward, nothing learned."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.core.text import KINDS
from rayfed_sub.core.types import ModelShape
from rayfed_sub.data.batching import Batch, collate
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.objects import OwnBatch
from rayfed_sub.models.architecture import Architecture
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.weights import assemble
from rayfed_sub.training.layers import Bound, PackLinear, Terms, bound
from rayfed_sub.training.losses import client_losses, forwarded
from rayfed_sub.training.own_loss import OwnCodeError, OwnPass, own_scores
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.passes import AnyPass, passes

log = logging.getLogger(__name__)


def check_first_step(
    config: Config, architecture: Architecture, tensors: Mapping[str, Tensor], dataset: Dataset, pad: int
) -> None:
    """UserError (batch, loss, measure, model, model.targets) where the caller's functions fail on the first client's
    first rows, logits have another shape than labels of rows, the loss is no scalar with a gradient, or depends on no
    trained layer.  A warning names layers that this
    batch does not reach."""
    client = dataset.client_names[0]
    rows = dataset.rows_of(0)[: config.federation.batch_size]
    model = assemble(architecture, tensors)
    layers = install(model, architecture.shape)
    try:
        batch = collate(dataset.train, rows, mask_prompt=config.task.mask_prompt, pad=pad)
    except Exception as error:  # the caller's code raises anything
        allowed = f"a function that makes a batch of a list of rows; with {len(rows)} of client {client} it raises"
        raise UserError("batch", "OwnModel.batch", allowed, _line(error)) from error
    try:
        _check_outputs(model, passes([batch], pass_rule(model), pad)[0], dataset)
        reached = _reached(model, layers, architecture.shape, batch, pad)
        if isinstance(batch, OwnBatch):
            own_scores(model, batch)
    except OwnCodeError as error:
        name, _, cause = str(error).partition(" ")
        allowed = f"a function of the module and a batch; with rows of client {client} it {cause}"
        raise UserError(name, f"OwnModel.{name}", allowed, "run it by hand on batch(rows)") from error
    except UserError:
        raise
    except Exception as error:  # so does the caller's module
        allowed = f"a module that reads this task's rows; with rows of client {client} it raises"
        raise UserError("model", type(architecture.module).__qualname__, allowed, _line(error)) from error
    trained = [layer.name for layer in (*architecture.shape.targets, *architecture.shape.head)]
    missed = [name for name in trained if name not in reached]
    if not any(layer.name in reached for layer in architecture.shape.targets):
        allowed = f"layers that the loss depends on; it does not on {', '.join(missed[:4])}"
        raise UserError("model.targets", config.model.targets, allowed, "name layers whose forward is called")
    if missed:
        log.warning("the loss of a first batch does not depend on %s", ", ".join(missed[:8]))


@torch.no_grad()
def _check_outputs(model: nn.Module, one: AnyPass, dataset: Dataset) -> None:
    """UserError where the module has not one output for each class, or label, or for a regression's number: a loss
    would spread the labels over outputs of another shape."""
    if isinstance(one, OwnPass) or one.of_tokens:
        return
    shape = tuple(forwarded(model, one).logits.shape)
    wanted = (one.seen.size, 1 if dataset.kind == "regression" else len(dataset.class_names))
    if shape != wanted:
        form = f"a module with logits of shape (rows, {wanted[1]}) for {KINDS[dataset.kind]}"
        allowed = f"{form}, here {wanted}; it returns {shape}"
        advice = f"give its last layer {wanted[1]} output{'s' if wanted[1] > 1 else ''}, and squeeze nothing"
        raise UserError("model", type(model).__qualname__, allowed, advice)


def _reached(model: nn.Module, layers: Mapping[str, PackLinear], shape: ModelShape, batch: Batch, pad: int) -> set[str]:
    """The trained layers that have a gradient from the batch: targets with a term of rank 1 that is zero, heads with
    weights of their own."""
    leaves = {layer.name: torch.zeros(1, layer.m, 1, requires_grad=True) for layer in shape.targets}
    leaves |= {layer.name: _own(layers[layer.name])[None].clone().requires_grad_() for layer in shape.head}
    reached: set[str] = set()
    for turn in passes([batch], pass_rule(model), pad):
        own = {name: turn.seen_by(name).runs(slice(0, 1)) for name in leaves}
        terms = {
            layer.name: Terms(own[layer.name], left_Gmr=leaves[layer.name], right_Grn=_random(layer.name, layer.n))
            for layer in shape.targets
        }
        terms |= {layer.name: Terms(own[layer.name], weight_Gmn=leaves[layer.name]) for layer in shape.head}
        with bound(layers, {name: Bound(turn.seen_by(name).size, (one,)) for name, one in terms.items()}):
            loss = client_losses(model, turn, torch.tensor(turn.counts)).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        reached |= {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    return reached


def _own(layer: PackLinear) -> Tensor:
    assert isinstance(layer.weight, Tensor), "a caller's own module is not quantised"
    return layer.weight.float()


def _random(name: str, n: int) -> Tensor:
    return torch.from_numpy(stream(0, "first step", name).standard_normal((1, 1, n), "float32"))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
