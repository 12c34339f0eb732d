"""What a sweep tells while it goes: one record per change of a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Begun:
    """A sweep before its first trial.  keys: the space's; mode: min or max, the metric's better end; total: trials,
    of which at_once go side by side; folder: the sweep's."""

    name: str
    keys: tuple[str, ...]
    metric: str
    mode: str
    total: int
    at_once: int
    folder: str


@dataclass(frozen=True)
class TrialNow:
    """A trial as it stands.

    values: the space's keys by dotted name.  status: "waiting", "running", "retried" (runs again after a failure),
    or at its end "finished", "stopped" (by the scheduler) or "failed".  round: finished rounds of `rounds`, which are
    0 until they are known.  metric: the sweep's own, None before the first evaluation.  seconds: since the trial began.
    """

    number: int
    values: Mapping[str, Any]
    status: str
    round: int
    rounds: int
    metric: float | None
    seconds: float
    failure: str | None = None
