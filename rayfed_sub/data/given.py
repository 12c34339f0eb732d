"""Rows that a Python call hands over, by client, in place of files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rayfed_sub.core.digests import digest
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.columns import Labels
from rayfed_sub.data.images import encoded
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.readers import NoTextError, Part, Wanted, no_text
from rayfed_sub.data.row_pickles import pickled
from rayfed_sub.data.sources import Source, read_source
from rayfed_sub.data.split_names import Split
from rayfed_sub.data.tables import Table

_ROWS = "a datasets.Dataset, a torch Dataset with a length, or a list of rows"
_DATA = f"a mapping of clients' names to their training rows, each {_ROWS}"


class RowSource(Protocol):
    """Rows in memory or read one by one: a list, a `datasets.Dataset`, or a torch Dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class GivenPart:
    """Rows of one client and split, as they were handed over; client: "" for rows of nobody; place: for messages."""

    place: str
    client: str
    split: Split
    rows: RowSource


@dataclass(frozen=True, eq=False)
class GivenRows:
    """All rows that were handed over.  clients: those that train."""

    parts: tuple[GivenPart, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(part.client for part in self.parts if part.split == "train")


def given_rows(data: Any, validation: Any = None, test: Any = None) -> GivenRows:
    """The rows of `run(data=..., validation=..., test=...)`, checked but not read.

    data: a mapping of clients to training rows.  validation, test: official rows, a mapping of clients to their own, or
    rows of nobody; None: shares of the training rows, as of files.
    Raises UserError (data, validation, test).
    """
    if not isinstance(data, Mapping):
        raise _refused("data", data, _DATA)
    if not data:
        raise UserError("data", {}, _DATA, "give one client at least")
    names = _names("data", data)
    parts = [_part("data", name, "train", rows) for name, rows in zip(names, data.values(), strict=True)]
    official: tuple[tuple[Split, Any], ...] = (("validation", validation), ("test", test))
    for split, found in official:
        if isinstance(found, Mapping):
            own = _names(split, found)
            if strange := [name for name in own if name not in names]:
                allowed = f"clients that data has: {', '.join(sorted(names)[:8])}"
                raise UserError(split, strange[0], allowed, f"give rows of nobody as {split}=rows, without a mapping")
            parts += [_part(split, name, split, rows) for name, rows in zip(own, found.values(), strict=True)]
        elif found is not None:
            parts.append(_part(split, "", split, found))
    return GivenRows(tuple(parts))


def given_table(given: GivenRows, wanted: Wanted) -> Table:
    """The wanted columns of rows that are mappings of columns to values, read as those of files are.

    Raises UserError (data, validation, test) for rows that are none, or have other keys than the first; for the field
    of a column as `Table.texts`.
    """
    return Table(tuple(_columns(part, wanted) for part in given.parts))


def own_pairs(given: GivenRows) -> Pairs:
    """The rows as they are, pickled, each with its digest as its question.

    Raises UserError (data, validation, test) for rows that cannot be read or pickled, and where reading a row twice
    gives two different rows: no run could be repeated.
    """
    questions, pickles, keys, splits = list[str](), list[bytes](), list[str](), list[str]()
    for part in given.parts:
        first = None
        for number, row in _read(part):
            try:
                pickles.append(pickled(row))
                questions.append(digest(row).hex())
            except Exception as error:  # objects raise anything when they are pickled
                allowed = f"rows that can be pickled; row {number} cannot"
                raise UserError(part.place, _kind(row), allowed, _line(error)) from None
            keys.append(part.client)
            splits.append(part.split)
            first = first or questions[-1]
        if first != digest(next(_read(part))[1]).hex():
            allowed = "rows that are the same each time they are read; row 1 is not"
            raise UserError(part.place, _kind(part.rows), allowed, "draw nothing at random while rows are read")
    official = tuple(splits) if {"validation", "test"} & set(splits) else ()
    answers = ("",) * len(questions)
    return Pairs("own", tuple(questions), answers, tuple(keys), splits=official, objects=tuple(pickles))


def check_left(given: GivenRows, pairs: Pairs) -> None:
    """UserError (data) naming the first client of which no training row is among `pairs`, those without repeats."""
    left = set(Labels.of(pairs.keys).take(np.flatnonzero(pairs.trained)).used)
    for part in given.parts:
        if part.split == "train" and part.client not in left:
            allowed = f"a row that no other client has, with all its values; none of its {len(part.rows)} rows is one"
            raise UserError(part.place, _kind(part.rows), allowed, "leave the client out, or give it rows of its own")


def _names(field: str, data: Mapping[Any, Any]) -> list[str]:
    """The clients' names without outer blanks, as files have them."""
    names = []
    for name in data:
        if not isinstance(name, str) or not name.strip():
            raise UserError(field, name, "clients' names as text that is not empty", f"e.g. {field}={{'north': rows}}")
        names.append(name.strip())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(field, twice[0], "each client once, whatever blanks are around its name", "rename one")
    return names


def _part(field: str, name: str, split: Split, rows: Any) -> GivenPart:
    place = f"{field}[{name!r}]" if name else field
    if not _is_rows(rows):
        raise _refused(place, rows, _ROWS)
    if not len(rows):
        raise UserError(place, _kind(rows), "one row at least", "leave it out")
    return GivenPart(place, name, split, rows)


def _is_rows(rows: Any) -> bool:
    """True for rows that are a sequence: not a mapping (such as a DatasetDict), text, a stream, or a pandas
    DataFrame, whose items are columns."""
    from torch.utils.data import IterableDataset

    if isinstance(rows, Mapping | str | bytes | IterableDataset) or hasattr(rows, "iloc"):
        return False
    return hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


def _read(part: GivenPart) -> Iterator[tuple[int, Any]]:
    """The rows, with their numbers from 1."""
    for number in range(1, len(part.rows) + 1):
        try:
            row = part.rows[number - 1]
        except Exception as error:  # a data set of the caller's own raises anything
            allowed = f"rows that can be read; row {number} cannot"
            raise UserError(part.place, _kind(part.rows), allowed, _line(error)) from None
        yield number, row


def _columns(part: GivenPart, wanted: Wanted) -> Part:
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    if isinstance(part.rows, datasets.Dataset):
        source = Source(part.place, data=part.rows, client=part.client)
        return read_source(source, wanted, part.place, part.split)
    names: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in wanted.names}
    for number, row in _read(part):
        if not isinstance(row, Mapping):
            allowed = f"rows that are mappings of columns to values; row {number} is {_kind(row)}"
            raise UserError(part.place, _kind(part.rows), allowed, "or give a model with a loss and batch of its own")
        names = names or list(map(str, row))
        if sorted(map(str, row)) != sorted(names):
            allowed = f"rows with the same keys; row 1 has {', '.join(names)}, row {number} {', '.join(map(str, row))}"
            raise UserError(part.place, _kind(part.rows), allowed, "give missing values as None")
        for name, cells in columns.items():
            cells.append(_cell(part, number, name, row.get(name), wanted))
    try:
        table = pa.table({name: _column(cells) for name, cells in columns.items() if name in names})
    except UnicodeEncodeError:
        allowed = "text; half of a surrogate pair (\\ud800 to \\udfff) is no character"
        raise UserError(part.place, _kind(part.rows), allowed, "correct the text") from None
    # Without a fingerprint `datasets` would take 10 ms to make one, for each client.
    data = datasets.Dataset(InMemoryTable(table), fingerprint=part.place)
    as_json = "task.image" not in wanted.cells.values()
    return Part(part.place, tuple(names), len(part.rows), data, as_json=as_json, split=part.split, client=part.client)


def _column(cells: Sequence[Any]) -> Any:
    """Text, or images' files, each with what is wrong with it."""
    import pyarrow as pa

    if any(isinstance(cell, Mapping) for cell in cells):
        return pa.array(cells, pa.struct([("bytes", pa.large_binary()), ("error", pa.large_string())]))
    return pa.array(cells, pa.large_string())


def _cell(part: GivenPart, number: int, name: str, value: Any, wanted: Wanted) -> str | dict[str, Any] | None:
    """A cell as the readers of files store it: text, the JSON of a chat, or an image's file or what is wrong with it
    (`encoded`)."""
    if getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        value = value.item()
    where = f"row {number} of {part.place}"
    if name in wanted.texts:
        try:
            return wanted.text(name, value)
        except NoTextError as error:
            raise no_text(wanted.texts[name], name, where, str(error)) from None
    if wanted.cells[name] == "task.image":
        try:
            return {"bytes": encoded(value), "error": None}
        except (OSError, ValueError) as error:
            return {"bytes": None, "error": str(error)}
    try:
        return None if value is None else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        allowed = f"values that JSON can hold; {where} is {_kind(value)}"
        raise UserError(wanted.cells[name], name, allowed, str(error)) from None


def _refused(field: str, value: Any, allowed: str) -> UserError:
    return UserError(field, _kind(value), allowed, f"give {field} as that")


def _kind(value: Any) -> str:
    """A value's type for messages: values may be large."""
    return "nothing" if value is None else f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
