"""Samples of this process's memory."""

from __future__ import annotations

import gc
import threading

from rayfed_sub.telemetry.process_memory import PeakMemory


def test_sampling_ends_with_its_owner() -> None:
    """A worker that nobody closes, as one whose construction failed, leaves no thread behind."""
    before = set(threading.enumerate())
    memory = PeakMemory(seconds=0.01)
    (thread,) = set(threading.enumerate()) - before
    assert memory.last == memory.peak > 0
    del memory
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_closed_sampling_has_ended() -> None:
    memory = PeakMemory(seconds=0.01)
    memory.close()
    assert memory.sample().last > 0
