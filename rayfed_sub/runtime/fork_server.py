"""Ray's worker processes as forks of one process, which has imported the libraries.

A worker process of its own imports for five seconds of CPU and holds some 350 MB of what it has imported.  A fork is
there in the time that Ray itself takes, and shares that memory with all others.  Ray starts worker processes by the
command that a runtime environment names (`py_executable`): ours runs this file as a script, which hands command line,
environment and standard streams over to the server and ends.

The server imports no Ray, which reads the environment while it is imported, and starts no thread.  It ends with the
process that started it.  Only the standard library is imported here: the server begins before anything else does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

FORKED = "RAYFED_SUB_FORK_SERVER"
"""Environment variable of a forked process: its server's number."""
GIVEN = "RAYFED_SUB_GIVEN"
"""Environment variable of a forked process that was given a descriptor besides its streams: its number."""

MODULES = (
    *("transformers.modeling_utils", "rayfed_sub.training.executor", "rayfed_sub.training.inference"),
    *("rayfed_sub.training.pack_experts", "rayfed_sub.models.weights", "rayfed_sub.methods", "rayfed_sub.data.dataset"),
    *("rayfed_sub.diagnostics.cohort", "rayfed_sub.evaluation.scores", "rayfed_sub.storage.state_store"),
    *("rayfed_sub.planning.packs", "rayfed_sub.privacy.mechanism", "rayfed_sub.telemetry.environment"),
)
"""What workers and coordinators import, but Ray and what imports it."""

_DONE = b"."
_FIRST_TO_GO = "1000"
_STREAMS = 4  # descriptors of a request at most
_LONGEST = 100  # bytes of a socket's path, of which Linux takes 107


@contextmanager
def fork_server(wanted: bool, address: str | None = None, modules: Sequence[str] = MODULES) -> Iterator[str | None]:
    """Yields the command by which a Ray that this process starts, in `ray_session`, forks its worker processes.

    wanted: `Resources.forked`.  modules: what the server imports.  None, and no server, where `wanted` is false, and
    where the run joins a Ray, by its address or because this process has one.  Forked processes outlive the server:
    they end as all of Ray's do.  In a driver the server is its front's."""
    from rayfed_sub.runtime.front import front_of_this_process

    if not wanted or joins(address):
        yield None
        return
    if (front := front_of_this_process()) is not None:
        yield front.forks
        return
    with TemporaryDirectory(prefix="rayfed-sub-", dir=_short()) as folder:
        path = str(Path(folder) / "fork")  # only this user can open the folder
        with socket.socket(socket.AF_UNIX) as listener:  # the server's alone: who asks in vain is to notice it
            listener.bind(path)
            listener.listen(128)
            server = subprocess.Popen(
                [sys.executable, __file__, "serve", str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a worker that fails at an import says so itself
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the process that asks
                # As Ray sets it for its processes; threads are set where work begins.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert server.stdin is not None
        try:
            server.stdin.write(json.dumps([[str(place) for place in sys.path], modules]).encode() + b"\n")
            server.stdin.flush()
            yield shlex.join([sys.executable, "-I", "-S", __file__, "ask", path])
        finally:
            server.kill()
            server.communicate()


def server_of_this_process() -> int | None:
    """Number of the process that this one was forked from; None where it was not."""
    parent = os.getppid()
    return parent if os.environ.get(FORKED) == str(parent) else None  # a fork's own children have the variable too


def joins(address: str | None) -> bool:
    """True where the run has its Ray already, as `cluster.joined` has it."""
    if (address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local"):
        return True
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _short() -> str | None:
    """A folder whose name leaves room for a socket's; None: the usual one for temporary files."""
    from tempfile import gettempdir

    return None if len(gettempdir()) + len("/rayfed-sub-12345678/fork") <= _LONGEST else "/tmp"


def fork(command: str, script: str, words: Sequence[str], more: Mapping[str, str], given: int) -> None:
    """Asks for a fork that runs the script under these words, the program's name first; returns at once, while the
    server may still be importing.

    command: of `fork_server`.  more: environment variables besides this process's.  given: a descriptor for it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(shlex.split(command)[-1])
        _send(server, script, words, {**os.environ, **more}, [0, 1, 2, given])


def _serve(listener: socket.socket) -> None:
    """Imports, then forks a process for each request, until the process that started this one ends."""
    sys.path[:], modules = json.loads(sys.stdin.buffer.readline())
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would write into memory that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        asking, _ = listener.accept()
        request, streams = _request(asking)
        if request is not None and not os.fork():
            listener.close()
            _become(request, streams, asking)
            return
        asking.close()
        for stream in streams:
            os.close(stream)


def _request(asking: socket.socket) -> tuple[dict[str, object] | None, list[int]]:
    """What is asked for, and three standard streams; None where who asked has been killed meanwhile."""
    streams: list[int] = []
    try:
        _, streams, _, _ = socket.recv_fds(asking, 1, _STREAMS)
        with asking.makefile("rb") as file:
            return json.loads(file.read()), list(streams)
    except (OSError, ValueError):
        return None, list(streams)


def _become(request: dict[str, object], streams: list[int], asking: socket.socket) -> None:
    """Runs the asked command line in this process.  Until it says that it is there, whoever asks can go without it."""
    import numpy as np

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # Ray kills a worker with its process group
    given = {GIVEN: str(streams[3])} if len(streams) > 3 else {}
    if not given:
        with suppress(OSError):  # where /proc cannot be written Ray does without as well
            # What Ray does for the process that it has started itself: where memory ends, workers are to go before Ray.
            Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
    np.random.seed()  # or all forks would draw the same numbers
    environment, words = request["environment"], request["words"]
    assert isinstance(environment, dict)
    assert isinstance(words, list)
    os.chdir(str(request["folder"]))
    server = os.getppid()
    os.environ.clear()
    os.environ.update({**environment, **given, FORKED: str(server)})
    sys.argv = words
    with suppress(OSError) if given else nullcontext():  # fails where nobody waits any more
        asking.send(_DONE)
    asking.close()
    runpy.run_path(str(request["script"]), run_name="__main__")


def _send(
    server: socket.socket, script: str, words: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]
) -> None:
    """Sends a request."""
    request = {"script": script, "words": [*words], "folder": os.getcwd(), "environment": {**environment}}
    socket.send_fds(server, [b"."], streams)
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)


def _ask(path: str, words: list[str]) -> None:
    """Asks the server for a process that runs these words; without a server it runs them here, imports and all."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        _send(server, words[0], words, os.environ, [0, 1, 2])
        if server.recv(1) == _DONE:
            return
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        _ask(sys.argv[2], sys.argv[3:])
