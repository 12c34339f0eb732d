"""Alerts during a run: each alert of `diagnostics/alerts.py` is raised once, and again where its rounds run
again."""

from __future__ import annotations

from collections import deque

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import RoundRow
from rayfed_sub.diagnostics.alerts import DIAGNOSED_ROUNDS, Alert, alerts
from rayfed_sub.evaluation.scores import overall
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.events import RoundDone


class Watch:
    """Raises each alert once; alerts on the rows already in `folder` were raised before.  After a coordinator's death
    these are those of its checkpoint: an alert on rounds that run again is raised again, as they are told again."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self._config, self._before = config, overall(folder.scores(0)).get("held_out_loss")
        self._rounds = [RoundRow(**row) for row in folder.rounds.to_pylist()]
        self._diagnosed = deque(folder.diagnosed_rounds(DIAGNOSED_ROUNDS), maxlen=DIAGNOSED_ROUNDS)
        self._reported = {alert.name for alert in self._alerts()}

    def add(self, done: RoundDone) -> list[Alert]:
        """Alerts that the round raises for the first time."""
        self._rounds.append(done.row)
        if done.layers:
            self._diagnosed.append((done.layers, done.client_layers))
        new = [alert for alert in self._alerts() if alert.name not in self._reported]
        self._reported |= {alert.name for alert in new}
        return new

    def _alerts(self) -> list[Alert]:
        layers = [row for rows, _ in self._diagnosed for row in rows]
        client_layers = [row for _, rows in self._diagnosed for row in rows]
        return alerts(self._rounds, layers, client_layers, self._config, before=self._before)
