"""Client states between rounds, in two tiers: in memory up to a budget, beyond it in safetensors files.

A state is immutable.  Its key is its client and the round that will read it: new states get new keys, so a round that
fails or runs again finds the old states unchanged.  Workers also keep the states that they used last
(runtime/worker.py).
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors.torch import load, save

from rayfed_sub.core.arrays import settled
from rayfed_sub.core.errors import RunError
from rayfed_sub.core.types import ClientState, wire_bytes
from rayfed_sub.storage import atomic_files

Key = tuple[int, int]
"""Client, round."""


@dataclass(frozen=True)
class StateFile:
    """A state file's entry in the manifest.  cursor, step: as in ClientState; size: bytes; crc: CRC-32."""

    cursor: int
    step: int
    size: int
    crc: int


class ClientStates:
    """Client states by key.  put, get: into memory and out of it (see `runtime/object_store.py`); budget: bytes of
    tensors in memory.  `save` may run beside the other methods, as long as nobody drops what it saves."""

    def __init__(self, folder: Path, budget: int, put: Callable[[Any], Any], get: Callable[[Any], Any]) -> None:
        self._folder, self._budget, self._put, self._get = folder, budget, put, get
        self._held: OrderedDict[Key, tuple[Any, int]] = OrderedDict()  # -> reference, bytes; longest unused first
        self._total = 0
        self._files: dict[Key, StateFile] = {}
        self._writing = Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors in memory; above the budget only where a single state is larger."""
        return self._total

    def add(self, client: int, state: ClientState) -> Key:
        """Adds a state; moves others to disk to stay within the budget.  Raises RunError where the disk is full."""
        key = (client, state.round)
        self._files.pop(key, None)  # a round that is run again writes its own files
        self._hold(key, state)
        return key

    def reference(self, key: Key) -> Any:
        """Handle of the state, which is read from its file where it is not in memory.

        Raises RunError, naming the client, where the file is missing or damaged.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        return self._hold(key, read(self._folder, key, self._files[key]))

    def unsaved(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """Handles of those states that have no file yet."""
        return {key: self._held[key][0] for key in keys if key not in self._files}

    def save(self, keys: Iterable[Key], unsaved: Mapping[Key, Any]) -> dict[Key, StateFile]:
        """Writes the `unsaved` ones of these states; returns the manifest entries of all."""
        for key, reference in unsaved.items():
            self._write(key, reference)
        return {key: self._files[key] for key in keys}

    def recall(self, state_files: Mapping[Key, StateFile]) -> None:
        """Registers states that a checkpoint left on disk."""
        self._files.update(state_files)

    def release(self, keys: Iterable[Key]) -> None:
        """Frees the memory of states whose files are still needed."""
        for key in keys:
            self._free(key)

    def drop(self, keys: Iterable[Key]) -> None:
        """Deletes states, in memory and on disk."""
        for key in keys:
            self._free(key)
            self._files.pop(key, None)
            path(self._folder, key).unlink(missing_ok=True)

    def _hold(self, key: Key, state: ClientState) -> Any:
        size = wire_bytes(state.tensors)
        self._free(key)
        while self._held and self._total + size > self._budget:
            oldest = next(iter(self._held))
            self._write(oldest, self._held[oldest][0])
            self._free(oldest)
        reference = self._put(state)
        self._held[key] = (reference, size)
        self._total += size
        return reference

    def _free(self, key: Key) -> None:
        if key in self._held:
            self._total -= self._held.pop(key)[1]

    def _write(self, key: Key, reference: Any) -> None:
        """Writes a state that has no file yet."""
        with self._writing:
            if key in self._files:
                return
            state: ClientState = self._get(reference)
            content = save(dict(state.tensors))
            atomic_files.write(path(self._folder, key), content)
            self._files[key] = StateFile(state.cursor, state.step, len(content), zlib.crc32(content))


def path(folder: Path, key: Key) -> Path:
    """The file of a state, named by its client and round.

    >>> path(Path("clients"), (12, 3)).name
    '000012-000003.safetensors'
    """
    client, round = key
    return folder / f"{client:06d}-{round:06d}.safetensors"


def read(folder: Path, key: Key, entry: StateFile) -> ClientState:
    """A state from its file.  Raises RunError, naming the client, where the file is gone, cut or changed."""
    client, round = key
    file = path(folder, key)
    try:
        content = file.read_bytes()
    except OSError as error:
        cause = f"{file}: {error.strerror}; begin anew in another folder"
        raise RunError("reading a client's state", cause, round=round, client=client, resume=None) from None
    if (len(content), zlib.crc32(content)) != (entry.size, entry.crc):
        cut = f"{len(content)} of {entry.size} bytes" if len(content) != entry.size else "its checksum differs"
        cause = f"{file}: not as it was written ({cut}); begin anew in another folder"
        raise RunError("reading a client's state", cause, round=round, client=client, resume=None)
    return ClientState(round, entry.cursor, entry.step, settled(load(content)))
