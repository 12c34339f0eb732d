"""The course of a run between its rounds: early stopping, callbacks, and which round is the best.

What is decided after so many finished rounds is recorded in the run's log before it takes effect.  A round that runs
again, after any death, is followed by what the log says, and nobody is asked a second time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import RoundRow, Score
from rayfed_sub.core.text import LOWER, count, number
from rayfed_sub.evaluation.early_stopping import best_round, without_gain
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.runtime.callbacks import asked
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.events import Callback, Decided, Progress, RoundDone


class Course:
    """Course of the run in `folder`, whose tables hold the finished rounds.  callbacks: by name."""

    def __init__(self, folder: RunFolder, config: Config, callbacks: Mapping[str, Callback]) -> None:
        self._folder, self._config, self._callbacks = folder, config, callbacks
        self._rows = [RoundRow(**row) for row in folder.rounds.to_pylist()]
        self._scores = folder.overall_scores()
        self._decided = folder.decisions()

    def add(self, done: RoundDone) -> None:
        """Takes note of a finished round."""
        self._rows.append(done.row)
        self.judged(done.row.round + 1, done.scores)

    def judged(self, finished: int, scores: Sequence[Score]) -> None:
        """Takes note of the scores after so many rounds; none where they were not judged."""
        if scores:
            self._scores[finished] = overall(scores)

    @property
    def best(self) -> int | None:
        """Finished rounds of the model with the best score; None without early_stopping.metric."""
        return best_round(self._watched(), lower=self._config.early_stopping.metric in LOWER)

    def best_score(self) -> dict[str, object] | None:
        """The best model, as the summary names it."""
        finished, metric = self.best, self._config.early_stopping.metric
        if finished is None or metric is None:
            return None
        return {"round": finished, "metric": metric, "value": self._scores[finished][metric]}

    def decide(self, finished: int) -> Decided:
        """What holds for the round after so many finished ones: from the log, or decided now, and then recorded.

        Raises RunError where a callback fails, and where the disk is full."""
        if finished in self._decided:
            return self._decided[finished]
        earlier = [self._decided[at] for at in sorted(self._decided) if at < finished]
        factor = earlier[-1].lr_factor if earlier else 1.0
        if not finished:
            return Decided(finished, factor)
        now = Decided(finished, factor, self._stalled())
        if now.stop is None and self._callbacks:
            rows = tuple(self._rows)
            now = asked(self._callbacks, Progress(self._config, finished, rows, dict(self._scores), factor))
        if now.stop is not None or self._callbacks:
            self._folder.record(now)
            self._decided[finished] = now
        return now

    def _watched(self) -> dict[int, float]:
        """The watched score of every judged model but the initial one."""
        metric = self._config.early_stopping.metric
        if metric is None:
            return {}
        # A score that is not defined for the rows, as correlations of one prediction for all, is no gain.
        watched = {finished: scores.get(metric, math.nan) for finished, scores in self._scores.items() if finished}
        return {finished: score for finished, score in watched.items() if self._scores[finished]}

    def _stalled(self) -> str | None:
        """Why early stopping ends the run; None where it goes on."""
        asked_for, scores = self._config.early_stopping, self._watched()
        if asked_for.patience is None or asked_for.metric is None:
            return None
        waited = without_gain(scores, lower=asked_for.metric in LOWER, min_gain=asked_for.min_gain)
        if waited < asked_for.patience:
            return None
        gain = f"by more than {number(asked_for.min_gain)} " if asked_for.min_gain else ""
        return f"{asked_for.metric} has not gained {gain}in {count('evaluation', waited)}"
