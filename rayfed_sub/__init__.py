"""rayfed_sub: federated fine-tuning in gradient subspaces, simulated on Ray.

>>> from rayfed_sub import load_config, run          # doctest: +SKIP
>>> run(load_config("experiments/tiny.yaml")).metrics  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.telemetry.events import Decision, Progress

if TYPE_CHECKING:
    from rayfed_sub.runtime.session import Listener
    from rayfed_sub.sweeps.outcome import SweepResult
    from rayfed_sub.telemetry.events import Callback, Summary

__all__ = ["Config", "Decision", "Progress", "RunError", "UserError", "load_config", "run", "sweep"]


def run(
    config: Config,
    out: str | Path | None = None,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Summary:
    """Runs a federated job to the end, or goes on with one; with a report; see `rayfed_sub.runtime.session.run`."""
    from rayfed_sub.reports.report import report_run  # heavy: torch and Ray
    from rayfed_sub.runtime import session

    return session.run(config, out, listener, resume=resume, address=address, finish=report_run, callbacks=callbacks)


def sweep(
    file: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
) -> SweepResult:
    """Runs the sweep that a YAML file describes, or goes on with it; see `rayfed_sub.sweeps.runner.run_sweep`.

    The result has the table of trials as a pandas DataFrame, the best configuration, and Ray Tune's ResultGrid.
    """
    from rayfed_sub.sweeps.runner import run_sweep
    from rayfed_sub.sweeps.space import load_sweep

    return run_sweep(load_sweep(file, overrides), out, resume=resume, address=address)
