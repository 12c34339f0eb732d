"""A client's half of a federation: one client of one node, which keeps its version of the server and its client's state
in files between rounds, for every message is worked in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import Broadcast, Client, ClientState, ServerState, Tensors, Update
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.deployment import deltas
from rayfed_sub.deployment.deltas import Download
from rayfed_sub.deployment.server import Reply
from rayfed_sub.deployment.setup import Setup, initial, pretrained
from rayfed_sub.models.text_to_text import KIND
from rayfed_sub.models.weights import assemble
from rayfed_sub.planning import packs, sampling
from rayfed_sub.storage import atomic_files
from rayfed_sub.training import client_round
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.layers import based_on
from rayfed_sub.training.pack_experts import install

WEIGHTS = "weights.safetensors"
"""The file of a run's pretrained weights on a node."""
_SERVER, _STATE = "server/", "state/"  # prefixes in a version's file
_WRITING = 3600.0  # seconds that another process may take to write the weights


@dataclass(frozen=True, eq=False)
class Version:
    """What a node keeps of a round that its client has trained in: the server as it read it, and the client's state."""

    server: ServerState
    state: ClientState | None = None


def train(
    setup: Setup,
    weights: Mapping[str, Tensor],
    dataset: Dataset,
    folder: Path,
    client: int,
    got: Download,
    checkpoint: ClientState | None = None,
    device: str = "cpu",
) -> Reply:
    """The client's round: brings its version up to date, trains, keeps the new version, and answers.

    weights: see `pretrained`; dataset: see `setup.rows_of`; folder: of this client's versions in this run; checkpoint:
    the state with which the client goes on from a simulation, where it has no version.  The version before is kept
    beside the new one until the server has confirmed that, by building on it.
    """
    config, method, shape, n = setup.config, setup.method, setup.shape, got.round
    place = packs.place(config, dataset, client)
    if got.since < 0:
        version = Version(initial(setup, weights), checkpoint)
    else:
        found = _read(folder, got.since)
        if found is None:
            return Reply(Update(client, 0.0, {}, {}, "its node holds no version to go on from"), place, holds=False)
        version = found
    server = deltas.applied(method, shape, config.server, version.server, got)
    work = sampling.pack_work(config, dataset, n, [client])
    (steps,), (weight,), state = work.steps, work.weights, version.state
    received, cursor = method.broadcast(server), 0 if state is None else state.cursor
    pad, apart = setup.processor.pad, setup.architecture.kind == KIND
    here = Broadcast(received.round, {name: x.to(device) for name, x in received.tensors.items()})
    start = method.start_client(here, state, Client(client, config.seed), shape)
    rows = dataset.rows_of(client)
    batches = client_round.batches(config, dataset, rows, client, cursor, steps, pad=pad, apart=apart)
    model = assemble(setup.architecture, {name: tensor.to(device) for name, tensor in weights.items()})
    layers = install(model, shape)
    held = {layer.name: here.tensors.get(f"{layer.name}/weight") for layer in shape.targets}
    recompute = config.resources.activation_checkpointing == "blocks"
    rule = client_round.local_rule(config, work.lr, pad=pad, recompute=recompute)
    with based_on(layers, {name: base for name, base in held.items() if base is not None}):
        one = ClientWork(client, start, batches, cursor, batches.expected)
        (result,) = train_pack(model, layers, shape, [one], rule).results
    ended = client_round.ended(method, received, result, state, weight, shape)
    if isinstance(ended, str):
        return Reply(Update(client, 0.0, {}, {}, ended), place)
    update, new = ended
    _keep(folder, n, Version(server, new), got.since)
    return Reply(update, place)


def kept_weights(setup: Setup, folder: Path) -> dict[str, Tensor]:
    """The pretrained weights from the folder's file of them, which the first process writes: later ones, and those of
    the node's other clients, map it."""
    file = folder / WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files.claim(folder / ".weights-lock", _WRITING):
        if not file.exists():
            atomic_files.write_tensors(file, pretrained(setup))
        file.touch()  # or another run may take it for left
    held: dict[str, Tensor] = load_file(file)
    return held


def stored_state(folder: Path, round: int) -> ClientState | None:
    """The client's state after its round `round`; None where the node holds none."""
    found = _read(folder, round)
    return None if found is None else found.state


def _keep(folder: Path, n: int, version: Version, before: int) -> None:
    """Writes version n, and deletes the earlier ones but that on which it was built; no later one, which is there where
    this process ends after the server has gone on without it."""
    state = version.state
    assert state is not None
    about = {"round": state.round, "cursor": state.cursor, "step": state.step}
    tensors = _named(_SERVER, version.server.tensors) | _named(_STATE, state.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_files.write_tensors(_file(folder, n), tensors, {"state": json.dumps(about)})
    for file in folder.glob("version-*.safetensors"):
        if file < _file(folder, n) and file != _file(folder, before):
            file.unlink(missing_ok=True)  # two processes may delete it


def _read(folder: Path, n: int) -> Version | None:
    """Version n, None where the node has none."""
    file = _file(folder, n)
    if not file.exists():
        return None
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["state"])
    tensors = settled(load_file(file))
    server, state = (_unnamed(prefix, tensors) for prefix in (_SERVER, _STATE))
    return Version(ServerState(n, server), ClientState(about["round"], about["cursor"], about["step"], state))


def _file(folder: Path, n: int) -> Path:
    return folder / f"version-{n:06d}.safetensors"  # sorted by name they are sorted by number


def _named(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _unnamed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
