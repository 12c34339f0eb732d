"""Flower's simulation as `flwr run` starts it: a SuperLink of this machine, and Ray with two client actors.

    python -m experiments.benchmarks.run_flower_app WORK OUT WORKERS

The configuration of the connection, the app's folder and the SuperLink's log are in OUT.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from experiments.benchmarks.marks import asked

APP = """
[project]
name = "race"
version = "1.0.0"
description = "A case of the race"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "race"

[tool.flwr.app.components]
serverapp = "race:server_app"
clientapp = "race:client_app"
"""
MODULE = """
from experiments.benchmarks import flower_app

server_app = flower_app.server_app
client_app = flower_app.client_app
"""  # Flower looks for assignments to these names
CONNECTION = """
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true

[superlink.here.options]
num-supernodes = {clients}

[superlink.here.options.backend.client-resources]
num-cpus = 1
num-gpus = 0.0

[superlink.here.options.backend.init-args]
num-cpus = {workers}
"""
_SECONDS = 60.0  # until the SuperLink answers


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    case, _, out, workers = asked()
    home, app, port = (out / "flwr").absolute(), (out / "app").absolute(), free_port()
    home.mkdir()
    app.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(port=port, clients=case.clients, workers=workers))
    (app / "pyproject.toml").write_text(APP)
    (app / "race.py").write_text(MODULE)
    there = Path(sys.executable).parent
    path = os.pathsep.join([str(there), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    serve = [there / "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    serve += ["--control-api-address", f"127.0.0.1:{free_port()}", "--isolation", "subprocess"]
    with (out / "superlink.log").open("w") as log:
        link = subprocess.Popen([str(word) for word in serve], env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", link)
            subprocess.run([there / "flwr", "run", str(app), "here", "--stream"], env=environment, check=True)
        finally:
            link.terminate()
            link.wait()


def _wait_for(url: str, link: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _SECONDS
    while True:
        try:
            with urlopen(url):
                return
        except OSError:
            if link.poll() is not None or time.monotonic() > until:
                raise
        time.sleep(0.1)


if __name__ == "__main__":
    main()
