"""The server's step from a round's mean change, for any method: plain, momentum or Adam.

Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295 (FedAdam: Algorithm 2, no bias correction, v begins at
tau^2); Hsu, Qi, Brown, arXiv 1909.06335 (FedAvgM); Wang et al., arXiv 2007.07481 (FedNova).  All of them move the
tensors that the method's `aggregate` changed, so they fit methods whose server tensors keep their basis from round to
round: those with `supports_server_optimizer` set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayfed_sub.core.types import HOOK, ServerState, Tensors

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Optimizer, Server

Noise = Callable[[str, Sequence[int]], Tensor]
"""Function from a tensor's name and shape to the noise to add to its change."""


def advance(
    rule: Server,
    before: ServerState,
    after: ServerState,
    memory: Tensors,
    factor: float = 1.0,
    noise: Noise | None = None,
) -> tuple[ServerState, dict[str, Tensor]]:
    """The server after the round, and the rule's memory: `<name>/v` (momentum) or `<name>/m`, `<name>/v` (adam).

    after: the result of the method's `aggregate` on `before`.  factor scales the change first (FedNova, a fixed
    denominator); noise, by a tensor's name and shape, is then added to it (`privacy/mechanism.py`), before momentum and
    Adam.
    """
    if noise is None and rule.optimizer == "plain" and rule.lr * factor == 1.0:
        return after, {}
    tensors, kept = dict(after.tensors), dict(memory)
    for name in moved(before, after):
        old = before.tensors[name]
        d = factor * (after.tensors[name] - old)
        if noise is not None:
            d = d + noise(name, d.shape)
        if rule.optimizer == "momentum":
            d = kept[f"{name}/v"] = rule.momentum * memory.get(f"{name}/v", torch.zeros_like(d)) + d
        elif rule.optimizer == "adam":
            b1, b2 = rule.betas
            m = kept[f"{name}/m"] = b1 * memory.get(f"{name}/m", torch.zeros_like(d)) + (1 - b1) * d
            v = kept[f"{name}/v"] = (
                b2 * memory.get(f"{name}/v", torch.full_like(d, rule.tau**2)) + (1 - b2) * d.square()
            )
            d = m / (v.sqrt() + rule.tau)
        tensors[name] = old + rule.lr * d
    return ServerState(after.round, tensors), kept


def moved(before: ServerState, after: ServerState) -> list[str]:
    """The learned tensors that `aggregate` replaced: factors, weights and head; not moments, counters, histories or a
    hook's."""
    learned = ("/weight", "/left", "/right", "/core", "/bias")
    return [
        name
        for name, tensor in after.tensors.items()
        if name.endswith(learned) and name in before.tensors and tensor is not before.tensors[name]
        if not name.startswith(HOOK)
    ]


def nova_length(optimizer: Optimizer, lr: float, proximal: float, steps: int) -> float:
    """FedNova's normaliser |a_k|_1 of a client with so many local steps: how far, in units of lr, its w would move if
    every gradient were 1.  SGD only: a change by AdamW is no weighted sum of gradients, the paper has no rule for it.

    Plain SGD: the steps.  Momentum rho: (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho), for a buffer that begins
    the round at zero.  FedProx's mu: (1 - (1 - lr mu)^steps) / (lr mu).

    >>> from rayfed_sub.config.schema import Optimizer
    >>> nova_length(Optimizer(name="sgd"), 0.1, 0.0, 3), nova_length(Optimizer(name="sgd", momentum=0.5), 0.1, 0.0, 3)
    (3.0, 4.25)
    """
    assert optimizer.name == "sgd", "FedNova's rule is for SGD"
    buffer, way = 0.0, 0.0
    for _ in range(steps):
        buffer = optimizer.momentum * buffer + 1 - lr * proximal * way
        way += buffer
    return way


def nova_factor(weights: Sequence[float], steps: Sequence[float]) -> float:
    """FedNova's factor on the mean of changes weighed by w_k / tau_k, so that it becomes tau_eff sum p_k d_k / tau_k:

    (sum w_k / tau_k) (sum w_k tau_k) / (sum w_k)^2, at least 1.  steps: tau_k, see `nova_length`.

    >>> nova_factor([1.0, 1.0], [1, 3])  # (1 + 1/3) (1 + 3) / 4
    1.3333333333333333
    """
    per_step = sum(w / tau for w, tau in zip(weights, steps, strict=True))
    steps_of_all = sum(w * tau for w, tau in zip(weights, steps, strict=True))
    return per_step * steps_of_all / sum(weights) ** 2
