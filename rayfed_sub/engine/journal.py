"""The records of what happens in a run: told to whoever listens, kept as rows in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfed_sub.analysis.diagnostics import ClientLayer, CohortLayer
from rayfed_sub.analysis.scores import Score
from rayfed_sub.config import Config


@dataclass(frozen=True)
class Stage:
    """What is going on before the first round."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Something out of the ordinary, worth a line that stays: an interruption, a run taken up again."""

    text: str


@dataclass(frozen=True)
class Beginning:
    """What a run that is taken up again has to know of its first sitting: the initial model's scores, and what the bits
    depend on besides the configuration.  rows: the task's `Census`; data: its `Fingerprint`; backbone: a sum over the
    frozen weights in hex."""

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
class RoundRow:
    """One round.  clients: sampled, those skipped among them; failed: skipped.  Bytes are wire bytes of the whole
    cohort; losses in nats per label, loss: the mean over clients that were not skipped; labels: tokens, or classified
    rows, that carried loss; change_rank: median over the target layers that diagnostics look at of the rank of the
    server's change (None: they did not look); epsilon: privacy spent up to here (None where no evaluation was due);
    retries: packs' results that were lost or unsound, and made again; memory_bytes: of coordinator and workers at the
    round's end; seconds include evaluation.
    """

    round: int
    clients: int
    failed: int
    loss: float | None
    held_out_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    labels: int
    change_rank: float | None
    epsilon: float | None
    train_seconds: float
    seconds: float
    retries: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class PackRow:
    """One pack's training: its number in the round, its clients and the first of them, which worker; began: Unix time
    when the worker set about it, seconds until the result was there; attempts, and what troubled those before the last.
    """

    round: int
    pack: int
    clients: int
    first: int
    worker: int
    began: float
    seconds: float
    attempts: int = 1
    trouble: str | None = None


@dataclass(frozen=True)
class ClientRow:
    """One client's round.  loss: mean over its local steps; loss_last: at its last step, before that step.  A client
    that was skipped has weight 0, sent nothing, and has its failure in words."""

    round: int
    client: int
    weight: float
    uplink_bytes: int
    downlink_bytes: int
    loss: float | None = None
    loss_last: float | None = None
    labels: float = 0.0
    steps: float = 0.0
    periods: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class ScoreRow:
    """A `Score` of the model after so many finished rounds."""

    rounds: int
    client: int | None
    metric: str
    value: float
    count: int


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
    `<metric>` after, which `analysis/scores.py` defines; dense_bytes, dense_downlink_bytes:
    what the same clients would have sent and received with dense target weights, by the rule of
    `methods/downloads.py`; privacy: what was spent, see `analysis/privacy.account`; wall_seconds and
    peak_memory_bytes: of the last sitting; planned_memory_bytes: what `plan` gives for all processes of a run on one
    machine (None: a sweep's trial); resumed: the rounds with which earlier sittings were taken up again; precision: of
    the model that was judged, but for its target layers and head, which compute in float32; logits: how they follow
    from a language model's output layer (`models/logits.py`; None: they are the model's own, or a classifier's); rows:
    the task's `Census`."""

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
