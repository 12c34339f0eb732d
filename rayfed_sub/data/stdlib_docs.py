"""Finds documented callables of the standard library.  Runs as a script in a separate interpreter.

It imports nothing but the standard library, so `python -I -S stdlib_docs.py` works without this package; it
prints one JSON list of [module, dotted name, first paragraph], sorted by module and name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

SKIPPED = frozenset(
    {
        *("antigravity", "this"),  # open a browser; print
        *("idlelib", "tkinter", "turtle", "turtledemo"),  # need Tk, which many installations lack
        *("lib2to3", "test"),  # write grammar caches; the interpreter's own tests
        *("nt", "posix"),  # the same functions as `os`, under names that depend on the platform
    }
)
# Public modules whose callables say that they come from somewhere else.
ORIGINS = {"os": frozenset({"nt", "posix"})}
# A line that begins with `name(arguments)`, one level of parentheses inside, perhaps `-> result` or `- text`.
SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\((?:[^()]|\([^()]*\))*\)(?:\s*(?:-+>?|:)\s*(?P<text>.*))?\s*(?:\n|$)")


def documented(names: Iterator[str]) -> list[tuple[str, str, str]]:
    """(module, dotted name, first paragraph) of every public documented callable of the modules `names`.

    Modules that cannot be imported here (of another platform, or built without a library) are left out.
    A paragraph that several callables share is kept for the first of them, so that no answer can stand
    in the training rows under one name and in the held-out rows under another.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for name in sorted(names):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                module = importlib.import_module(name)
        except Exception:  # a module of another platform may raise anything: it is not available here
            continue
        for path, thing in callables(module):
            text = first_paragraph(getattr(thing, "__doc__", None))
            if text:
                found.setdefault(text, (name, f"{name}.{path}", text))
    return sorted(found.values())


def callables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The module's own public functions, classes and methods, by the names of their definitions, sorted."""
    origins = ORIGINS.get(module.__name__, frozenset()) | {module.__name__, f"_{module.__name__}"}
    for name, thing in sorted(vars(module).items()):
        origin = (getattr(thing, "__module__", None) or module.__name__).partition(".")[0]
        if not _defined_as(name, thing) or origin not in origins:
            continue
        yield name, thing
        if inspect.isclass(thing):
            for part in sorted(vars(thing)):
                method = getattr(thing, part, None)
                if _defined_as(part, method):
                    yield f"{name}.{part}", method


def first_paragraph(doc: object) -> str:
    """The first paragraph of a docstring with single spaces, or "" where it holds no sentence.

    Signatures that C functions put first are cut off.

    >>> first_paragraph("D.update([E, ]**F) -> None.  Update D from E and F.")
    'Update D from E and F.'
    >>> first_paragraph("ceil(x)\\n\\nRound   up to\\nthe next integer.\\n\\nMore.")
    'Round up to the next integer.'
    >>> first_paragraph("Point(x, y)")
    ''
    """
    if not isinstance(doc, str):
        return ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        text = paragraph.strip()
        while signature := SIGNATURE.match(text):
            rest = re.sub(r"^None\b[.:]?\s*", "", signature["text"] or "")
            # "name(x) -> new list" is all signature; "name(x) -> the sum of all x" says something.
            text = f"{rest if len(rest.split()) > 3 else ''}\n{text[signature.end() :]}".strip()
        words = text.split()
        if words:
            return " ".join(words) if len(words) > 2 and re.match(r"[\w'\"*`]", text) else ""
    return ""


def _defined_as(name: str, thing: object) -> bool:
    """True where `thing` is a public callable that is called `name` (and not another name for it)."""
    callable_ = inspect.isclass(thing) or inspect.isroutine(thing)
    return callable_ and not name.startswith("_") and getattr(thing, "__name__", None) == name


if __name__ == "__main__":
    public = (name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED)
    json.dump(documented(public), sys.stdout)
