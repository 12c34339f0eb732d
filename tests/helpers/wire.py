"""A method's `wire` formula as numbers."""

from __future__ import annotations

import re

from rayfed_sub.methods.protocol import Method


def uplink_numbers(method: Method, round: int, m: int, n: int, rank: int, periods: int = 1) -> int:
    """Numbers that a client uploads for a layer (m, n) in a round, by the part of `wire` before the slash.

    Alternatives "a, b in turn" hold in even and odd rounds.
    """
    up = method.wire.partition(" / ")[0]
    turns = up.removesuffix(" in turn").split(", ") if up.endswith(" in turn") else [up]
    formula = turns[round % len(turns)].replace("^", "**")
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula)  # a blank between two factors
    return int(eval(product, {"m": m, "n": n, "r": rank, "k": periods, "max": max, "min": min}))
