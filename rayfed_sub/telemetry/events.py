"""Events of a run, as its listener gets them, and its summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import ClientLayer, ClientRow, CohortLayer, PackRow, RoundRow, Score


@dataclass(frozen=True)
class Stage:
    """A stage before the first round."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Something out of the ordinary, worth a line that stays: an interruption, a run taken up again."""

    text: str


@dataclass(frozen=True)
class Beginning:
    """Start of a run, for resuming: the initial model's scores, and what the bits
    depend on besides the configuration.  rows: the task's `RowCounts`; data: its `Fingerprint`; backbone: a sum over
    the frozen weights in hex."""

    scores: tuple[Score, ...]
    versions: dict[str, str]
    environment: dict[str, Any]
    rows: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""


@dataclass(frozen=True)
class Started:
    """The initial state is evaluated; training begins, or goes on, with round `round`.  folder: as people call it."""

    config: Config
    folder: str
    metrics: Mapping[str, float]
    target_bytes: int
    round: int = 0


@dataclass(frozen=True)
class PackDone:
    """One pack of a round is folded: what a live display shows."""

    round: int
    clients_done: int
    clients: int
    loss: float | None
    labels: int
    seconds: float
    uplink_bytes: int


@dataclass(frozen=True)
class RoundDone:
    """A round is over; all of it goes to the run folder.  scores: none where no evaluation was due; layers and
    client_layers: none where diagnostics did not look."""

    row: RoundRow
    client_rows: tuple[ClientRow, ...]
    scores: tuple[Score, ...] = ()
    packs: tuple[PackRow, ...] = ()
    layers: tuple[CohortLayer, ...] = ()
    client_layers: tuple[ClientLayer, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The finished run, as summary.json.  metrics: the scores over all held-out rows, `<metric>_before` training and
    `<metric>` after, which `evaluation/scores.py` defines; dense_bytes, dense_downlink_bytes:
    what the same clients would have sent and received with dense target weights, by the rule of
    `methods/downloads.py`; privacy: what was spent, see `accountant.account`; wall_seconds and
    peak_memory_bytes: of the last sitting; planned_memory_bytes: what `plan` gives for all processes of a run on one
    machine (None: a sweep's trial); resumed: the rounds with which earlier sittings were taken up again; precision: of
    the model that was judged, but for its target layers and head, which compute in float32; logits: how they follow
    from a language model's output layer (`models/logits.py`; None: they are the model's own, or a classifier's); rows:
    the task's `RowCounts`."""

    name: str
    method: str
    rounds: int
    weights_sha256: str
    uplink_bytes: int
    downlink_bytes: int
    dense_bytes: int
    change_rank: float | None
    wall_seconds: float
    train_seconds: float
    peak_memory_bytes: int
    metrics: dict[str, float]
    versions: dict[str, str]
    environment: dict[str, Any]
    dense_downlink_bytes: int = 0
    privacy: dict[str, Any] | None = None
    planned_memory_bytes: int | None = None
    resumed: tuple[int, ...] = ()
    precision: str = "float32"
    logits: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    folder: str = field(default="", compare=False)
