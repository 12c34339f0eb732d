"""AdamW and SGD over a pack: every tensor has a leading client axis G, and each client its own step count.

AdamW is galore-torch 1.0's (after Loshchilov and Hutter, arXiv 1711.05101): eps is added before bias correction, decay
comes after the step.  The same rule serves every method, so that comparisons differ in the method alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayfed_sub.core.devices import onto
from rayfed_sub.core.types import OptimizerRule


def moment_roles(optimizer: OptimizerRule) -> tuple[str, ...]:
    """Running averages of the optimizer per trained tensor: m1 (first moment), m2 (second moment)."""
    if optimizer.name == "adamw":
        return ("m1", "m2")
    return ("m1",) if optimizer.momentum else ()


def clip(grads: Sequence[Tensor], norm: float) -> None:
    """Scales every client's gradients (G, ...) in place so that their joint 2-norm is at most `norm`."""
    # Client by client down to the last sum: a sum over an axis that does not come last takes another path for one.
    squares_GK = torch.stack([g.flatten(1).square().sum(1) for g in grads], dim=1)
    factor_G = (norm / (squares_GK.sum(1).sqrt() + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s rule
    torch._foreach_mul_(list(grads), [_spread(factor_G, g) for g in grads])


def step(
    optimizer: OptimizerRule,
    lr: float,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: dict[str, list[Tensor]],
    steps: Sequence[Sequence[int]],
) -> None:
    """Optimiser step in place on params and moments, all (G, ...) float32.

    steps: per parameter the steps that each client had taken before this one.  moments: role -> one tensor per
    parameter.

    >>> from rayfed_sub.config.schema import Optimizer
    >>> p, m1, m2 = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step(Optimizer(eps=1e-12), 0.1, [p], [torch.full((1, 1), 5.0)], {"m1": [m1], "m2": [m2]}, [[0]])
    >>> p  # Adam's first step has length lr
    tensor([[-0.1000]])
    """
    if not params:
        return
    params, grads = list(params), list(grads)
    if optimizer.name == "adamw":
        b1, b2 = optimizer.betas
        torch._foreach_lerp_(moments["m1"], grads, 1 - b1)
        torch._foreach_mul_(moments["m2"], b2)
        torch._foreach_addcmul_(moments["m2"], grads, grads, 1 - b2)
        denominators = torch._foreach_sqrt(moments["m2"])
        torch._foreach_add_(denominators, optimizer.eps)
        directions = torch._foreach_div(moments["m1"], denominators)
        length_G = {
            step_G: onto([lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1)) for t in step_G], params[0].device)
            for step_G in set(map(tuple, steps))
        }
        torch._foreach_mul_(
            directions, [_spread(length_G[tuple(own)], d) for own, d in zip(steps, directions, strict=True)]
        )
        torch._foreach_sub_(params, directions)
    elif optimizer.momentum:
        torch._foreach_mul_(moments["m1"], optimizer.momentum)
        torch._foreach_add_(moments["m1"], grads)
        torch._foreach_add_(params, moments["m1"], alpha=-lr)
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
    if optimizer.weight_decay:
        torch._foreach_mul_(params, decay(optimizer, lr))


def decay(optimizer: OptimizerRule, lr: float) -> float:
    """Factor of one step's weight decay on a weight."""
    return 1 - lr * optimizer.weight_decay


def _spread(factor_G: Tensor, like: Tensor) -> Tensor:
    return factor_G.view(-1, *[1] * (like.dim() - 1))
