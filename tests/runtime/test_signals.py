"""Signals of a process that has started a Ray of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, signal, time
from rayfed_sub.runtime.local_ray import ray_session

def stops(number, frame):
    time.sleep(5)  # as long as a checkpoint may take
    print("written", flush=True)

signal.signal(signal.SIGTERM, stops)
with ray_session():
    os.kill(os.getpid(), signal.SIGTERM)
print("left", flush=True)
"""


@pytest.mark.slow
def test_ray_does_not_end_a_process_that_is_asked_to_stop() -> None:
    """Its core would end the process three seconds after the signal."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["written", "left"], "")
