"""A command in two processes: what goes over the line between them, and what becomes of one when the other dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from rayfed_sub.runtime import fork_server, front, local_ray
from rayfed_sub.runtime.front import drive

DRIVER = """
import os, sys, signal, time
from pathlib import Path
from rayfed_sub.runtime.front import front_of_this_process
front = front_of_this_process()
assert front is front_of_this_process()
file, what = Path(sys.argv[1]), sys.argv[2]
if what == "address":
    file.write_text(f"{front.address()} {front.process} {os.getppid()} {'RAYFED_SUB_FORKS' in os.environ}")
    front.over()
    front.ended(3)
elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    def asked(number, frame):
        front.ended(130)
        os._exit(0)
    signal.signal(signal.SIGINT, asked)
    file.with_suffix(".part").write_text(str(os.getpid()))
    file.with_suffix(".part").rename(file)
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "driver.py"
    file.write_text(DRIVER)
    return file


@pytest.fixture
def ups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a Ray goes through that is none."""
    states: list[str] = []

    @contextmanager
    def session() -> Iterator[object]:
        states.append("up")
        yield lambda: None
        states.append("down")

    monkeypatch.setattr(local_ray, "ray_session_aside", session)
    monkeypatch.setattr(front, "_address", lambda: "10.0.0.1:6379")
    monkeypatch.setattr(fork_server, "joins", lambda address: False)  # the tests' own Ray may be up
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return states


def test_driver_gets_words_and_address_and_its_code_comes_back(script: Path, tmp_path: Path, ups: list[str]) -> None:
    assert drive(str(script), ["rayfed-sub", str(tmp_path / "told"), "address"], ()) == 3
    address, process, parent, still = (tmp_path / "told").read_text().split()
    assert (address, int(process), still) == ("10.0.0.1:6379", os.getpid(), "False")
    assert int(parent) not in (os.getpid(), 1)  # the fork server
    assert ups == ["up", "down"]


def test_driver_that_is_killed_is_told(
    script: Path, tmp_path: Path, ups: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert drive(str(script), ["rayfed-sub", str(tmp_path / "told"), "killed"], ()) == 137
    assert "was killed; go on with the same command and --resume" in capsys.readouterr().err
    assert ups == ["up", "down"]


def test_without_a_driver_the_command_is_to_run_here(tmp_path: Path, ups: list[str]) -> None:
    assert drive(str(tmp_path / "driver.py"), ["rayfed-sub"], ("nothing.of_this_name",)) is None
    assert ups == ["up", "down"]


def test_signals_go_to_the_driver(script: Path, tmp_path: Path, ups: list[str]) -> None:
    def interrupt() -> None:
        while not (tmp_path / "told").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert drive(str(script), ["rayfed-sub", str(tmp_path / "told"), "wait"], ()) == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_driver_dies_with_its_front(script: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"""
from contextlib import nullcontext
from rayfed_sub.runtime import front, local_ray
local_ray.ray_session_aside = lambda: nullcontext(lambda: None)
front._address = lambda: "10.0.0.1:6379"
front.drive({str(script)!r}, ["rayfed-sub", {str(told)!r}, "wait"], ())
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while not told.exists():
            assert process.poll() is None
            time.sleep(0.02)
        driver = psutil.Process(int(told.read_text()))
        process.kill()
    driver.wait(10)
