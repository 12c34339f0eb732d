"""The loss of every client of a pack: each client's own mean over its labelled tokens (or rows).

Logits are computed only where there is a label, in chunks, and their gradient at once: a vocabulary of 49,152
costs 200 kB a token, so the full logits of a pack would be its largest tensor by far.
Legend: G clients, R rows, T tokens, L labels, c a chunk of them, h hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfed_sub.core.devices import fetched, free_to_read
from rayfed_sub.models.filled_masks import told
from rayfed_sub.models.flat_rows import attending, pass_rule
from rayfed_sub.models.frozen_linear import FrozenLinear, product
from rayfed_sub.models.logits import LogitRule, added_bias, hidden_states
from rayfed_sub.models.quantised import Quantised
from rayfed_sub.models.text_to_text import decoder_inputs
from rayfed_sub.models.weights import answered
from rayfed_sub.training.own_loss import OwnPass, trained_loss
from rayfed_sub.training.passes import AnyPass, Pass, labelled_passes

_TOKENS, _LOGITS = 128, 2**20  # a chunk of logits is as many numbers as that, or those of as many tokens if more


def client_losses(model: nn.Module, one: AnyPass, count_G: Tensor) -> Tensor:
    """Each client's summed loss in this pass over the number of its labels in the step, (G,) float32, with gradient:
    summed over the step's passes it is the mean over its labels.

    count_G: int64, on the model's device; a client without any label has loss 0.  A loss of the caller's own is its
    batch's mean already.
    """
    if isinstance(one, OwnPass):
        return trained_loss(model, one.batch)[None]
    output = _output_layer(model) if one.of_tokens else None
    if output is None:
        loss_L = row_losses(_logits_at(model, one), one.labels)
    else:
        head, bias_V, rule = output
        hidden_Lh = _hidden(model, head, one)
        loss_L = _HeadLoss.apply(hidden_Lh, head.weight, bias_V, one.labels, rule)  # type: ignore[no-untyped-call]
    total_G = loss_L.new_zeros(len(one.seen.parts)).index_add(0, one.clients, loss_L)
    return total_G / count_G.clamp_min(1)


def row_losses(logits_LC: Tensor, label_L: Tensor) -> Tensor:
    """The loss of each label (L,): cross-entropy of classes (L,) int64; of float32 labels (L, 1) the squared error, of
    (L, C) of 0 and 1 the mean binary cross-entropy over the labels, as transformers has them."""
    if not label_L.is_floating_point():
        return functional.cross_entropy(logits_LC, label_L, reduction="none")
    if label_L.shape[1] == 1:
        return (logits_LC - label_L).square()[:, 0]
    return functional.binary_cross_entropy_with_logits(logits_LC, label_L, reduction="none").mean(dim=1)


def _likeliest(logits_LC: Tensor, label_L: Tensor) -> Tensor:
    """The likeliest label by the logits, in the form of the labels; of a number the logit itself."""
    if not label_L.is_floating_point():
        return logits_LC.argmax(dim=-1)
    return logits_LC if label_L.shape[1] == 1 else (logits_LC > 0).float()


@dataclass(frozen=True)
class Predicted:
    """Predictions of a model at every label of a batch, row by row, on the CPU: loss float32 and row (L,), the label
    itself and the likeliest one, int64 (L,), or float32 (L, C) where labels are numbers."""

    loss_L: Tensor
    row_L: Tensor
    label_L: Tensor
    best_L: Tensor


@torch.inference_mode()
def predicted(model: nn.Module, batch: Mapping[str, Tensor], pad: int = 0) -> Predicted:
    """Predictions for the labels of the batch, as for `client_losses`; in language modelling for each token given the
    true ones before it (teacher forcing).  A row's are the same in any batch."""
    device, turns = next(model.parameters()).device, labelled_passes([batch], pass_rule(model), pad)
    found = [_predicted(model, one.to(device)) for one in turns]
    both = fetched(
        {name: torch.cat(parts) for name, parts in zip(("loss", "best"), zip(*found, strict=True), strict=True)}
    )
    row_L, label_L = torch.cat([one.rows for one in turns]), torch.cat([one.labels for one in turns])
    order_L = row_L.argsort(stable=True)
    return Predicted(both["loss"][order_L], row_L[order_L], label_L[order_L], both["best"][order_L])


def _predicted(model: nn.Module, one: Pass) -> tuple[Tensor, Tensor]:
    """Loss and likeliest label (L,) of a pass."""
    output = _output_layer(model) if one.of_tokens else None
    losses, best = [], []
    if output is None:
        logits_LV = _logits_at(model, one)
        chunk = _chunk(logits_LV.shape[1])
        chunks = iter(logits_LV.split(chunk))
    else:
        head, bias_V, rule = output
        chunk = _chunk(len(head.weight))
        hidden_Lh = _hidden(model, head, one)
        head_Vh = _dense(head.weight, hidden_Lh)
        chunks = (_logits(hidden_ch, head_Vh, bias_V, rule) for hidden_ch in hidden_Lh.split(chunk))
    for logits_cV, label_c in zip(chunks, one.labels.split(chunk), strict=True):
        losses.append(row_losses(logits_cV, label_c))
        best.append(_likeliest(logits_cV, label_c))
    return torch.cat(losses), torch.cat(best)


def forwarded(model: Any, one: Pass) -> Any:
    """The model's answer to a pass.  Pixels take its own type: not every architecture sees to that itself."""
    dtype = getattr(model, "dtype", torch.float32)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in one.inputs.items()}
    if one.answers is not None:
        inputs["decoder_input_ids"] = decoder_inputs(model, one.answers)
    around: AbstractContextManager[None] = nullcontext()
    if one.flat is not None:
        around = attending(model, one.flat)
    elif one.filled is not None and not free_to_read(one.labels.device):
        around = told(model, filled=one.filled)
    with around:
        return answered(model, inputs, causal=one.of_tokens)


def _logits_at(model: nn.Module, one: Pass) -> Tensor:
    """The model's own logits (L, V) or (L, C), float32, for the labels."""
    logits: Tensor = forwarded(model, one).logits
    return logits.flatten(0, -2)[one.places].float()


def _hidden(model: nn.Module, head: nn.Module, one: Pass) -> Tensor:
    """The output layer's input (L, h) where the labels are predicted."""
    with hidden_states(head) as seen:
        forwarded(model, one)
    (hidden_RTh,) = seen
    return hidden_RTh.flatten(0, -2)[one.places]


def _output_layer(model: nn.Module) -> tuple[nn.Linear | FrozenLinear, Tensor | None, LogitRule] | None:
    """The output layer, its bias with what the model adds to it, and the rule by which logits follow from them; None
    where there is none and the model must give its own logits."""
    rule, head = getattr(model, "logit_rule", None), getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(rule, LogitRule) or not isinstance(head, nn.Linear | FrozenLinear):
        return None
    biases = [bias_V for bias_V in (head.bias, added_bias(model)) if bias_V is not None]
    return head, biases[0] + biases[1] if len(biases) == 2 else next(iter(biases), None), rule


def _chunk(vocabulary: int) -> int:
    """Labelled tokens whose logits exist at the same time: small products would waste a small vocabulary's time.

    >>> _chunk(512), _chunk(49152)
    (2048, 128)
    """
    return max(_TOKENS, _LOGITS // vocabulary)


def _dense(head_Vh: Tensor | Quantised, hidden_Lh: Tensor) -> Tensor:
    """The output layer's weight, dequantised once for all chunks."""
    return head_Vh.dense(hidden_Lh.dtype) if isinstance(head_Vh, Quantised) else head_Vh


def _logits(hidden_ch: Tensor, head_Vh: Tensor, bias_V: Tensor | None, rule: LogitRule) -> Tensor:
    return rule.logits(product(hidden_ch, head_Vh, bias_V).float())


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy (L,) of hidden (L, h) under a frozen output layer (V, h), (V,), without ever holding (L, V)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Lh: Tensor,
        weight_Vh: Tensor | Quantised,
        bias_V: Tensor | None,
        label_L: Tensor,
        rule: LogitRule,
    ) -> Tensor:
        head_Vh = _dense(weight_Vh, hidden_Lh)
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
