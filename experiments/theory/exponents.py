"""Exponents of power laws: slopes of least-squares lines through log y over log x, one for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t


@dataclass(frozen=True)
class Exponent:
    """The mean of the seeds' slopes, the ends of its 95 % interval by Student's t over the seeds, and the share of the
    variance of log y within a seed that lines of this slope explain.

    `explained` below some 0.9: there is no power law over this range, and the slope is an average over it.
    """

    slope: float
    low: float
    high: float
    explained: float

    def __str__(self) -> str:
        return f"{self.slope:+.2f} [{self.low:+.2f}, {self.high:+.2f}], {self.explained:.2f}"


def exponent(points: Sequence[tuple[int, float, float]]) -> Exponent:
    """The exponent of y over x from (seed, x, y).

    Two seeds at least, each with two values of x at least; x and y are above zero.

    >>> e = exponent([(seed, x, (seed + 1) * x**2.0) for seed in range(3) for x in (1, 2, 4)])
    >>> round(e.slope, 9), round(e.low, 9), round(e.explained, 9)
    (2.0, 2.0, 1.0)
    """
    seeds = sorted({seed for seed, _, _ in points})
    centred = [_centred([point[1:] for point in points if point[0] == seed]) for seed in seeds]
    slopes = np.array([x @ y / (x @ x) for x, y in centred])
    slope = float(slopes.mean())
    half = float(t.ppf(0.975, len(seeds) - 1) * slopes.std(ddof=1) / len(seeds) ** 0.5)
    x, y = np.concatenate(centred, axis=1)
    left, whole = float(((y - slope * x) ** 2).sum()), float(y @ y)
    return Exponent(slope, slope - half, slope + half, 1 - left / whole if whole else 1.0)


def _centred(points: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """log x and log y, (2, points), each less its mean."""
    logs = np.log(np.array(points, dtype=np.float64)).T
    centred: NDArray[np.float64] = logs - logs.mean(axis=1, keepdims=True)
    return centred
