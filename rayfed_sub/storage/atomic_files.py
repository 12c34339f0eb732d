"""Atomic and durable writes, and the lock of a run folder's writer."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rayfed_sub.core.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Writes the parts as `replacing` does."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(parts)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file as `replacing` does; about: its texts.  Tensors go out one by one from where they lie:
    `safetensors.torch.save` would hold all of them twice more."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, dict(about or {}))
        except SafetensorError as error:  # a full disk among others
            raise OSError(str(error)) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file's path beside `path`; what was written there is synced to the disk, then renamed: a
    reader of `path` sees the old bytes or the new ones.

    Raises RunError naming the file where the disk is full or refuses; `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}")
    with disk_errors(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append(path: Path, line: str) -> None:
    """Adds a line.  Raises RunError naming the file where the disk is full or refuses."""
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def claim(path: Path, seconds: float) -> IO[bytes]:
    """Exclusive lock on the file, held while the returned file is open and at most until this process ends.

    Waits for another holder, which may be ending.  Raises RunError after `seconds`.
    """
    with disk_errors(path):
        file, until = path.open("wb"), time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > until:
                    cause = f"{path.parent}: another run is at work here"
                    raise RunError("start", cause, resume=None) from None
                time.sleep(0.1)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError("writing files", f"{path}: {error.strerror or error}") from None


def sync_folder(folder: Path) -> None:
    """Syncs the folder, without which a rename may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
