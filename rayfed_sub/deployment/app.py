"""What a Flower app reads of its run's and its node's configuration, and what it writes at the end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.types import ClientState, ServerState
from rayfed_sub.data.kept import cache_root
from rayfed_sub.deployment import server
from rayfed_sub.deployment.node import WEIGHTS
from rayfed_sub.deployment.server import Federation
from rayfed_sub.deployment.setup import Setup, run_config, set_up
from rayfed_sub.models.model_folder import generation_config, write_folder
from rayfed_sub.models.weights import dense
from rayfed_sub.storage import atomic_files

_DAY = 24 * 3600.0  # seconds
_MONTH = 30 * _DAY

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


def setup_of(values: Mapping[str, Scalar], node_config: Mapping[str, Scalar] | None = None) -> Setup:
    """The setup of a run configuration, and torch's threads as it says, for they may change the bits.

    node_config: its `model` is where a node has the pretrained model, in place of model.path.  Raises UserError where
    it does not fit."""
    own = {"model.path": place} if node_config and (place := node_config.get("model")) is not None else {}
    config = run_config({key: value for key, value in {**values, **own}.items() if key not in APP_KEYS})
    torch.set_num_threads(config.resources.threads)
    return set_up(config, json.loads(str(values["classes"])), str(values["problem"]))


def node_folder(node_config: Mapping[str, Scalar], run_id: int) -> Path:
    """The folder of the node's client in this run, for its versions, which outlive a message; the folder above has the
    pretrained weights, once for all clients of a cache.

    It lies below the node's `cache`, by default the user's folder for caches.  When a run begins there, weights that
    nobody has read for a day are deleted, and versions that nobody has touched for a month."""
    given = node_config.get("cache")
    root = cache_root() / "flower" if given is None else Path(str(given)).expanduser()
    folder = root / f"run-{run_id}" / f"client-{int(node_config['partition-id'])}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for old in root.glob("run-*/client-*"):
            if _age(old) > _MONTH:
                shutil.rmtree(old, ignore_errors=True)
        for weights in root.glob(f"run-*/{WEIGHTS}"):
            if _age(weights) > _DAY:
                weights.unlink(missing_ok=True)
        for run in root.glob("run-*"):
            if _age(run) > _DAY and not any(run.glob("client-*")):  # a younger one may be another run's that begins
                shutil.rmtree(run, ignore_errors=True)
    return folder


def _age(path: Path) -> float:
    """Seconds since the path was touched; 0 where another process has deleted it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def checkpoint_state(node_config: Mapping[str, Scalar], client: int) -> ClientState | None:
    """The state with which the client goes on from a simulation, from the node's `checkpoint`, the file of one client
    or the folder of all; None where it begins anew: without that key, and where the folder has no file of this client.

    Raises UserError where there is no such file or folder."""
    given = node_config.get("checkpoint")
    if given is None:
        return None
    place = Path(str(given)).expanduser()
    file = client_file(place, client)
    if file.parent.is_dir():
        if not file.exists():
            return None  # it had not trained
    elif place.is_file():
        file = place
    else:
        allowed = "a client's file that `rayfed-sub export --checkpoint` has written, or its folder `checkpoint`"
        raise UserError("checkpoint", str(given), allowed, "correct it in this node's --node-config")
    about, tensors = _stored(file, ("round", "cursor", "step"), "a client's file")
    return ClientState(about["round"], about["cursor"], about["step"], tensors)


def write_checkpoint(
    folder: Path, round: int, tensors: Mapping[str, Tensor], states: Mapping[int, ClientState]
) -> None:
    """Writes the server after so many rounds, and a file for each client that has trained."""
    (folder / "clients").mkdir(parents=True)
    _write_server(folder, round, tensors)
    for client, state in states.items():
        about = {"round": str(state.round), "cursor": str(state.cursor), "step": str(state.step)}
        save_file(dict(state.tensors), client_file(folder, client), about)


def write_server(federation: Federation, folder: Path) -> None:
    """Writes the server, and its optimizer's tensors, as `read_checkpoint` reads them."""
    tensors = {**federation.server.tensors, **{f"{MEMORY}{name}": x for name, x in federation.memory.items()}}
    _write_server(folder, federation.round, tensors)


def _write_server(folder: Path, round: int, tensors: Mapping[str, Tensor]) -> None:
    try:
        atomic_files.write_tensors(_server_file(folder), tensors, {"round": str(round)})
    except RunError as error:
        raise RunError(error.stage, error.cause, round=round, resume=None) from None


def read_checkpoint(folder: str) -> tuple[ServerState, dict[str, Tensor]] | None:
    """The server of a checkpoint, and its optimizer's tensors; None for an empty name.  Raises UserError where there is
    none."""
    if not folder:
        return None
    file = _server_file(Path(folder).expanduser())
    if not file.exists():
        allowed = (
            "a folder with a server.safetensors, of `rayfed-sub export --checkpoint` or of an earlier run's results"
        )
        raise UserError("checkpoint", folder, allowed, "check it")
    about, tensors = _stored(file, ("round",), "a server's file")
    memory = {name.removeprefix(MEMORY): tensors.pop(name) for name in list(tensors) if name.startswith(MEMORY)}
    return ServerState(about["round"], tensors), memory


MEMORY = "server/"
"""Prefix of the server optimizer's tensors in a checkpoint."""


def _server_file(folder: Path) -> Path:
    return folder / "server.safetensors"


def client_file(folder: Path, client: int) -> Path:
    """The file of a client's state in a checkpoint's folder; a node needs no more than its own client's."""
    return folder / "clients" / f"{client}.safetensors"


def _stored(file: Path, keys: Sequence[str], what: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The numbers that a file has under these keys, and its tensors.  Raises UserError for another file."""
    try:
        with safe_open(file, "pt") as opened:
            about = {key: int(value) for key, value in (opened.metadata() or {}).items() if key in keys}
        if len(about) == len(keys):
            return about, load_file(file)
        cause = "it is another file"
    except SafetensorError as error:
        cause = str(error)
    raise UserError("checkpoint", str(file), f"{what} of `rayfed-sub export --checkpoint`", cause)


def write_model(federation: Federation, weights: Mapping[str, Tensor], folder: Path) -> str:
    """Writes the model, where all clients have one, as a folder `model` that transformers loads, float32; returns
    `weights_sha256`.  weights: see `pretrained`."""
    setup, tensors = federation.setup, federation.server.tensors
    if not setup.method.personal:
        trained = server.model_weights(federation, weights) | {name: tensors[name] for name in setup.shape.head_names}
        generation = generation_config(setup.config.model, setup.architecture, setup.processor)
        whole = dense(setup.architecture, weights)
        write_folder(setup.architecture, whole, trained, folder / "model", setup.processor, torch.float32, generation)
    return server.weights_sha256(federation, weights)
