"""python -m tests.slow.rayup FOLDER: puts the stage up, plays on it, takes it down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAMESPACES = ("unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child")


def missing() -> str | None:
    """What this machine lacks for it, or None."""
    lacking = [tool for tool in ("unshare", "ip", "sshd", "rsync", "ssh-keygen") if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    trial = [*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
        return "needs root, and a machine that lets it have namespaces"
    return None


def play(folder: Path) -> int:
    """Runs it with its files in `folder`; the exit status, 0 where everything was as it must be."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = ["bash", str(Path(__file__).with_name("stage.sh")), str(folder.resolve()), sys.executable, str(ROOT)]
    return subprocess.run([*NAMESPACES, *stage], check=False).returncode


if __name__ == "__main__":
    why_not = missing()
    sys.exit(why_not or play(Path(sys.argv[1])))
