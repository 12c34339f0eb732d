"""A sweep's keys and values in few characters, for tables and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WORD = 24
"""Characters of a value in a figure."""


def headings(keys: Sequence[str]) -> dict[str, str]:
    """For every dotted key its last part, or as many of its last parts as tell it from the others.

    >>> headings(["method.rank", "optimizer.lr", "server.lr"])
    {'method.rank': 'rank', 'optimizer.lr': 'optimizer.lr', 'server.lr': 'server.lr'}
    """
    alone = {key: (tail for tail in _tails(key) if sum(_ends(other, tail) for other in keys) == 1) for key in keys}
    return {key: next(tails, key) for key, tails in alone.items()}


def worded(value: object) -> str:
    """A value as short as it can be read: four digits, and powers of ten where the number is small or large.

    >>> [worded(value) for value in (8, 0.003, 0.01, 0.25, 2.5e7, 1.0, "fedit", None)]
    ['8', '3e-3', '1e-2', '0.25', '2.5e7', '1', 'fedit', '-']
    """
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if math.isnan(value):
        return "-"
    if value and not 0.01 < abs(value) < 1e5:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}" if power else digits
    return f"{value:.4g}"


def score(value: float) -> str:
    """A metric to four digits after the point, or where that says nothing to four digits.

    >>> score(2.73051), score(0.00002), score(123456.0)
    ('2.7305', '2e-5', '1.235e5')
    """
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e4 else worded(value)


def short(value: object) -> str:
    """A value in a figure."""
    text = worded(value)
    return text if len(text) <= _WORD else f"{text[: _WORD - 1]}…"


def _tails(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _ends(key: str, tail: str) -> bool:
    return key == tail or key.endswith(f".{tail}")
