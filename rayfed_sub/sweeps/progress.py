"""Progress of a sweep: a record for each change of a trial, from Ray Tune's callbacks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import Callback

from rayfed_sub.core.errors import RunError
from rayfed_sub.sweeps.trial import values_of
from rayfed_sub.telemetry.events import Notice

_NOTICE_SECONDS = 60.0  # without a running trial

_GIVE_UP_SECONDS = 1800.0


class Watcher(Callback):  # type: ignore[misc]
    """Turns Tune's callbacks into records.  A trial that Tune restarts after a failure is `retried`."""

    def __init__(self, metric: str, notify: Callable[[Notice | TrialNow], None]) -> None:
        self._metric, self._notify = metric, notify
        self._began: dict[int, float] = {}
        self._reported = set[int]()
        self._idle, self._warned = time.monotonic(), False  # since when no trial runs

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Also reports trials that ended in an earlier session."""
        self._check_going(trials)
        for trial in trials:
            if trial.is_finished() and place_of(trial) not in self._reported:
                self._show(trial, "failed" if trial.get_error() else _end(trial))

    def _check_going(self, trials: list[Any]) -> None:
        """Reports a wait for resources, during which Tune is silent; raises RunError after `_GIVE_UP_SECONDS`."""
        now = time.monotonic()
        if not trials or any(trial.status != "PENDING" for trial in trials if not trial.is_finished()):
            self._idle, self._warned = now, False
        if now - self._idle > _GIVE_UP_SECONDS:
            raise RunError("sweep", f"no trial could be placed for {_GIVE_UP_SECONDS:.0f} s; look at `ray status`")
        if now - self._idle > _NOTICE_SECONDS and not self._warned:
            self._warned = True
            self._notify(Notice("waiting for a place for the next trial, e.g. for the cluster to grow"))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.on_step_begin(0, trials)  # without trials left there was no step

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._began[place_of(trial)] = time.monotonic()
        self._show(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._show(trial, "running", result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "retried")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, _end(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "failed")

    def _show(self, trial: Any, status: str, result: Mapping[str, Any] | None = None) -> None:
        self._reported.add(place_of(trial))
        reported, number = result or trial.last_result or {}, place_of(trial)
        self._notify(
            TrialNow(
                number=number,
                values=values_of(trial.config),
                status=status,
                round=reported.get("rounds", 0),
                rounds=reported.get("of_rounds", 0),
                metric=reported.get(self._metric),
                seconds=time.monotonic() - self._began.get(number, time.monotonic()),
                failure=failure_of(_error_of(trial)) if status in ("failed", "retried") else None,
            )
        )


def _end(trial: Any) -> str:
    return "finished" if (trial.last_result or {}).get("finished") else "stopped"


def place_of(trial: Any) -> int:
    """Number of a Tune trial: the name of its folder."""
    return int(Path(trial.local_path).name)


def _error_of(trial: Any) -> str | None:
    """Text of a trial's last error: Tune writes it beside the trial first, and copies it to its storage later."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(encoding="utf-8") if file is not None and file.exists() else trial.get_error()
    return None if text is None else str(text)


def failure_of(error: Exception | str | None) -> str | None:
    """Cause of a trial's failure: the last line of Ray's traceback."""
    if error is None:
        return None
    last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
    return re.sub(r"^[\w.]+Error: ", "", last[0])


@dataclass(frozen=True)
class Begun:
    """A sweep before its first trial.  keys: of the space; mode: min or max, the metric's better direction; total:
    number of trials, at_once of them concurrent; folder: the sweep's."""

    name: str
    keys: tuple[str, ...]
    metric: str
    mode: str
    total: int
    at_once: int
    folder: str


@dataclass(frozen=True)
class TrialNow:
    """State of a trial.

    values: the space's keys by dotted name.  status: "waiting", "running", "retried" (runs again after a failure),
    or at its end "finished", "stopped" (by the scheduler) or "failed".  round: finished rounds of `rounds`, which is
    0 until it is known.  metric: the sweep's, None before the first evaluation.  seconds: since the trial began.
    """

    number: int
    values: Mapping[str, Any]
    status: str
    round: int
    rounds: int
    metric: float | None
    seconds: float
    failure: str | None = None
