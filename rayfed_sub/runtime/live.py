"""A run's numbers while it runs: TensorBoard's scalars in the run folder, gauges on Ray's Prometheus endpoints."""

from __future__ import annotations

from pyarrow import compute

from rayfed_sub.config.schema import Config
from rayfed_sub.runtime.gauges import Gauges
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.events import RoundDone
from rayfed_sub.telemetry.metrics import SUMMED, judged, scalars
from rayfed_sub.telemetry.tensorboard import Events


class Live:
    """Shows the rounds of a sitting, which begins after those that the folder's tables hold.

    To be closed before Ray is shut down.  Raises RunError where the disk is full.
    """

    def __init__(self, folder: RunFolder, config: Config) -> None:
        done = folder.rounds.num_rows
        sums = {tag: compute.sum(folder.rounds[column]).as_py() for tag, column in SUMMED.items()}
        self._sums = {tag: float(total or 0) for tag, total in sums.items()}  # None: of nothing
        start = {"round/finished": float(done), **self._sums, **judged(folder.scores(done))}
        self._events = Events(folder.path / "tensorboard", done + 1 if done else 0)
        if not done:
            self._events.add(0, start)
        tags = {"run": config.name, "method": str(config.method["name"]), "folder": folder.place.called()}
        self._gauges = Gauges(tags)
        self._gauges.show(start)

    def add(self, done: RoundDone) -> None:
        """Shows a finished round.  Raises RunError where the disk is full."""
        values = scalars(done, self._sums)
        self._sums = {tag: values[tag] for tag in SUMMED}
        self._gauges.show(values)
        self._events.add(done.row.round + 1, values)

    def close(self) -> None:
        """Ends what repeats the gauges."""
        self._gauges.close()
