"""What the engines themselves cost where clients have nothing to compute: time, traffic and memory a client.

    python -m experiments.benchmarks.overhead [PART ...] [--flower PYTHON] [--out FILE]

time: 1,000 clients of a tiny model, packs of 100.  traffic: a model whose trained weights take 41.9 MB, 48 clients.
memory: how the peak grows with every added client of the tiny model.  --flower: the Python of an environment with
Flower.  Figures of time and traffic are medians over all rounds but the first and the last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from experiments.benchmarks.loads import FEDFTG, IDLE, LARGE, TINY, Load
from experiments.benchmarks.machine import told
from experiments.benchmarks.meter import metered
from rayfed_sub.cli.run_view import print_table, size

ROOT = Path(__file__).parents[2]
WORKERS = 2
OURS, FLOWER = "rayfed_sub", "flower"
TRAINED, MOST, LEAST = "train, send low-rank", "send 41.9 MB back", "send nothing back"


@dataclass(frozen=True)
class Row:
    """An engine under a load.  does: what its clients do.  seconds: a round's; stored, loopback: bytes a client and
    round through Ray's object store and through sockets; peak_pss: bytes."""

    part: str
    engine: str
    does: str
    clients: int
    seconds: float
    stored: float
    loopback: float
    peak_pss: int


def time_loads() -> list[tuple[str, str, Load]]:
    """Engine, what its clients do, load."""
    return [(OURS, LEAST, Load(1000, 8, TINY, IDLE)), (FLOWER, "send it back", Load(1000, 5, TINY, IDLE))]


def traffic_loads() -> list[tuple[str, str, Load]]:
    """Likewise: clients that do as little as they can, and those whose result is as large as the weights."""
    ours = [(OURS, LEAST, Load(48, 4, LARGE, IDLE, 8)), (OURS, TRAINED, Load(48, 4, LARGE, FEDFTG, 8))]
    theirs = [(FLOWER, LEAST, Load(48, 4, LARGE, IDLE, answers=False)), (FLOWER, MOST, Load(48, 4, LARGE, IDLE))]
    return [*ours, *theirs]


def memory_loads() -> list[tuple[str, str, Load]]:
    """Likewise."""
    ours = [(OURS, LEAST, Load(clients, 4, TINY, IDLE)) for clients in (100, 1000, 10_000)]
    return [*ours, *((FLOWER, "send it back", Load(clients, 3, TINY, IDLE)) for clients in (100, 1000))]


def smoke_loads() -> list[tuple[str, str, Load]]:
    """The smallest, for tests."""
    return [(OURS, LEAST, Load(4, 4, TINY, IDLE, 2))]


PARTS = ("time", "traffic", "memory")
LOADS = {"smoke": smoke_loads, "time": time_loads, "traffic": traffic_loads, "memory": memory_loads}


def measured(part: str, flower: str | None) -> list[Row]:
    """All loads of a part, one after the other."""
    rows = []
    for engine, does, load in LOADS[part]():
        python = sys.executable if engine == OURS else flower
        if python is None:
            continue
        with tempfile.TemporaryDirectory(prefix="load-") as folder:
            out = Path(folder)
            (out / "load.json").write_text(json.dumps(asdict(load)))
            script = "run_rayfed_load" if engine == OURS else "run_flower_load"
            command = [python, "-m", f"experiments.benchmarks.{script}", str(out / "load.json"), folder, str(WORKERS)]
            taken = metered(command, ROOT, out / "log", 1.0 if part == "memory" else 5.0)
            readings = json.loads((out / "readings.json").read_text())
        steady = {
            name: float(np.median(np.diff([reading[name] for reading in readings])[1:-1]))
            for name in ("seconds", "stored", "loopback")
        }
        stored, loopback = steady["stored"] / load.clients, steady["loopback"] / load.clients
        rows.append(Row(part, engine, does, load.clients, steady["seconds"], stored, loopback, taken.peak_pss))
        found = f"{steady['seconds']:.3f} s a round, {size(taken.peak_pss)}"
        print(f"{part}, {engine}, {load.clients} clients: {found}", flush=True)
    return rows


def show_time(rows: Sequence[Row]) -> None:
    """Milliseconds a client."""
    cells = [(r.engine, r.clients, f"{r.seconds:.3f}", f"{1000 * r.seconds / r.clients:.2f}") for r in rows]
    print_table(("engine", "clients", "s a round", "ms a client"), cells)


def show_traffic(rows: Sequence[Row]) -> None:
    """Bytes a client and round, and how much less that is than Flower's."""
    theirs = {r.does: r.stored + r.loopback for r in rows if r.engine == FLOWER}
    cells = []
    for r in rows:
        against = [f"{theirs[does] / (r.stored + r.loopback):.1f}x" if theirs else "" for does in (LEAST, MOST)]
        cells.append((f"{r.engine}: {r.clients} clients {r.does}", size(r.stored), size(r.loopback), *against))
    flower = [f"flower, clients {does}" for does in (LEAST, MOST)]
    print_table(("", "object store, a client", "sockets, a client", *flower), cells)


def show_memory(rows: Sequence[Row]) -> None:
    """Peaks, and their growth since the row before."""
    cells = []
    for before, r in zip([None, *rows], rows, strict=False):
        grown = "" if before is None or before.engine != r.engine else _growth(before, r)
        cells.append((r.engine, f"{r.clients:,}", size(r.peak_pss), grown))
    print_table(("engine", "clients", "peak memory", "an added client"), cells)


def _growth(before: Row, row: Row) -> str:
    return f"{(row.peak_pss - before.peak_pss) / (row.clients - before.clients) / 1000:.1f} kB"


SHOW: dict[str, Callable[[Sequence[Row]], None]] = {
    "smoke": show_time,
    "time": show_time,
    "traffic": show_traffic,
    "memory": show_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(LOADS)}; {', '.join(PARTS)} if none")
    parser.add_argument("--flower", metavar="PYTHON")
    parser.add_argument("--out", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(LOADS):
        parser.error(f"no part {min(unknown)}; there are {', '.join(LOADS)}")
    parts, measured_at = asked.parts or PARTS, told()
    rows = [row for part in parts for row in measured(part, asked.flower)]
    for part in parts:
        SHOW[part]([row for row in rows if row.part == part])
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({**measured_at, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
