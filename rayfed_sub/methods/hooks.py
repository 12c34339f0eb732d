"""The protocol between local training and a hook: what changes the gradients of a client's steps, keeps tensors of its
own at the clients and at the server, and sends them beside the method's.  SCAFFOLD, FedDyn, terms of the local loss and
optimizers are such hooks.

A hook is a frozen dataclass of hyperparameters with pure functions, as a method is.  It sees one client at a time,
never the pack, so that a client has the same bits in any pack; and no value of a tensor decides what it computes, so
that `rayfed-sub plan` can run it on tensors without data.

One round, as the engine walks it:
    broadcast(server)                           server -> clients: those of the hook's tensors that travel
    begin(received, kept, trained)              the memory with which a client's round begins
    correct(memory, step)                       in every local step: the gradients that the optimizer gets
    upload / client_state(memory, ended, steps) what travels to the server, what the client keeps
    aggregate(server, mean)                     the hook's tensors at the server, and its part in the server's step

Names: tensors that belong to a trained tensor are called `<trained tensor>/<kind>`, such as
`model.layers.0.mlp.up_proj/left/c`.  In the engine's records they stand as `hook/<name>` beside the method's
(`hooked.py`), so that bytes, plan, stored states, checkpoints and hashes cover them as they cover the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from rayfed_sub.core.types import LocalStep, Tensors

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config


@dataclass(frozen=True)
class CohortMean:
    """Mean of a round, for a hook's part at the server.

    sent: weighted mean of the clients' hook tensors, with the weights of the method's own mean.  before, after: the
    server's learned tensors that the method's `aggregate` has moved; where the server holds dense weights, these.
    trained: clients whose updates count, at least 1; clients: of the federation.
    """

    sent: Tensors
    before: Tensors
    after: Tensors
    trained: int
    clients: int


class LocalHook(Protocol):
    """The protocol, structural: nothing inherits from it.  All tensors are float32."""

    name: ClassVar[str]
    paper: ClassVar[str]
    wire: ClassVar[str]
    """Numbers beside the method's own, up / down; t: those of the trained tensors."""
    departs: ClassVar[str]
    """Differences from the paper, in words; empty: none."""

    # Optional: `keeps_mean: ClassVar[bool]`, True where `aggregate` replaces no tensor of `mean.after`, as
    # `nothing_moved` does.  Else a dense weight is no sum of the cohort's blocks, and clients download it whole.

    def check(self, config: Config) -> None:
        """Raises UserError where the run's settings do not fit the hook."""

    def init_server(self, trained: Tensors) -> Tensors:
        """The hook's tensors at the server before round 0, and where the trained tensors get another basis.  trained:
        names and shapes of a client's trained tensors; their values mean nothing."""

    def broadcast(self, server: Tensors) -> Tensors:
        """Those of the server's that travel to every client of a round; their bytes are counted as its download."""

    def begin(self, received: Tensors, kept: Tensors, trained: Tensors) -> Tensors:
        """Memory of a client's round.  received: see `broadcast`; kept: see `client_state`, empty in the client's first
        round and in its first in another basis; trained: the trained tensors as the round begins.  All of them are in
        shared memory and are not to be written."""

    def correct(self, memory: Tensors, step: LocalStep) -> tuple[Tensors, Tensors]:
        """The gradients that the optimizer gets in this step, one for every trained tensor, and the memory for the next
        step, of the same names and shapes.  With optimizer.name=sgd, without momentum, a client moves by -lr times
        these: that is how a hook is an optimizer of its own."""

    def upload(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        """Exactly the tensors that travel to the server beside the method's.  ended: the trained tensors after the
        round; steps: local steps of the round."""

    def client_state(self, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
        """The tensors that the client keeps for its next round; arguments as in `upload`."""

    def aggregate(self, server: Tensors, mean: CohortMean) -> tuple[Tensors, Tensors]:
        """The hook's tensors at the server after the round, and those of `mean.after` that it replaces, often none.
        Not called in a round without clients."""


def nothing_refused(hook: object, config: Config) -> None:
    """For hooks that fit all settings; taken over by assignment, as are the following."""


def nothing_at_server(hook: object, trained: Tensors) -> Tensors:
    """For hooks without tensors at the server."""
    return {}


def nothing_received(hook: object, server: Tensors) -> Tensors:
    """For hooks whose tensors at the server stay there."""
    return {}


def nothing_kept(hook: object, memory: Tensors, ended: Tensors, steps: int) -> Tensors:
    """For hooks that send nothing, or whose clients keep nothing."""
    return {}


def nothing_moved(hook: object, server: Tensors, mean: CohortMean) -> tuple[Tensors, Tensors]:
    """For hooks without a part at the server."""
    return server, {}


def moves_server(hook: LocalHook | None) -> bool:
    """True for a hook whose part at the server may replace tensors that the method's `aggregate` has moved."""
    return hook is not None and not getattr(hook, "keeps_mean", type(hook).aggregate is nothing_moved)
