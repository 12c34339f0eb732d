"""Privacy spent by a run under differential privacy: (epsilon, delta) by dp-accounting.

The mechanism is `rayfed_sub/privacy/mechanism.py`: every round the Gaussian mechanism, noise times the sensitivity, on
a Poisson sample of the clients; the accountants' neighbours differ by one client more or less.  With
privacy.unit=example it is `rayfed_sub/privacy/examples.py`: every local step the Gaussian mechanism on a Poisson sample
of the client's rows; the neighbours differ by one training row more or less at one client.  Partitions that give a row
to several clients are refused, so it meets no other client's mechanism, and epsilon is the largest of all clients'.

Two accountants give upper bounds, and the smaller one counts.  PLD composes privacy loss distributions on a grid, never
below the true ones (Connect the Dots: Doroshenko et al., arXiv 2207.04380), and is as tight as its grid is fine.  RDP,
the cross-check, takes Renyi divergences (Mironov, Talwar, Zhang, arXiv 1908.10530; converted as by Canonne, Kamath,
Steinke, arXiv 2004.00010): a sixth more epsilon is usual, several times as much where sampling is sparse.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError

Draws = tuple[tuple[float, int], ...]
"""Pairs of a chance to be drawn and a number of Gaussian mechanisms on such samples, one for each group of clients, or
rows, that may have spent most; () where nothing was released."""

NOISES = (1e-6, 1e6)
"""The noises that RDP can judge: beyond, its sums over- and underflow, and it may say 0 where nothing is private."""
_DIGITS, _CLOSE = 5, 1e-4  # of a noise that is found, and how near it is to the smallest one
_NOTHING = 1e6  # an epsilon by RDP that protects nothing: PLD would overflow
_FINE, _A_ROUND, _POINTS = 3e3, 100.0, 5e5  # of the grid: see `_grid`
_TAIL = 1e-15  # mass that PLD lets go of, on delta's side


def noise_of(config: Config, draws: Callable[[], Draws]) -> float | None:
    """The noise as a multiple of the clipping norm: as set, or found for privacy.epsilon over the `draws` of all
    rounds; None without privacy.  Raises UserError where no noise keeps the budget."""
    privacy = config.privacy
    if privacy.epsilon is None:
        return privacy.noise
    found = NOISES[0]
    asked = draws()
    while asked:
        bounds = {own: renyi_epsilons(max(found, 1.0), *own, (privacy.delta,))[0] for own in asked}
        q, times = max(asked, key=lambda own: (bounds[own], own))
        found = max(found, noise_for(privacy.epsilon, privacy.delta, q, times))
        others = (own for own in asked if own != (q, times))
        asked = tuple(own for own in others if epsilon(found, *own, privacy.delta) > privacy.epsilon)
    return found


def spent(config: Config, noise: float | None, draws: Callable[[], Draws]) -> float | None:
    """epsilon of the `draws` of the finished rounds at privacy.delta; None without privacy."""
    return None if noise is None else _largest(noise, draws(), config.privacy.delta)[0]


def account(config: Config, noise: float | None, draws: Callable[[], Draws]) -> dict[str, Any] | None:
    """Epsilon and delta of the `draws`, the accountant of that bound (PLD, or RDP where its own is smaller), RDP's
    epsilon as the cross-check, the noise, the epsilon that was asked for (None where the noise was set), and what is
    protected; None without privacy."""
    if noise is None:
        return None
    privacy = config.privacy
    smallest, by_renyi = _largest(noise, draws(), privacy.delta)
    return {
        "epsilon": smallest,
        "delta": privacy.delta,
        "accountant": "PLD" if smallest < by_renyi else "RDP",
        "epsilon_rdp": by_renyi,
        "noise": noise,
        "epsilon_asked": privacy.epsilon,
        "unit": privacy.unit,
    }


def _largest(noise: float, draws: Draws, delta: float) -> tuple[float, float]:
    """The largest epsilon of all draws, and RDP's largest.  PLD, the slower one, is asked in the order of RDP's bounds,
    which are no smaller, and only while one of these exceeds what has been found."""
    found, by_renyi = 0.0, 0.0
    bounds = [(renyi_epsilons(noise, q, times, (delta,))[0], q, times) for q, times in draws]
    for bound, q, times in sorted(bounds, reverse=True):
        by_renyi = max(by_renyi, bound)
        if bound > found:
            found = max(found, epsilon(noise, q, times, delta))
    return found, by_renyi


@functools.lru_cache(maxsize=256)
def epsilon(noise: float, q: float, rounds: int, delta: float) -> float:
    """epsilon of `rounds` rounds at chance q of taking part, with noise as a multiple of the clipping norm.

    >>> 1 < epsilon(noise=1.1, q=0.01, rounds=1000, delta=1e-5) < 2
    True
    """
    renyi, widest = renyi_epsilons(noise, q, rounds, (delta, _TAIL))
    if not 0 < renyi <= _NOTHING:
        return renyi
    from dp_accounting.pld import PLDAccountant

    with _quiet():
        accountant = PLDAccountant(value_discretization_interval=_grid(noise, rounds, renyi, widest))
        accountant.compose(_event(noise, q, rounds))
        return min(renyi, float(accountant.get_epsilon(delta)))


def renyi_epsilons(noise: float, q: float, rounds: int, deltas: tuple[float, ...]) -> list[float]:
    """RDP's epsilon at each delta; otherwise as `epsilon`."""
    from dp_accounting.rdp import RdpAccountant

    with _quiet():
        accountant = RdpAccountant()
        accountant.compose(_event(noise, q, rounds))
        return [float(accountant.get_epsilon(delta)) for delta in deltas]


@functools.cache
def noise_for(target: float, delta: float, q: float, rounds: int) -> float:
    """The smallest noise within NOISES whose epsilon does not exceed `target`, up to a few ten-thousandths.

    Raises UserError (privacy.epsilon) where there is none.
    """
    from scipy.optimize import brentq

    least, most = NOISES

    def over(z: float) -> float:
        return epsilon(z, q, rounds, delta) / target - 1

    if over(least) <= 0:
        return least
    if over(most) > 0:
        allowed = f"a budget that {rounds} rounds can keep at privacy.delta={delta:g}"
        raise UserError("privacy.epsilon", target, allowed, "raise it")
    low, high = least, most
    while high > 1.01 * low:  # by RDP, which is quick: enough noise, and little too much
        middle = math.sqrt(low * high)
        low, high = (low, middle) if renyi_epsilons(middle, q, rounds, (delta,))[0] <= target else (middle, high)
    while over(low := max(least, low / 1.3)) <= 0:  # by PLD, most of a second a call: too little
        high = low
    root = brentq(over, low, high, xtol=_CLOSE * high)
    while over(found := _decimals(root)) > 0:
        root = found * (1 + _CLOSE)
    return found


def _decimals(z: float) -> float:
    """The next number of so many digits that is not below z."""
    unit = 10.0 ** (math.floor(math.log10(z)) + 1 - _DIGITS)
    return float(f"{math.ceil(z / unit * (1 - 1e-12)) * unit:.{_DIGITS}g}")


def _event(noise: float, q: float, rounds: int) -> Any:
    import dp_accounting

    if q == 1:  # so many Gaussian mechanisms are one
        return dp_accounting.GaussianDpEvent(noise / math.sqrt(rounds))
    a_round = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(a_round, rounds)


def _grid(noise: float, rounds: int, renyi: float, widest: float) -> float:
    """The distance of PLD's grid points: a three-thousandth of the epsilon that is looked for, below a round's share
    of it, for what rounding up costs is a round's; but no more than half a million points for the largest loss of a
    round (20 deviations out) and of all of them (`widest`), which bounds time and memory."""
    loss = (1 + 20 * noise) / (2 * noise**2)
    return max(renyi / (_FINE + _A_ROUND * math.sqrt(rounds)), max(loss, widest) / _POINTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for every Renyi order that the accountant cannot compute and leaves out: epsilon stays a bound.
    absl would also set up logging for the whole process where nobody has; a handler that does nothing keeps it from it.
    """
    from absl import logging as absl_logging

    before, handler = absl_logging.get_verbosity(), logging.NullHandler()
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        absl_logging.set_verbosity(before)
