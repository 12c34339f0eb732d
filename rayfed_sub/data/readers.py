"""Local files as memory-mapped `datasets.Dataset`s whose cells are what the file says, whatever its type.

CSV, TSV, text and JSON are read by Python's own parsers: they guess at no types, dates or "NA", and know the line of a
fault.  Cells that are asked for as text are written as canonical text (`as_text`), other cells as they are.  Only the
columns that are asked for are written, in batches, so that no file is in memory as a whole but a .json.
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.split_names import bare_split

if TYPE_CHECKING:
    import datasets

CLIENT = "client"
"""The column with the client's name, of JSON files that hold rows by client."""

_BATCH = 10_000  # rows in memory at a time
_SMALL = 2**20
_WHOLE = 2**53  # beyond it a float does not say which whole number it is


@dataclass(frozen=True)
class Wanted:
    """Columns to read, each with the configuration's field that asks for it.  texts: those whose cells are to be text;
    cells: those whose cells stay as they are, such as images."""

    texts: Mapping[str, str]
    cells: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        """All of them, with their fields."""
        return {**self.texts, **self.cells}

    def text(self, name: str, value: object) -> str:
        """A cell of one of `texts` as text.  Raises NoTextError."""
        return as_label(value) if self.texts[name] == "task.label" else as_text(value)


@dataclass(frozen=True)
class Place:
    """A row for messages.  file: its file or data set; row: its number there, from 1.

    >>> str(Place("north.jsonl", 1200))
    'row 1,200 of north.jsonl'
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row:,} of {self.file}"


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one file or data set.  place: its name for messages; names: all its columns; rows: their
    number, which `data` without columns does not know; data: the columns that were asked for; as_json: cells other than
    text are JSON; split, client: of all its rows, by its place."""

    place: str
    names: tuple[str, ...]
    rows: int
    data: datasets.Dataset
    as_json: bool = False
    split: str = "train"
    client: str = ""


class NoTextError(ValueError):
    """A cell that is neither text nor a whole number nor true or false; says what it is."""


Names = tuple[str, ...]
Batch = Mapping[str, Sequence[str | None]]
Batches = Generator[Any, None, tuple[Names, int]]
"""Yields batches of columns, returns the names of all columns and the number of rows."""


def as_text(value: object) -> str:
    """A cell as text: without outer blanks, "" where it is missing.  Numbers with a fraction are refused, since files
    spell them in many ways.

    Raises NoTextError.

    >>> as_text(" 3 "), as_text(3), as_text(3.0), as_text(True), as_text(None), as_text(float("nan"))
    ('3', '3', '3', 'True', '', '')
    """
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return ""
        if -_WHOLE <= value <= _WHOLE and value == int(value):
            return str(int(value))
        raise NoTextError(f"the number {value}, which is not {'whole' if math.isfinite(value) else 'finite'}")
    raise NoTextError(_KINDS.get(type(value), f"a {type(value).__name__}"))


def as_label(value: object) -> str:
    """A cell of the label's column as text: as `as_text`, but numbers with a fraction, floats so large that they have
    no digit of one any more, and lists of texts and numbers, are JSON after `MARK`, so that they differ from texts that
    look alike.

    Raises NoTextError.

    >>> as_label(" 3 "), as_label(3.0), as_label(None), as_label(0.25), as_label([1.0, "b"])
    ('3', '3', '', '\\x000.25', '\\x00["1", "b"]')
    """
    if (
        isinstance(value, float | Decimal)
        and math.isfinite(value)
        and (value != int(value) or not -_WHOLE <= value <= _WHOLE)
    ):
        return f"{MARK}{float(value)!r}"
    if isinstance(value, list | tuple | set | frozenset) or getattr(value, "ndim", 0) == 1:
        items: Iterable[Any] = sorted(value, key=str) if isinstance(value, set | frozenset) else value  # type: ignore[assignment]
        return MARK + json.dumps([as_text(one.item() if hasattr(one, "item") else one) for one in items])
    return as_text(value)


MARK = "\0"
"""Before the JSON of a label that is no text."""

_KINDS: Mapping[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}


def no_text(field: str, name: str, place: str | Place, what: str) -> UserError:
    """Error for a cell that is no text; place: its file and row."""
    kinds = "text, whole numbers, true or false"
    if field == "task.label":
        kinds = "text, finite numbers, true or false, or lists of text and whole numbers"
    allowed = f"a column of {kinds}; {place} holds {what}"
    return UserError(field, name, allowed, "name another column, or write its values as text")


def read_file(file: Path, wanted: Wanted, field: str) -> Part:
    """The wanted columns of a file, by its suffix (one of `READERS`).

    The Arrow file behind it lies in the folder for temporary files (TMPDIR), has no name any more, and goes with the
    process.  Raises UserError: for `field`, where the file cannot be read, else for the field of a column.
    """
    kind = file.suffix.lower()
    try:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        names, rows, data = _mapped(*READERS[kind](file, wanted))
    except UserError:
        raise
    except (ValueError, OSError, NotImplementedError, RecursionError, csv.Error) as error:  # Arrow's errors are these
        cause = _undecodable(file) if isinstance(error, UnicodeDecodeError) else str(error).partition("\n")[0][:200]
        raise UserError(field, str(file), f"a readable {kind} file", cause or type(error).__name__) from None
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(field, str(file), "a table with each column once", f"rename one of: {', '.join(repeated)}")
    return Part(file.name, names, rows, data, as_json=kind != ".parquet")


def _mapped(schema: Any, batches: Batches) -> tuple[Names, int, datasets.Dataset]:
    """Names of all columns, number of rows, and the batches as a memory-mapped data set, or in memory where it has less
    than `_SMALL` bytes: each mapping keeps a file open, and there may be a file for each of thousands of clients."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, MemoryMappedTable

    handle, path = tempfile.mkstemp(suffix=".arrow", prefix="rayfed-sub-")
    try:
        with os.fdopen(handle, "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            names, rows = _written(batches, stream.write)
        if os.path.getsize(path) < _SMALL:
            table = InMemoryTable.from_buffer(pa.py_buffer(Path(path).read_bytes()))
        else:
            table = MemoryMappedTable.from_file(path)
        # Without a fingerprint `datasets` would take 10 ms to make one.
        return names, rows, datasets.Dataset(table, fingerprint=Path(path).stem)
    finally:
        os.unlink(path)  # the mapping keeps the bytes


def _written(batches: Batches, write: Callable[[Any], None]) -> tuple[Names, int]:
    """Writes every batch; returns the names of all columns and the number of rows."""
    while True:
        try:
            write(next(batches))
        except StopIteration as end:
            names, rows = end.value
            return names, rows


def _parquet(file: Path, wanted: Wanted) -> tuple[Any, Batches]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pq.ParquetFile(file)
    names = tuple(content.schema_arrow.names)
    asked = [name for name in dict.fromkeys(names) if name in wanted.names]
    fields = [content.schema_arrow.field(names.index(name)) for name in asked]
    # `datasets` knows no dictionaries, as pandas stores categories.
    plain = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in fields
    ]
    schema = pa.schema(plain, content.schema_arrow.metadata)

    def batches() -> Batches:
        if len(set(names)) == len(names):
            for batch in content.iter_batches(batch_size=1000 if wanted.cells else _BATCH, columns=asked):
                yield pa.record_batch([batch.column(field.name).cast(field.type) for field in plain], schema=schema)
        return names, content.metadata.num_rows

    return schema, batches()


def _delimited(delimiter: str) -> Callable[[Path, Wanted], tuple[Any, Batches]]:
    def rows(file: Path, names: dict[str, None]) -> Iterator[tuple[str, dict[str, Any]]]:
        csv.field_size_limit(2**31 - 1)  # 128 kB otherwise
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            head: list[str] = []
            line = 1
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise ValueError(f"line {line}: {error}") from None
                if not head and cells:
                    head = [cell.strip() for cell in cells]
                    if twice := sorted({name for name in head if name and head.count(name) > 1}):
                        raise ValueError(f"line {line}: the header has {', '.join(twice)} more than once")
                    names.update(dict.fromkeys(name for name in head if name))
                elif cells:  # a blank line is no row
                    if len(cells) != len(head):
                        raise ValueError(f"line {line} has {_fields(len(cells))}, the header {_fields(len(head))}")
                    yield f"line {line}", dict(zip(head, cells, strict=True))
                line = reader.line_num + 1

    return lambda file, wanted: _from_records(file, wanted, rows)


def _fields(count: int) -> str:
    return f"{count} field{'s' if count != 1 else ''}"


def _lines(file: Path, wanted: Wanted) -> tuple[Any, Batches]:
    def rows(file: Path, names: dict[str, None]) -> Iterator[tuple[str, dict[str, Any]]]:
        names["text"] = None
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                yield f"line {number}", {"text": line}

    return _from_records(file, wanted, rows)


def _json_lines(file: Path, wanted: Wanted) -> tuple[Any, Batches]:
    return _from_records(file, wanted, _json_records)


def _json_records(file: Path, names: dict[str, None]) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _record(f"line {number}", _parsed(f"line {number}", line), names)


def _parsed(where: str, line: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:  # it counts lines from the beginning of what it was given
        raise ValueError(f"{where}: {error.msg}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once; Python would silently take the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands in one object twice")
    return content


def _record(where: str, record: object, names: dict[str, None]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a mapping of columns to values")
    if not record.keys() <= names.keys():
        names.update(dict.fromkeys(record))
    return record


def _json(file: Path, wanted: Wanted) -> tuple[Any, Batches]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one record a line, under the name of one document
            return _json_lines(file, wanted)
        raise

    def rows(file: Path, names: dict[str, None]) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((where, _record(where, record, names)) for where, record in _records_of(content))

    return _from_records(file, wanted, rows)


def _records_of(content: Any) -> Iterable[tuple[str, Any]]:
    """The records of a document, each with its place: a list of them; a mapping of clients to lists, as FedLLM-Bench
    has it; or LEAF's lists of values by user."""
    if isinstance(content, list):
        return ((f"record {number}", record) for number, record in enumerate(content, 1))
    if isinstance(content, dict) and isinstance(content.get("user_data"), dict):
        return _of_users(content["user_data"])
    lists = isinstance(content, dict) and content and all(isinstance(rows, list) for rows in content.values())
    if lists and all(isinstance(row, dict) for rows in content.values() for row in rows):
        splits = set(map(bare_split, content))
        if splits - {None, "train"} and ("train" in splits or None not in splits):
            raise ValueError(f"its keys, {', '.join(content)}, name splits, not clients; write a file for each split")
        return (
            (f"record {number} of {client}", _of_client(row, client))
            for client, rows in content.items()
            for number, row in enumerate(rows, 1)
        )
    raise ValueError(
        "a .json file must hold one list of records, or lists of records by client; "
        "name it .jsonl if it has one record a line"
    )


def _of_users(users: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for user, data in users.items():
        columns = data if isinstance(data, dict) else {}
        columns = {name: values for name, values in columns.items() if isinstance(values, list)}
        lengths = {len(values) for values in columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"user_data of {user} must hold lists of equal length, such as x and y")
        for number in range(lengths.pop()):
            row = {name: values[number] for name, values in columns.items()}
            yield f"record {number + 1} of {user}", _of_client(row, user)


def _of_client(row: Mapping[str, Any], client: str) -> dict[str, Any]:
    if CLIENT in row:
        raise ValueError(f"the records of {client} have a column {CLIENT} of their own, which names their client here")
    return {**row, CLIENT: client}


Rows = Callable[[Path, dict[str, None]], Iterator[tuple[str, dict[str, Any]]]]
"""Yields each row of a file with its place, and adds the names of columns to a dict as it meets them."""


def _from_records(file: Path, wanted: Wanted, rows: Rows) -> tuple[Any, Batches]:
    import pyarrow as pa

    asked = wanted.names
    schema = pa.schema([(name, pa.string()) for name in asked])

    def batches() -> Batches:
        names: dict[str, None] = {}
        places: list[str] = []
        written = 0
        columns: dict[str, list[str | None]] = {name: [] for name in asked}
        for where, row in rows(file, names):
            places.append(where)
            for name, cells in columns.items():
                cells.append(_cell(file, where, name, row.get(name), wanted))
            if len(places) == _BATCH:
                yield _batch(columns, places, schema)
                written += len(places)
                places, columns = [], {name: [] for name in asked}
        yield _batch(columns, places, schema)
        return tuple(names), written + len(places)

    return schema, batches()


def _cell(file: Path, where: str, name: str, value: object, wanted: Wanted) -> str | None:
    if name in wanted.cells:
        return None if value is None else json.dumps(value, ensure_ascii=False)
    try:
        return wanted.text(name, value)
    except NoTextError as error:
        raise no_text(wanted.texts[name], name, f"{where} of {file.name}", str(error)) from None


def _batch(columns: Mapping[str, Sequence[str | None]], places: Sequence[str], schema: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.record_batch([pa.array(cells, pa.string()) for cells in columns.values()], schema=schema)
    except UnicodeEncodeError:
        for where, *cells in zip(places, *columns.values(), strict=True):
            if any("\ud800" <= character <= "\udfff" for cell in cells if cell for character in cell):
                raise ValueError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
        raise


READERS: Mapping[str, Callable[[Path, Wanted], tuple[Any, Batches]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".txt": _lines,
}


def _undecodable(file: Path) -> str:
    """The first line that is not UTF-8."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
    return "it is not UTF-8; save it as UTF-8"
