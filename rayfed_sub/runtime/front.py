"""A command in two processes: a light one, its front, and the driver, a fork that has the libraries.

The front is the process that somebody has started.  It starts the fork server and, while that imports, a Ray; then it
waits, passes signals on, takes Ray down and ends with the driver's exit code.  The driver runs the command: it shares
the imported libraries with all workers, and begins when they are there.  A line between them tells the address of Ray
one way, and what becomes of the driver the other; when one of the two dies, the other sees its end closed and ends.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from rayfed_sub.runtime.fork_server import GIVEN, MODULES, fork, fork_server

_FORKS = "RAYFED_SUB_FORKS"
"""Environment variable of a driver until it begins: the command by which processes are forked."""

_HERE, _OVER, _CODE = "here", "over", "code"
_KILLED = 137  # what a shell has for it

_FRONTS: list[Front] = []


class Front:
    """The driver's view of its front.  forks: as of `fork_server`; process: the front's number."""

    def __init__(self, line: socket.socket, forks: str) -> None:
        self.forks, self._line, self._address = forks, line, Future[str]()
        # Of the other end's process, its user and its group.
        self.process = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        threading.Thread(target=self._listen, daemon=True, name="front").start()
        self._say(f"{_HERE} {os.getpid()}")

    def address(self) -> str:
        """HOST:PORT of the front's Ray, once it is up."""
        return self._address.result()

    def over(self) -> None:
        """Tells that Ray is not needed any more."""
        self._say(_OVER)

    def ended(self, code: int) -> None:
        """Tells the exit code; the process is to end with it at once."""
        self._say(f"{_CODE} {code}")

    def _listen(self) -> None:
        for line in _lines(self._line):
            self._address.set_result(line)
        os.kill(os.getpid(), signal.SIGKILL)  # as the front was

    def _say(self, words: str) -> None:
        self._line.sendall(f"{words}\n".encode())


def front_of_this_process() -> Front | None:
    """The front of the driver that this process is; None where it is none."""
    if not _FRONTS and (forks := os.environ.pop(_FORKS, None)) is not None:
        _FRONTS.append(Front(socket.socket(fileno=int(os.environ.pop(GIVEN))), forks))
    return _FRONTS[0] if _FRONTS else None


def drive(script: str, words: Sequence[str], modules: Sequence[str] = MODULES) -> int | None:
    """Runs the script with these words, the program's name first, in a driver; returns its exit code.  None where no
    driver came to be: the command is to run here.  modules: what the driver and its workers find imported.

    Raises KeyboardInterrupt for a signal before there is a driver, and what Ray raises where it does not come up."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray does where it starts, for the driver to know as well
    from rayfed_sub.runtime.local_ray import ray_session_aside

    ours, theirs = socket.socketpair()
    driver: int | None = None
    code: int | None = None
    with ours, fork_server(wanted=True, modules=modules) as forks, ExitStack() as stack:
        assert forks is not None, "a front joins no Ray"
        wait_for_ray = stack.enter_context(ray_session_aside())
        with theirs, suppress(OSError):  # a server that has ended
            fork(forks, script, words, {_FORKS: forks}, theirs.fileno())
        threading.Thread(target=_tell_address, args=(ours, wait_for_ray), daemon=True).start()
        with _starting() as begun, ExitStack() as signals:
            for line in _lines(ours):
                word, _, number = line.partition(" ")
                if word == _HERE:
                    driver = int(number)
                    signals.enter_context(_passed_on_to(driver))
                    begun()
                elif word == _OVER:
                    stack.close()
                else:
                    code = int(number)
        wait_for_ray()
    if driver is not None and code is None:
        print("rayfed-sub: the run's process was killed; go on with the same command and --resume", file=sys.stderr)
        return _KILLED
    return code


def _lines(line: socket.socket) -> Iterator[str]:
    """Lines from the other end until it is closed, whatever it has left unread."""
    with suppress(ConnectionResetError), line.makefile(encoding="utf-8") as lines:
        yield from (one.rstrip() for one in lines)


def _tell_address(line: socket.socket, wait_for_ray: Callable[[], None]) -> None:
    """Sends the address of the Ray that is coming up; ends the driver where it does not."""
    try:
        wait_for_ray()
    except Exception:  # raised in the main thread, once the driver has ended
        line.shutdown(socket.SHUT_RDWR)
        return
    with suppress(OSError):  # a driver that has ended without
        line.sendall(f"{_address()}\n".encode())


def _address() -> str:
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address


@contextmanager
def _passed_on_to(driver: int) -> Iterator[None]:
    """Passes on what asks the command to stop, and a pause, to the driver, which is in a session of its own."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(driver, number)

    def pause(number: int, frame: FrameType | None) -> None:
        pass_on(signal.SIGSTOP, frame)
        os.kill(os.getpid(), signal.SIGSTOP)
        pass_on(signal.SIGCONT, frame)

    handlers = {signal.SIGINT: pass_on, signal.SIGTERM: pass_on, signal.SIGTSTP: pause}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _starting() -> Iterator[Callable[[], None]]:
    """Shows in a terminal that something begins, until the function is called that it yields."""
    shown = sys.stdout is not None and sys.stdout.isatty()

    def begun() -> None:
        nonlocal shown
        if shown:
            print("\r\x1b[K", end="", flush=True)
        shown = False

    if shown:
        print("starting", end="", flush=True)
    try:
        yield begun
    finally:
        begun()
