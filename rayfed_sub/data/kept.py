"""Prepared rows of large files, kept on disk: a second start maps them in place of reading, ordering and tokenizing.

They lie below RAYFED_SUB_CACHE, else in the user's folder for caches, each in a folder that is named by a digest of all
that they follow from: the files' contents, the keys of the configuration, the tokenizer, versions.  A folder that is
there is whole.  Those that no run has read for a month go when another one is written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import BY_CLIENT, BY_SOURCE, Federation, Task
from rayfed_sub.data.columns import Labels, forget
from rayfed_sub.data.prepared import Prepared
from rayfed_sub.data.processors import Processor, Tokenizer
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.sources import listed, sources_of
from rayfed_sub.data.split_names import SPLITS
from rayfed_sub.data.tasks import filled
from rayfed_sub.data.tokenization import Cuts

log = logging.getLogger(__name__)

_FORM = 3  # of what lies in a folder; a change of reading, order or tokenization is one, too
_LARGE = 2**25  # bytes of files from which on their rows are kept
_AT_ONCE = 2**22  # rows or tokens written at a time
_META, _NEW = "rows.json", "new-"
_LIBRARIES = ("transformers", "tokenizers", "datasets", "pyarrow", "flwr-datasets", "numpy")
_MONTH = 30 * 24 * 3600
_ROWS = ("tokens", "begins", "lengths", "prompts", "classes", "learned", "types")
_ARRAYS = ("hashes", "sizes", "questions", "inputs", "begun")
_LABELS = ("keys", "splits")
_PLAIN = ("kind", "plain", "digest", "class_names", "client_names", "read", "wanted", "chosen", "transparent", "deep")


def kept(task: Task, federation: Federation, processor: Processor, make: Callable[[], Prepared]) -> Prepared:
    """The rows that `make` makes of the task's, or, where those are large files here, that it made of them before."""
    found = _sources(task, federation) if isinstance(processor, Tokenizer) else None
    if found is None or not isinstance(processor, Tokenizer):
        return make()
    folder = cache_root() / _key(found, task, federation, processor)
    if (before := _read(folder)) is not None:
        rows, notes = before
        for note in notes:
            log.warning("%s", note)
        return rows
    with _heard() as notes:
        made = make()
    try:
        _write(made, notes, folder)
        _clear(folder.parent)
    except OSError as error:  # no room, or no right to write
        log.warning("rows are not kept for the next start: %s", error)
        return made
    written = _read(folder)
    return made if written is None else written[0]


def _sources(task: Task, federation: Federation) -> list[tuple[Path, str]] | None:
    """The files and splits of the task's rows, where all are files, and large."""
    named = filled(task)
    places = [place for name in ("path", *SPLITS) for place in listed(getattr(named, name))]
    here = [place for place in places if glob.has_magic(place) or os.path.exists(os.path.expanduser(place))]
    if not here or (named.path is not None and not set(listed(named.path)) <= set(here)):
        return None
    with _heard(quiet=True):  # reading them says it again
        found = sources_of(named, by_client=federation.partition.kind == "files")
    files = [(source.file, f"{split} {source.client}") for split, sources in found.items() for source in sources]
    if any(file is None for file, _ in files) or sum(file.stat().st_size for file, _ in files if file) < _LARGE:
        return None
    return [(file, name) for file, name in files if file is not None]


def _key(files: list[tuple[Path, str]], task: Task, federation: Federation, processor: Tokenizer) -> str:
    partition = federation.partition
    contents = [(_content(file), file.suffix.lower(), name) for file, name in files]
    left_out = {"path", "test_share", "validation_share"}  # where the files are, and what is drawn later
    left_out |= set() if task.split_column else set(SPLITS)  # of a column they are values, else places of files
    left_out |= set() if task.max_rows else {"seed"}
    counted = partition.kind in (*BY_CLIENT, *BY_SOURCE)
    follows = {
        "form": _FORM,
        "files": contents if partition.kind in BY_SOURCE else sorted(contents),  # row numbers count in their order
        "task": task.model_dump(mode="json", exclude=left_out),
        "partition": partition.model_dump(mode="json"),
        "clients": federation.clients if counted else None,
        "listed": _content(Path(os.path.expanduser(partition.file))) if partition.file else None,
        "tokenizer": processor.identity,
        "versions": [sys.version, *map(version, _LIBRARIES)],
    }
    if len(task.prompts) > 1:
        follows["pairs"] = processor.pair_identity
    return hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:32]


def _content(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def cache_root() -> Path:
    """The folder below which prepared rows lie, and what else may be made again."""
    given = os.environ.get("RAYFED_SUB_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rayfed_sub"
    return Path(given).expanduser() if given else cache


@contextmanager
def _heard(*, quiet: bool = False) -> Iterator[list[str]]:
    """The warnings of the data room, whatever else of it is shown; quiet: these are not."""
    notes: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                notes.append(record.getMessage())

    room, handler = logging.getLogger("rayfed_sub.data"), Heard()
    shown, level = room.propagate, room.level
    room.addHandler(handler)
    room.propagate = shown and not quiet
    if room.getEffectiveLevel() > logging.WARNING:
        room.setLevel(logging.WARNING)
        room.propagate = False
    try:
        yield notes
    finally:
        room.propagate = shown
        room.setLevel(level)
        room.removeHandler(handler)


def _write(made: Prepared, notes: list[str], folder: Path) -> None:
    """Writes a folder under another name first; where another process was quicker its folder stays, unless it cannot be
    read."""
    assert isinstance(made.rows, Rows), "tokenizers make rows of tokens"
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder.parent))
    broken = new.with_name(f"{new.name}-broken")
    try:
        arrays = {name: getattr(made.rows, name) for name in _ROWS} | {name: getattr(made, name) for name in _ARRAYS}
        arrays |= {name: getattr(made, name).numbers for name in _LABELS}
        for name, array in arrays.items():
            _save(new / f"{name}.npy", array)
        meta = {name: getattr(made, name) for name in _PLAIN} | {"cuts": asdict(made.cuts), "notes": notes}
        meta |= {f"{name}_names": getattr(made, name).names for name in _LABELS}
        meta["bytes"] = {name: array.nbytes for name, array in arrays.items()}
        with (new / _META).open("w", encoding="utf-8") as sink:
            json.dump(meta, sink)
            sink.flush()
            os.fsync(sink.fileno())
        try:
            new.rename(folder)
        except OSError:
            if _read(folder) is None and folder.exists():
                folder.rename(broken)
                new.rename(folder)
            elif not folder.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(broken, ignore_errors=True)


def _save(file: Path, array: NDArray[Any]) -> None:
    """Writes an array, little of which is in memory at a time."""
    with file.open("wb") as sink:
        np.lib.format.write_array_header_2_0(sink, np.lib.format.header_data_from_array_1_0(array))
        for begin in range(0, len(array), _AT_ONCE):
            sink.write(np.ascontiguousarray(array[begin : begin + _AT_ONCE]).data)
            forget(array)
        sink.flush()
        os.fsync(sink.fileno())


def _read(folder: Path) -> tuple[Prepared, list[str]] | None:
    """The rows of a folder and the warnings of their making; None where there are none that are whole."""
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*_ROWS, *_ARRAYS, *_LABELS)}
        if {name: array.nbytes for name, array in arrays.items()} != meta["bytes"]:
            raise ValueError("its files are not as long as they were written")
        labels = {name: Labels(tuple(meta[f"{name}_names"]), arrays[name]) for name in _LABELS}
        plain = {name: tuple(meta[name]) if isinstance(meta[name], list) else meta[name] for name in _PLAIN}
        fields: dict[str, Any] = {**plain, **labels, **{name: arrays[name] for name in _ARRAYS}}
        rows = Prepared(rows=Rows(*(arrays[name] for name in _ROWS)), cuts=Cuts(**meta["cuts"]), **fields)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("rows that were kept in %s cannot be read: %s; they are made anew", folder, error)
        return None
    with suppress(OSError):  # another person's cache
        os.utime(folder)
    return rows, list(meta["notes"])


def _clear(root: Path) -> None:
    """Deletes folders that no run has read for a month, and those that nobody finished."""
    for folder in root.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _MONTH:
            (folder / _META).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
