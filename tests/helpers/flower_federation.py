"""A Flower federation of processes on this machine: a SuperLink, SuperNodes, and runs of an app, over loopback.

Everything comes from one virtual environment, by its `bin` folder, and writes below one folder.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Federation:
    """A SuperLink on a free port, and the SuperNodes that were started, by client."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._port = programs, folder, free_port()
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        home = folder / "home"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._environment = {
            **kept,
            "PATH": path,
            "FLWR_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        own = [
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--disable-runtime-dependency-installation",
        ]
        self._link = self._start("superlink", ["flower-superlink", *own], self._environment)
        self._wait_for(self._port)

    def add(self, client: int, config: str = "") -> None:
        """Starts the SuperNode of a client, again where it was stopped; config: more of its configuration."""
        about = f"partition-id={client} cache='{self._folder / f'node-{client}'}' {config}".strip()
        own = [
            "--insecure",
            "--superlink",
            f"127.0.0.1:{self._port}",
            "--port",
            str(free_port()),
            "--node-config",
            about,
        ]
        home = self._folder / f"home-{client}"
        home.mkdir(exist_ok=True)
        environment = {**self._environment, "FLWR_HOME": str(home)}
        self.nodes[client] = self._start(f"node-{client}", ["flower-supernode", *own], environment)

    def kill(self, client: int) -> None:
        """Kills a client's SuperNode and what it has started, as a power cut would."""
        os.killpg(self.nodes.pop(client).pid, signal.SIGKILL)

    def run(self, app: Path, timeout: float = 300, **config: object) -> str:
        """Runs the app to its end; returns what it printed."""
        with self.running(app, **config) as process:
            out, _ = process.communicate(timeout=timeout)
        return out.decode()

    @contextmanager
    def running(self, app: Path, **config: object) -> Iterator[subprocess.Popen[bytes]]:
        """A run of the app; config: overrides of its keys, `__` for a dot and `_` for a hyphen at the top."""
        words = " ".join(f"{key}={value}" for key, value in config.items())
        command = [str(self._programs / "flwr"), "run", str(app), "here", "--stream"]
        command += ["--run-config", words] if words else []
        environment: Mapping[str, str] = self._environment
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=self._folder
        ) as process:
            yield process

    def close(self) -> None:
        for process in [*self.nodes.values(), self._link]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in [*self.nodes.values(), self._link]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / command[0]), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._folder,
                start_new_session=True,
            )

    def _wait_for(self, port: int) -> None:
        for _ in range(600):
            with socket.socket() as asked:
                if not asked.connect_ex(("127.0.0.1", port)):
                    return
            time.sleep(0.1)
        raise AssertionError(f"no SuperLink: {(self._folder / 'superlink.log').read_text()[-2000:]}")
