"""Runs a command and watches what it takes: seconds, and memory of it and all processes that it starts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_EVERY = 5.0  # reading the memory of twenty processes takes half a second of a core


@dataclass(frozen=True)
class Metered:
    """began: seconds since 1970; seconds; peak_pss: bytes, the largest sum of proportional set sizes that was seen."""

    began: float
    seconds: float
    peak_pss: int


def metered(command: Sequence[str], folder: Path, log: Path, every: float = _EVERY) -> Metered:
    """Runs the command in a folder, one torch thread a process, its output in the file.  every: seconds between two
    looks at its memory.  Raises RuntimeError with the end of the output where it fails."""
    began = time.time()
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    peak, over = [0], threading.Event()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env={**os.environ, **threads})
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, over, every))
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}\n{log.read_text()[-3000:]}")
    return Metered(began, time.time() - began, peak[0])


def _watch(pid: int, peak: list[int], over: threading.Event, every: float) -> None:
    while not over.wait(every):
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            total = 0
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    total += process.memory_full_info().pss
            peak[0] = max(peak[0], total)
