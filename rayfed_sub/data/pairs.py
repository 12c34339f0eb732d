"""Question and answer as text: rows of a table, by a template or an image, before they meet a tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from string import Formatter
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import BY_SOURCE, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.data.chats import Chat, read_chats
from rayfed_sub.data.client_keys import clients_of, partitioned_by
from rayfed_sub.data.images import as_png, digest, encoded, opened
from rayfed_sub.data.readers import Wanted
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.sources import SPLITS
from rayfed_sub.data.tables import Table, class_names, classes, load_table, renamed, splits_of
from rayfed_sub.data.tasks import TASKS

Kind = Literal["causal-lm", "classification", "own"]
OVER_WHITE, SCALED = "over white", "scaled"
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
    plain: True for plain text, which has neither: questions are the texts, answers are empty.
    splits: of each row the official split that it is in, train, validation or test; empty where all are in train.
    changes: of each image OVER_WHITE where it has transparent pixels, SCALED where it has 16 bits, else "".
    objects: of rows of the caller's own (kind own) their pickles; questions are then digests of what they hold, answers
    are empty."""

    kind: Kind
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()
    chats: tuple[Chat, ...] = ()
    plain: bool = False
    splits: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    objects: tuple[bytes, ...] = ()

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
        splits = tuple(self.splits[int(index)] for index in indices) if self.splits else ()
        changes = tuple(self.changes[int(index)] for index in indices) if self.changes else ()
        objects = tuple(self.objects[int(index)] for index in indices) if self.objects else ()
        names, plain = self.class_names, self.plain
        return Pairs(self.kind, questions, answers, keys, names, images, spans, chats, plain, splits, changes, objects)

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Which rows are in no official validation or test split, (rows,)."""
        return (
            np.fromiter((split == "train" for split in self.splits), bool) if self.splits else np.ones(len(self), bool)
        )


def distinct(pairs: Pairs) -> Pairs:
    """Each (question, answer) once, of a classification each question: the first.  Copies could stand in training and
    held-out rows at once, and those with another label contradict each other.  One warning says how many were dropped.
    Plain text keeps its repeats: how often something is said is what a model of it learns, and each client has its own.
    So do rows of the caller's own, of which nobody knows what a repeat means.  Rows of official validation and test
    splits stay as they are.

    >>> distinct(Pairs("causal-lm", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"))).keys
    ('1', '2')
    >>> distinct(Pairs("classification", ("q", "q", "q"), ("a", "b", "a"), ("1", "2", "3"), ("a", "b"))).keys
    ('1',)
    """
    if pairs.plain or pairs.objects:
        return pairs
    first: dict[tuple[object, ...], int] = {}
    contradicting, trained = 0, pairs.trained
    for index, pair in enumerate(zip(pairs.questions, pairs.answers, strict=True)):
        repeated = pair if pairs.kind == "causal-lm" else pair[:1]
        kept = first.setdefault(repeated if trained[index] else (index,), index)
        contradicting += pairs.answers[kept] != pair[1]
    if len(first) < len(pairs):
        asked = "history and answer" if pairs.chats else "prompt and answer"
        what = "pixels" if pairs.images else "text" if pairs.kind == "classification" else asked
        other = f" ({contradicting:,} of them with another label)" if contradicting else ""
        counts = f"{len(pairs) - len(first):,} of {int(trained.sum()):,} rows"
        log.warning("%s have the %s of a row before them; dropped%s", counts, what, other)
    return pairs.take(np.fromiter(first.values(), np.int64, len(first)))


def ordered(pairs: Pairs) -> Pairs:
    """The pairs in canonical order, by the digests of question and answer, then by key: the order of a source's rows
    and files decides nothing.

    >>> one, other = (Pairs("causal-lm", tuple(rows), tuple(rows), ("", "")) for rows in ("ab", "ba"))
    >>> ordered(one) == ordered(other)
    True
    """
    splits = pairs.splits or [""] * len(pairs)
    places = [
        (_digest(question), _digest(answer), key, split)
        for question, answer, key, split in zip(pairs.questions, pairs.answers, pairs.keys, splits, strict=True)
    ]
    return pairs.take(np.asarray(sorted(range(len(pairs)), key=places.__getitem__), np.int64))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def capped(pairs: Pairs, max_rows: int | None, seed: int) -> Pairs:
    """At most `max_rows` pairs of the training rows, drawn without replacement, and all rows of official validation and
    test splits, in their first order."""
    trained = np.flatnonzero(pairs.trained)
    if max_rows is None or len(trained) <= max_rows:
        return pairs
    drawn = stream(seed, "max-rows").permutation(len(trained))[:max_rows]
    return pairs.take(np.sort(np.concatenate([trained[drawn], np.flatnonzero(~pairs.trained)])))


def of_keys(pairs: Pairs, keys: tuple[str, ...]) -> Pairs:
    """The pairs whose key is one of `keys`, and those without a key, which are nobody's."""
    wanted = frozenset((*keys, ""))
    kept = compress(range(len(pairs)), (key in wanted for key in pairs.keys))
    return pairs.take(np.fromiter(kept, np.int64))


_FILES = ("file", "path")  # columns that may name an image's file

_ANYBODY = "\0"  # the key of rows that nothing deals out

_NAMED = 3  # broken images named in a warning


def table_pairs(
    task: Task,
    key: str | None,
    federation: Federation | None = None,
    given: Callable[[Wanted], Table] | None = None,
) -> Pairs:
    """The pairs of the table that `task`, `filled`, describes, in the order of its sources.  key: the column whose
    values are the pairs' keys, unless `federation` names each row's client in another way (`clients_of`).  given: reads
    the table in place of the task's sources.

    Rows without a question, an answer (or label) or a key are dropped, and counted in one warning; so are, in another
    one that names some, images that cannot be read: by column `file` or `path`, the image's own path, or its row.
    Raises UserError (task.path, .train, .validation, .test, .split_column, .prompt, .answer, .label, .image,
    federation.partition.column, .file, .partitioner, .args).

    >>> import tempfile; file = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
    >>> print('{"q": "one?", "by": "A", "a": 1}', file=file, flush=True)
    >>> pairs = table_pairs(Task(name="table", path=file.name, prompt="{by}: {q}", answer="a"), key="by")
    >>> pairs.questions, pairs.answers, pairs.keys
    (('A: one?',), ('1',), ('A',))
    """
    _check_columns(task, sources=given is None)
    column = None if federation is not None and federation.partition.kind in BY_SOURCE else key
    dealt_by = partitioned_by(federation.partition) if federation else None
    pieces = _pieces(task.prompt) if task.prompt else []
    known = TASKS.get(task.name)
    wanted, renames = _wanted(task, pieces, column, dealt_by)
    by_client = federation is not None and federation.partition.kind == "files"
    read = load_table(task, wanted, by_client) if given is None else given(wanted)
    table = renamed(read, renames)
    if known:
        names = [name for _, name in pieces] + [task.image, task.answer, task.label, key if key == known.key else None]
        needed = tuple(dict.fromkeys(name for name in names if name is not None))
        if not set(needed) <= set(table.names):
            having = f"a table with the columns {', '.join(needed)}, as {task.name} has them"
            allowed = f"{having}; it has {', '.join(read.names) or 'none'}"
            raise UserError("task.path", task.path, allowed, "give another file, or set task.name=table")

    pictures, chats, labels = _Pictures([], [], []), list[Chat | None](), tuple[str, ...]()
    spans: list[tuple[Span, ...]] = []
    if task.messages is not None:
        chats = read_chats(task.messages, table.column("task.messages", task.messages), table.places())
        questions = [chat.history if chat else "" for chat in chats]
    elif task.text is not None:
        questions = table.texts("task.text", task.text)
    elif task.image is not None:
        pictures = _images(table, task.image)
        questions = pictures.digests
    else:
        questions, spans = _questions(table, pieces, tidy=bool(known and known.tidy))
    if task.messages is not None or task.text is not None:
        answers = [chat.turns[-1][1] if chat else "" for chat in chats] or [""] * len(questions)
    elif task.label is not None:
        answers = _named(classes(table.texts("task.label", task.label)), known.class_names if known else ())
        labels = class_names(answers)
    else:
        answers = table.texts("task.answer", str(task.answer))
        answers = [" ".join(answer.split()) for answer in answers] if known and known.tidy else answers
    keys, splits = _owners(table, task, key, federation)
    # Rows that nobody trains on need no key: they are nobody's.
    full = [
        bool(question and (answer or task.text) and (row_key or split != "train"))
        for question, answer, row_key, split in zip(questions, answers, keys, splits, strict=True)
    ]
    _check_full(task, full, broken=questions.count("") if task.image else 0)
    _check_splits(task, splits, full)
    pairs = Pairs(
        "classification" if task.label is not None else "causal-lm",
        tuple(questions),
        tuple(answers),
        tuple("" if row_key == _ANYBODY else row_key for row_key in keys),
        labels,
        tuple(pictures.files),
        tuple(spans),
        cast(tuple[Chat, ...], tuple(chats)),  # rows without one are not taken
        task.text is not None,
        tuple(splits) if {"validation", "test"} & set(splits) else (),
        tuple(pictures.changes) if any(pictures.changes) else (),
    )
    return pairs.take(np.flatnonzero([whole and bool(split) for whole, split in zip(full, splits, strict=True)]))


def _owners(
    table: Table, task: Task, key: str | None, federation: Federation | None
) -> tuple[list[str], Sequence[str]]:
    """Each row's key, "" where it has none, and its split; _ANYBODY where the task has no keys."""
    splits = splits_of(table, task)
    if federation is not None and federation.partition.kind in BY_SOURCE:
        return clients_of(table, federation.partition, federation.clients, splits)
    if key is None:
        return [_ANYBODY] * len(table), splits
    keys = classes(table.texts("federation.partition.column", key, optional=key != task.label))
    known = TASKS.get(task.name)
    return _named(keys, known.class_names if known and key == task.label else ()), splits


def _wanted(
    task: Task, pieces: Sequence[tuple[str, str | None]], key: str | None, dealt_by: str | None
) -> tuple[Wanted, dict[str, str]]:
    """The columns to read, under their names in the source too, and the renames that give them ours."""
    texts = {
        **{name: "task.prompt" for _, name in pieces if name is not None},
        **{str(getattr(task, role)): f"task.{role}" for role in ("answer", "label") if getattr(task, role) is not None},
        **({key: "federation.partition.column"} if key and key not in (task.answer, task.label) else {}),
        **({dealt_by: "federation.partition.args.partition_by"} if dealt_by else {}),
        **({task.split_column: "task.split_column"} if task.split_column else {}),
    }
    texts |= {task.text: "task.text"} if task.text else {}
    cells = {name: "task.image" for name in (task.image, *_FILES) if name} if task.image else {}
    cells |= {task.messages: "task.messages"} if task.messages else {}
    known = TASKS.get(task.name)
    renames = {old: name for old, name in known.renames.items() if name in texts} if known else {}
    return Wanted({**texts, **{old: texts[name] for old, name in renames.items()}}, cells), renames


def _check_full(task: Task, full: Sequence[bool], broken: int) -> None:
    """UserError where no row is complete; else a warning with the number of those that are not, broken images aside."""
    missing = len(full) - sum(full) - broken
    if not any(full):
        given = "an image" if task.image else "a prompt"
        allowed = f"a table with rows that have {given} and {'an answer' if task.label is None else 'a label'}"
        advice = "check the columns"
        if task.messages:
            allowed, advice = "a table with chats that hold an answer", "check task.messages"
        if task.text:
            allowed, advice = "a table with rows that have a text", "check task.text"
        raise UserError("task.path", task.path, allowed, advice)
    if missing:
        what = "label" if task.image else "prompt, answer" if task.label is None else "prompt, label"
        what = "answer" if task.messages else "text" if task.text else what
        log.warning("task.path: %s of %s rows have no %s or key; dropped", f"{missing:,}", f"{len(full):,}", what)


def _check_splits(task: Task, splits: Sequence[str], full: Sequence[bool]) -> None:
    """UserError for a split none of whose rows is complete."""
    used = {split for split, whole in zip(splits, full, strict=True) if whole}
    for split in SPLITS:
        if split in splits and split not in used:
            allowed = "a split with rows that have all that the task asks for; its rows lack text, label or key"
            raise UserError(f"task.{split}", getattr(task, split), allowed, f"name another one, or set task.{split}=[]")


def _check_columns(task: Task, *, sources: bool) -> None:
    """UserError where the task names no columns for a row's input and output; sources: whether it must name those."""
    if sources and not task.path and not task.train:
        raise UserError("task.path", task.path, "a file or hub id with task.name=table", "set task.path=FILE.parquet")
    for field in ("messages", "text"):
        if getattr(task, field) is not None:
            _alone(task, field)
            return
    if task.image is not None:
        if task.label is None:
            raise UserError("task.label", task.label, "the column of classes where task.image is set", "set task.label")
        for name in ("prompt", "answer"):
            if (value := getattr(task, name)) is not None:
                allowed = "nothing where task.image is set, which goes with task.label"
                raise UserError(f"task.{name}", value, allowed, f"remove task.{name}")
        return
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


def _alone(task: Task, field: str) -> None:
    """UserError where another column is named beside `field`, which says all of a row."""
    for name in ("prompt", "answer", "label", "image", "messages", "text"):
        if name != field and (value := getattr(task, name)) is not None:
            raise UserError(f"task.{name}", value, f"nothing where task.{field} is set", f"remove task.{name}")


@dataclass(frozen=True)
class _Pictures:
    """Of each image the digest of its pixels, "" where it cannot be read, its file, and its change (`Pairs`)."""

    digests: list[str]
    files: list[bytes]
    changes: list[str]


def _images(table: Table, name: str) -> _Pictures:
    """The images of a column; 16-bit ones as files of 8 bits, in which the largest value of all of them is white."""
    cells = table.column("task.image", name)
    read = _Pictures([""] * len(cells), [b""] * len(cells), [""] * len(cells))
    broken: list[tuple[int, str]] = []
    largest = 0
    for row, cell in enumerate(cells):
        try:
            read.files[row] = encoded(cell)
            found = opened(read.files[row])
        except (ValueError, OSError) as error:
            broken.append((row, str(error)))
            continue
        read.digests[row] = digest(found.image)
        read.changes[row] = SCALED if found.largest is not None else OVER_WHITE if found.transparent else ""
        largest = max(largest, found.largest or 0)
    for row in [row for row, change in enumerate(read.changes) if change == SCALED]:
        image = opened(read.files[row], max(largest, 1)).image
        read.files[row], read.digests[row] = as_png(image), digest(image)
    shown = [f"{file} ({error})" for file, error in _files(table, cells, broken)]
    if len(broken) == len(cells):
        some = ", ".join(shown[:_NAMED])
        raise UserError(
            "task.image", name, "a column of images in a format that Pillow knows", some or "it has no rows"
        )
    if broken:
        counts = f"{len(broken):,} of {len(cells):,}"
        log.warning("task.image: %s images cannot be read; skipped: %s", counts, ", ".join(shown))
    if transparent := read.changes.count(OVER_WHITE):
        log.warning("task.image: %s of %s images are transparent; over white", f"{transparent:,}", f"{len(cells):,}")
    if deep := read.changes.count(SCALED):
        counts = f"{deep:,} of {len(cells):,}"
        log.warning("task.image: %s images have 16 bits; scaled by %s, the largest value", counts, f"{largest:,}")
    return read


def _files(table: Table, cells: Sequence[Any], rows: Sequence[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """Names of images for messages, each with its text from `rows`."""
    named = [table.column("task.image", name) for name in _FILES if rows and all(name in p.names for p in table.parts)]
    places = list(table.places()) if rows else []
    for row, text in rows:
        cell = cells[row]
        names = [*(column[row] for column in named), cell.get("path") if isinstance(cell, Mapping) else None]
        yield next((str(name) for name in names if name), str(places[row])), text


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


def _questions(
    table: Table, pieces: Sequence[tuple[str, str | None]], tidy: bool
) -> tuple[list[str], list[tuple[Span, ...]]]:
    """The template filled in for every row, stripped, and where the columns' texts stand in it; an empty cell is empty
    text.  tidy: runs of white space in the cells become one space."""
    columns = [(literal, table.texts("task.prompt", name) if name else None) for literal, name in pieces]
    questions, spans = [], []
    for row in range(len(table)):
        text, places = "", []
        for literal, cells in columns:
            text = (text + literal).lstrip()
            if cells is not None and (cell := " ".join(cells[row].split()) if tidy else cells[row]):
                places.append((len(text), len(text) + len(cell)))
                text += cell
        questions.append(text.rstrip())  # cells end without a space, so every span stays inside
        spans.append(tuple(places))
    return questions, spans


def _named(labels: list[str], names: Sequence[str]) -> list[str]:
    """Labels that are numbers of `names` as these names, where all are."""
    numbers = {label: label.isdecimal() and int(label) < len(names) for label in set(labels) - {""}}
    return [names[int(label)] if label else "" for label in labels] if all(numbers.values()) and names else labels
