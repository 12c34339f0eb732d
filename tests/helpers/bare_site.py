"""A folder of packages with some distributions and what they ask for, and nothing else: an environment where this
project's other dependencies, and its own metadata, are not installed."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

_COMMANDS = "typer"
"""What the hub's client asks for, pydantic with it, for nothing but a command line of its own."""


def bare_site(folder: Path, *names: str) -> Path:
    """Links to all that the distributions need, in a new folder; Python finds them there with PYTHONPATH and -S."""
    folder.mkdir(parents=True)
    waiting, found = list(names), dict[str, Distribution]()
    while waiting:
        name = waiting.pop()
        if name in found or name == _COMMANDS:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of another platform's
            continue
        asked = [Requirement(line) for line in found[name].requires or ()]
        waiting += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in found.values():
        for top in sorted({path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}):
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(one.locate_file(top))))
    return folder
