"""State store: the last finished round as a whole, in memory and on disk.

A round's new states are taken in beside the old ones; only `commit` makes the round count, all of it at once.  So a
round that fails leaves nothing behind, and a checkpoint may be written at any moment.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import ClientState, ServerState, Tensors
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.checkpoints import Checkpoint
from rayfed_sub.storage.client_states import Key, States

_RULE = "server/"  # how a checkpoint names the tensors of the server's optimiser


@dataclass(frozen=True)
class RoundState:
    """State after a finished round, replaced as one.  memory: the server optimiser's; states: of each client that has
    trained, the round for which its stored state is."""

    server: ServerState
    memory: Tensors = field(default_factory=dict)
    states: Mapping[int, int] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[Key]:
        """The states that it refers to."""
        return frozenset(self.states.items())


class StateStore:
    """current: the last finished round's.  Every method may be called while another thread is in one.

    budget, put, get: as in States.  begin: the server before round 0, asked for where the folder has no checkpoint;
    otherwise the newest is where the run stands.  Raises UserError where that is torn.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        begin: Callable[[], ServerState],
        put: Callable[[Any], Any],
        get: Callable[[Any], Any],
    ) -> None:
        self._folder, self._lock, self._halted = folder, threading.Lock(), False
        checkpoints.make(folder)
        found = checkpoints.read(folder)
        self._states = States(checkpoints.clients(folder), budget, put, get)
        self._named: deque[frozenset[Key]] = deque(maxlen=checkpoints.KEPT)  # states of the checkpoints on disk
        if found is None:
            server = begin()
            self.current = RoundState(ServerState(server.round, settled(server.tensors)))
        else:
            self._named.extend([frozenset(checkpoints.older(folder)), frozenset(found.notes)])
            self._states.recall(found.notes)
            self.current = _round_state(found)
        checkpoints.sweep(folder, set().union(*self._named))

    def add(self, client: int, state: ClientState) -> Key:
        """Takes in a state of the round that is going on, for `commit`."""
        with self._lock:
            return self._states.add(client, state)

    def stored(self, client: int) -> tuple[Key, Any] | None:
        """Key and handle of the client's state there; None where it never trained."""
        with self._lock:
            round = self.current.states.get(client)
            return None if round is None else ((client, round), self._states.reference((client, round)))

    def commit(self, server: ServerState, memory: Tensors, trained: Iterable[Key]) -> bool:
        """From here on the round counts; False, and it never will, after `halt`.  The states that it replaced go, but
        for files that checkpoints name.

        trained: the states that were taken in and count.
        """
        with self._lock:
            if self._halted:
                return False
            whole = ServerState(server.round, settled(server.tensors))
            new = RoundState(whole, settled(memory), {**self.current.states, **dict(trained)})
            left, named = self.current.keys - new.keys, frozenset().union(*self._named)
            self.current = new
            self._states.release(left & named)
            self._states.drop(left - named)
            return True

    def move(self, tensors: Tensors) -> None:
        """The same server, with these tensors of equal numbers in the place of those of their names."""
        with self._lock:
            server = self.current.server
            whole = ServerState(server.round, {**server.tensors, **tensors})
            self.current = replace(self.current, server=whole)

    def halt(self) -> int:
        """From here on no round is committed any more; the number of those that are."""
        with self._lock:
            self._halted = True
            return self.current.server.round

    def checkpoint(self) -> None:
        """Writes what has changed since the last one.

        Raises RunError where the disk is full; the checkpoints that were there are then still good.
        """
        with self._lock:
            current, keys = self.current, self.current.keys
            if checkpoints.newest(self._folder) == current.server.round:
                return
            rule = {f"{_RULE}{name}": tensor for name, tensor in current.memory.items()}
            server = settled({**current.server.tensors, **rule})
            notes = self._states.save(keys)
            checkpoints.write(self._folder, Checkpoint(current.server.round, server, notes))
            leaving = self._named[0] if len(self._named) == checkpoints.KEPT else frozenset()
            self._named.append(keys)
            self._states.drop(leaving.difference(*self._named))


def _round_state(found: Checkpoint) -> RoundState:
    tensors = found.server
    memory = {name.removeprefix(_RULE): tensor for name, tensor in tensors.items() if name.startswith(_RULE)}
    server = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RULE)}
    return RoundState(ServerState(found.round, server), memory, dict(found.notes.keys()))
