"""python -m tests.slow.rayup FOLDER: sets the stage up, runs the test on it, takes it down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAMESPACES = ("unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child")


def missing() -> str | None:
    """The first missing requirement of this machine, or None."""
    lacking = [tool for tool in ("unshare", "ip", "sshd", "rsync", "ssh-keygen") if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    trial = [*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
        return "needs root, and a machine that lets it have namespaces"
    return None


def play(folder: Path) -> int:
    """Run it with its files in `folder`; the exit status, 0 if everything passed."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = ["bash", str(Path(__file__).with_name("stage.sh")), str(folder.resolve()), sys.executable, str(ROOT)]
    return subprocess.run([*NAMESPACES, *stage], check=False).returncode


if __name__ == "__main__":
    why_not = missing()
    sys.exit(why_not or play(Path(sys.argv[1])))
