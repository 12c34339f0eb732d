"""Memory over rounds and over client counts, measured: writes results/scale/memory.csv and prints a table.

    python -m experiments.scale.measure [KEY=VALUE ...]

One run for each number of registered clients, 100 of them sampled a round.  Memory is what the processes of the run
take: what is private to them (USS), and that with shared pages by their share (PSS), which moves from Ray's own
processes to these as they come to read more of the object store's pages.  Disk is what the run folder holds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from rayfed_sub import UserError, load_config, run
from rayfed_sub.cli.run_view import print_table, size
from rayfed_sub.telemetry.events import RoundDone, Started

HERE = Path(__file__).parent
FILE = HERE.parent / "results" / "scale" / "memory.csv"
COUNTS = (100, 1_000, 10_000)
COLUMNS = ("clients", "round", "driver_pss", "coordinator_pss", "workers_pss", "uss", "disk", "seconds")


class Meter:
    """A listener that notes one row for every finished round, bytes and seconds."""

    def __init__(self, clients: int) -> None:
        self.rows: list[tuple[float, ...]] = []
        self.began, self.started, self._clients = time.perf_counter(), 0.0, clients
        self._folder = Path()

    def __call__(self, record: Any) -> None:
        if isinstance(record, Started):
            self.started, self._folder = time.perf_counter() - self.began, Path(record.folder)
        if isinstance(record, RoundDone):
            pss, uss = _memory()
            disk = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
            row = (self._clients, record.row.round + 1, *pss, uss, disk, record.row.seconds)
            self.rows.append(row)
            print(*row, flush=True)


def _memory() -> tuple[list[int], int]:
    """PSS of this process, of the coordinator, of the workers; USS of all."""
    titles = {"": [psutil.Process()], "ray::Coordinator": [], "ray::Worker": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = next((t for t in titles if t and " ".join(process.cmdline()).startswith(t)), None)
            if title:
                titles[title].append(process)
    memory = {title: [process.memory_full_info() for process in found] for title, found in titles.items()}
    return [sum(m.pss for m in found) for found in memory.values()], sum(m.uss for f in memory.values() for m in f)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of rayfed-sub run")
    overrides = parser.parse_args().overrides
    try:
        for clients in COUNTS:
            load_config(HERE / "clients.yaml", [f"federation.clients={clients}", *overrides])
    except UserError as error:
        parser.error(str(error))
    rows, table = [], []
    for clients in COUNTS:
        config = load_config(HERE / "clients.yaml", [f"federation.clients={clients}", *overrides])
        meter = Meter(clients)
        with TemporaryDirectory(dir=".") as folder:
            run(config, Path(folder) / "run", meter)
        rows += meter.rows
        half, last = meter.rows[len(meter.rows) // 2 - 1], meter.rows[-1]
        seconds = statistics.median(row[-1] for row in meter.rows[1:])
        memory = [size(value) for value in (half[5], last[5], max(sum(row[2:5]) for row in meter.rows), last[6])]
        table.append((f"{clients:,}", f"{meter.started:.0f} s", f"{seconds:.0f} s", *memory))
    with FILE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    columns = ("clients", "start", "a round", "USS, halfway", "USS, at the end", "largest PSS", "disk")
    print_table(columns, table)


if __name__ == "__main__":
    main()
