"""Client states between rounds, in tiers: in memory while there is room, in safetensors files under a budget.

A state is immutable and known by its client and the round in which it will be read, so that a round that fails, or is
run again, finds the old ones in their places: states are added under new keys, and dropped when nobody needs them.
Workers keep those that they used last at hand as well (runtime/worker.py).
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from rayfed_sub.core.arrays import settled
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import ClientState, wire_bytes
from rayfed_sub.storage import atomic_files

Key = tuple[int, int]
"""Client, round."""


@dataclass(frozen=True)
class Note:
    """A state's file in the manifest: cursor and step as in ClientState, bytes, CRC-32."""

    cursor: int
    step: int
    size: int
    crc: int


class States:
    """put, get: into memory and out of it (see `runtime/object_store.py`); budget: bytes of tensors held there."""

    def __init__(self, folder: Path, budget: int, put: Callable[[Any], Any], get: Callable[[Any], Any]) -> None:
        self._folder, self._budget, self._put, self._get = folder, budget, put, get
        self._held: OrderedDict[Key, tuple[Any, int]] = OrderedDict()  # -> reference, bytes; longest unused first
        self._total = 0
        self._notes: dict[Key, Note] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors in memory; above the budget only while a single state is."""
        return self._total

    def add(self, client: int, state: ClientState) -> Key:
        """Takes a state in.  Others move to disk where the budget asks for it.  Raises RunError where it is full."""
        key = (client, state.round)
        self._notes.pop(key, None)  # a round that is run again writes its own files
        self._hold(key, state)
        return key

    def reference(self, key: Key) -> Any:
        """Handle of the state, read from its file where it was not in memory.

        Raises RunError, naming the client, where its file is not as it was written.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        return self._hold(key, read(self._folder, key, self._notes[key]))

    def save(self, keys: Iterable[Key]) -> dict[Key, Note]:
        """Writes those of the states that have no file yet; what is known of each file."""
        return {key: self._notes.get(key) or self._write(key) for key in keys}

    def recall(self, notes: Mapping[Key, Note]) -> None:
        """Knows states that a checkpoint left on disk."""
        self._notes.update(notes)

    def release(self, keys: Iterable[Key]) -> None:
        """Lets go of states in memory whose files somebody may still ask for."""
        for key in keys:
            self._let_go(key)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forgets states, in memory and on disk."""
        for key in keys:
            self._let_go(key)
            self._notes.pop(key, None)
            path(self._folder, key).unlink(missing_ok=True)

    def _hold(self, key: Key, state: ClientState) -> Any:
        size = wire_bytes(state.tensors)
        self._let_go(key)
        while self._held and self._total + size > self._budget:
            oldest = next(iter(self._held))
            if oldest not in self._notes:
                self._write(oldest)
            self._let_go(oldest)
        reference = self._put(state)
        self._held[key] = (reference, size)
        self._total += size
        return reference

    def _let_go(self, key: Key) -> None:
        if key in self._held:
            self._total -= self._held.pop(key)[1]

    def _write(self, key: Key) -> Note:
        state: ClientState = self._get(self._held[key][0])
        content = save(dict(state.tensors))
        atomic_files.write(path(self._folder, key), content)
        self._notes[key] = Note(state.cursor, state.step, len(content), zlib.crc32(content))
        return self._notes[key]


def path(folder: Path, key: Key) -> Path:
    """The file of a state, named by its client and round.

    >>> path(Path("clients"), (12, 3)).name
    '000012-000003.safetensors'
    """
    client, round = key
    return folder / f"{client:06d}-{round:06d}.safetensors"


def read(folder: Path, key: Key, note: Note) -> ClientState:
    """A state from its file.  Raises RunError, naming the client, where that is gone, cut or changed."""
    client, round = key
    file = path(folder, key)
    try:
        content = file.read_bytes()
    except OSError as error:
        cause = f"{file}: {error.strerror}; begin anew in another folder"
        raise RunError("reading a client's state", cause, round=round, client=client, resume=None) from None
    if (len(content), zlib.crc32(content)) != (note.size, note.crc):
        cut = f"{len(content)} of {note.size} bytes" if len(content) != note.size else "its checksum differs"
        cause = f"{file}: not as it was written ({cut}); begin anew in another folder"
        raise RunError("reading a client's state", cause, round=round, client=client, resume=None)
    return ClientState(round, note.cursor, note.step, settled(load(content)))
