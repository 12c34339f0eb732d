"""Processes as forks of one that has imported the libraries."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayfed_sub.runtime import fork_server as module
from rayfed_sub.runtime.fork_server import fork_server

TELLS = """
import json, os, sys
import numpy as np
print("printed", file=sys.stderr)
print(json.dumps({
    "words": sys.argv[1:], "folder": os.getcwd(), "told": os.environ.get("TOLD"), "parent": os.getppid(),
    "server": os.environ.get("RAYFED_SUB_FORK_SERVER"), "there": "colorsys" in sys.modules, "name": __name__,
    "drawn": np.random.random(), "group": os.getpgid(0) == os.getpid(),
    "goes": open("/proc/self/oom_score_adj").read().strip(),
}))
"""
"""What a forked process is and has."""


@pytest.fixture(scope="module")
def command() -> Iterator[str]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "joins", lambda address: False)  # the tests' own Ray may be up
            found = stack.enter_context(fork_server(wanted=True, modules=("colorsys",)))
        assert found is not None
        yield found


def told(command: Sequence[str], script: Path, *words: str) -> dict[str, Any]:
    """What the script tells, run by this command; it may go on after the command has ended."""
    read, write = os.pipe()
    done = subprocess.run(
        [*command, str(script), *words],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=script.parent,
        env={**os.environ, "TOLD": "so"},
        check=True,
        timeout=60,
    )
    os.close(write)
    with os.fdopen(read) as file:
        found: dict[str, Any] = json.loads(file.read())
    assert done.stderr == b"printed\n"
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "tells.py"
    file.write_text(TELLS)
    return file


def test_fork_has_what_is_imported_and_what_it_is_given(command: str, script: Path) -> None:
    one, other = (told(shlex.split(command), script, "a b", "ü") for _ in range(2))
    assert one["words"] == ["a b", "ü"]
    assert (one["folder"], one["told"], one["name"]) == (str(script.parent), "so", "__main__")
    assert one["there"]
    assert one["server"] == str(one["parent"])
    assert one["group"]  # Ray kills a worker with its process group
    assert one["goes"] == "1000"  # before Ray, where memory ends
    assert one["drawn"] != other["drawn"]


def test_without_a_server_the_command_runs_what_it_is_given(script: Path) -> None:
    alone = told([sys.executable, "-I", "-S", module.__file__, "ask", "/nowhere"], script, "a")
    assert alone["words"] == ["a"]
    assert not alone["there"]
    assert alone["server"] is None


def test_who_asks_and_is_killed_costs_nobody_else_anything(command: str, script: Path) -> None:
    path = shlex.split(command)[-1]
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)  # and says nothing
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        socket.send_fds(asking, [b"."], [1])
        asking.sendall(b'{"words": ["half')
    request = {"script": str(script), "words": [str(script)], "folder": "/", "environment": {}}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        socket.send_fds(asking, [b"."], [os.open(os.devnull, os.O_RDWR)] * 3)
        asking.sendall(json.dumps(request).encode())  # and does not wait for an answer
    assert told(shlex.split(command), script)["there"]


def test_process_that_cannot_begin_is_not_said_to_be_there(command: str) -> None:
    """So that whoever asks runs the words itself."""
    request = {"script": "nothing.py", "words": ["nothing.py"], "folder": "/nowhere", "environment": {}}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(shlex.split(command)[-1])
        socket.send_fds(asking, [b"."], [os.open(os.devnull, os.O_RDWR)] * 3)
        asking.sendall(json.dumps(request).encode())
        asking.shutdown(socket.SHUT_WR)
        assert asking.recv(1) == b""


def test_server_is_only_where_a_run_starts_its_own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with fork_server(wanted=False) as none:
        assert none is None
    with fork_server(wanted=True, address="10.0.0.1:6379") as none:
        assert none is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with fork_server(wanted=True) as none:
        assert none is None


def test_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "import time\n"
        "from rayfed_sub.runtime.fork_server import fork_server\n"
        "with fork_server(wanted=True, modules=()):\n"
        "    print(flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starting:
        assert starting.stdout is not None
        starting.stdout.readline()
        (server,) = psutil.Process(starting.pid).children()
        starting.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_ray_s_processes_are_forks(ray_session: None) -> None:
    import ray

    def about() -> tuple[bool, bool, int | None]:
        from rayfed_sub.runtime.fork_server import server_of_this_process

        there = "rayfed_sub.training.executor" in sys.modules
        before = set(sys.modules)
        import rayfed_sub.runtime.worker  # noqa: F401

        new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in ("rayfed_sub", "ray")}
        return there, not {name.partition(".")[0] for name in new} & {"torch", "transformers"}, server_of_this_process()

    there, light, server = ray.get(ray.remote(num_cpus=0)(about).remote())
    assert there
    assert light
    assert server is not None
    assert psutil.Process(server).ppid() == os.getpid()
