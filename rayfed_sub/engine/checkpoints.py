"""Checkpoints: the server's and every client's tensors as safetensors, and a manifest that is written last.

checkpoints/round-000003/manifest.json  server.safetensors  clients/000012.safetensors ...
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from rayfed_sub.engine.exchange import unpacked
from rayfed_sub.engine.folder import replace_folder
from rayfed_sub.errors import UserError
from rayfed_sub.records import ClientState, ServerState

if TYPE_CHECKING:
    from rayfed_sub.engine.coordinator import Snapshot


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Writes a snapshot under `folder`/checkpoints and removes older ones once it is complete."""
    final = folder / "checkpoints" / f"round-{snapshot.round:06d}"
    temporary = final.with_name(f".{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "clients").mkdir(parents=True)
    save_file(unpacked(snapshot.server), temporary / "server.safetensors")
    clients = {}
    for client, state in snapshot.clients.items():
        save_file(unpacked(state.tensors), temporary / "clients" / f"{client:06d}.safetensors")
        clients[client] = {"round": state.round, "cursor": state.cursor, "step": state.step}
    manifest = {"round": snapshot.round, "clients": clients}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    replace_folder(temporary, final)
    for other in final.parent.glob("*round-*"):  # older ones, and what an interrupted write left behind
        if other != final:
            shutil.rmtree(other)
    return final


def read(folder: Path) -> tuple[ServerState, dict[int, ClientState]]:
    """The newest checkpoint under `folder`/checkpoints.  Raises UserError where there is none."""
    complete = sorted((folder / "checkpoints").glob("round-*/manifest.json"))
    if not complete:
        raise UserError("RUN", str(folder), "a run folder with a checkpoint", "check the path")
    root = complete[-1].parent
    manifest = json.loads(complete[-1].read_text(encoding="utf-8"))
    clients = {
        int(client): ClientState(**entry, tensors=load_file(root / "clients" / f"{int(client):06d}.safetensors"))
        for client, entry in manifest["clients"].items()
    }
    return ServerState(manifest["round"], load_file(root / "server.safetensors")), clients
