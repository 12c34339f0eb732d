"""Samples of this process's memory."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from rayfed_sub.telemetry.process_memory import GpuPeak, PeakMemory, gpu_peak


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


def test_a_gpu_s_peak_is_what_torch_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert gpu_peak(torch.device("cuda")) == GpuPeak(5, 7)
    assert gpu_peak(torch.device("cpu")) is None
