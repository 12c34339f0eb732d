"""rayfed_sub: federated fine-tuning in gradient subspaces, simulated on Ray.

>>> from rayfed_sub import load_config, run          # doctest: +SKIP
>>> run(load_config("experiments/tiny.yaml")).metrics  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayfed_sub.config import Config
from rayfed_sub.config_files import load_config
from rayfed_sub.errors import RunError, UserError

if TYPE_CHECKING:
    from rayfed_sub.engine.journal import Summary
    from rayfed_sub.engine.session import Listener
    from rayfed_sub.sweeps.outcome import SweepResult

__all__ = ["Config", "RunError", "UserError", "load_config", "run", "sweep"]


def run(
    config: Config,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> Summary:
    """Runs a federated job to the end, or goes on with one; see `rayfed_sub.engine.session.run`."""
    from rayfed_sub.engine import session  # heavy: torch and Ray

    return session.run(config, out, listener, resume=resume, address=address)


def sweep(
    file: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Runs the sweep that a YAML file describes, or goes on with it; see `rayfed_sub.sweeps.session.run_sweep`.

    The result has the table of trials as a pandas DataFrame, the best configuration, and Ray Tune's ResultGrid.
    """
    from rayfed_sub.sweeps.session import run_sweep
    from rayfed_sub.sweeps.space import load_sweep

    return run_sweep(load_sweep(file, overrides), out, resume=resume, address=address)
