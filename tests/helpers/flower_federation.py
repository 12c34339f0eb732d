"""A Flower federation of processes on this machine: a SuperLink, SuperNodes, and runs of an app, over loopback.

Everything comes from one virtual environment, by its `bin` folder, and writes below one folder.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPLATE = """
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Federation:
    """A SuperLink on a free port, and the SuperNodes that were started, by client."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._port = programs.absolute(), folder, free_port()
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        home = folder / "home"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(_TEMPLATE.format(port=self._port))
        path = f"{self._programs}{os.pathsep}{os.environ['PATH']}"
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        own = ["--insecure", "--host", "127.0.0.1", "--port", str(self._port)]
        words = ["flower-superlink", *own, "--disable-runtime-dependency-installation"]
        self._link = self._start("superlink", words, home)
        self._wait_for(self._port)

    def add(self, client: int, config: str = "") -> None:
        """Starts the SuperNode of a client, again where it was stopped; config: more of its configuration."""
        about = f"partition-id={client} cache='{self._folder / f'node-{client}'}' {config}".strip()
        port, home = free_port(), self._folder / f"home-{client}"
        home.mkdir(exist_ok=True)
        own = ["--insecure", "--superlink", f"127.0.0.1:{self._port}", "--port", str(port), "--node-config", about]
        self._nodes[client] = self._start(f"node-{client}", ["flower-supernode", *own], home)

    def kill(self, client: int) -> None:
        """Kills a client's SuperNode and what it has started, as a power cut would."""
        process = self._nodes.pop(client)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def folder_of(self, client: int, run: str) -> Path:
        """What a client's node keeps of a run."""
        return self._folder / f"node-{client}" / f"run-{run}" / f"client-{client}"

    def run(self, app: Path, timeout: float = 900, **config: object) -> Path:
        """Runs the app to its end; returns the folder that its ServerApp wrote."""
        with self.running(app, **config) as process:
            output = self.output_of(process)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
        assert code == 0
        assert (output / "summary.json").exists(), self._said(app)
        return output

    @contextmanager
    def running(self, app: Path, **config: object) -> Iterator[subprocess.Popen[bytes]]:
        """A run of the app; config: overrides of its keys."""
        command = [str(self._programs / "flwr"), "run", str(app), "here", "--stream"]
        words = " ".join(f"{key}={value}" for key, value in config.items())
        command += ["--run-config", words] if words else []
        environment = {**self._environment, "FLWR_HOME": str(self._folder / "home")}
        with self._log(f"run-{app.parent.name}").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self._folder)
            self._last = self._log(f"run-{app.parent.name}")
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def output_of(self, process: subprocess.Popen[bytes], seconds: float = 120) -> Path:
        """The folder of the ServerApp's results, once the run has a number."""
        until = time.monotonic() + seconds
        while (found := re.search(r"started run (\d+)", self._last.read_text())) is None:
            assert process.poll() in (None, 0), self._last.read_text()
            assert time.monotonic() < until, self._last.read_text()
            time.sleep(0.2)
        return self._folder / "outputs" / found[1]

    def close(self) -> None:
        """Ends what was started."""
        processes = [*self._nodes.values(), self._link]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _said(self, app: Path) -> str:
        return self._log(f"run-{app.parent.name}").read_text()[-4000:]

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _start(self, name: str, command: list[str], home: Path) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / command[0]), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, "FLWR_HOME": str(home)},
                cwd=self._folder,
                start_new_session=True,
            )

    def _wait_for(self, port: int) -> None:
        for _ in range(600):
            with socket.socket() as asked:
                if not asked.connect_ex(("127.0.0.1", port)):
                    return
            time.sleep(0.1)
        raise AssertionError(f"no SuperLink: {self._log('superlink').read_text()[-2000:]}")
