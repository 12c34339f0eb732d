"""Checkpoints: the server's tensors and the clients' states as safetensors, and a manifest that is written last.

    checkpoints/manifest-000003.json               round, files with their lengths and sums; the clock, with devices
                server-000003.safetensors          the server's tensors, and its optimiser's as `server/...`; those of
                                                   clients under way as `flight/...`
                clients/000012-000003.safetensors  client 12's state for round 3, see storage/client_states.py
                best-000002.json                   the manifest of the best round's checkpoint, where one is kept

Only what changed since the last checkpoint is written.  The newest two checkpoints are kept whole, and the best one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.torch import load

from rayfed_sub.core.arrays import packed, settled
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ClientState, Tensors
from rayfed_sub.storage import atomic_files, client_states
from rayfed_sub.storage.client_states import Key, StateFile

KEPT = 2
_KINDS = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"},
}


@dataclass(frozen=True)
class Checkpoint:
    """Finished rounds, the server's tensors, and the state files of clients that have trained, by key; clock: of a run
    with devices, see `landings.py`; received: see `state_store.RoundState`."""

    round: int
    server: Tensors
    state_files: Mapping[Key, StateFile]
    clock: dict[str, Any] | None = None
    received: Mapping[int, int] = field(default_factory=dict)


def root(folder: Path) -> Path:
    """Folder of a run's checkpoints."""
    return folder / "checkpoints"


def clients(folder: Path) -> Path:
    """Folder of a run's client states."""
    return root(folder) / "clients"


def make(folder: Path) -> None:
    """Makes both folders.  Raises RunError where that fails."""
    with atomic_files.disk_errors(clients(folder)):
        clients(folder).mkdir(parents=True, exist_ok=True)


def claim(folder: Path, seconds: float) -> IO[bytes]:
    """The lock of the run's writer, see `atomic_files.claim`."""
    make(folder)
    return atomic_files.claim(root(folder) / ".lock", seconds)


def write(folder: Path, checkpoint: Checkpoint, check: Callable[[], None] = lambda: None) -> None:
    """Writes server and manifest, after the states' files, and deletes all checkpoints but the newest `KEPT`.

    check: called before the manifest, may raise where the server's tensors were changed meanwhile.
    Raises RunError where the disk is full; the earlier checkpoints then stay valid.
    """
    parts = safetensors_parts(checkpoint.server)
    atomic_files.write(_server(folder, checkpoint.round), *parts)
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    check()
    manifest = {
        "round": checkpoint.round,
        "server": [sum(map(len, parts)), crc],
        "clients": [[*key, *astuple(entry)] for key, entry in sorted(checkpoint.state_files.items())],
        **({} if checkpoint.clock is None else {"clock": checkpoint.clock}),
        "received": [list(entry) for entry in sorted(checkpoint.received.items())],
    }
    atomic_files.write(_manifest(folder, checkpoint.round), json.dumps(manifest).encode())
    for old in _manifests(folder)[:-KEPT]:
        old.unlink()
    _tidy(folder)


def keep_best(folder: Path, round: int) -> None:
    """Keeps the checkpoint of that round, the newest, until a better one replaces it.

    Raises RunError where the disk is full; an earlier best checkpoint then stays.
    """
    kept = _best_manifest(folder, round)
    atomic_files.write(kept, _manifest(folder, round).read_bytes())
    for old in _bests(folder):
        if old != kept:  # also one of a later round, from which the run went back
            old.unlink()
    _tidy(folder)


def go_back(folder: Path) -> None:
    """Deletes the newest checkpoint's manifest: the one before it is then the newest."""
    _manifests(folder)[-1].unlink()


def read(folder: Path, *, best: bool = False) -> Checkpoint | None:
    """The newest checkpoint, or the best; None where there is none.

    Raises UserError, naming the damaged file and the checkpoint to go on from, where it is torn.
    """
    found = _bests(folder) if best else _manifests(folder)
    return _read(folder, found[-1]) if found else None


def newest(folder: Path) -> int | None:
    """Finished rounds of the newest checkpoint; None where there is none."""
    found = _manifests(folder)
    return _round(found[-1]) if found else None


def count(folder: Path) -> int:
    """Number of the checkpoints that a run can go on from."""
    return len(_manifests(folder))


def best(folder: Path) -> int | None:
    """Finished rounds of the best checkpoint; None where none is kept."""
    found = _bests(folder)
    return _round(found[-1]) if found else None


def best_states(folder: Path) -> set[Key]:
    """Keys of the best checkpoint's states.  Raises UserError where its manifest is torn."""
    found = _bests(folder)
    if not found:
        return set()
    for old in found[:-1]:  # of an interrupted write
        old.unlink()
    try:
        return {(entry[0], entry[1]) for entry in json.loads(found[-1].read_bytes())["clients"]}
    except (ValueError, KeyError) as error:
        raise _torn(folder, found[-1], str(error).partition("\n")[0]) from None


def older(folder: Path) -> set[Key]:
    """Keys of the states in checkpoints before the newest; a torn checkpoint, which is deleted, has none."""
    keys: set[Key] = set()
    for manifest in _manifests(folder)[:-1]:
        try:
            keys |= {(entry[0], entry[1]) for entry in json.loads(manifest.read_bytes())["clients"]}
        except (ValueError, KeyError):  # of no use any more; the newest is whole
            manifest.unlink()
    return keys


def sweep(folder: Path, kept: set[Key]) -> None:
    """Deletes state files other than `kept`: left by an interrupted round, or half written."""
    names = {client_states.path(clients(folder), key).name for key in kept}
    for file in clients(folder).iterdir():
        if file.name not in names:
            file.unlink()


def stored_state(folder: Path, checkpoint: Checkpoint, client: int) -> ClientState:
    """The state of a client that has trained.  Raises RunError where its file is damaged."""
    key = next(key for key in checkpoint.state_files if key[0] == client)
    return client_states.read(clients(folder), key, checkpoint.state_files[key])


def safetensors_parts(tensors: Tensors) -> list[bytes | memoryview]:
    """Parts of a safetensors file, as views of the tensors' memory: the library's `save` copies the tensors twice.

    Format: length of the header as 8 bytes, little endian; the header, JSON; the tensors without a gap, here the wide
    numbers first, so that each begins at a multiple of its size (github.com/huggingface/safetensors).
    """
    header, end, parts = {}, 0, []
    for name, (kind, array) in sorted(packed(tensors).items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        parts.append(array.reshape(-1).view(np.uint8).data)
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": _KINDS[kind], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _read(folder: Path, manifest: Path) -> Checkpoint:
    try:
        tree = json.loads(manifest.read_bytes())
        state_files = {(client, round): StateFile(*entry) for client, round, *entry in tree["clients"]}
        received = dict(tree.get("received", ()))  # an older version writes none
        server, expected = _server(folder, tree["round"]), tree["server"]
        content = server.read_bytes()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _torn(folder, manifest, str(error).partition("\n")[0]) from None
    if [len(content), zlib.crc32(content)] != expected:
        raise _torn(folder, manifest, f"{server.name} is not as it was written")
    for key, entry in state_files.items():
        file = client_states.path(clients(folder), key)
        if not file.exists() or file.stat().st_size != entry.size:
            raise _torn(folder, manifest, f"{file.name} is cut or gone")
    return Checkpoint(tree["round"], settled(load(content)), state_files, tree.get("clock"), received)


def _torn(folder: Path, manifest: Path, why: str) -> UserError:
    before = _manifests(folder)[-2:-1]
    advice = (
        f"delete {manifest.name} to go on from round {_round(before[0])}" if before else "begin anew in another folder"
    )
    if manifest in _bests(folder):
        advice = f"delete {manifest.name} to go on without it"
    return UserError("checkpoint", str(manifest), f"a whole checkpoint: {why}", advice)


def _tidy(folder: Path) -> None:
    """Deletes server files that no manifest names, and what interrupted writes have left."""
    kept = {_server(folder, _round(manifest)) for manifest in (*_manifests(folder), *_bests(folder))}
    for file in (*root(folder).glob("server-*"), *root(folder).glob(".*-*")):  # .: of an interrupted write
        if file not in kept:
            file.unlink()


def _manifests(folder: Path) -> list[Path]:
    return sorted(root(folder).glob("manifest-*.json"), key=_round)


def _bests(folder: Path) -> list[Path]:
    """More than one where a write was interrupted: the last is the best."""
    return sorted(root(folder).glob("best-*.json"), key=_round)


def _manifest(folder: Path, round: int) -> Path:
    return root(folder) / f"manifest-{round:06d}.json"


def _best_manifest(folder: Path, round: int) -> Path:
    return root(folder) / f"best-{round:06d}.json"


def _round(manifest: Path) -> int:
    return int(manifest.stem.rpartition("-")[2])


def _server(folder: Path, round: int) -> Path:
    return root(folder) / f"server-{round:06d}.safetensors"
