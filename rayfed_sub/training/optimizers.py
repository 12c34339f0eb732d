"""AdamW and SGD over a pack: every tensor has a leading client axis G, and each client its own step count.

AdamW is galore-torch 1.0's (after Loshchilov and Hutter, arXiv 1711.05101): eps is added before bias correction, decay
comes after the step.  The same rule serves every method, so that comparisons differ in the method alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayfed_sub.config.schema import Optimizer


def moment_roles(optimizer: Optimizer) -> tuple[str, ...]:
    """Which running averages the optimiser keeps per trained tensor: m1 (first moment), m2 (second moment)."""
    if optimizer.name == "adamw":
        return ("m1", "m2")
    return ("m1",) if optimizer.momentum else ()


def clip(grads: Sequence[Tensor], norm: float) -> None:
    """Scales every client's gradients (G, ...) in place so that their joint 2-norm is at most `norm`."""
    squares_G = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
    factor_G = (norm / (squares_G.sqrt() + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s rule
    torch._foreach_mul_(list(grads), [_spread(factor_G, g) for g in grads])


def step(
    optimizer: Optimizer,
    lr: float,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: dict[str, list[Tensor]],
    step_G: Sequence[int],
) -> None:
    """One optimiser step in place on params and moments, all (G, ...) float32.

    step_G: steps that each client had taken before this one.  moments: role -> one tensor per parameter.

    >>> p, m1, m2 = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)
    >>> step(Optimizer(eps=1e-12), 0.1, [p], [torch.full((1, 1), 5.0)], {"m1": [m1], "m2": [m2]}, [0])
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
        length_G = torch.tensor(
            [lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1)) for t in step_G], device=params[0].device
        )
        torch._foreach_mul_(directions, [_spread(length_G, d) for d in directions])
        torch._foreach_sub_(params, directions)
    elif optimizer.momentum:
        torch._foreach_mul_(moments["m1"], optimizer.momentum)
        torch._foreach_add_(moments["m1"], grads)
        torch._foreach_add_(params, moments["m1"], alpha=-lr)
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
    if optimizer.weight_decay:
        torch._foreach_mul_(params, decay(optimizer, lr))


def decay(optimizer: Optimizer, lr: float) -> float:
    """What one step's weight decay multiplies a weight with."""
    return 1 - lr * optimizer.weight_decay


def _spread(factor_G: Tensor, like: Tensor) -> Tensor:
    return factor_G.view(-1, *[1] * (like.dim() - 1))
