"""A table from a local file or the hub, as columns of Python values.  Readers are imported when used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.hub_client import hub_or_cache, is_hub_id


@dataclass(frozen=True)
class Table:
    """names: all columns; columns: the cells of those that were read, all of one length;
    class_names: the names behind the numbers of `ClassLabel` columns."""

    names: tuple[str, ...]
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def column(self, field: str, name: str) -> Sequence[Any]:
        """The cells of column `name`; UserError for the configuration's `field` where there is none."""
        if name not in self.columns:
            known = ", ".join(self.names) or "it has none"
            raise UserError(field, name, f"a column of the table: {known}", f"change {field}")
        return self.columns[name]


def renamed(table: Table, renames: Mapping[str, str]) -> Table:
    """The table with columns under other names (old -> new), where it has none of the new name."""
    new = {old: name for old, name in renames.items() if old in table.names and name not in table.names}
    return Table(
        tuple(new.get(name, name) for name in table.names),
        {new.get(name, name): cells for name, cells in table.columns.items()},
        {new.get(name, name): names for name, names in table.class_names.items()},
    )


def read_table(path: str, split: str, columns: frozenset[str]) -> Table:
    """The table at `path`: a .parquet, .jsonl, .json or .csv file, else what `datasets.load_dataset` finds.

    columns: those that will be asked for; a Parquet file or hub data set is read only there.
    Raises UserError (task.path, task.split) for a table that cannot be read.
    """
    file = Path(os.path.expanduser(path))
    reader = READERS.get(file.suffix.lower())
    if file.is_dir() or (reader is None and not file.is_file() and is_hub_id(path)):
        return _from_datasets(path, split, columns)
    kinds = ", ".join(READERS)
    if not file.is_file():
        raise UserError("task.path", path, f"a file that exists ({kinds}) or a hub id", "check the path")
    if reader is None:
        raise UserError("task.path", path, f"a file ending in {kinds}, or a hub id", "convert the file")
    if split != "train":
        raise UserError("task.split", split, "train where task.path is one file", "remove task.split")
    try:
        return reader(file, columns)
    except (ValueError, OSError, NotImplementedError) as error:  # Arrow's, pandas' and json's errors are these
        cause = _undecodable(file) if isinstance(error, UnicodeDecodeError) else str(error).partition("\n")[0][:200]
        raise UserError("task.path", path, f"a readable {file.suffix} file", cause) from None


def _parquet(file: Path, columns: frozenset[str]) -> Table:
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    wanted = [name for name in schema.names if name in columns]
    table = pq.read_table(file, columns=wanted)
    cells = {name: table.column(name).to_pylist() for name in wanted}
    # Where `datasets` wrote the file, it left the names of its classes in the schema.
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = notes.get("info", {}).get("features", {})
    names = {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return Table(tuple(schema.names), cells, names)


def _json_lines(file: Path, columns: frozenset[str]) -> Table:
    with file.open(encoding="utf-8") as lines:
        numbered = [(f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return _from_records([_parsed(where, line) for where, line in numbered], [where for where, _ in numbered])


def _parsed(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:  # it counts lines from the beginning of what it was given
        raise ValueError(f"{where}: {error.msg}, column {error.colno}") from None


def _json(file: Path, columns: frozenset[str]) -> Table:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, list):
        raise ValueError("a .json file must hold one list of records; name it .jsonl if it has one record a line")
    return _from_records(content, [f"record {number}" for number in range(1, len(content) + 1)])


def _csv(file: Path, columns: frozenset[str]) -> Table:
    import pandas as pd

    # Every cell stays the text that stands in the file: no guessing at numbers, dates or "NA".
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    cells = {str(name): frame[name].tolist() for name in frame.columns}
    return Table(tuple(cells), cells)


READERS: Mapping[str, Callable[[Path, frozenset[str]], Table]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
}


def _undecodable(file: Path) -> str:
    """The first line that is not UTF-8."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"line {number}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
    return "it is not UTF-8; save it as UTF-8"


def _from_records(records: Sequence[object], places: Sequence[str]) -> Table:
    """places: the name of each record for messages."""
    names: dict[str, None] = {}
    for where, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a mapping of columns to values")
        names.update(dict.fromkeys(record))
    rows = [record for record in records if isinstance(record, dict)]
    return Table(tuple(names), {name: [row.get(name) for row in rows] for name in names})


def _from_datasets(path: str, split: str, columns: frozenset[str]) -> Table:
    import datasets

    try:
        with hub_or_cache() if is_hub_id(path) else nullcontext():
            data = datasets.load_dataset(path, split=split)
    except Exception as error:  # the hub's client raises several families of errors; all mean the same to a person
        cause = str(error).partition("\n")[0][:200]
        if "split" in cause.lower():
            raise UserError("task.split", split, f"a split of {path}", cause) from error
        raise UserError(
            "task.path", path, "a hub id or file that can be loaded", cause or type(error).__name__
        ) from error
    wanted = [name for name in data.column_names if name in columns]
    for name in wanted:
        if isinstance(data.features[name], datasets.Image):  # its file's bytes will do, nobody needs the pixels yet
            data = data.cast_column(name, datasets.Image(decode=False))
    names = {
        name: tuple(feature.names)
        for name, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table(tuple(data.column_names), {name: data[name][:] for name in wanted}, names)
