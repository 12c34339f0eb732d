"""The loss of every client of a pack: each client's own mean over its labelled tokens (or rows).

Logits are computed only where there is a label, in chunks, and their gradient at once: a vocabulary of 49,152
costs 200 kB a token, so the full logits of a pack would be its largest tensor by far.
Legend: G clients, L labelled tokens, h hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfed_sub.data.batches import IGNORED

_CHUNK = 128  # labelled tokens whose logits exist at the same time


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
        logits_RC = model(**inputs).logits.float()
        row_L = (labels != IGNORED).nonzero()[:, 0]
        loss_L = functional.cross_entropy(logits_RC[row_L], labels[row_L], reduction="none")
    client_L = row_L // (len(labels) // clients)
    count_G = torch.bincount(client_L, minlength=clients)
    total_G = loss_L.new_zeros(clients).index_add(0, client_L, loss_L)
    return total_G / count_G.clamp_min(1), count_G


def _token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (L,) of every labelled token and the row it stands in."""
    row_L, before_L = (labels_RT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    label_L = labels_RT[row_L, before_L + 1]
    causal: Any = model
    head = causal.get_output_embeddings()
    if _scaled_logits(causal.config) or not isinstance(head, nn.Linear) or head.bias is not None:
        logits_LV = causal(**inputs, use_cache=False).logits[row_L, before_L].float()
        return functional.cross_entropy(logits_LV, label_L, reduction="none"), row_L
    hidden_RTh = causal.base_model(**inputs, use_cache=False).last_hidden_state
    cap = getattr(causal.config, "final_logit_softcapping", None)
    loss_L: Tensor = _HeadLoss.apply(hidden_RTh[row_L, before_L], head.weight, label_L, cap)
    return loss_L, row_L


def _scaled_logits(config: Any) -> bool:
    """Whether the model does more to its logits than a matrix product and soft-capping (Cohere, Granite, Falcon-H1)."""
    factors = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in factors)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy (L,) of hidden (L, h) under a frozen output matrix (V, h), without ever holding (L, V)."""

    @staticmethod
    def forward(ctx: Any, hidden_Lh: Tensor, head_Vh: Tensor, label_L: Tensor, cap: float | None) -> Tensor:
        grads, losses = [], []
        for hidden_ch, label_c in zip(hidden_Lh.split(_CHUNK), label_L.split(_CHUNK), strict=True):
            logits_cV = functional.linear(hidden_ch, head_Vh).float()
            slope_cV = None
            if cap is not None:
                logits_cV = torch.tanh(logits_cV / cap)
                slope_cV = 1 - logits_cV.square()
                logits_cV = logits_cV * cap
            log_p_cV = functional.log_softmax(logits_cV, dim=-1)
            losses.append(-log_p_cV.gather(1, label_c[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                grad_cV = log_p_cV.exp_()
                grad_cV[torch.arange(len(label_c), device=label_c.device), label_c] -= 1
                if slope_cV is not None:
                    grad_cV *= slope_cV
                grads.append(grad_cV.to(head_Vh.dtype) @ head_Vh)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden_Lh))
        return torch.cat(losses) if losses else hidden_Lh.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_Lh,) = ctx.saved_tensors
        return grad_Lh * outputs[0][:, None].to(grad_Lh.dtype), None, None, None
