"""What goes wrong with a run while it runs: each symptom of `analysis/symptoms.py` is told once."""

from __future__ import annotations

from collections import deque

from rayfed_sub.analysis.diagnostics import ClientLayer, CohortLayer
from rayfed_sub.analysis.scores import overall
from rayfed_sub.analysis.symptoms import Symptom, symptoms
from rayfed_sub.config import Config
from rayfed_sub.engine.folder import RunFolder
from rayfed_sub.engine.journal import RoundDone, RoundRow

_LOOKS = 3  # rounds of diagnostics that the rules read


class Watch:
    """folder: what is in it was told in an earlier sitting."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self._config, self._before = config, overall(folder.scores(0)).get("held_out_loss")
        self._rounds = [RoundRow(**row) for row in folder.rounds.to_pylist()]
        self._layers: deque[tuple[CohortLayer, ...]] = deque(maxlen=_LOOKS)
        self._client_layers: deque[tuple[ClientLayer, ...]] = deque(maxlen=_LOOKS)
        self._told = {symptom.name for symptom in self._symptoms()}

    def add(self, done: RoundDone) -> list[Symptom]:
        """What the round shows for the first time."""
        self._rounds.append(done.row)
        if done.layers:
            self._layers.append(done.layers)
            self._client_layers.append(done.client_layers)
        new = [symptom for symptom in self._symptoms() if symptom.name not in self._told]
        self._told |= {symptom.name for symptom in new}
        return new

    def _symptoms(self) -> list[Symptom]:
        layers = [row for look in self._layers for row in look]
        client_layers = [row for look in self._client_layers for row in look]
        return symptoms(self._rounds, layers, client_layers, self._config, before=self._before)
