"""Question and answer as text: rows of a table, by a template or an image, before they meet a tokenizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import compress
from string import Formatter
from typing import Any, Literal

import numpy as np

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.data.chats import Chat, read_chats
from rayfed_sub.data.images import decoded, digest, encoded
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.tables import Table, read_table, renamed
from rayfed_sub.data.tasks import TASKS

Kind = Literal["causal-lm", "classification"]
Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Rows as text.  answers: texts to learn, or names of classes; keys: the value by which a row
    may be dealt out (such as its module), "" where the task has none; class_names is empty for
    language modelling, else in the order of the class numbers.
    images: of an image classification each row's image as in its file; questions are then digests of their pixels.
    spans: of each question the parts that are the user's text, in order; the rest is a template's own and is never cut.
    Empty: questions are the user's as a whole.
    chats: of a task of chats each row's; its question is then the history of its last answer, its answer that one.
    plain: True for plain text, which has neither: questions are the texts, answers are empty."""

    kind: Kind
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()
    chats: tuple[Chat, ...] = ()
    plain: bool = False

    def __len__(self) -> int:
        return len(self.questions)

    def take(self, indices: Ints) -> Pairs:
        """The pairs at `indices`, in that order."""
        questions, answers, keys = (
            tuple(column[int(index)] for index in indices) for column in (self.questions, self.answers, self.keys)
        )
        images = tuple(self.images[int(index)] for index in indices) if self.images else ()
        spans = tuple(self.spans[int(index)] for index in indices) if self.spans else ()
        chats = tuple(self.chats[int(index)] for index in indices) if self.chats else ()
        return Pairs(self.kind, questions, answers, keys, self.class_names, images, spans, chats, self.plain)


def distinct(pairs: Pairs) -> Pairs:
    """Each (question, answer) once, of a classification each question: the first.  Copies could stand in training and
    held-out rows at once, and those with another label contradict each other.  One warning says how many were dropped.
    Plain text keeps its repeats: how often something is said is what a model of it learns, and each client has its own.

    >>> distinct(Pairs("causal-lm", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"))).keys
    ('1', '2')
    >>> distinct(Pairs("classification", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"), ("a", "b"))).keys
    ('1',)
    """
    if pairs.plain:
        return pairs
    first: dict[tuple[str, ...], int] = {}
    contradicting = 0
    for index, pair in enumerate(zip(pairs.questions, pairs.answers, strict=True)):
        kept = first.setdefault(pair if pairs.kind == "causal-lm" else pair[:1], index)
        contradicting += pairs.answers[kept] != pair[1]
    if len(first) < len(pairs):
        asked = "history and answer" if pairs.chats else "prompt and answer"
        what = "pixels" if pairs.images else "text" if pairs.kind == "classification" else asked
        other = f" ({contradicting:,} of them with another label)" if contradicting else ""
        counts = f"{len(pairs) - len(first):,} of {len(pairs):,} rows"
        log.warning("%s have the %s of a row before them; dropped%s", counts, what, other)
    return pairs.take(np.fromiter(first.values(), np.int64, len(first)))


def capped(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """At most `max_rows` pairs drawn without replacement, in their first order."""
    if max_rows is None or len(pairs) <= max_rows:
        return pairs
    drawn = stream(seed, "max-rows").permutation(len(pairs))[:max_rows]
    return pairs.take(np.sort(drawn))


def of_keys(pairs: Pairs, keys: tuple[str, ...]) -> Pairs:
    """The pairs whose key is one of `keys`."""
    wanted = frozenset(keys)
    kept = compress(range(len(pairs)), (key in wanted for key in pairs.keys))
    return pairs.take(np.fromiter(kept, np.int64))


_FILES = ("file", "path")  # columns that may name an image's file

_NAMED = 3  # broken images named in a warning


def table_pairs(task: Task, key: str | None) -> Pairs:
    """The pairs of the table that `task`, `filled`, describes; key: the column whose values are the pairs' keys.

    Rows without a question, an answer (or label) or a key are dropped, and counted in one warning; so are, in another
    one that names some, images that cannot be read: by column `file` or `path`, the image's own path, or its number,
    counted from 1.
    Raises UserError (task.path, .split, .prompt, .answer, .label, .image, federation.partition.column).

    >>> import tempfile; file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
    >>> print('{"q": "one?", "by": "A", "a": 1}', file=file, flush=True)
    >>> pairs = table_pairs(Task(name="table", path=file.name, prompt="{by}: {q}", answer="a"), key="by")
    >>> pairs.questions, pairs.answers, pairs.keys
    (('A: one?',), ('1',), ('A',))
    """
    path = _checked(task)
    if task.messages is not None:
        return _chats(task, read_table(path, task.split, _columns(task.messages, key)), key)
    if task.text is not None:
        return _plain(task, read_table(path, task.split, _columns(task.text, key)), key)
    pieces = _pieces(task.prompt) if task.prompt else []
    known = TASKS.get(task.name)
    named = {name for _, name in pieces if name is not None} | {task.answer, task.label, task.image, key}
    asked = {name for name in named if name is not None} | (set(_FILES) if task.image else set())
    renames = {old: name for old, name in known.renames.items() if name in asked} if known else {}
    read = read_table(path, task.split, frozenset({*asked, *renames}))
    table = renamed(read, renames)
    if known:
        names = [name for _, name in pieces] + [task.image, task.answer, task.label, key if key == known.key else None]
        needed = tuple(dict.fromkeys(name for name in names if name is not None))
        if not set(needed) <= set(table.names):
            having = f"a table with the columns {', '.join(needed)}, as {task.name} has them"
            allowed = f"{having}; it has {', '.join(read.names) or 'none'}"
            raise UserError("task.path", path, allowed, "give another file, or set task.name=table")
    for name in (task.label, key):
        table = _whole(table, name) if name else table

    if known and known.tidy:
        table = _tidied(table, {name for _, name in pieces if name} | {str(task.answer)})
    images: list[bytes] = []
    spans: list[tuple[Span, ...]] = []
    if task.image is not None:
        questions, images = _images(table, task.image)
    else:
        questions, spans = _questions(table, pieces)
    if task.label is not None:
        table = _with_names(table, task.label, known.class_names if known else ())
        answers, class_names = _classes(table, task.label)
    else:
        answers, class_names = _texts(table, "task.answer", str(task.answer)), ()
    keys = _texts(table, "federation.partition.column", key) if key else ["*"] * len(questions)

    full = [all(row) for row in zip(questions, answers, keys, strict=True)]
    broken = questions.count("") if task.image else 0
    missing = len(full) - sum(full) - broken
    if not any(full):
        given = "an image" if task.image else "a prompt"
        wanted = "an answer" if task.label is None else "a label"
        raise UserError(
            "task.path", task.path, f"a table with rows that have {given} and {wanted}", "check the columns"
        )
    if missing:
        what = "label" if task.image else "prompt, answer" if task.label is None else "prompt, label"
        log.warning("task.path: %s of %s rows have no %s or key; dropped", f"{missing:,}", f"{len(full):,}", what)
    pairs = Pairs(
        "classification" if task.label is not None else "causal-lm",
        tuple(questions),
        tuple(answers),
        tuple(keys if key else [""] * len(keys)),
        class_names,
        tuple(images),
        tuple(spans),
    )
    return pairs.take(np.flatnonzero(full))


def _chats(task: Task, table: Table, key: str | None) -> Pairs:
    """The pairs of a table of chats.  Rows without an answer or a key are dropped, and counted in one warning."""
    column = str(task.messages)
    chats = read_chats(column, table.column("task.messages", column))
    keys = _texts(_whole(table, key), "federation.partition.column", key) if key else [""] * len(chats)
    full = [chat for chat, named in zip(chats, keys, strict=True) if chat is not None and (named or not key)]
    if not full:
        raise UserError("task.path", task.path, "a table with chats that hold an answer", "check task.messages")
    if len(full) < len(chats):
        log.warning(
            "task.path: %s of %s rows have no answer or key; dropped", f"{len(chats) - len(full):,}", f"{len(chats):,}"
        )
    return Pairs(
        "causal-lm",
        tuple(chat.history for chat in full),
        tuple(chat.turns[-1][1] for chat in full),
        tuple(keys[chat.row - 1] for chat in full),
        chats=tuple(full),
    )


def _plain(task: Task, table: Table, key: str | None) -> Pairs:
    """The texts of a table.  Rows without a text or a key are dropped, and counted in one warning."""
    texts = _texts(table, "task.text", str(task.text))
    keys = _texts(_whole(table, key), "federation.partition.column", key) if key else ["*"] * len(texts)
    full = [row for row, both in enumerate(zip(texts, keys, strict=True)) if all(both)]
    if not full:
        raise UserError("task.path", task.path, "a table with rows that have a text", "check task.text")
    if len(full) < len(texts):
        counts = f"{len(texts) - len(full):,} of {len(texts):,}"
        log.warning("task.path: %s rows have no text or key; dropped", counts)
    named = tuple(keys[row] if key else "" for row in full)
    return Pairs("causal-lm", tuple(texts[row] for row in full), ("",) * len(full), named, plain=True)


def _columns(*names: str | None) -> frozenset[str]:
    return frozenset(name for name in names if name is not None)


def _checked(task: Task) -> str:
    """The table's path.  UserError where the task names no columns for a row's input and output."""
    if not task.path:
        raise UserError("task.path", task.path, "a file or hub id with task.name=table", "set task.path=FILE.parquet")
    for field in ("messages", "text"):
        if getattr(task, field) is not None:
            return _alone(task, field)
    if task.image is not None:
        if task.label is None:
            raise UserError("task.label", task.label, "the column of classes where task.image is set", "set task.label")
        for name in ("prompt", "answer"):
            if (value := getattr(task, name)) is not None:
                allowed = "nothing where task.image is set, which goes with task.label"
                raise UserError(f"task.{name}", value, allowed, f"remove task.{name}")
        return task.path
    if task.answer is None and task.label is None:
        allowed = "a column of the table, here (language modelling) or in task.label (classification)"
        raise UserError("task.answer", None, allowed, "set one of them")
    if task.answer is not None and task.label is not None:
        allowed = "nothing where task.label is set: an answer is for language modelling, a label for classification"
        raise UserError("task.answer", task.answer, allowed, "remove one of them")
    if not task.prompt:
        raise UserError("task.prompt", task.prompt, "a template such as '{question}'", "set task.prompt")
    wanted = task.answer or task.label
    if any(name == wanted for _, name in _pieces(task.prompt)):
        allowed = f"a template without {{{wanted}}}, which is what the model is to say"
        raise UserError("task.prompt", task.prompt, allowed, "leave that column out")
    return task.path


def _alone(task: Task, field: str) -> str:
    """The table's path, of a task whose `field` says all of a row.  UserError where another column is named too."""
    for name in ("prompt", "answer", "label", "image", "messages", "text"):
        if name != field and (value := getattr(task, name)) is not None:
            raise UserError(f"task.{name}", value, f"nothing where task.{field} is set", f"remove task.{name}")
    return str(task.path)


def _images(table: Table, name: str) -> tuple[list[str], list[bytes]]:
    """The digest of each image's pixels, "" where it cannot be read, and the image as in its file."""
    digests, contents, broken = [], [], []
    cells = table.column("task.image", name)
    for row, cell in enumerate(cells):
        content = b""
        try:
            content = encoded(cell)
            digests.append(digest(decoded(content)))
        except (ValueError, OSError) as error:
            digests.append("")
            broken.append(f"{_file(table, cell, row)} ({error})")
        contents.append(content)
    if len(broken) == len(cells):
        some = ", ".join(broken[:_NAMED])
        raise UserError(
            "task.image", name, "a column of images in a format that Pillow knows", some or "it has no rows"
        )
    if broken:
        counts = f"{len(broken):,} of {len(cells):,}"
        log.warning("task.image: %s images cannot be read; skipped: %s", counts, ", ".join(broken))
    return digests, contents


def _file(table: Table, cell: Any, row: int) -> str:
    """Name of a row's image for messages."""
    stored = [cell.get("path")] if isinstance(cell, Mapping) else []
    names = [*(table.columns[name][row] for name in _FILES if name in table.columns), *stored]
    return next((str(name) for name in names if name), f"row {row + 1}")


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


def _questions(table: Table, pieces: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[tuple[Span, ...]]]:
    """The template filled in for every row, stripped, and where the columns' texts stand in it; an empty cell is empty
    text."""
    columns = [(literal, _texts(table, "task.prompt", name) if name else None) for literal, name in pieces]
    count = next(len(cells) for _, cells in columns if cells is not None)
    questions, spans = [], []
    for row in range(count):
        text, places = "", []
        for literal, cells in columns:
            text = (text + literal).lstrip()
            if cells is not None and cells[row]:
                places.append((len(text), len(text) + len(cells[row])))
                text += cells[row]
        questions.append(text.rstrip())  # cells end without a space, so every span stays inside
        spans.append(tuple(places))
    return questions, spans


def _tidied(table: Table, names: Set[str]) -> Table:
    """The table with runs of white space in the texts of these columns as one space."""
    tidy = {
        name: [" ".join(cell.split()) if isinstance(cell, str) else cell for cell in table.columns[name]]
        for name in table.columns.keys() & names
    }
    return replace(table, columns={**table.columns, **tidy})


def _texts(table: Table, field: str, name: str) -> list[str]:
    """A column as stripped text: "" for a missing cell, the class's name for a `ClassLabel`."""
    cells = [None if _missing(cell) else cell for cell in table.column(field, name)]
    if name in table.class_names:
        names = table.class_names[name]
        return ["" if cell is None or cell < 0 else names[cell] for cell in cells]  # -1 is "no label"
    return ["" if cell is None else str(cell).strip() for cell in cells]


def _classes(table: Table, name: str) -> tuple[list[str], tuple[str, ...]]:
    """Each row's class name, and all in order: a `ClassLabel`'s own, numbers by size, else the alphabet."""
    texts = _texts(table, "task.label", name)
    if name in table.class_names:
        return texts, table.class_names[name]
    numbers = all(type(cell) is int for cell in _present(table, name))
    return texts, tuple(sorted(set(texts) - {""}, key=(lambda text: (int(text), text)) if numbers else None))


def _whole(table: Table, name: str) -> Table:
    """The table with integers in a column of floats without a fraction: so pandas keeps integers with missing cells."""
    cells = _present(table, name)
    if not cells or not all(isinstance(cell, float) and cell.is_integer() for cell in cells):
        return table
    whole = [None if _missing(cell) else int(cell) for cell in table.columns[name]]
    return replace(table, columns={**table.columns, name: whole})


def _with_names(table: Table, name: str, class_names: tuple[str, ...]) -> Table:
    """The table with names for the numbers of a column that has none of its own, where they fit."""
    cells = _present(table, name)
    if name in table.class_names or not all(type(cell) is int and cell < len(class_names) for cell in cells):
        return table
    return replace(table, class_names={**table.class_names, name: class_names})


def _present(table: Table, name: str) -> list[Any]:
    return [cell for cell in table.columns.get(name, ()) if not _missing(cell)]


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))  # NaN is how pandas says None
