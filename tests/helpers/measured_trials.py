"""Runs side by side on one node over one backbone and one data set, with their memory measured.

`python -m tests.helpers.measured_trials FOLDER COUNT KEY=VALUE ...` prints the peak memory of so many runs of the
quickstart as JSON: `private`, the private memory of coordinators and workers, summed; `store`, the growth of the object
store's file since before the first run (the file never shrinks); `both` at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import ray

from rayfed_sub import load_config
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.runtime.fork_server import fork_server
from rayfed_sub.runtime.local_ray import ray_session
from rayfed_sub.runtime.object_store import Shared
from rayfed_sub.runtime.rounds import carry_out
from rayfed_sub.runtime.session import load_backbone, spec_of
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create, new

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
SMALL = [
    *("federation.clients=4", "federation.rounds=3", "federation.local_steps=2", "federation.batch_size=2"),
    *("evaluation.eval_rows=16", "evaluation.generate_rows=0"),
    *("resources.workers=1", "resources.cpus_per_worker=0.5", "resources.pack_size=2"),
]
TITLES = ("ray::Coordinator", "ray::Worker")


@dataclass(frozen=True)
class Peaks:
    """Bytes; 0.2 seconds between samples."""

    private: int
    store: int
    both: int
    coordinators: int
    workers: int
    sha256: tuple[str, ...]


def processes() -> list[tuple[str, psutil.Process]]:
    """Coordinators and workers among the descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = process.cmdline()[:1]
            found += [(name, process) for name in TITLES if title and title[0].startswith(name)]
    return found


def private() -> dict[str, int]:
    """Anonymous memory by kind of process, summed; it contains nothing of the object store."""
    sums = dict.fromkeys(TITLES, 0)
    for name, process in processes():
        with contextlib.suppress(OSError):  # it has ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            sums[name] += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return sums


def store_file() -> Path:
    """The object store's memory: an unnamed file that the raylet holds open."""
    for process in psutil.Process().children(recursive=True):
        if process.name() == "raylet":
            for handle in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if "plasma" in str(handle.readlink()):
                        return handle
    raise RuntimeError("no object store")


class Meter:
    """Samples every 0.2 s while entered."""

    def __init__(self) -> None:
        self._store, self._over = store_file(), threading.Event()
        self._before = self._stored()
        self.rows: list[tuple[int, int, int]] = []  # coordinators, workers, store

    def _stored(self) -> int:
        return 512 * self._store.stat().st_blocks

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.rows.append((*private().values(), self._stored() - self._before))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def peaks(self, sha256: tuple[str, ...]) -> Peaks:
        coordinators, workers, store = (max(column) for column in zip(*self.rows, strict=True))
        return Peaks(
            max(a + b for a, b, _ in self.rows), store, max(map(sum, self.rows)), coordinators, workers, sha256
        )


def side_by_side(job: Job, shared: Shared, folder: Path, count: int) -> Peaks:
    """So many runs at once, each in a folder of its own."""
    meter = Meter()

    def one(number: int) -> str:
        own = create(new(Place(folder / f"{count}-{number}"), job.config.name), job.config)
        return carry_out(job, shared, own, lambda record: None, time.perf_counter()).weights_sha256

    with meter.watching(), ThreadPoolExecutor(count) as pool:
        return meter.peaks(tuple(pool.map(one, range(count))))


def main(folder: Path, count: int, overrides: list[str]) -> None:
    job = prepare(load_config(QUICKSTART, [*SMALL, *overrides]))
    # Ray frees objects a second late, and the next broadcast would take new pages.
    os.environ.setdefault("RAY_free_objects_batch_size", "1")
    with fork_server(wanted=job.config.resources.forked) as forks, ray_session(forks):
        shared = Shared(ray.put(spec_of(job)), ray.put(load_backbone(job)), ray.put(job.dataset))
        print(json.dumps(asdict(side_by_side(job, shared, folder, count))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
