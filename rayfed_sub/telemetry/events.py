"""Events of a run for its listener, and its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayfed_sub.config.schema import Config
from rayfed_sub.core.schemas import (
    AnswerRow,
    ClientLayer,
    ClientRow,
    CohortLayer,
    PackRow,
    RoundRow,
    Score,
    TimelineRow,
)


@dataclass(frozen=True)
class Stage:
    """A stage before the first round."""

    text: str


@dataclass(frozen=True)
class Notice:
    """A message to keep on the screen, e.g. of an interruption or a resumed run."""

    text: str


@dataclass(frozen=True)
class Beginning:
    """Start of a run, for resuming: the initial model's scores, and the conditions besides the configuration that
    determine the bits.  rows: the task's `RowCounts`; data: its `Fingerprint`; backbone: checksum of the frozen weights
    in hex; code: digests of the caller's own code, by its name in the call of `run`; classes: names of the classes;
    problem: the kind of labels, "" of runs of older versions; start: digest of what model.start_from names."""

    scores: tuple[Score, ...]
    versions: dict[str, str]
    environment: dict[str, Any]
    rows: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    code: dict[str, str] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    start: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on, with round `round`; the initial model has been evaluated.  folder: as shown to
    people; problem: the kind of labels, "own" with a loss of the caller's own."""

    config: Config
    folder: str
    metrics: Mapping[str, float]
    target_bytes: int
    round: int = 0
    problem: str = "causal-lm"


@dataclass(frozen=True)
class PackDone:
    """A pack of a round has been accumulated: numbers for a live display."""

    round: int
    clients_done: int
    clients: int
    loss: float | None
    labels: int
    seconds: float
    uplink_bytes: int


@dataclass(frozen=True)
class RoundDone:
    """A round has finished; all of it goes to the run folder.  scores: empty where no evaluation was due; layers,
    client_layers: empty without diagnostics in the round; answers: of the last round, of the trained model; timeline:
    empty without devices."""

    row: RoundRow
    client_rows: tuple[ClientRow, ...]
    scores: tuple[Score, ...] = ()
    packs: tuple[PackRow, ...] = ()
    layers: tuple[CohortLayer, ...] = ()
    client_layers: tuple[ClientLayer, ...] = ()
    answers: tuple[AnswerRow, ...] = ()
    timeline: tuple[TimelineRow, ...] = ()


@dataclass(frozen=True)
class Answered:
    """The greedy answers of a run that has finished its rounds: of the initial model and of the trained one."""

    answers: tuple[AnswerRow, ...]


@dataclass(frozen=True)
class Progress:
    """A run between two rounds, as its callbacks see it.  finished: rounds so far; rounds: their rows; scores: finished
    rounds -> score -> value over all held-out rows, with the initial model's at 0; lr_factor: on the schedule's
    learning rate at present."""

    config: Config
    finished: int
    rounds: tuple[RoundRow, ...]
    scores: Mapping[int, Mapping[str, float]]
    lr_factor: float


@dataclass(frozen=True)
class Decision:
    """A callback's answer.  stop: the reason why no further round is to run; lr_factor: on the schedule's learning rate
    from the next round on, in place of the present one."""

    stop: str | None = None
    lr_factor: float | None = None


Callback = Callable[[Progress], Decision | None]
"""Function that is asked after every round but the last.  It sees all of the run so far, so it needs no memory of its
own; what it answers is recorded, and a round that runs again does not ask again."""


@dataclass(frozen=True)
class Decided:
    """What holds after so many finished rounds, as the run's log records it."""

    finished: int
    lr_factor: float
    stop: str | None = None


@dataclass(frozen=True)
class Summary:
    """The finished run, as summary.json.  metrics: the scores over all held-out rows, `<metric>_before` training and
    `<metric>` after, which `evaluation/scores.py` defines; dense_bytes, dense_downlink_bytes:
    traffic of the same clients in dense FedAvg, which trains target weights and head, by the rule of
    `methods/downloads.py`; privacy: the account, see `accountant.account`; wall_seconds and
    peak_memory_bytes: of the last session; planned_memory_bytes: of `plan`, for all processes of a run on one
    machine (None: a sweep's trial); gpu_memory: of each worker on a GPU, by node and process, the bytes that were
    `allocated` and `reserved` at most in the last session; planned_gpu_bytes: of `plan`, allocated by a worker;
    resumed: the rounds from which the run was resumed; precision: of the evaluated model, except for its target layers
    and head, which compute in float32; logits: how they follow from a language model's output layer
    (`models/logits.py`; None: they are the model's own, or a classifier's); rows: the task's `RowCounts`; split: the
    name of the split that the scores are on (None: of an older version); stopped: why the run ended before its last
    round; best: `round`, finished ones, and `value` of early_stopping's `metric` (None: no best checkpoint is kept);
    one_at_a_time: packs had one client, for nothing says how the model treats the rows of several; start_from: the
    `StartInfo` of what model.start_from names;
    simulated: what the run takes with its devices (`clock/accounts.py`; None: it has none)."""

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
    split: str | None = None
    stopped: str | None = None
    best: dict[str, Any] | None = None
    one_at_a_time: bool = False
    start_from: dict[str, Any] | None = None
    simulated: dict[str, Any] | None = None
    gpu_memory: dict[str, dict[str, int]] = field(default_factory=dict)
    planned_gpu_bytes: int | None = None
    folder: str = field(default="", compare=False)
