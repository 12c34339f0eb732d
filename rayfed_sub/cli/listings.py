"""Tables of `rayfed-sub list`: columns and rows of methods, hooks, tasks and model presets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Listing = tuple[tuple[str, ...], list[tuple[object, ...]]]


def methods() -> Listing:
    """Columns: name, paper, trained tensors, exact or not, wire cost (numbers per layer, client and round, up / down),
    departures from the paper."""
    from rayfed_sub.methods import METHODS, build

    built = [build({"name": name}) for name in METHODS]
    columns = ("name", "paper", "trained", "exact", "wire", "as published")
    return columns, [(m.name, m.paper, m.trained, m.exact, m.wire, m.departs or "yes") for m in built]


def hooks() -> Listing:
    """Columns: name, paper, wire cost (numbers beside the method's own, per client and round, up / down; t: those of
    the trained tensors), departures from the paper."""
    from rayfed_sub.methods import HOOKS, class_of

    classes: list[Any] = [class_of(name, "hook") for name in HOOKS]
    columns = ("name", "paper", "wire", "as published")
    return columns, [(cls.name, cls.paper, cls.wire, cls.departs or "yes") for cls in classes]


def tasks() -> Listing:
    """Columns: name, data set's hub id, description, default column of the partition, licence."""
    from rayfed_sub.data.python_docs import COLUMN
    from rayfed_sub.data.tasks import TASKS

    docs = "questions and answers from the standard library's docstrings, keyed by module"
    table = "hub id, file, folder or glob at task.path, with task.prompt, image, messages or text"
    rows: list[tuple[object, ...]] = [("python-docs", "built in", docs, COLUMN, "PSF-2.0")]
    rows += [(name, task.hub, task.what, task.key, task.licence) for name, task in TASKS.items()]
    return ("name", "hub id", "what", "column", "licence"), [*rows, ("table", "yours", table, "none", "yours")]


def models() -> Listing:
    """Columns: preset, source, kind, note; any hub id, folder or GGUF file works as model.path too."""
    from rayfed_sub.models.presets import MODELS

    rows: list[tuple[object, ...]] = [(name, preset.path, preset.kind, preset.note) for name, preset in MODELS.items()]
    return ("name", "path", "kind", "note"), rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The listing as a Markdown table, names as code.

    >>> print(markdown(("name", "exact"), [("fedftg", True)]))
    | name | exact |
    | --- | --- |
    | `fedftg` | yes |
    """
    truth = {True: "yes", False: "no"}
    body = [[f"`{name}`", *(truth[x] if isinstance(x, bool) else x for x in rest)] for name, *rest in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [columns, ["---"] * len(columns), *body])


LISTINGS: dict[str, Callable[[], Listing]] = {"methods": methods, "hooks": hooks, "tasks": tasks, "models": models}
