"""Scores of a language model over its labels, the tokens to predict."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss), for a mean loss in nats per label; inf where that is beyond a float, nan for nan.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def token_accuracy(hits: int, labels: int) -> float | None:
    """The share of labels that were the most probable token, in [0, 1]; None without labels.

    >>> token_accuracy(3, 4), token_accuracy(0, 0)
    (0.75, None)
    """
    return hits / labels if labels else None
