"""State store: the last finished round as a whole, in memory and on disk.

New client states are added beside the old ones; `commit` replaces the whole round at once.  So a failed round leaves
nothing behind, and a checkpoint of a pinned round may be written while the next one runs and is committed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rayfed_sub.clock.virtual_clock import Clock
from rayfed_sub.core.arrays import Guard, settled
from rayfed_sub.core.types import ClientState, ServerState, Tensors
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.checkpoints import Checkpoint
from rayfed_sub.storage.client_states import ClientStates, Key
from rayfed_sub.storage.landings import Landing, clock_entry, landed, landing_tensors

_RULE = "server/"  # prefix of the server optimiser's tensors in a checkpoint


@dataclass(frozen=True)
class RoundState:
    """State after a finished round, replaced as one.  memory: the server optimiser's tensors; states: client -> round
    for which its stored state is, for clients that have trained; clock: of a run with devices; landings: client -> the
    result of its flight, for clients under way; received: client -> the finished rounds of the server that it holds,
    for clients that have got a broadcast since the round of their state, but not trained to an end."""

    server: ServerState
    memory: Tensors = field(default_factory=dict)
    states: Mapping[int, int] = field(default_factory=dict)
    clock: Clock | None = None
    landings: Mapping[int, Landing] = field(default_factory=dict)
    received: Mapping[int, int] = field(default_factory=dict)

    def synchronised(self, client: int) -> int:
        """The last round whose broadcast the client holds; -1: none."""
        trained = self.states.get(client, 0) - 1  # a state is for the round after the one that made it
        return max(trained, self.received.get(client, -1))

    @property
    def keys(self) -> frozenset[Key]:
        """Keys of the clients' states."""
        return frozenset(self.states.items())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The server's tensors, its optimiser's, and those of clients under way, as a checkpoint names them."""
        memory = {f"{_RULE}{name}": tensor for name, tensor in self.memory.items()}
        return {**self.server.tensors, **memory, **landing_tensors(self.landings)}


@dataclass(frozen=True)
class _Pinned:
    """A round of which a checkpoint is to be written.  unsaved: handles of its states without a file."""

    state: RoundState
    unsaved: Mapping[Key, Any]
    guard: Guard


class StateStore:
    """State of a run: `current` after the last finished round.  Thread-safe; one checkpoint is written at a time.

    Starts from the folder's newest checkpoint, or from `begin()`, the server before round 0.  budget, put, get: see
    `ClientStates`.  Raises UserError where the newest checkpoint is torn.
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
        self._states = ClientStates(checkpoints.clients(folder), budget, put, get)
        self._named: deque[frozenset[Key]] = deque(maxlen=checkpoints.KEPT)  # states of the checkpoints on disk
        if found is None:
            server = begin()
            self.current = RoundState(ServerState(server.round, settled(server.tensors)))
        else:
            self._named.extend([frozenset(checkpoints.older(folder)), frozenset(found.state_files)])
            self._states.recall(found.state_files)
            self.current = _round_state(found)
        self._pinned: _Pinned | None = None
        self._best = frozenset(checkpoints.best_states(folder))  # states of the best checkpoint
        checkpoints.sweep(folder, set().union(*self._named, self._best))

    def add(self, client: int, state: ClientState) -> Key:
        """Stores a client's state of the current round until `commit`."""
        with self._lock:
            return self._states.add(client, state)

    def stored(self, client: int) -> tuple[Key, Any] | None:
        """Key and handle of the client's stored state; None for a client that never trained."""
        with self._lock:
            round = self.current.states.get(client)
            return None if round is None else ((client, round), self._states.reference((client, round)))

    def commit(
        self,
        server: ServerState,
        memory: Tensors,
        trained: Iterable[Key],
        clock: Clock | None = None,
        landings: Mapping[int, Landing] | None = None,
        received: Mapping[int, int] | None = None,
        *,
        still: bool = False,
    ) -> bool:
        """Makes the round the current one; does nothing and returns False after `halt`.

        clock, landings: as in `RoundState`.  received: of the round alone, by clients that did not train to an end.
        still: clients read the same of this server as of the last one, so that who holds that one holds this one.
        trained: keys of the added states that belong to the round.  The states that they replace are dropped, except
        for the files that a checkpoint names, or will name.
        """
        with self._lock:
            if self._halted:
                return False
            whole = ServerState(server.round, settled(server.tensors))
            states = {**self.current.states, **dict(trained)}
            held = {**self.current.received, **(received or {})}
            if still:
                last = self.current.server.round
                held = {client: server.round if round == last else round for client, round in held.items()}
            held = {client: round for client, round in held.items() if round >= states.get(client, 0)}
            new = RoundState(whole, settled(memory), states, clock, landings or {}, held)
            pinned = frozenset() if self._pinned is None else self._pinned.state.keys
            left, named = self.current.keys - new.keys, pinned.union(*self._named)
            self.current = new
            self._states.release(left & named)
            self._states.drop(left - named)
            return True

    def move(self, tensors: Tensors) -> None:
        """Replaces server tensors by others of the same names and values, e.g. in shared memory."""
        with self._lock:
            server = self.current.server
            whole = ServerState(server.round, {**server.tensors, **tensors})
            self.current = replace(self.current, server=whole)

    def halt(self) -> int:
        """Refuses every later commit, and pins the last one; returns the number of committed rounds."""
        with self._lock:
            self._halted = True
            self._pin()
            return self.current.server.round

    def pin(self) -> None:
        """Makes the current round the one of which the next checkpoint is, whatever is committed before that."""
        with self._lock:
            self._pin()

    def checkpoint(self) -> None:
        """Writes a checkpoint of the pinned round: only files that the last one lacks.  Rounds may be committed
        meanwhile.

        Raises RunError where the disk is full, and where the server's tensors were written in place; the earlier
        checkpoints then stay valid.
        """
        with self._lock:
            pinned = self._pinned
            assert pinned is not None, "a checkpoint of no round"
        try:
            if checkpoints.newest(self._folder) != pinned.state.server.round:
                self._write(pinned)
        finally:
            with self._lock:
                self._pinned = None

    def keep_best(self) -> None:
        """Keeps the newest checkpoint as the best one, and frees an earlier best.

        Raises RunError where the disk is full; an earlier best checkpoint then stays valid.
        """
        with self._lock:
            newest = checkpoints.newest(self._folder)
            assert newest is not None, "no checkpoint to keep"
            if checkpoints.best(self._folder) == newest:
                return
            checkpoints.keep_best(self._folder, newest)
            leaving, self._best = self._best, self._named[-1]
            self._states.drop(leaving.difference(self._best, *self._named))

    def _pin(self) -> None:
        current = self.current
        self._pinned = _Pinned(current, self._states.unsaved(current.keys), Guard(current.tensors.items()))

    def _write(self, pinned: _Pinned) -> None:
        keys = pinned.state.keys
        state_files = self._states.save(keys, pinned.unsaved)
        clock = clock_entry(pinned.state.clock, pinned.state.landings)
        server, received = settled(pinned.state.tensors), pinned.state.received
        whole = Checkpoint(pinned.state.server.round, server, state_files, clock, received)
        checkpoints.write(self._folder, whole, pinned.guard.check)
        with self._lock:
            leaving = self._named[0] if len(self._named) == checkpoints.KEPT else frozenset()
            self._named.append(keys)
            # What the current round has of the states that leave, the pinned one has too.
            self._states.drop(leaving.difference(self._best, *self._named))


def _round_state(found: Checkpoint) -> RoundState:
    tensors, clock, landings = landed(found.server, found.clock)
    memory = {name.removeprefix(_RULE): tensor for name, tensor in tensors.items() if name.startswith(_RULE)}
    server = {name: tensor for name, tensor in tensors.items() if not name.startswith(_RULE)}
    states = dict(found.state_files.keys())
    return RoundState(ServerState(found.round, server), memory, states, clock, landings, found.received)
