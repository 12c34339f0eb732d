"""The configuration as records: every key, what it means, its default and what is allowed.

Each default lives here and nowhere else (a method's own fields have theirs in the method's file).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]
Batching = Literal["shuffled", "bucketed"]


class Record(BaseModel):
    """A group of keys: unknown ones are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Record):
    """path: hub id, local folder, `package:NAME/FILE.gguf`, a preset of `rayfed-sub list models`, or `random`,
    which builds the architecture `random.type` from the other numbers in `random` with seeded weights.
    targets: `lower-mlp` (the architecture's preset) or a regular expression over module names."""

    path: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    targets: str = "lower-mlp"
    random: dict[str, Any] = {}


class Task(Record):
    """name: a task of `rayfed-sub list tasks`, which knows its source, columns and prompt; or `table` for any
    `datasets` source.  path: hub id, or a Parquet, JSONL or CSV file, in place of the task's own source. A table row
    becomes a prompt by `prompt` (a format string over column names) and either an `answer` column (language modelling)
    or a `label` column (classification); or its `image` column goes with a `label`. max_length: tokens of a row; longer
    ones are cut in the columns' texts, then in the answer (`data/tokenization.py`). image_size: pixels, the side of the
    square (None: the model's own).  held_out and validation: shares of all rows that nobody trains on;
    `evaluation.split` says which of the two is judged.  seed: draws these rows, those of them that are judged, and
    those that max_rows leaves; the run's own `seed` has no part in it, so runs of all seeds are judged on the same
    rows."""

    name: Literal["python-docs", "medquad", "dolly-15k", "brain-tumor", "table"] = "python-docs"
    path: str | None = None
    split: str = "train"
    prompt: str | None = None
    answer: str | None = None
    label: str | None = None
    image: str | None = None
    image_size: Count | None = None
    max_length: Annotated[int, Field(ge=8)] = 128
    max_rows: Count | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    mask_prompt: bool = True

    @model_validator(mode="after")
    def _some_left(self) -> Task:
        if self.held_out + self.validation >= 1:
            raise ValueError(f"validation|less than {1 - self.held_out:g}, what task.held_out leaves|e.g. 0.05")
        return self


class Partition(Record):
    """Partition of the rows.  column: one client per value of `column`, the largest values first.
    dirichlet: shares over the values of `column` drawn from Dirichlet(alpha).  shards: the rows sorted by `column` are
    cut into equal shards, of which every client draws `shards_per_client`.  power-law: the i-th largest client has a
    share proportional to i ** -exponent, rows at random.  iid: equal shares.
    resample: every client draws `rows_per_client` different rows of its own from all of them, so clients overlap and
    may outnumber the rows.  pool: one client holds all.  largest: only the rows of so many values of `column`, the
    largest; with kind=column that is the number of clients."""

    kind: Literal["column", "dirichlet", "shards", "power-law", "iid", "resample", "pool"] = "column"
    column: str | None = None
    alpha: Annotated[float, Field(gt=0)] = 0.5
    shards_per_client: Count = 2
    exponent: Annotated[float, Field(ge=0)] = 1.0
    rows_per_client: Count | None = None
    largest: Count | None = None

    @model_validator(mode="after")
    def _keyed(self) -> Partition:
        if self.kind == "column" and self.largest is not None:
            raise ValueError("largest|nothing with partition.kind=column, which has a value for each client|remove it")
        return self

    @model_validator(mode="after")
    def _resampled(self) -> Partition:
        if (self.kind == "resample") != (self.rows_per_client is not None):
            needed = "a number of rows with" if self.kind == "resample" else "nothing without"
            raise ValueError(f"rows_per_client|{needed} partition.kind=resample|e.g. 32 with kind=resample, else none")
        return self


class StepRange(Record):
    """Local steps from low to high, both included: clients of different speed."""

    low: Count
    high: Count

    @model_validator(mode="after")
    def _ordered(self) -> StepRange:
        if self.high < self.low:
            raise ValueError(f"high|{self.low} or more|raise it or lower low")
        return self


class Federation(Record):
    """clients in all, sampled per round (None: all); rounds, or epochs over all training rows.
    local_steps is the paper's T_agg, optimiser steps between two averagings: a number, a list (client i has entry
    i modulo its length), or {low, high}, from which every client draws its own once.
    batching: `shuffled` cuts a client's batches from a random permutation of its rows; `bucketed` makes them of rows of
    like length, the same step long or short for all clients, which pads less but makes the order depend on lengths.
    availability: the chance that a sampled client takes part.  proximal: FedProx's mu.  normalise_steps: FedNova, which
    weighs a client's change by its steps, with SGD's momentum and proximal as in its paper, for optimizer.name=sgd
    alone.  on_client_failure: a client that fails twice in a round (a loss that is not
    finite, data that cannot be read) stops the run, or is skipped for the round at weight 0."""

    clients: Count = 8
    sampled: Count | None = None
    rounds: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    local_steps: Count | Annotated[tuple[Count, ...], Field(min_length=1)] | StepRange = 4
    batch_size: Count = 4
    batching: Batching = "shuffled"
    partition: Partition = Partition()
    client_weighting: Literal["samples", "uniform"] = "samples"
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    proximal: Annotated[float, Field(ge=0)] = 0.0
    normalise_steps: bool = False
    on_client_failure: Literal["stop", "skip"] = "stop"

    @property
    def cohort(self) -> int:
        """Clients drawn for a round; their mean number under Poisson sampling."""
        return self.sampled or self.clients

    @model_validator(mode="before")
    @classmethod
    def _long_enough(cls, tree: Any) -> Any:
        """Three rounds where nothing is said of the length."""
        if isinstance(tree, Mapping) and tree.get("rounds") is None and tree.get("epochs") is None:
            return {**tree, "rounds": 3}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        if self.rounds is not None and self.epochs is not None:
            raise ValueError("rounds|one of rounds and epochs, not both|remove one of them")
        if self.sampled is not None and self.sampled > self.clients:
            raise ValueError(f"sampled|1 to federation.clients={self.clients}|lower it or raise federation.clients")
        if self.partition.kind == "pool" and self.clients != 1:
            raise ValueError("clients|1 with partition.kind=pool|set federation.clients=1")
        return self


class Optimizer(Record):
    """AdamW as galore-torch computes it (eps before bias correction, decay after the step) or SGD with momentum.
    clip_norm bounds each client's own gradient norm over its trained tensors (None: no clipping).
    schedule: the learning rate over rounds, after warmup_rounds of linear growth; it falls to lr * final_lr_ratio."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(ge=0)] = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class Server(Record):
    """Server optimizer, on a round's mean change d: `plain` adds lr * d, `momentum` lr * v with v = momentum v + d
    (FedAvgM, arXiv 1909.06335), `adam` is FedAdam (arXiv 2003.00295) with betas and tau, its v beginning at tau^2."""

    optimizer: Literal["plain", "momentum", "adam"] = "plain"
    lr: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    tau: Annotated[float, Field(gt=0)] = 1e-3


class Privacy(Record):
    """Central differential privacy (DP-FedAvg, arXiv 1710.06963), on where clip is set: every client's change is scaled
    down to L2 norm `clip`, Gaussian noise of standard deviation noise * clip goes onto the sum, clients are drawn by
    Poisson sampling, and the mean has the expected cohort as its denominator.  noise, or the epsilon that all rounds
    together may spend (`privacy/accountant.py`), for which the noise is found.  The noise comes from the run's seed, so
    that runs repeat: a deployment would draw it from a secret source."""

    clip: Annotated[float, Field(gt=0)] | None = None
    noise: Annotated[float, Field(gt=0)] | None = None
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @model_validator(mode="after")
    def _one_of_both(self) -> Privacy:
        if self.clip is None and (self.noise, self.epsilon) != (None, None):
            raise ValueError("clip|a number > 0 where privacy.noise or privacy.epsilon is set|e.g. privacy.clip=1.0")
        if self.clip is not None and (self.noise is None) == (self.epsilon is None):
            raise ValueError(
                "noise|one of privacy.noise and privacy.epsilon, not both|set one of them, e.g. privacy.noise=1.0"
            )
        return self


class Evaluation(Record):
    """every: rounds between held-out evaluations (the first and last state are always evaluated); split: which rows are
    judged, the held-out ones or, to choose settings by, the validation ones of `task.validation`. eval_rows: rows for
    loss, accuracy and F1, at most so many, drawn by `task.seed`; generate_rows: as many of these rows answered
    greedily, before and after, for ROUGE-L and BLEU-4, as published and over the words of any script."""

    every: Count = 1
    split: Literal["held-out", "validation"] = "held-out"
    eval_rows: Count = 256
    generate_rows: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Count = 40
    batch_size: Count = 16


class Diagnostics(Record):
    """Diagnostics of training: ranks, drift, overlap (`diagnostics/cohort.py`), the rank of the
    server's own change and how far it has come (`diagnostics/server_change.py`), and how low-rank gradients are
    (`diagnostics/gradients.py`).  It changes no bits.  every: rounds between looks (0: never; the last round is looked
    at as well); clients: of a cohort at most so many, evenly spaced; layers: of the target layers at most so many,
    evenly spaced; gradient_layers: of those, where one client of a pack has its gradients looked at (0: nowhere).  The
    rank of a dense change that is no mean of factors (fedavg, weight decay, server momentum, noise) takes seconds a
    large layer and is looked at in evaluated rounds alone. The coordinator's time and memory grow with layers and
    (clients * rank)^2, the tables with rounds, layers and
    clients: runs of thousands of rounds look less often."""

    every: Annotated[int, Field(ge=0)] = 1
    clients: Count = 8
    layers: Count = 32
    gradient_layers: Annotated[int, Field(ge=0)] = 2


class Resources(Record):
    """workers hold clients and train packs of pack_size side by side; torch threads = max(1, floor(cpus_per_worker)).
    executor: `pack`, or `reference` (one client at a time with peft and galore-torch; slow, the tests' oracle).
    state_memory: bytes, or text such as 2GB: what stored client states may take in memory before the longest unused
    lie on disk alone.  deadline: seconds that a pack, or a shard of an evaluation, may take before its worker is
    replaced and the work given to another."""

    workers: Count = 2
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    pack_size: Count = 4
    executor: Literal["pack", "reference"] = "pack"
    deterministic: bool = False
    state_memory: ByteSize = ByteSize(10**9)
    deadline: Annotated[float, Field(gt=0)] = 3600.0

    @property
    def threads(self) -> int:
        """torch's threads in a worker, and in the coordinator."""
        return max(1, int(self.cpus_per_worker))


class Checkpoint(Record):
    """every: rounds between checkpoints (0: only at the end, or when interrupted)."""

    every: Annotated[int, Field(ge=0)] = 1


class Config(Record):
    """One run.  `method` holds `name` and the method's own fields (`rayfed-sub list methods`)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    model: Model = Model()
    task: Task = Task()
    federation: Federation = Federation()
    method: dict[str, Any] = {"name": "fedftg"}
    optimizer: Optimizer = Optimizer()
    server: Server = Server()
    privacy: Privacy = Privacy()
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    resources: Resources = Resources()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _judged(self) -> Config:
        if self.evaluation.split == "validation" and not self.task.validation:
            raise ValueError(
                "evaluation.split|held-out where task.validation is 0|set a share, e.g. task.validation=0.05"
            )
        return self
