"""One run of one contestant in a process of its own: its rounds, its memory, and the machine that it ran on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from types import MappingProxyType

import numpy as np
import psutil
import torch

from experiments.benchmarks.cases import FLOWER, OURS
from rayfed_sub.telemetry.environment import commit_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "benchmarks"
WORKERS = 2
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
ALONE = {"RAY_ADDRESS": "local"}
"""Else Flower's Ray looks for the last cluster that was started on this machine, which may have been killed."""


@dataclass(frozen=True)
class Pass:
    """start: seconds until the first round begins; rounds: seconds of each; stored, loopback: bytes of each through
    Ray's object store and through sockets (`marks.py`), where they were counted; peak_pss: bytes, the largest sum of
    proportional set sizes of the whole process tree that was seen."""

    start: float
    rounds: tuple[float, ...]
    stored: tuple[float, ...]
    loopback: tuple[float, ...]
    peak_pss: int

    @property
    def steady(self) -> tuple[float, ...]:
        """All rounds but the first and the last."""
        return self.rounds[1:-1]


@dataclass(frozen=True)
class Contestant:
    """command: of one run, less WORK OUT WORKERS; tree: the checkout that it runs from."""

    command: tuple[str, ...]
    tree: Path = ROOT


def contestants(
    flower: Sequence[str] = (), pfl: str | None = None, before: Path | None = None
) -> dict[str, Contestant]:
    """All contestants by name.  flower, pfl: the Python of an environment that has it, of several versions of Flower;
    before: a checkout of an earlier state of this project."""
    script = {name: ("-m", f"experiments.benchmarks.run_{name}") for name in ("bare", "rayfed", "flower", "pfl")}
    own = {
        "bare": Contestant((sys.executable, *script["bare"])),
        OURS: Contestant((sys.executable, *script["rayfed"])),
    }
    if before is not None:
        own[f"{OURS} before"] = Contestant((sys.executable, *script["rayfed"]), before)
    for python in flower:
        version = _version(python, "flwr")
        own[f"{FLOWER} {version}"] = Contestant((python, *script["flower"]))
        if version >= "1.42":  # which deprecates the other way
            own[f"{FLOWER} {version}, flwr run"] = Contestant(
                (python, f"{script['flower'][0]}", f"{script['flower'][1]}_app")
            )
    if pfl is not None:
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", str(WORKERS))
        own |= {"pfl-1": Contestant((pfl, *script["pfl"])), "pfl-2": Contestant((pfl, *torchrun, *script["pfl"]))}
    return own


def _version(python: str, package: str) -> str:
    """Major and minor version of the package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return ".".join(found.split(".")[:2])


def measured(one: Contestant, work: Path, out: Path, look_every: float, workers: int = WORKERS) -> Pass:
    """Runs a contestant on the work, one torch thread a process; what it leaves is in the new folder `out`.

    Raises RuntimeError with the end of its output where it fails.
    """
    out.mkdir()
    log, began, peak, over = out / "log", time.time(), [0], threading.Event()
    environment = {
        **os.environ,
        **THREADS,
        **ALONE,
        "PYTHONPATH": str(one.tree),
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [*one.command, str(work), str(out), str(workers)], cwd=one.tree, stdout=file, stderr=file, env=environment
        )
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over, look_every))
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
    if code:
        raise RuntimeError(f"{' '.join(one.command)} ended with {code}\n{log.read_text()[-3000:]}")
    readings = json.loads((out / "readings.json").read_text())
    taken = {name: tuple(np.diff([reading[name] for reading in readings]).tolist()) for name in readings[0]}
    stored, loopback = taken.get("stored", ()), taken.get("loopback", ())
    return Pass(readings[0]["seconds"] - began, taken["seconds"], stored, loopback, peak[0])


_COMMAND = """
import importlib
try:
    line = importlib.import_module("rayfed_sub.cli.main")
except ModuleNotFoundError:  # before the command line became a folder
    line = importlib.import_module("rayfed_sub.cli")
getattr(line, "command", line.main)()
"""


def command_line(tree: Path, words: Sequence[str], more: Mapping[str, str] = MappingProxyType({})) -> Popen[str]:
    """Starts `rayfed-sub` with these words in a checkout of any state; its output and errors come as one text.  more:
    environment variables."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1", **more}
    command = [sys.executable, "-c", _COMMAND, *words]
    return Popen(command, cwd=tree, env=environment, stdout=PIPE, stderr=STDOUT, text=True)


def _watch(pid: int, peak: list[int], over: threading.Event, every: float) -> None:
    """Notes the peak; reading the memory of twenty processes takes half a second of a core."""
    while not over.wait(every):
        peak[0] = max(peak[0], total_memory(pid))


def total_memory(pid: int) -> int:
    """Proportional set sizes of a process and all its descendants, bytes; 0 where it has ended."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total


def machine() -> Mapping[str, str | int]:
    """Date, commit (see `commit_of`), processor, cores, memory, GPU, torch's version."""
    return {
        "date": date.today().isoformat(),
        "commit": commit_of(ROOT) or "unknown",
        "processor": _processor(),
        "cores": psutil.cpu_count() or 0,
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
    }


def _processor() -> str:
    named = Path("/proc/cpuinfo")
    lines = named.read_text().splitlines() if named.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
