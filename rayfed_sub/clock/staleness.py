"""Weights of stale updates: FedBuff (Nguyen et al., arXiv 2106.06639) and FedAsync (Xie, Koyejo, Gupta, arXiv
1903.03934).

A client that began from version v of the server and counts at version t has staleness t - v.  FedBuff's step is the
mean over the buffer's K changes, each times its discount, so a stale buffer takes a shorter step.  FedAsync moves the
server by alpha times the discount towards one client's model.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayfed_sub.config.schema import Asynchronous


def discount(staleness: int, exponent: float) -> float:
    """(1 + staleness) ** -exponent; 1 for a client that is not stale.

    >>> discount(0, 0.5), discount(3, 0.5)
    (1.0, 0.5)
    """
    return float((1 + staleness) ** -exponent)


def step_factor(rule: Asynchronous, weights: Sequence[float], staleness: Sequence[int]) -> float:
    """Factor on the step towards the mean of updates that are weighted by weight and discount.

    FedBuff: sum of weights times discounts over the sum of weights, so that the denominator is that of the whole
    buffer.  FedAsync: mixing times the discount of its one update.

    >>> step_factor(Asynchronous(buffer=2), [1.0, 1.0], [0, 3])
    0.75
    >>> step_factor(Asynchronous(rule="fedasync", mixing=0.6), [5.0], [3])
    0.3
    """
    discounts = [discount(stale, rule.exponent) for stale in staleness]
    if rule.rule == "fedasync":
        return rule.mixing * (discounts[0] if discounts else 1.0)
    if not any(staleness) or not sum(weights):
        return 1.0
    return sum(weight * each for weight, each in zip(weights, discounts, strict=True)) / sum(weights)
