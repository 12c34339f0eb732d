"""rayfed_sub: federated fine-tuning in gradient subspaces, simulated on Ray.

>>> from rayfed_sub import load_config, run          # doctest: +SKIP
>>> run(load_config("experiments/tiny.yaml")).metrics  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayfed_sub.config import Config
from rayfed_sub.config_files import load_config
from rayfed_sub.errors import RunError, UserError

if TYPE_CHECKING:
    from rayfed_sub.engine.journal import Summary
    from rayfed_sub.engine.session import Listener

__all__ = ["Config", "RunError", "UserError", "load_config", "run"]


def run(
    config: Config, out: str | Path | None = None, listener: Listener | None = None, *, resume: bool = False
) -> Summary:
    """Runs a federated job to the end, or goes on with one; see `rayfed_sub.engine.session.run`."""
    from rayfed_sub.engine import session  # heavy: torch and Ray

    return session.run(config, out, listener, resume=resume)
