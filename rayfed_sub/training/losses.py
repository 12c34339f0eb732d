"""The loss of every client of a pack: each client's own mean over its labelled tokens (or rows).

Logits are computed only where there is a label, in chunks, and their gradient at once: a vocabulary of 49,152
costs 200 kB a token, so the full logits of a pack would be its largest tensor by far.
Legend: G clients, R rows, T tokens, L labels, c a chunk of them, h hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfed_sub.data.batching import IGNORED
from rayfed_sub.models.frozen_linear import FrozenLinear, product
from rayfed_sub.models.logits import LogitRule, hidden_states

_TOKENS, _LOGITS = 128, 2**20  # a chunk of logits is as many numbers as that, or those of as many tokens if more


def client_losses(model: nn.Module, batch: Mapping[str, Tensor], clients: int) -> tuple[Tensor, Tensor]:
    """Each client's mean loss (G,) float32, with gradient, and its number of labels (G,) int64.

    batch: rows client-major, (G * B, ...), with `labels` (G * B, T) unshifted for language modelling or (G * B,) for
    classification; -100 is no label.  A client without any label has loss 0.
    """
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if labels.dim() == 2:
        loss_L, row_L = _token_losses(model, inputs, labels)
    else:
        logits_LC, row_L = _class_logits(model, inputs, labels)
        loss_L = functional.cross_entropy(logits_LC, labels[row_L], reduction="none")
    client_L = row_L // (len(labels) // clients)
    count_G = torch.bincount(client_L, minlength=clients)
    total_G = loss_L.new_zeros(clients).index_add(0, client_L, loss_L)
    return total_G / count_G.clamp_min(1), count_G


@dataclass(frozen=True)
class Predicted:
    """Predictions of a model at every label of a batch: loss (nats) float32, row, the label itself and the likeliest
    one, int64, all (L,), row by row."""

    loss_L: Tensor
    row_L: Tensor
    label_L: Tensor
    best_L: Tensor


@torch.inference_mode()
def predicted(model: nn.Module, batch: Mapping[str, Tensor]) -> Predicted:
    """Predictions for the labels of the batch, as for `client_losses`; in language modelling for each token given the
    true ones before it (teacher forcing)."""
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if labels.dim() == 1:
        logits_LC, row_L = _class_logits(model, inputs, labels)
        loss_L = functional.cross_entropy(logits_LC, labels[row_L], reduction="none")
        return Predicted(loss_L, row_L, labels[row_L], logits_LC.argmax(dim=-1))
    row_L, before_L = _places(labels)
    label_L = labels[row_L, before_L + 1]
    output = _output_layer(model)
    losses, best = [], []
    if output is None:
        logits_LV = cast(Any, model)(**inputs, use_cache=False).logits[row_L, before_L].float()
        chunk = _chunk(logits_LV.shape[1])
        chunks = iter(logits_LV.split(chunk))
    else:
        head, rule = output
        chunk = _chunk(len(head.weight))
        hidden_Lh = _hidden(model, head, inputs, row_L, before_L)
        chunks = (_logits(hidden_ch, head.weight, head.bias, rule) for hidden_ch in hidden_Lh.split(chunk))
    for logits_cV, label_c in zip(chunks, label_L.split(chunk), strict=True):
        losses.append(functional.cross_entropy(logits_cV, label_c, reduction="none"))
        best.append(logits_cV.argmax(dim=-1))
    return Predicted(torch.cat(losses), row_L, label_L, torch.cat(best))


def _class_logits(model: nn.Module, inputs: Mapping[str, Tensor], labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (L, C) of the labelled rows, and which rows those are.  Pixels take the model's own type: not every
    architecture sees to that itself."""
    row_L = (labels_R != IGNORED).nonzero()[:, 0]
    cast_inputs = {name: x.to(cast(Any, model).dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return model(**cast_inputs).logits.float()[row_L], row_L


def _token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (L,) of every labelled token and the row it stands in."""
    row_L, before_L = _places(labels_RT)
    label_L = labels_RT[row_L, before_L + 1]
    output = _output_layer(model)
    if output is None:
        logits_LV = cast(Any, model)(**inputs, use_cache=False).logits[row_L, before_L].float()
        return functional.cross_entropy(logits_LV, label_L, reduction="none"), row_L
    head, rule = output
    hidden_Lh = _hidden(model, head, inputs, row_L, before_L)
    loss_L: Tensor = _HeadLoss.apply(hidden_Lh, head.weight, head.bias, label_L, rule)  # type: ignore[no-untyped-call]
    return loss_L, row_L


def _places(labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of the token before every labelled one, where the label is predicted."""
    row_L, before_L = (labels_RT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return row_L, before_L


def _output_layer(model: nn.Module) -> tuple[nn.Linear | FrozenLinear, LogitRule] | None:
    """The output layer and the rule by which logits follow from it; None where there is none and the model must give
    its own logits."""
    rule, head = getattr(model, "logit_rule", None), cast(Any, model).get_output_embeddings()
    return (head, rule) if isinstance(rule, LogitRule) and isinstance(head, nn.Linear | FrozenLinear) else None


def _hidden(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor], row_L: Tensor, place_L: Tensor) -> Tensor:
    """The output layer's input (L, h) at those places."""
    with hidden_states(head) as seen:
        model(**inputs, use_cache=False)
    (hidden_RTh,) = seen
    return hidden_RTh[row_L, place_L]


def _chunk(vocabulary: int) -> int:
    """Labelled tokens whose logits exist at the same time: small products would waste a small vocabulary's time.

    >>> _chunk(512), _chunk(49152)
    (2048, 128)
    """
    return max(_TOKENS, _LOGITS // vocabulary)


def _logits(hidden_ch: Tensor, head_Vh: Tensor, bias_V: Tensor | None, rule: LogitRule) -> Tensor:
    return rule.logits(product(hidden_ch, head_Vh, bias_V).float())


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy (L,) of hidden (L, h) under a frozen output layer (V, h), (V,), without ever holding (L, V)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_Lh: Tensor, head_Vh: Tensor, bias_V: Tensor | None, label_L: Tensor, rule: LogitRule
    ) -> Tensor:
        grads, losses = [], []
        chunk = _chunk(len(head_Vh))
        for hidden_ch, label_c in zip(hidden_Lh.split(chunk), label_L.split(chunk), strict=True):
            logits_cV = _logits(hidden_ch, head_Vh, bias_V, rule)
            slope_cV = rule.slope(logits_cV)
            # The probabilities are the gradient too; the likeliest one says what all were divided by.  Its logarithm is
            # added last: to a logit of 20, of a loss of 1e-5 one digit would be left.
            p_cV = functional.softmax(logits_cV, dim=-1)
            behind_c = logits_cV.amax(dim=-1) - logits_cV.gather(1, label_c[:, None])[:, 0]
            losses.append(behind_c - p_cV.amax(dim=-1).log())
            if ctx.needs_input_grad[0]:
                grad_cV = p_cV
                grad_cV[torch.arange(len(label_c), device=label_c.device), label_c] -= 1
                if isinstance(slope_cV, Tensor) or slope_cV != 1.0:
                    grad_cV *= slope_cV
                grads.append(product(grad_cV.to(head_Vh.dtype), head_Vh.mT))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden_Lh))
        return torch.cat(losses) if losses else hidden_Lh.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_Lh,) = ctx.saved_tensors
        return grad_Lh * outputs[0][:, None].to(grad_Lh.dtype), None, None, None, None
