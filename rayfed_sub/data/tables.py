"""A table of one or several sources, whose cells are the same whatever the type of file that they stand in.

Its rows are in the order of the sources; `pairs.py` gives them their canonical order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.columns import Labels
from rayfed_sub.data.readers import NoTextError, Part, Place, Wanted, as_label, as_text, no_text
from rayfed_sub.data.sources import names_of, read_source, sources_of
from rayfed_sub.data.split_names import SPLITS

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.0+)?")
_TRUTHS = {"true": "True", "false": "False"}


@dataclass(frozen=True, eq=False)
class Table:
    """parts: the sources, one after the other."""

    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names))

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def places(self) -> Iterator[Place]:
        """Each row's file and its number in it."""
        return (Place(part.place, row) for part in self.parts for row in range(1, part.rows + 1))

    def of_parts(self, says: Callable[[Part], str]) -> Labels:
        """What is said of each row's part, such as its file."""
        return Labels.runs([says(part) for part in self.parts], [part.rows for part in self.parts])

    def numbers(self) -> NDArray[np.int32]:
        """Each row's number in its file, from 1, (rows,)."""
        return np.concatenate([np.arange(1, part.rows + 1, dtype=np.int32) for part in self.parts])

    def texts(self, field: str, name: str, optional: bool = False) -> Iterator[str]:
        """The cells of column `name` as canonical text (`as_text`), "" where they are missing.

        optional: the column may be missing from parts that nobody trains on.
        Raises UserError for the configuration's `field` where there is no such column, or a cell that is no text.
        """
        self._check(field, name, optional)
        return chain.from_iterable(_part_texts(part, field, name) for part in self.parts)

    def labels(self, field: str, name: str) -> Iterator[str]:
        """The cells of column `name` as labels (`as_label`), "" where they are missing.  Raises UserError as
        `texts`."""
        self._check(field, name)
        return chain.from_iterable(_part_texts(part, field, name, as_label) for part in self.parts)

    def column(self, field: str, name: str) -> Iterator[Any]:
        """The cells of column `name` as they are, None where they are missing.  Raises UserError as `texts`."""
        self._check(field, name)
        return chain.from_iterable(_cells(part, field, name) for part in self.parts)

    def _check(self, field: str, name: str, optional: bool = False) -> None:
        if name not in self.names:
            known = ", ".join(self.names) or "it has none"
            raise UserError(field, name, f"a column of the table: {known}", f"change {field}")
        for part in self.parts:
            needed = part.rows and not (optional and part.split != "train")
            if needed and name not in part.names:
                allowed = f"a column of every file; {part.place} has {', '.join(part.names)}"
                raise UserError(field, name, allowed, f"rename its columns, or change {field}")


def load_table(task: Task, wanted: Wanted, by_client: bool = False) -> Table:
    """The rows of the task's splits, as `sources_of` finds them.  Raises UserError as that does, or for the field of a
    column.

    by_client: a file belongs to the client that its place names.
    """
    parts: list[Part] = []
    for split, sources in sources_of(task, by_client).items():
        field = f"task.{split}" if getattr(task, split) else "task.path"
        parts += [read_source(source, wanted, field, split) for source in sources]
    return Table(tuple(parts))


def splits_of(table: Table, task: Task) -> Labels:
    """Each row's split, "" for rows of none; with task.split_column by its cells.

    Raises UserError (task.split_column, .train, .validation, .test) where it does not have the values that are named.
    """
    if task.split_column is None:
        return table.of_parts(lambda part: part.split)
    cells = Labels.of(table.texts("task.split_column", task.split_column))
    found = set(cells.used) - {""}
    split_of: dict[str, str] = {}
    for split in SPLITS:
        given, names = getattr(task, split), names_of(task, split, found)
        if missing := [name for name in names if name not in found] or (
            [split] if split == "train" and not names else []
        ):
            allowed = f"values of the column {task.split_column}: {', '.join(sorted(found)) or 'it has none'}"
            raise UserError(f"task.{split}", given, allowed, f"set task.{split}; there is no {missing[0]}")
        for name in names:
            if split_of.setdefault(name, split) != split:
                allowed = f"other rows than task.{split_of[name]} has"
                raise UserError(f"task.{split}", given, allowed, "name another value")
    if idle := int((~cells.are(*split_of)).sum()):
        log.warning("task.split_column: %s of %s rows are in no split that is used", f"{idle:,}", f"{len(cells):,}")
    return cells.renamed([split_of.get(name, "") for name in cells.names])


def renamed(table: Table, renames: Mapping[str, str]) -> Table:
    """The table with columns under other names (old -> new), where it has none of the new name."""
    return Table(tuple(_renamed(part, renames) for part in table.parts))


def canonical_classes(texts: Iterable[str]) -> Labels:
    """Canonical names of classes or keys: whole numbers without the ".0" that programs give them where some are
    missing, True and False in one spelling, where all are such.

    >>> [list(canonical_classes(texts)) for texts in (["1.0", "", "3.0"], ["true", "FALSE"], ["007", "1.0"])]
    [['1', '', '3'], ['True', 'False'], ['007', '1.0']]
    """
    labels = Labels.of(texts)
    names = [name for name in labels.names if name]
    if all(_NUMBER.fullmatch(name) for name in names):
        return labels.renamed([name.partition(".")[0] for name in labels.names])
    if all(name.lower() in _TRUTHS for name in names):
        return labels.renamed([_TRUTHS.get(name.lower(), name) for name in labels.names])
    return labels


def of_named_classes(table: Table, name: str) -> bool:
    """True where the column is a `ClassLabel` in every part."""
    import datasets

    return all(isinstance(part.data.features.get(name), datasets.ClassLabel) for part in table.parts)


def whole_numbers(table: Table, field: str, name: str) -> Sequence[str | int]:
    """A column as `datasets` would have it: the numbers of a `ClassLabel`, whole numbers where all cells are such, else
    texts.  Raises UserError as `Table.texts`."""
    texts = list(table.texts(field, name))
    if of_named_classes(table, name):
        return list(table.column(field, name))
    return (
        [int(text) for text in texts] if all(_NUMBER.fullmatch(text) and "." not in text for text in texts) else texts
    )


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """The different names but "", numbers by size, else by the alphabet: the same order for numbers, texts and
    `ClassLabel`s in any file.

    >>> class_names(["10", "9", "", "10"])
    ('9', '10')
    """
    found = set(names) - {""}
    numbers = all(_NUMBER.fullmatch(name) for name in found)
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if numbers else None))


def _renamed(part: Part, renames: Mapping[str, str]) -> Part:
    new = {old: name for old, name in renames.items() if old in part.names and name not in part.names}
    names = tuple(new.get(name, name) for name in part.names)
    inside = {old: name for old, name in new.items() if old in part.data.column_names}
    return replace(part, names=names, data=part.data.rename_columns(inside) if inside else part.data)


def _cells(part: Part, field: str, name: str) -> Iterator[Any]:
    import json

    if name not in part.data.column_names:
        yield from [None] * part.rows
        return
    row = 0
    for chunk in part.data.data.column(name).chunks:
        for cell in _of_chunk(chunk, row, part, field, name):
            row += 1
            yield json.loads(cell) if part.as_json and cell is not None else cell


def _part_texts(part: Part, field: str, name: str, form: Callable[[object], str] = as_text) -> Iterator[str]:
    import datasets

    if name not in part.data.column_names:
        yield from [""] * part.rows
        return
    feature = part.data.features[name]
    labels = feature.names if isinstance(feature, datasets.ClassLabel) else None
    inner = getattr(feature, "feature", None) if form is as_label else None
    inside = inner.names if isinstance(inner, datasets.ClassLabel) else None
    row = 0
    for chunk in part.data.data.column(name).chunks:
        _check_kind(chunk, row, part, field, name, lists=form is as_label)
        for cell in _of_chunk(chunk, row, part, field, name):
            row += 1
            try:
                if labels is not None:
                    yield _label(cell, labels)
                else:
                    yield form(cell if inside is None or cell is None else [_label(one, inside) for one in cell])
            except NoTextError as error:
                raise no_text(field, name, Place(part.place, row), str(error)) from None


def _of_chunk(chunk: Any, before: int, part: Part, field: str, name: str) -> list[Any]:
    """The cells of a chunk that begins after row `before`.  UserError for text that is not UTF-8, which Arrow stores
    unread."""
    try:
        cells: list[Any] = chunk.to_pylist()
        return cells
    except UnicodeDecodeError:
        row = before + next(row for row, cell in enumerate(chunk, 1) if not _is_text(cell))
        raise no_text(field, name, Place(part.place, row), "text that is not UTF-8") from None


def _is_text(cell: Any) -> bool:
    try:
        cell.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _check_kind(chunk: Any, before: int, part: Part, field: str, name: str, *, lists: bool = False) -> None:
    """UserError for a column of another type than text and numbers, or `lists`, without a look into its cells."""
    from pyarrow import types

    simple = (
        *(types.is_string, types.is_large_string, types.is_null, types.is_boolean),
        *(types.is_integer, types.is_floating, types.is_decimal),
    )
    several = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    fits = any(test(chunk.type) for test in (*simple, *(several if lists else ())))
    if not fits and chunk.null_count < len(chunk):
        row = before + chunk.is_valid().to_pylist().index(True) + 1
        raise no_text(field, name, Place(part.place, row), f"a cell of type {chunk.type}")


def _label(number: int | None, names: Sequence[str]) -> str:
    """The name of a class by its number; -1 is "no label"."""
    if number is not None and number >= len(names):
        raise NoTextError(f"the number {number} of {len(names)} classes")
    return "" if number is None or number < 0 else names[number].strip()
