"""The tables of a run folder: in parts while the run goes on, one file each when it has ended.

    rounds.parquet/part-000000.parquet   rows in their order, as many as come to `FULL` bytes
                   part-000128.parquet   the next rows, from round 128 on; replaced until it is full as well
    rounds.parquet                       of a finished run, and of older versions: one file

pandas and pyarrow open both under the one name.  A part appears whole or not at all, and no row is ever in two of them.
So a checkpoint writes a bounded number of bytes, however long the run, and only rows since the last full part are in
memory.

A folder cannot be replaced by a file in one step, nor a file by a folder.  Between two steps the parts lie aside, in
`.rounds.parquet.parts`, which counts where there is no `rounds.parquet`: `place` finds them there, and a run that goes
on puts them back.
"""

from __future__ import annotations

import io
import shutil
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet

from rayfed_sub.core.schemas import (
    AnswerRow,
    ClientLayer,
    ClientRow,
    CohortLayer,
    PackRow,
    RoundRow,
    ScoreRow,
    TimelineRow,
)
from rayfed_sub.storage import atomic_files

KINDS = {
    **{"rounds": RoundRow, "clients": ClientRow, "packs": PackRow, "layers": CohortLayer, "client_layers": ClientLayer},
    **{"scores": ScoreRow, "answers": AnswerRow, "timeline": TimelineRow},
}
"""The rows of each table, by its name."""
FULL = 2**17
"""Bytes of a part from which on the next rows begin another one."""
PARTS = "part-*.parquet"


class Table:
    """A table of the run in `folder`, of `KINDS`.  Rows are added in memory, and written by `write`; begin with `begin`
    or `cut`.  All methods that write raise RunError where the disk is full."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._kind = folder / f"{name}.parquet", KINDS[name]
        self._last, self._rows, self._size, self._changed = 0, table(self._kind, []), 0, False
        """The last part's number, rows, bytes on the disk, and whether these are not its rows any more."""

    def begin(self, rows: Sequence[Any] = ()) -> None:
        """An empty table, or one of these rows, in place of what a run that never began has left."""
        self._recover()
        with atomic_files.disk_errors(self._path):
            for old in (self._path,) if self._path.is_file() else _parts(self._path):
                old.unlink()
        self._set(0, table(self._kind, rows), 0, changed=bool(rows))

    def add(self, round: int, rows: Sequence[Any]) -> None:
        """Adds the rows of a round, later than all others."""
        if not rows:
            return
        if self._size >= FULL and not self._changed:
            self._set(max(round, self._last + 1), table(self._kind, []), 0)
        self._set(self._last, pa.concat_tables([self._rows, table(self._kind, rows)]), self._size, changed=True)

    def replace(self, rounds: int, rows: Sequence[Any]) -> None:
        """Puts the rows in place of those that the last of so many finished rounds has added."""
        kept = self._within(self._rows, rounds - 1)
        self._set(self._last, pa.concat_tables([kept, table(self._kind, rows)]), self._size, changed=True)

    def write(self) -> None:
        """Writes the rows since the last full part, where they are others than on the disk."""
        if self._changed or not self._path.exists():
            self._write(self._rows)

    def cut(self, rounds: int) -> bool:
        """Goes on with the table of the folder, of which it deletes all rows after so many finished rounds; returns
        True where one file had to become a folder of parts."""
        self._recover()
        if one_file := self._path.is_file():
            rows = self._within(self._read(self._path), rounds)
            self._set(0, rows, self._write_part(_aside(self._path) / _part(0), rows))
            with atomic_files.disk_errors(self._path):
                self._path.unlink()
                _aside(self._path).rename(self._path)
                atomic_files.sync_folder(self._path.parent)
            return one_file
        parts = _parts(self._path)
        for part in reversed(parts):
            rows = self._read(part)
            kept = self._within(rows, rounds)
            if not kept.num_rows and part != parts[0]:
                with atomic_files.disk_errors(part):
                    part.unlink()
                continue
            self._set(int(part.stem.rpartition("-")[2]), kept, part.stat().st_size)
            if kept.num_rows < rows.num_rows:
                self._write(kept)
            return one_file
        self._set(0, table(self._kind, []), 0)
        return one_file

    def lead(self, rows: Sequence[Any]) -> None:
        """Makes these the rows before the first round, which the table may lack after `cut`."""
        if not self._last:
            first, column = table(self._kind, rows), self._rows["rounds"]
            later = self._rows.filter(compute.greater(column, 0))
            self._set(0, pa.concat_tables([first, later]), self._size, changed=True)

    def rows(self) -> Iterator[pa.Table]:
        """All rows, part by part, the newest part first."""
        if self._path.is_file():
            yield self._read(self._path)
            return
        yield self._rows
        for part in reversed(_parts(self._path)):
            if part.name != _part(self._last):
                yield self._read(part)

    def newest(self, most: int) -> pa.Table:
        """The rows of the newest rounds in the table, of at least so many, or all."""
        found: list[pa.Table] = []
        for rows in self.rows():
            found.insert(0, rows)
            if len({round for one in found for round in one["round"].to_pylist()}) > most:
                break
        return pa.concat_tables(found)

    @property
    def has_any(self) -> bool:
        """True where the table has rows."""
        return bool(self._rows.num_rows)

    def merge(self) -> None:
        """Makes one file of all parts, once all rows are written; does nothing where there are none."""
        if not self._path.is_dir():
            return
        content = io.BytesIO()
        with parquet.ParquetWriter(content, schema(self._kind)) as writer:
            for part in _parts(self._path):
                writer.write_table(self._read(part))
        whole, aside = self._path.with_name(f".{self._path.name}.whole"), _aside(self._path)
        atomic_files.write(whole, content.getbuffer())
        with atomic_files.disk_errors(self._path):
            self._path.rename(aside)
            whole.rename(self._path)
            atomic_files.sync_folder(self._path.parent)
            shutil.rmtree(aside)

    def _set(self, last: int, rows: pa.Table, size: int, *, changed: bool = False) -> None:
        self._last, self._rows, self._size, self._changed = last, rows, size, changed

    def _write(self, rows: pa.Table) -> None:
        self._set(self._last, rows, self._write_part(self._path / _part(self._last), rows))

    def _write_part(self, part: Path, rows: pa.Table) -> int:
        """Writes a part, and where it is the first one its folder; returns its bytes."""
        content = io.BytesIO()
        parquet.write_table(rows, content)
        if not part.parent.exists():
            with atomic_files.disk_errors(part):
                part.parent.mkdir()
                atomic_files.sync_folder(part.parent.parent)
        atomic_files.write(part, content.getbuffer())
        return content.getbuffer().nbytes

    def _read(self, part: Path) -> pa.Table:
        return parquet.read_table(part, schema=schema(self._kind))

    def _within(self, rows: pa.Table, rounds: int) -> pa.Table:
        """The rows of so many finished rounds."""
        if "rounds" in rows.column_names:  # finished ones
            return rows.filter(compute.less_equal(rows["rounds"], rounds))
        return rows.filter(compute.less(rows["round"], rounds))

    def _recover(self) -> None:
        """Takes back, or finishes, what was cut off between two steps."""
        aside = _aside(self._path)
        with atomic_files.disk_errors(self._path):
            if aside.exists() and self._path.exists():
                shutil.rmtree(aside)
            elif aside.exists():
                aside.rename(self._path)
            self._path.with_name(f".{self._path.name}.whole").unlink(missing_ok=True)


def place(folder: Path, name: str) -> Path | None:
    """The file or folder of a table, for pandas and pyarrow; None where there is none."""
    path = folder / f"{name}.parquet"
    return next((at for at in (path, _aside(path)) if at.exists()), None)


def schema(kind: type) -> pa.Schema:
    """Columns of a record: numbers and texts, nullable where the record's type has `| None`."""
    arrow = {int: pa.int64(), float: pa.float64(), str: pa.string(), tuple[float, ...]: pa.list_(pa.float64())}
    hints = typing.get_type_hints(kind)
    plain = {name: hint.__args__[0] if isinstance(hint, types.UnionType) else hint for name, hint in hints.items()}
    return pa.schema([(field.name, arrow[plain[field.name]]) for field in fields(kind)])


def table(kind: type, rows: Sequence[Any]) -> pa.Table:
    """Records as a table."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema(kind))


def _part(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _parts(path: Path) -> list[Path]:
    return sorted(path.glob(PARTS))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")
