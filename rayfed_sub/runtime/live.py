"""Live metrics of a run: TensorBoard scalars in the run folder, with Ray gauges on its Prometheus endpoints, and the
trackers that the configuration names."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import ray
from pyarrow import compute
from ray.util.metrics import Gauge

from rayfed_sub.config.schema import Config
from rayfed_sub.storage.run_folder import RunFolder
from rayfed_sub.telemetry.events import RoundDone
from rayfed_sub.telemetry.metrics import FIGURES, SCORES, SUMMED, judged, scalars
from rayfed_sub.telemetry.tensorboard import Events
from rayfed_sub.telemetry.trackers import Tracker


class Live:
    """Publishes the rounds after those in the tables of a folder that this run's coordinator has claimed.

    Begins the trackers.  Close it before Ray is shut down; they stay open.  Raises RunError where the disk is full.
    """

    def __init__(self, folder: RunFolder, config: Config, trackers: Sequence[Tracker] = ()) -> None:
        done = folder.rounds.num_rows
        sums = {tag: compute.sum(folder.rounds[column]).as_py() for tag, column in SUMMED.items()}
        self._sums = {tag: float(total or 0) for tag, total in sums.items()}  # None: no rows
        start = {"round/finished": float(done), **self._sums, **judged(folder.scores(done))}
        self._events, self._trackers = Events(folder.path / "tensorboard", done + 1 if done else 0), trackers
        for tracker in trackers:
            tracker.begin()
        if not done:
            self._log(0, start)
        tags = {"run": config.name, "method": str(config.method["name"]), "folder": folder.place.display_name()}
        self._gauges = Gauges(tags) if ray.is_initialized() else None
        if self._gauges is not None:
            self._gauges.show(start)

    def add(self, done: RoundDone) -> None:
        """Publishes a finished round.  Raises RunError where the disk is full."""
        values = scalars(done, self._sums)
        self._sums = {tag: values[tag] for tag in SUMMED}
        if self._gauges is not None:
            self._gauges.show(values)
        self._log(done.row.round + 1, values)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._events.add(step, values)
        for tracker in self._trackers:
            tracker.add(step, values)

    def close(self) -> None:
        """Ends the thread of the gauges."""
        if self._gauges is not None:
            self._gauges.close()


_PREFIX = "rayfed_sub_"  # Ray puts its own ray_ in front

_SECONDS = 1.0  # no emitter reports more often


class Gauges:
    """Gauges of this process, which must be connected to Ray; its node's endpoint shows them as `ray_rayfed_sub_...`.

    Ray reports a gauge's value once and forgets it two reports later, so that an ended run disappears: a daemon thread
    sets each gauge again every second until `close`.  tags: of all gauges.
    """

    def __init__(self, tags: Mapping[str, str]) -> None:
        self._tags = {key: _ascii(value) for key, value in tags.items()}
        keys = tuple(self._tags)
        self._gauges = {_PREFIX + SCORES: Gauge(_PREFIX + SCORES, "over all held-out rows", (*keys, "score"))}
        for tag, meaning in FIGURES.items():
            name, _ = gauge_of(tag)
            self._gauges[name] = Gauge(name, meaning, keys)
        self._values: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="gauges")
        self._thread.start()

    def show(self, values: Mapping[str, float]) -> None:
        """Sets the gauges of these names; others stay as they are."""
        self._values = {**self._values, **values}  # another dict: the thread may be walking through that one

    def close(self) -> None:
        """Ends the thread; Ray forgets the values within half a minute."""
        self._over.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._over.wait(_SECONDS):
            for tag, value in self._values.items():
                name, score = gauge_of(tag)
                self._gauges[name].set(value, self._tags if score is None else {**self._tags, "score": _ascii(score)})


def gauge_of(tag: str) -> tuple[str, str | None]:
    """Gauge of a metric's tag, and the score's name where it is a score.

    >>> gauge_of("loss/training"), gauge_of("scores/f1/cat")
    (('rayfed_sub_loss_training', None), ('rayfed_sub_scores', 'f1/cat'))
    """
    group, _, name = tag.partition("/")
    return (_PREFIX + SCORES, name) if group == SCORES else (_PREFIX + tag.replace("/", "_"), None)


def _ascii(text: str) -> str:
    """`text` in ASCII, the only characters that Ray takes.

    >>> _ascii("größe")
    'gr\\\\xf6\\\\xdfe'
    """
    return text.encode("ascii", "backslashreplace").decode("ascii")
