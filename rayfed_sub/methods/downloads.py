"""Bytes that a client downloads before a round: one rule for all methods, those of the user's own among them.

Rule: tensors that follow from the pretrained weights and the run's seed cost nothing.  Every client holds both, and a
head that was drawn from the seed, so the server's state before anything was learned never travels, for dense FedAvg as
for LoRA.  From then on a client pays for the tensors that it lacks, which each method counts in `download_bytes`.
What the run begins from besides the pretrained weights (model.start_from) every client downloads before its first
round, whatever the method.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch

from rayfed_sub.core.types import Client, ModelShape, ServerState, Tensors, wire_bytes
from rayfed_sub.methods.hooked import hook_of
from rayfed_sub.methods.hooks import moves_server
from rayfed_sub.methods.protocol import Method

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Privacy, Server


def downloaded(
    method: Method,
    server: ServerState,
    shape: ModelShape,
    client: Client,
    since: int,
    *,
    learned: bool,
    mixed: bool,
    start: int = 0,
) -> int:
    """Wire bytes to the client before round server.round.

    since: as in `Method.download_bytes`.  learned: whether any round has moved the server, so that it is not what
    `init_server` made of the pretrained weights and the seed.  mixed: see `mixes`.  start: bytes of model.start_from.
    """
    first = start if since < 0 else 0
    if not learned or since == server.round:  # the client holds this very state
        return first
    counted = method.download_bytes(server, shape, client, since)
    return first + (mixed_bytes(method.broadcast(server).tensors, shape, counted) if mixed else counted)


def unchanged(method: Method, before: ServerState, after: ServerState) -> bool:
    """True where clients read the same of both, as of two servers between which no update counted, most of the time:
    who holds the one holds the other."""
    old, new = (method.broadcast(server).tensors for server in (before, after))
    return old.keys() == new.keys() and all(x is new[name] or torch.equal(x, new[name]) for name, x in old.items())


def mixes(method: Method, rule: Server, privacy: Privacy) -> bool:
    """True where a round moves the server by anything but the mean of its updates: by the server's optimizer, noise, or
    a hook's part at the server."""
    return rule.optimizer != "plain" or privacy.of_clients or moves_server(hook_of(method))


def mixed_bytes(sent: Tensors, shape: ModelShape, counted: int) -> int:
    """A client's download where the server mixes (see `mixes`): a dense weight is then no sum of the cohort's
    blocks any more, and the whole broadcast `sent` travels; without one the method's own count stays."""
    dense = any(f"{layer.name}/weight" in sent for layer in shape.targets)
    return wire_bytes(sent) if dense else counted


def first_counted(method: Method, server: ServerState, since: int, down: int, start: int = 0) -> int:
    """The bytes `down` where nothing followed from pretrained weights and seed: a client that never synchronised
    (since -1) would download all that it reads, the whole broadcast, and the start."""
    return max(down, start + wire_bytes(method.broadcast(server).tensors)) if since < 0 else down


def dense_traffic(
    exchanges: Iterable[tuple[int, int, float, float]],
    trained: Collection[int],
    dense: int,
    *,
    private: bool,
    start: int = 0,
) -> tuple[int, int]:
    """Bytes up and down of dense FedAvg with the same clients, by the same rule.

    exchanges: client, finished rounds of the server that it began from, and the shares of its upload and of its
    download that crossed; trained: rounds in which the server took an update; dense: bytes of what FedAvg trains;
    private: noise moves the server in every round; start: bytes of model.start_from, which every client downloads once.

    >>> dense_traffic([(0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 1, 1)], {0}, 100, private=False)  # client 1 failed
    (200, 100)
    >>> dense_traffic([(0, 0, 0, 1), (0, 1, 1, 1)], set(), 100, private=False)  # nothing was learned in round 0
    (100, 0)
    >>> dense_traffic([(1, 1, 0, 0.2), (1, 1, 0.5, 1)], {0}, 100, private=False)  # cut off, then it begins anew
    (50, 120)
    """
    moves, up, down, held = sorted(trained), 0, 0, dict[int, int]()
    for client, version, sent, received in exchanges:
        earlier = bisect_left(moves, version)
        moved = version if private else moves[earlier - 1] + 1 if earlier else 0  # the server is as after so many
        lacks = dense * (0 < moved > held.get(client, -1)) + start * (client not in held)
        up, down = up + round(sent * dense), down + round(received * lacks)
        if received == 1:
            held[client] = version
    return up, down
