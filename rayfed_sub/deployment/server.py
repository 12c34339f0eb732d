"""The server's half of a federation: who takes part in a round, what each client receives, and how the updates become
the next server.  Plain functions over a record; whoever moves the messages calls them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from rayfed_sub.core.arrays import add_to_digest, settled
from rayfed_sub.core.errors import RunError, UserError
from rayfed_sub.core.finite import not_finite
from rayfed_sub.core.types import Client, ServerState, Tensors, Update
from rayfed_sub.deployment import deltas
from rayfed_sub.deployment.deltas import Download, History
from rayfed_sub.deployment.setup import Setup, initial
from rayfed_sub.methods.downloads import downloaded, mixes
from rayfed_sub.methods.server_optimizers import advance
from rayfed_sub.models.weights import target_weights
from rayfed_sub.planning import sampling
from rayfed_sub.training.client_errors import client_failed


@dataclass(frozen=True)
class Reply:
    """A client's answer to a round.  place: of its update in the sum, see `planning.packs.place`; holds: whether its
    node has the version that the download changes, which else is sent anew."""

    update: Update
    place: tuple[int, int] = (0, 0)
    holds: bool = True


@dataclass(frozen=True, eq=False)
class Federation:
    """The server between rounds.  memory: its optimizer's; since: by client the version that its node has."""

    setup: Setup
    server: ServerState
    history: History
    memory: Tensors = field(default_factory=dict)
    since: Mapping[int, int] = field(default_factory=dict)

    @property
    def round(self) -> int:
        return self.server.round

    @property
    def learned(self) -> bool:
        """True where the server is not what pretrained weights and seed make."""
        return any(self.history.changed.values())


def begin(
    setup: Setup, weights: Mapping[str, Tensor], checkpoint: tuple[ServerState, Tensors] | None = None
) -> Federation:
    """The federation before its first round, from the pretrained weights or from where a simulation has come: its
    server, and the server optimizer's memory.

    Raises UserError (federation.rounds) where no round is left."""
    rounds, done = setup.config.federation.rounds or 0, 0 if checkpoint is None else checkpoint[0].round
    if rounds <= done:
        allowed = f"more than {done}, the rounds of the checkpoint"
        raise UserError("federation.rounds", rounds, allowed, f"set federation.rounds={2 * done} in --run-config")
    first = initial(setup, weights)
    server, memory = (first, {}) if checkpoint is None else checkpoint
    return Federation(setup, ServerState(server.round, settled(server.tensors)), deltas.begun(first, server), memory)


def cohort(federation: Federation) -> list[int]:
    """The clients of the coming round, sorted, as a simulation draws them."""
    return sampling.cohort(federation.setup.config, federation.round)


def download(federation: Federation, client: int, *, anew: bool = False) -> Download:
    """What the client receives before the coming round; anew: its node holds no version."""
    setup, since = federation.setup, -1 if anew else federation.since.get(client, -1)
    who = Client(client, setup.config.seed)
    return deltas.download(setup.method, setup.shape, federation.server, federation.history, who, since)


def counted_bytes(federation: Federation, client: int, *, anew: bool = False) -> int:
    """`download_bytes` of the client, as a simulation counts them."""
    setup, since = federation.setup, -1 if anew else federation.since.get(client, -1)
    mixed = mixes(setup.method, setup.config.server, setup.config.privacy)
    who = Client(client, setup.config.seed)
    return downloaded(setup.method, federation.server, setup.shape, who, since, learned=federation.learned, mixed=mixed)


def checked(update: Update) -> Update:
    """The update, or its failure where it is not finite: a node may send anything."""
    failure = update.failure or not_finite(update.tensors)
    return update if failure is None else Update(update.client, 0.0, {}, update.metrics, failure)


def finish(federation: Federation, replies: Sequence[Reply]) -> Federation:
    """The federation after the round.  replies: of every client of the cohort, in any order.

    Updates are added in the order of `planning.packs.ordered`, not as they arrive.  Raises RunError for a failed client
    where federation.on_client_failure=stop, and where the server is not finite."""
    setup, before, n = federation.setup, federation.server, federation.round
    config, method, shape = setup.config, setup.method, setup.shape
    updates = [checked(reply.update) for reply in sorted(replies, key=lambda one: (*one.place, one.update.client))]
    for update in updates:
        if update.failure is not None and config.federation.on_client_failure == "stop":
            raise client_failed(update.failure, n, update.client)
    counted = [update for update in updates if update.failure is None]
    total = method.accumulator(before, shape)
    for update in counted:
        total = method.accumulate(total, update, shape)
    trained = [(update.client, update.weight) for update in counted]
    factor = sampling.nova_factor_of(config, n, trained) if config.federation.normalise_steps else 1.0
    mixed = mixes(method, config.server, config.privacy)
    done = None if mixed else deltas.repeatable(method, shape, n, counted, total, factor)
    after, memory = advance(config.server, before, method.aggregate(before, total, shape), federation.memory, factor)
    after = ServerState(after.round, settled(after.tensors))
    if (failure := not_finite(after.tensors)) is not None:
        raise RunError("aggregation", f"{failure}; lower optimizer.lr and begin anew", round=n, resume=None)
    history = deltas.continued(federation.history, method, shape, before, after, done)
    since = {**federation.since, **dict.fromkeys((update.client for update in counted), n)}
    return replace(federation, server=after, memory=memory, history=history, since=since)


def model_weights(federation: Federation, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights `<target>/weight` (m, n) of the model of all, float32; weights: see `pretrained`."""
    setup = federation.setup
    targets = target_weights(setup.shape, setup.architecture.transposed, weights)
    changes = setup.method.model(federation.server, setup.shape)
    return {f"{t.name}/weight": changes[t.name].apply(targets[f"{t.name}/weight"]) for t in setup.shape.targets}


def weights_sha256(federation: Federation, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything that the server has learned: for methods with one model for all the `weights_sha256` of a
    simulation of the same run."""
    digest = hashlib.sha256()
    trained, tensors = model_weights(federation, weights), federation.server.tensors
    add_to_digest(digest, ((layer.name, trained[f"{layer.name}/weight"]) for layer in federation.setup.shape.targets))
    add_to_digest(digest, sorted(tensors.items()))
    return digest.hexdigest()
