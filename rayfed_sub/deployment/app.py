"""What a Flower app reads of its run's and its node's configuration, and what it writes at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ClientState, ServerState
from rayfed_sub.data.kept import cache_root
from rayfed_sub.deployment import server
from rayfed_sub.deployment.server import Federation
from rayfed_sub.deployment.setup import Setup, run_config, set_up
from rayfed_sub.models.weights import generation_config, write_folder

Scalar = bool | int | float | str

APP_KEYS: Mapping[str, Scalar] = {
    "round-timeout": 3600.0,
    "node-timeout": 600.0,
    "output-dir": "outputs",
    "checkpoint": "",
    "classes": "[]",
    "problem": "classification",
}
"""Keys of a Flower app's run configuration that are no keys of a rayfed_sub configuration, with their defaults."""


def setup_of(values: Mapping[str, Scalar]) -> Setup:
    """The setup of a run configuration.  Raises UserError where it does not fit."""
    config = run_config({key: value for key, value in values.items() if key not in APP_KEYS})
    return set_up(config, json.loads(str(values["classes"])), str(values["problem"]))


@dataclass(frozen=True)
class NodeFolders:
    """Where a node keeps what outlives a message.  weights: of the pretrained weights, for all runs that begin with
    them; versions: of this run's client; start: folder of a simulation's checkpoint, None without one."""

    weights: Path
    versions: Path
    start: Path | None

    @classmethod
    def of(cls, node_config: Mapping[str, Scalar], run_id: int, setup: Setup) -> NodeFolders:
        """The folders below the node's `cache`, by default the user's folder for caches."""
        given = node_config.get("cache")
        root = cache_root() / "flower" if given is None else Path(str(given)).expanduser()
        model, start = setup.config.model.model_dump_json(), node_config.get("checkpoint")
        key = hashlib.sha256(f"{model} {setup.config.seed} {setup.classes}".encode()).hexdigest()[:16]
        versions = root / f"run-{run_id}" / f"client-{int(node_config['partition-id'])}"
        return cls(root / f"weights-{key}", versions, None if start is None else Path(str(start)).expanduser())

    def checkpoint(self, client: int) -> ClientState | None:
        """The state with which the client goes on from the simulation; None where it begins anew."""
        file = None if self.start is None else client_file(self.start, client)
        if file is None or not file.exists():
            return None
        about = _about(file)
        return ClientState(int(about["round"]), int(about["cursor"]), int(about["step"]), load_file(file))


def write_checkpoint(
    folder: Path, round: int, tensors: Mapping[str, Tensor], states: Mapping[int, ClientState]
) -> None:
    """Writes the server after so many rounds, and a file for each client that has trained."""
    (folder / "clients").mkdir(parents=True)
    save_file(dict(tensors), _server_file(folder), {"round": str(round)})
    for client, state in states.items():
        about = {"round": str(state.round), "cursor": str(state.cursor), "step": str(state.step)}
        save_file(dict(state.tensors), client_file(folder, client), about)


def read_checkpoint(folder: str) -> tuple[ServerState, dict[str, Tensor]] | None:
    """The server of a checkpoint, and its optimizer's tensors; None for an empty name.  Raises UserError where there is
    none."""
    if not folder:
        return None
    file = _server_file(Path(folder).expanduser())
    if not file.exists():
        raise UserError("checkpoint", folder, "a folder that `rayfed-sub export --checkpoint` has written", "check it")
    tensors, memory = load_file(file), dict[str, Tensor]()
    for name in [name for name in tensors if name.startswith(MEMORY)]:
        memory[name.removeprefix(MEMORY)] = tensors.pop(name)
    return ServerState(int(_about(file)["round"]), tensors), memory


MEMORY = "server/"
"""Prefix of the server optimizer's tensors in a checkpoint."""


def _server_file(folder: Path) -> Path:
    return folder / "server.safetensors"


def client_file(folder: Path, client: int) -> Path:
    """The file of a client's state in a checkpoint's folder; a node needs no more than its own client's."""
    return folder / "clients" / f"{client}.safetensors"


def _about(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def write_model(federation: Federation, weights: Mapping[str, Tensor], folder: Path) -> str:
    """Writes the server's tensors to server.safetensors and, where all clients have one model, that as a folder that
    transformers loads, float32; returns `weights_sha256`.  weights: see `pretrained`."""
    setup, tensors = federation.setup, federation.server.tensors
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, _server_file(folder), {"round": str(federation.round)}
    )
    if not setup.method.personal:
        trained = server.model_weights(federation, weights) | {name: tensors[name] for name in setup.shape.head_names}
        generation = generation_config(setup.config.model, setup.architecture, setup.processor)
        write_folder(setup.architecture, weights, trained, folder / "model", setup.processor, torch.float32, generation)
    return server.weights_sha256(federation, weights)
