"""What the bits depend on besides the configuration: kept with every run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayfed_sub.config import Config

_LIBRARIES = ("rayfed_sub", "ray", "torch", "transformers", "numpy", "datasets")


def versions() -> dict[str, str]:
    """Of the libraries that compute, and of Python."""
    return {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}


def environment(config: Config) -> dict[str, Any]:
    """What the bits depend on besides configuration and versions."""
    import torch

    return {
        "processor": _processor(),
        "threads": config.resources.threads,
        "pack_size": config.resources.pack_size,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    return platform.processor()
