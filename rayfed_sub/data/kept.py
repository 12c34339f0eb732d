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
from contextlib import contextmanager
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
from rayfed_sub.data.sources import SPLITS, listed, sources_of
from rayfed_sub.data.tasks import filled
from rayfed_sub.data.tokenization import Cuts

log = logging.getLogger(__name__)

_FORM = 1  # of what lies in a folder; a change of reading, order or tokenization is one, too
_LARGE = 2**25  # bytes of files from which on their rows are kept
_AT_ONCE = 2**22  # rows or tokens written at a time
_NOT_ROWS = {"path", *SPLITS, "test_share", "validation_share"}  # places of the files, and what is drawn later
_MONTH = 30 * 24 * 3600
_ROWS = ("tokens", "begins", "lengths", "prompts", "classes", "learned")
_ARRAYS = ("hashes", "sizes", "questions", "inputs")
_LABELS = ("keys", "splits")
_PLAIN = ("kind", "plain", "class_names", "client_names", "read", "wanted", "chosen", "transparent", "deep")


def kept(task: Task, federation: Federation, processor: Processor, make: Callable[[], Prepared]) -> Prepared:
    """What `make` makes of the task's rows, or what it made of them before where they are large files here."""
    found = _sources(task, federation) if isinstance(processor, Tokenizer) else None
    if found is None or not isinstance(processor, Tokenizer):
        return make()
    folder = _root() / _key(found, task, federation, processor)
    if not (folder / "rows.json").exists():
        with _heard() as notes:
            made = make()
        try:
            _write(made, notes, folder)
            _clear(folder.parent)
        except OSError as error:  # no room, or no right to write
            log.warning("rows are not kept for the next start: %s", error)
            return made
        return _mapped(folder)
    os.utime(folder / "rows.json")
    for note in _meta(folder)["notes"]:
        log.warning("%s", note)
    return _mapped(folder)


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
    counted = partition.kind in (*BY_CLIENT, *BY_SOURCE)
    follows = {
        "form": _FORM,
        "files": sorted((_content(file), file.suffix.lower(), name) for file, name in files),
        "task": task.model_dump(mode="json", exclude=_NOT_ROWS if task.max_rows else {*_NOT_ROWS, "seed"}),
        "partition": partition.model_dump(mode="json"),
        "clients": federation.clients if counted else None,
        "listed": _content(Path(os.path.expanduser(partition.file))) if partition.file else None,
        "tokenizer": processor.identity,
        "versions": [
            sys.version,
            *(version(name) for name in ("transformers", "tokenizers", "flwr-datasets", "numpy")),
        ],
    }
    return hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:32]


def _content(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _root() -> Path:
    given = os.environ.get("RAYFED_SUB_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rayfed_sub"
    return Path(given).expanduser() if given else cache


@contextmanager
def _heard(*, quiet: bool = False) -> Iterator[list[str]]:
    """The warnings of the data room; quiet: which are then not shown."""
    notes: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    room, handler = logging.getLogger("rayfed_sub.data"), Heard()
    shown = room.propagate
    room.addHandler(handler)
    room.propagate = shown and not quiet
    try:
        yield notes
    finally:
        room.propagate = shown
        room.removeHandler(handler)


def _write(made: Prepared, notes: list[str], folder: Path) -> None:
    """Writes a folder under another name first; where another process was quicker its folder stays."""
    assert isinstance(made.rows, Rows), "tokenizers make rows of tokens"
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
    try:
        arrays = {name: getattr(made.rows, name) for name in _ROWS} | {name: getattr(made, name) for name in _ARRAYS}
        arrays |= {name: getattr(made, name).numbers for name in _LABELS}
        for name, array in arrays.items():
            _save(new / f"{name}.npy", array)
        meta = {name: getattr(made, name) for name in _PLAIN} | {"cuts": asdict(made.cuts), "notes": notes}
        meta |= {f"{name}_names": getattr(made, name).names for name in _LABELS}
        (new / "rows.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _save(file: Path, array: NDArray[Any]) -> None:
    with file.open("wb") as sink:
        np.lib.format.write_array_header_2_0(sink, np.lib.format.header_data_from_array_1_0(array))
        for begin in range(0, len(array), _AT_ONCE):
            sink.write(np.ascontiguousarray(array[begin : begin + _AT_ONCE]).data)
            forget(array)
        sink.flush()
        os.fsync(sink.fileno())  # a folder that is there is whole, whatever ended the machine


def _mapped(folder: Path) -> Prepared:
    meta = _meta(folder)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*_ROWS, *_ARRAYS, *_LABELS)}
    labels = {name: Labels(tuple(meta[f"{name}_names"]), arrays[name]) for name in _LABELS}
    plain = {name: tuple(meta[name]) if isinstance(meta[name], list) else meta[name] for name in _PLAIN}
    fields: dict[str, Any] = {**plain, **labels, **{name: arrays[name] for name in _ARRAYS}}
    return Prepared(rows=Rows(*(arrays[name] for name in _ROWS)), cuts=Cuts(**meta["cuts"]), **fields)


def _meta(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return content


def _clear(root: Path) -> None:
    """Deletes folders that no run has read for a month."""
    for mark in root.glob("*/rows.json"):
        if time.time() - mark.stat().st_mtime > _MONTH:
            shutil.rmtree(mark.parent, ignore_errors=True)
