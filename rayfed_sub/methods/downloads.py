"""Bytes that a client downloads before a round: one rule for all methods, those of the user's own among them.

Rule: tensors that follow from the pretrained weights and the run's seed cost nothing.  Every client holds both, and a
head that was drawn from the seed, so the server's state before anything was learned never travels, for dense FedAvg as
for LoRA.  From then on a client pays for the tensors that it lacks, which each method counts in `download_bytes`.
What the run begins from besides the pretrained weights (model.start_from) every client downloads before its first
round, whatever the method.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayfed_sub.core.types import Client, ModelShape, ServerState, wire_bytes
from rayfed_sub.methods.protocol import Method
from rayfed_sub.methods.server_optimizers import mixed_bytes


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
    `init_server` made of the pretrained weights and the seed.  mixed: see `methods/server_optimizers.py`.  start: bytes
    of model.start_from.
    """
    first = start if since < 0 else 0
    if not learned:
        return first
    counted = method.download_bytes(server, shape, client, since)
    return first + (mixed_bytes(method.broadcast(server).tensors, shape, counted) if mixed else counted)


def first_counted(method: Method, server: ServerState, since: int, down: int, start: int = 0) -> int:
    """The bytes `down` where nothing followed from pretrained weights and seed: a client that never synchronised
    (since -1) would download all that it reads, the whole broadcast, and the start."""
    return max(down, start + wire_bytes(method.broadcast(server).tensors)) if since < 0 else down


def dense_downloads(clients: Sequence[int], skipped: Sequence[int], dense: int, *, private: bool) -> int:
    """Download bytes of dense FedAvg's clients in a run by the same rule: `dense` bytes each, in rounds before which
    the server had moved.  clients, skipped: of each round; private: noise moves the server in a round without clients.

    >>> dense_downloads([8, 8, 2], [0, 0, 0], 100, private=False)  # the first eight hold the pretrained weights
    1000
    >>> dense_downloads([8, 8, 2], [8, 0, 0], 100, private=False)  # all of them failed: the second eight hold them too
    200
    """
    total, learned = 0, False
    for count, failed in zip(clients, skipped, strict=True):
        total += dense * count * learned
        learned = learned or private or count > failed
    return total
