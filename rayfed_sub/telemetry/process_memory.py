"""Memory of one process as its node feels it: proportional set size, in which shared pages count by their share."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from rayfed_sub.planning.heap import MMAP_BYTES, PRODUCT_KERNELS
from rayfed_sub.planning.machines import free_memory

if TYPE_CHECKING:
    import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's options, from glibc's malloc.h
_SHARE = 0.005  # of the time, that samples may take
_LONGEST = 10.0  # seconds between two of them


@dataclass(frozen=True)
class GpuPeak:
    """The most memory of a GPU that one process had, bytes: allocated, of tensors; reserved, what torch keeps for them.
    The process's context on the GPU comes on top, half a gigabyte."""

    allocated: int
    reserved: int


@dataclass(frozen=True)
class Sample:
    """Memory of one process, bytes: as last sampled, and the largest seen.  process: its node's name and
    its number, so that a process asked twice counts once.  free: of its node, for new processes.  gpu: of a worker on
    one."""

    process: tuple[str, int]
    last: int
    peak: int
    free: int = 0
    gpu: GpuPeak | None = None


def peak_of(samples: Iterable[Sample]) -> int:
    """Sum of the processes' peaks.

    >>> peak_of([Sample(("a", 7), 1, 5), Sample(("a", 8), 1, 2), Sample(("a", 7), 1, 6)])
    8
    """
    peaks: dict[tuple[str, int], int] = {}
    for sample in samples:
        peaks[sample.process] = max(sample.peak, peaks.get(sample.process, 0))
    return sum(peaks.values())


def gpu_peak(device: torch.device) -> GpuPeak | None:
    """This process's memory on the device so far; None where that is no GPU."""
    if device.type != "cuda":
        return None
    from torch import cuda

    return GpuPeak(cuda.max_memory_allocated(device), cuda.max_memory_reserved(device))


def begin_gpu_anew() -> None:
    """Frees what nothing on the GPU holds, and lets its peaks begin with what is left, where this process has used one:
    a process that serves another run counts that run's memory alone."""
    from torch import cuda

    if cuda.is_initialized():
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


class PeakMemory:
    """Samples the PSS of this process, or of the one of this number, in a daemon thread until `close`, or until nobody
    holds it any more; `last` is the newest value, `peak` the largest seen, in bytes: a lower bound, since a peak may
    fall between two samples and a restarted process begins anew.  A sample takes some 10 ms of a large process, so
    nobody who asks waits for one, and they come at least `seconds` apart, and further, up to ten, where they would take
    more than half a percent of the time."""

    def __init__(self, seconds: float = 1.0, process: int | None = None) -> None:
        self._samples = _Samples(process)
        pause, self._over = self._samples.take(seconds), threading.Event()
        watching = (self._samples, self._over, seconds, pause)  # not this object, which the thread would keep alive
        self._thread = threading.Thread(target=_watch, args=watching, daemon=True, name="peak-memory")
        self._thread.start()
        weakref.finalize(self, self._over.set)

    @property
    def last(self) -> int:
        return self._samples.last

    @property
    def peak(self) -> int:
        return self._samples.peak

    def sample(self) -> Sample:
        """The last sample, without waiting for a new one."""
        return Sample((socket.gethostname(), self._samples.process.pid), self.last, self.peak, free_memory())

    def close(self) -> None:
        """Ends the sampling thread."""
        self._over.set()
        self._thread.join()


class _Samples:
    def __init__(self, process: int | None) -> None:
        self.process = psutil.Process(process)
        self.last = self.peak = 0

    def take(self, seconds: float) -> float:
        """Takes a sample; returns the seconds until the next, `seconds` at least."""
        began = time.thread_time()
        try:
            memory = self.process.memory_full_info()
        except psutil.NoSuchProcess:  # another one, which has ended
            return _LONGEST
        self.last = getattr(memory, "pss", memory.uss)
        self.peak = max(self.peak, self.last)
        return min(max(seconds, (time.thread_time() - began) / _SHARE), _LONGEST)


def _watch(samples: _Samples, over: threading.Event, seconds: float, pause: float) -> None:
    while not over.wait(pause):
        pause = samples.take(seconds)


def keep_freed() -> None:
    """Makes malloc (of glibc) keep memory that this process frees, until `give_back`.

    By default every tensor of some megabytes gets fresh memory from the system, whose pages are zeroed at first touch:
    on a virtual machine that took seven times as long as the arithmetic of an elementwise operation.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(MMAP_THRESHOLD, MMAP_BYTES)
        set_option(TRIM_THRESHOLD, 2**31 - 1)


def few_kernels() -> None:
    """Limits oneDNN's kernel cache to `PRODUCT_KERNELS`, in a process without a kernel yet.

    oneDNN makes a kernel of some 0.6 MB for each shape of a product and keeps 1,024, half a gigabyte with rows of all
    lengths.  A model has about a dozen shapes for each number of tokens, and a new one takes 0.2 ms.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCT_KERNELS))


def give_back() -> None:
    """Returns freed memory to the system, for other processes on the node; does nothing without glibc's malloc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
