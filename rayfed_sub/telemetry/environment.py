"""Versions, machine and settings that determine the bits, reported by the workers and stored with every run.

The process that starts a run may be on a head without a GPU, or with another build of torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayfed_sub.config.schema import Config

_GIT_SECONDS = 5.0
_LIBRARIES = ("rayfed_sub", "ray", "torch", "transformers", "numpy", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute; of this package with the commit, where it is a checkout."""
    found = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    commit = commit_of(Path(__file__).parents[2])
    return found if commit is None else {**found, "rayfed_sub": f"{found['rayfed_sub']}+{commit}"}


@cache
def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, followed by `.changed` where Python files differ from it (a study rewrites its tables
    while it runs); None of another folder, also where one above it is a checkout."""
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None

    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def said(*words: str) -> str:
        how: dict[str, Any] = {"cwd": folder, "env": own, "capture_output": True, "text": True, "timeout": _GIT_SECONDS}
        return str(subprocess.run([git, "--no-optional-locks", *words], check=False, **how).stdout).strip()

    try:
        commit = said("rev-parse", "--short=8", "HEAD")
        return (commit + (".changed" if said("status", "--porcelain", "-uno", "--", "*.py") else "")) or None
    except subprocess.TimeoutExpired:  # a folder of a slow file system
        return None


def machine(gpu: bool) -> dict[str, Any]:
    """Processor and GPU of this process; gpu: True where it computes on a GPU."""
    import torch

    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def environment(config: Config, machines: Sequence[Mapping[str, Any]], any_pack: bool) -> dict[str, Any]:
    """Machine and settings that results depend on; machines: the workers', see `machine`.  any_pack: whether the bits
    are the same in any pack."""
    found = merged(machines)
    pack_size = "any" if any_pack else config.resources.first_pack
    settings = {"threads": config.resources.threads, "pack_size": pack_size}
    return {"processor": found.pop("processor", None), **settings, **found}


def merged(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The workers' answers merged: the common value, or the different values joined.

    >>> merged([{"gpu": "L4", "torch": "2.13"}, {"gpu": "A100", "torch": "2.13"}])
    {'gpu': 'A100, L4', 'torch': '2.13'}
    """
    values = {
        key: {answer.get(key) for answer in answers}
        for key in dict.fromkeys(key for answer in answers for key in answer)
    }
    return {
        key: next(iter(found)) if len(found) == 1 else ", ".join(sorted("none" if x is None else str(x) for x in found))
        for key, found in values.items()
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    return platform.processor()
