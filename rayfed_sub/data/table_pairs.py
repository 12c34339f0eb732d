"""A table's rows as pairs: a template makes the question, a column is the answer or the class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from string import Formatter

import numpy as np

from rayfed_sub.config import Task
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.table import Table, read_table
from rayfed_sub.errors import UserError

log = logging.getLogger(__name__)


def table_pairs(task: Task, key: str | None) -> Pairs:
    """The pairs of the table that `task` describes; key: the column whose values are the pairs' keys.

    Rows without a question, an answer (or label) or a key are dropped, and counted in one warning.
    Raises UserError (task.path, .split, .prompt, .answer, .label, federation.partition.column).

    >>> import tempfile; file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
    >>> print('{"q": "one?", "by": "A", "a": 1}', file=file, flush=True)
    >>> pairs = table_pairs(Task(name="table", path=file.name, prompt="{by}: {q}", answer="a"), key="by")
    >>> pairs.questions, pairs.answers, pairs.keys
    (('A: one?',), ('1',), ('A',))
    """
    if not task.path:
        raise UserError("task.path", task.path, "a file or hub id with task.name=table", "set task.path=FILE.parquet")
    if (task.answer is None) == (task.label is None):
        given = "neither" if task.answer is None else "both"
        allowed = f"one of task.answer (language modelling) and task.label (classification), not {given}"
        raise UserError("task.answer", task.answer, allowed, "name one column in one of them")
    if not task.prompt:
        raise UserError("task.prompt", task.prompt, "a template such as '{question}'", "set task.prompt")

    pieces = _pieces(task.prompt)
    named = {name for _, name in pieces if name is not None} | {task.answer, task.label, key}
    table = read_table(task.path, task.split, frozenset(name for name in named if name is not None))
    questions = _questions(table, pieces)
    if task.label is not None:
        answers, class_names = _classes(table, task.label)
    else:
        answers, class_names = _texts(table, "task.answer", str(task.answer)), ()
    keys = _texts(table, "federation.partition.column", key) if key else ["*"] * len(questions)

    full = [all(row) for row in zip(questions, answers, keys, strict=True)]
    missing = len(full) - sum(full)
    if not any(full):
        said = "an answer" if task.label is None else "a label"
        raise UserError("task.path", task.path, f"a table with rows that have a prompt and {said}", "check the columns")
    if missing:
        log.warning("task.path: %d of %d rows have no prompt, answer or key; dropped", missing, len(full))
    pairs = Pairs(
        "classification" if task.label is not None else "causal-lm",
        tuple(questions),
        tuple(answers),
        tuple(keys if key else [""] * len(keys)),
        class_names,
    )
    return pairs.take(np.flatnonzero(full))


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, column that follows it or None)."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError("task.prompt", template, "text with {column} in it", str(error)) from None
    if not any(name for _, name, _, _ in parsed) or any(
        name == "" or spec or conversion for _, name, spec, conversion in parsed
    ):
        raise UserError(
            "task.prompt",
            template,
            "text with {column} in it",
            "name columns, without index, format or !conversion",
        )
    return [(literal, name) for literal, name, _, _ in parsed]


def _questions(table: Table, pieces: Sequence[tuple[str, str | None]]) -> list[str]:
    """The template filled in for every row; an empty cell is empty text."""
    columns = [(literal, _texts(table, "task.prompt", name) if name else None) for literal, name in pieces]
    count = next(len(cells) for _, cells in columns if cells is not None)
    return [
        "".join(literal + (cells[row] if cells is not None else "") for literal, cells in columns).strip()
        for row in range(count)
    ]


def _texts(table: Table, field: str, name: str) -> list[str]:
    """A column as stripped text: "" for a missing cell, the class's name for a `ClassLabel`."""
    cells = table.column(field, name)
    if name in table.class_names:
        names = table.class_names[name]
        return ["" if cell is None or cell < 0 else names[cell] for cell in cells]  # -1 is "no label"
    return ["" if cell is None else str(cell).strip() for cell in cells]


def _classes(table: Table, name: str) -> tuple[list[str], tuple[str, ...]]:
    """Each row's class name, and all in order: a `ClassLabel`'s own, numbers by size, else the alphabet."""
    texts = _texts(table, "task.label", name)
    if name in table.class_names:
        return texts, table.class_names[name]
    numbers = all(type(cell) is int for cell in table.column("task.label", name) if cell is not None)
    return texts, tuple(sorted(set(texts) - {""}, key=(lambda text: (int(text), text)) if numbers else None))
