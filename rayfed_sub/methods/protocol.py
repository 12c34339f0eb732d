"""The protocol between the engine and a federated method.  A method is a frozen dataclass of hyperparameters with pure
functions: it owns no state, does no I/O, draws no unnamed random number and never knows where it runs.

One round, as the engine walks it:
    broadcast(server)                         server -> shared memory, once
    start_client(broadcast, state, client)    what each client trains, and from where
    ... local training (training/) ...
    upload(broadcast, result, weight)         client -> server: exactly the tensors that travel
    client_state(broadcast, result)           the tensors that a client stores for its next round
    accumulator / accumulate / aggregate      the weighted mean, summed in a fixed order, normalised at the end
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from rayfed_sub.core.types import (
    Accumulator,
    Broadcast,
    Change,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    ServerState,
    Start,
    Tensors,
    Update,
)


class Method(Protocol):
    """The protocol, structural: nothing inherits from it."""

    name: ClassVar[str]
    paper: ClassVar[str]
    trained: ClassVar[str]
    """A client's trained tensors, in words, for the table of methods."""
    exact: ClassVar[bool]
    """True: the server's change equals sum p_k dW_k to rounding."""
    supports_server_optimizer: ClassVar[bool]
    """True: the server's tensors keep their basis and move with the mean update, so that server optimisers fit."""
    personal: ClassVar[bool]
    """True: every client has a model of its own, see `personal_model`."""
    wire: ClassVar[str]
    """Numbers per layer, client and round, up / down, as a formula."""

    departs: ClassVar[str]
    """Differences from the paper, in words for the table of methods; empty: none."""

    # Optional: `alerts: ClassVar[frozenset[str]]`, rules of `diagnostics/alerts.py` (BY_METHOD) that hold for it.
    # Optional: `at_most() -> Method`, for methods whose server keeps as much as the data asks for: the same one with
    # fields under which it keeps most, which plans walk.
    # Optional: `shared_basis(round: int) -> int`, for methods whose clients all train the same tensors in one basis.
    # Rounds of equal numbers have the same one, so that tensors like those that are trained can be compared and added,
    # over clients and over these rounds.  Without it hooks (`hooks.py`) are refused.

    # Optional: `sent_values(shape: ModelShape) -> tuple[str, ...]`, for methods whose updates are of use to a server
    # that has moved on since the client began.  Names of the tensors in an update that are new values of the server's
    # tensors of the same names; all others are parts of a change that is added to whatever the server has become, or
    # moments.  Without it federation.mode=async is refused.

    # Optional, of use to a deployment alone: `layerwise: ClassVar[bool]`, True where `aggregate` computes each layer
    # from that layer's tensors alone, so that a node may repeat it for some layers with the cohort's updates, where
    # these are smaller than the dense weight.  `received(tensors, shape, client) -> Tensors`: what this client reads of
    # the broadcast's tensors, where that is less than all; `start_client` then takes a broadcast that holds no more.

    def check(self, shape: ModelShape) -> None:
        """Raises UserError where the hyperparameters do not fit the model (a rank above the matrix)."""

    def init_server(self, weights: Tensors, shape: ModelShape, seed: int) -> ServerState:
        """The server before round 0.  weights: the pretrained `<target>/weight` (m, n) and the head, float32."""

    def broadcast(self, server: ServerState) -> Broadcast:
        """The tensors that the clients of the coming round read; may depend on server.round."""

    def download_bytes(self, server: ServerState, shape: ModelShape, client: Client, since: int) -> int:
        """Bytes the client would receive before round server.round, having last synchronised at the start of round
        `since` (-1: never; it then holds the pretrained weights and the seed).  Not asked before anything was learned:
        what follows from pretrained weights and seed costs nothing, whatever the method (`downloads.py`)."""

    def start_client(self, broadcast: Broadcast, state: ClientState | None, client: Client, shape: ModelShape) -> Start:
        """A client's tensors at the start of the round; state is None in its first round."""

    def upload(self, broadcast: Broadcast, result: LocalResult, weight: float, shape: ModelShape) -> Update:
        """Exactly the tensors that travel; weight is the client's raw weight (its rows, or 1).  broadcast: the one that
        the client began with (its round and tensors)."""

    def client_state(self, broadcast: Broadcast, result: LocalResult, shape: ModelShape) -> Tensors:
        """The tensors the client stores for its next round; broadcast as in `upload`."""

    def accumulator(self, server: ServerState, shape: ModelShape) -> Accumulator:
        """The empty sum."""

    def accumulate(self, total: Accumulator, update: Update, shape: ModelShape) -> Accumulator:
        """Adds an update; called in a fixed order.  Uses `total` up: its tensors may be written."""

    def aggregate(self, server: ServerState, total: Accumulator, shape: ModelShape) -> ServerState:
        """The server after the round; divides by the total weight.  Uses `total` up: its tensors may be written."""

    def model(self, server: ServerState, shape: ModelShape) -> Mapping[str, Change]:
        """The global model: per target layer its change relative to the backbone's weight."""

    def personal_model(self, server: ServerState, state: ClientState | None, shape: ModelShape) -> Mapping[str, Change]:
        """Changes of a client's model, like `model`; for methods with `personal` set.  state: None before the first
        round."""
