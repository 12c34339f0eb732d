"""What a run under differential privacy has spent: (epsilon, delta) by dp-accounting's Renyi accountant.

The mechanism is `rayfed_sub/methods/privacy.py`: every round the Gaussian mechanism, noise times the sensitivity, on a
Poisson sample of the clients; the accountant's neighbours differ by one client more or less.  Renyi divergences of the
sampled mechanism: Mironov, Talwar, Zhang, arXiv 1908.10530; their conversion: Canonne, Kamath, Steinke, arXiv
2004.00010.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayfed_sub.config import Config
from rayfed_sub.errors import UserError

NOISES = (1e-6, 1e6)
"""What the accountant can judge: beyond, its sums over- and underflow, and it may say 0 where nothing is private."""
_DIGITS = 5  # of a noise that was found: it stands in the configuration of the run


def spent(config: Config, rounds: int) -> float | None:
    """epsilon of the first `rounds` rounds at privacy.delta; None without privacy."""
    privacy, federation = config.privacy, config.federation
    if privacy.noise is None:
        return None
    q = federation.cohort / federation.clients
    return epsilon(privacy.noise, q, rounds, privacy.delta)


def epsilon(noise: float, q: float, rounds: int, delta: float) -> float:
    """epsilon of `rounds` rounds at chance q of taking part, with noise as a multiple of the clipping norm.

    >>> 1 < epsilon(noise=1.1, q=0.01, rounds=1000, delta=1e-5) < 2
    True
    """
    from dp_accounting.rdp import RdpAccountant

    with _quiet():
        accountant = RdpAccountant()
        accountant.compose(_event(noise, q, rounds))
        return float(accountant.get_epsilon(delta))


def noise_for(target: float, delta: float, q: float, rounds: int) -> float:
    """The smallest noise within NOISES, rounded up to 5 digits, whose epsilon does not exceed `target`.

    Raises UserError (privacy.epsilon) where there is none.
    """
    from dp_accounting import calibrate_dp_mechanism
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError
    from dp_accounting.rdp import RdpAccountant

    least, most = NOISES
    try:
        with _quiet():
            found = float(calibrate_dp_mechanism(RdpAccountant, lambda z: _event(z, q, rounds), target, delta))
    except NoBracketIntervalFoundError:
        found = math.inf
    if found > most:
        allowed = f"a budget that {rounds} rounds can keep at privacy.delta={delta:g}"
        raise UserError("privacy.epsilon", target, allowed, "raise it")
    unit = 10.0 ** (math.floor(math.log10(max(found, least))) + 1 - _DIGITS)
    return float(f"{math.ceil(max(found, least) / unit) * unit:.{_DIGITS}g}")


def _event(noise: float, q: float, rounds: int) -> Any:
    import dp_accounting

    a_round = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(a_round, rounds)


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
