"""The built-in task `python-docs`: questions about the Python standard library, answered by its docstrings.

Needs no download: the rows are made at run time, so they are those of the running Python's version, platform
and build (about 3,800 rows over some 180 modules with CPython 3.11 on Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from rayfed_sub.data import stdlib_docs
from rayfed_sub.data.pairs import Pairs

_BEFORE, _AFTER = "What does `", "` do?"

COLUMN = "module"
"""The partition column: the top-level module."""


@cache
def python_docs() -> Pairs:
    """A row for each documented public callable, e.g. "What does `textwrap.dedent` do?", sorted by name.

    The modules are imported, because parsing their sources would miss what is written in C (`builtins`,
    `math`, `itertools`, `datetime`: more than a third of the rows).  That happens in an interpreter of its
    own, isolated from the environment: this process then gains no modules, warnings or hooks, and the rows
    cannot depend on what was imported or patched here before, so all processes see the same ones.  Left out
    are modules that open, print or write something when imported, need Tk, or name a platform
    (`stdlib_docs.SKIPPED`), and private ones.

    Takes about half a second, once a process.  Raises RuntimeError where the interpreter cannot be started again.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(Path(stdlib_docs.__file__))]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"reading the standard library's docstrings failed: {done.stderr.strip()[-500:]}")
    found: list[tuple[str, str, str]] = json.loads(done.stdout)
    return Pairs(
        kind="causal-lm",
        questions=tuple(f"{_BEFORE}{name}{_AFTER}" for _, name, _ in found),
        answers=tuple(text for _, _, text in found),
        keys=tuple(module for module, _, _ in found),
        spans=tuple(((len(_BEFORE), len(_BEFORE) + len(name)),) for _, name, _ in found),
    )
