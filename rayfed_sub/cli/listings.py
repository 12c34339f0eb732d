"""Tables of `rayfed-sub list`: columns and rows of methods, hooks, tasks and model presets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

Listing = tuple[tuple[str, ...], list[tuple[object, ...]]]


FAMILY = "family"
"""The column by which rows are grouped, in text."""


def methods() -> Listing:
    """Columns: name, paper, trained tensors, exact or not, wire cost (numbers per layer, client and round, up / down),
    departures from the paper, and FAMILY: what is trained and what is averaged."""
    from rayfed_sub.methods import FAMILIES, build

    columns = ("name", "paper", "trained", "exact", "wire", "as published", FAMILY)
    built = [(family, build({"name": name})) for family, names in FAMILIES.items() for name in names]
    return columns, [(m.name, m.paper, m.trained, m.exact, m.wire, m.departs or "yes", of) for of, m in built]


def choices() -> Listing:
    """What helps to choose a method, from its own code: see `choosing.py`."""
    from rayfed_sub.cli.choosing import COLUMNS, facts
    from rayfed_sub.methods import FAMILIES

    rows = [(*row, family) for family, names in FAMILIES.items() for row in facts(tuple(names))]
    return (*COLUMNS, FAMILY), rows


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
    truth, body = {True: "yes", False: "no"}, list[list[object]]()
    left, groups = families(columns, rows)
    for family, members in groups:
        if family:
            body.append([f"**{family}**", *[""] * (len(left) - 1)])
        body += [[f"`{name}`", *(truth[x] if isinstance(x, bool) else x for x in rest)] for name, *rest in members]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [left, ["---"] * len(left), *body])


def families(
    columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> tuple[tuple[str, ...], list[tuple[str, list[tuple[object, ...]]]]]:
    """The columns without FAMILY, and each family's name and rows; all rows under no name where there is no family.

    >>> families(("name", "family"), [("fedftg", "subspaces"), ("fedkrso", "subspaces"), ("fedavg", "dense")])
    (('name',), [('subspaces', [('fedftg',), ('fedkrso',)]), ('dense', [('fedavg',)])])
    >>> families(("name",), [("tiny",)])
    (('name',), [('', [('tiny',)])])
    """
    if FAMILY not in columns:
        return tuple(columns), [("", [tuple(row) for row in rows])]
    at = list(columns).index(FAMILY)

    def left(row: Sequence[Any]) -> tuple[Any, ...]:
        return (*row[:at], *row[at + 1 :])

    groups = groupby(rows, key=lambda row: str(row[at]))
    return left(columns), [(family, [left(row) for row in members]) for family, members in groups]


LISTINGS: dict[str, Callable[[], Listing]] = {
    "methods": methods,
    "choices": choices,
    "hooks": hooks,
    "tasks": tasks,
    "models": models,
}
