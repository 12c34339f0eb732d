"""Rows of a table as question and answer, by a template or an image, in the order of the table's sources."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from string import Formatter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import BY_SOURCE, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.chats import Chats, read_chats
from rayfed_sub.data.client_keys import clients_of, partitioned_by
from rayfed_sub.data.columns import Labels, TextWriter, taken
from rayfed_sub.data.images import as_png, digest, encoded, opened
from rayfed_sub.data.labels import LabelColumn, read_labels, untrained
from rayfed_sub.data.pairs import OVER_WHITE, SCALED, Pairs, Span, Spans
from rayfed_sub.data.readers import Wanted
from rayfed_sub.data.split_names import SPLITS
from rayfed_sub.data.tables import Table, canonical_classes, load_table, renamed, splits_of
from rayfed_sub.data.tasks import TASKS

log = logging.getLogger(__name__)

_FILES = ("file", "path")  # columns that may name an image's file

_Text = tuple[str, str, Sequence[Span]]
"""Question, answer, and of each column of the template its text's place in the question."""

_ANYBODY = "\0"  # the key of rows that nothing deals out

_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence")),
    *(("sentence_a", "sentence_b"), ("text1", "text2"), ("query", "passage")),
)
"""Names that columns of pairs of texts usually have."""

_NAMED = 3  # broken images, or labels, named in a warning


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
    >>> list(pairs.questions), list(pairs.answers), list(pairs.keys)
    (['A: one?'], ['1'], ['A'])
    """
    read = partial(_read, task, federation, given)
    _check_columns(task, sources=given is None, read=read)
    column = None if federation is not None and federation.partition.kind in BY_SOURCE else key
    dealt_by = partitioned_by(federation.partition) if federation else None
    templates = [_pieces(template) for template in task.prompts]
    pieces = [piece for template in templates for piece in template]
    known = TASKS.get(task.name)
    wanted, renames = _wanted(task, pieces, column, dealt_by)
    whole = read(wanted)
    table = renamed(whole, renames)
    if known:
        own = [task.image, task.answer, *task.labels, key if key == known.key else None]
        names = [*(name for _, name in pieces), *own]
        needed = tuple(dict.fromkeys(name for name in names if name is not None))
        if not set(needed) <= set(table.names):
            having = f"a table with the columns {', '.join(needed)}, as {task.name} has them"
            allowed = f"{having}; it has {', '.join(whole.names) or 'none'}"
            raise UserError("task.path", task.path, allowed, "give another file, or set task.name=table")

    pictures = _images(table, task.image) if task.image is not None else _Pictures([], [], [])
    splits = splits_of(table, task)
    found = read_labels(table, task, splits, known.class_names if known else ()) if task.labels else None
    labels = None if found is None else found.labels
    keys, splits = _owners(table, task, key, federation, found, splits)
    tidy = bool(known and known.tidy)
    if task.image is not None:
        texts: Iterator[_Text] = ((question, "", ()) for question in pictures.digests)
    elif task.messages is not None:
        chats = read_chats(task.messages, table.column("task.messages", task.messages), table.places())
        texts = ((chat.history, chat.turns[-1][1], ()) if chat else ("", "", ()) for chat in chats)
    elif task.text is not None:
        texts = ((text, "", ()) for text in table.texts("task.text", task.text))
    else:
        texts = _asked(table, task, templates[0], tidy) if len(templates) == 1 else _pairs(table, task, templates)
    # Rows that nobody trains on need no key: they are nobody's.
    owned = ~keys.are("") | ~splits.are("train")
    answered = ~labels.are("") if labels is not None else np.full(len(table), task.text is not None)
    questions, answers, spans = TextWriter(), TextWriter(), array("i")
    full, used = np.zeros(len(table), bool), ~splits.are("")
    for row, (question, answer, places) in enumerate(texts):
        full[row] = bool(question and (answer or answered[row]) and owned[row])
        if full[row] and used[row]:
            questions.add(question)
            answers.add(answer)
            spans.extend(chain.from_iterable(places))
    _check_full(task, full, broken=pictures.digests.count(""))
    _check_splits(task, splits, full, found)
    kept = np.flatnonzero(full & used)
    asked, said, splits = questions.done(), answers.done(), splits.take(kept).compact()
    files = table.of_parts(lambda part: part.place).take(kept)
    parts = np.frombuffer(spans, np.int32) if spans else np.empty(0, np.int32)
    return Pairs(
        "causal-lm" if found is None else found.problem,
        asked,
        said if labels is None else labels.take(kept),
        keys.take(kept).compact().renamed_one(_ANYBODY, ""),
        () if found is None else found.names,
        taken(pictures.files, kept),
        Spans(parts.reshape(len(kept), -1, 2)) if len(parts) else (),
        Chats(asked, said, files, table.numbers()[kept]) if task.messages is not None else (),
        task.text is not None,
        splits if {"validation", "test"} & set(splits.names) else (),
        taken(pictures.changes, kept) if any(pictures.changes) else (),
        paired=len(templates) > 1,
    )


def _read(task: Task, federation: Federation | None, given: Callable[[Wanted], Table] | None, wanted: Wanted) -> Table:
    by_client = federation is not None and federation.partition.kind == "files"
    return load_table(task, wanted, by_client) if given is None else given(wanted)


def _owners(
    table: Table,
    task: Task,
    key: str | None,
    federation: Federation | None,
    labels: LabelColumn | None,
    splits: Labels,
) -> tuple[Labels, Labels]:
    """Each row's key, "" where it has none, and its split, which the partition may change; _ANYBODY where the task has
    no keys."""
    if federation is not None and federation.partition.kind in BY_SOURCE:
        keys, own = clients_of(table, federation.partition, federation.clients, splits)
        return Labels.of(keys), Labels.of(own)
    if key is None:
        return Labels.runs([_ANYBODY], [len(table)]), splits
    if labels is not None and key == task.label_name:
        return labels.groups(splits.are("train")), splits
    return canonical_classes(table.texts("federation.partition.column", key, optional=True)), splits


def _wanted(
    task: Task, pieces: Sequence[tuple[str, str | None]], key: str | None, dealt_by: str | None
) -> tuple[Wanted, dict[str, str]]:
    """The columns to read, under their names in the source too, and the renames that give them ours."""
    own = (task.answer, task.label_name, *task.labels)
    texts = {
        **{name: "task.prompt" for _, name in pieces if name is not None},
        **({task.answer: "task.answer"} if task.answer is not None else {}),
        **dict.fromkeys(task.labels, "task.label"),
        **({key: "federation.partition.column"} if key and key not in own else {}),
        **({dealt_by: "federation.partition.args.partition_by"} if dealt_by else {}),
        **({task.split_column: "task.split_column"} if task.split_column else {}),
    }
    texts |= {task.text: "task.text"} if task.text else {}
    cells = {name: "task.image" for name in (task.image, *_FILES) if name} if task.image else {}
    cells |= {task.messages: "task.messages"} if task.messages else {}
    known = TASKS.get(task.name)
    renames = {old: name for old, name in known.renames.items() if name in texts} if known else {}
    return Wanted({**texts, **{old: texts[name] for old, name in renames.items()}}, cells), renames


def _check_full(task: Task, full: NDArray[np.bool_], broken: int) -> None:
    """UserError where no row is complete; else a warning with the number of those that are not, broken images aside."""
    missing = len(full) - int(full.sum()) - broken
    if not full.any():
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


def _check_splits(task: Task, splits: Labels, full: NDArray[np.bool_], found: LabelColumn | None) -> None:
    """UserError for a split none of whose rows is complete; a warning of labels that no training row has."""
    used = splits.take(np.flatnonzero(full)).used
    for split in SPLITS:
        if split in splits.used and split not in used:
            allowed = "a split with rows that have all that the task asks for; its rows lack text, label or key"
            raise UserError(f"task.{split}", getattr(task, split), allowed, f"name another one, or set task.{split}=[]")
    if found is not None and (strange := untrained(found, full & splits.are("train"))):
        counts = f"{len(strange):,} of {len(found.names):,}"
        log.warning("task.label: no training row has %s labels: %s", counts, ", ".join(strange[:_NAMED]))


def _check_columns(task: Task, *, sources: bool, read: Callable[[Wanted], Table]) -> None:
    """UserError where the task names no columns for a row's input and output; sources: whether it must name those;
    read: the table, whose columns the advice may name."""
    if sources and not task.path and not task.train:
        raise UserError("task.path", task.path, "a file or hub id with task.name=table", "set task.path=FILE.parquet")
    for field in ("messages", "text"):
        if getattr(task, field) is not None:
            _alone(task, field)
            return
    if task.image is not None:
        if task.label is None:
            raise UserError("task.label", task.label, "the column of labels where task.image is set", "set task.label")
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
    if not task.prompt and task.answer is not None:
        raise UserError("task.prompt", task.prompt, "a template such as '{question}'", "set task.prompt")
    if not task.prompt:
        names = read(Wanted(dict.fromkeys(task.labels, "task.label"), {})).names
        raise UserError("task.prompt", task.prompt, "a template such as '{question}', or a pair of them", _usual(names))
    if task.answer is not None and len(task.prompts) > 1:
        allowed = "one template where task.answer is set: pairs of texts are classified"
        raise UserError("task.prompt", list(task.prompts), allowed, "write both columns into one template")
    said = {*task.labels, task.answer}
    for template in task.prompts:
        for _, column in _pieces(template):
            if column is not None and column in said:
                allowed = f"a template without {{{column}}}, which is what the model is to say"
                raise UserError("task.prompt", template, allowed, "leave that column out")


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
    cells = list(table.column("task.image", name))
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
    there = [name for name in _FILES if rows and all(name in part.names for part in table.parts)]
    named = [list(table.column("task.image", name)) for name in there]
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


def _asked(table: Table, task: Task, pieces: Sequence[tuple[str, str | None]], tidy: bool) -> Iterator[_Text]:
    """The template filled in for every row, stripped, the answer, "" for a classification, and where the columns' texts
    stand in the question; an empty cell is empty text, and a row of no other cells has no question.  tidy: runs of
    white space in the cells become one space."""
    asked = [table.texts("task.prompt", name) if name else repeat("") for _, name in pieces]
    said = table.texts("task.answer", task.answer) if task.answer else repeat("", len(table))
    for answer, *cells in zip(said, *asked, strict=False):
        text, places = "", list[Span]()
        for (literal, name), cell in zip(pieces, cells, strict=True):
            text = (text + literal).lstrip()
            filled = " ".join(cell.split()) if tidy else cell
            if name is not None:
                places.append((len(text), len(text) + len(filled)))
            text += filled
        filled_any = any(end > begin for begin, end in places)
        # Cells end without a space, so every place of a text stays inside.
        yield text.rstrip() if filled_any else "", " ".join(answer.split()) if tidy else answer, places


def _usual(names: Sequence[str]) -> str:
    """Advice for a classification without a prompt, by the usual names of columns.

    >>> _usual(["idx", "premise", "hypothesis", "label"]), _usual(["id", "body"])
    ('set task.prompt=["{premise}","{hypothesis}"]', 'set task.prompt; the columns are id, body')
    """
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    if pair is not None:
        return 'set task.prompt=["{{{}}}","{{{}}}"]'.format(*pair)
    single = next((name for name in ("sentence", "text") if name in names), None)
    return f"set task.prompt={{{single}}}" if single else f"set task.prompt; the columns are {', '.join(names)}"


def _pairs(table: Table, task: Task, templates: Sequence[Sequence[tuple[str, str | None]]]) -> Iterator[_Text]:
    """The two templates filled in for every row, one below the other, and where each stands in the question; a row
    without one of them has no question."""
    both = zip(*(_asked(table, task, pieces, tidy=False) for pieces in templates), strict=True)
    for (first, _, _), (second, _, _) in both:
        begin = len(first) + 1
        if first and second:
            yield f"{first}\n{second}", "", ((0, len(first)), (begin, begin + len(second)))
        else:
            yield "", "", ()
