"""The configuration as records: every key with its meaning, its default and what is allowed.

Each default and each meaning lives here and nowhere else (a method's own fields have theirs in the method's file);
`rayfed-sub config` prints them.  Rules between keys are in `checks.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

Count = Annotated[int, Field(ge=1, strict=True)]
Batching = Literal["shuffled", "bucketed"]
Share = Annotated[float, Field(ge=0, lt=1)]
Names = str | tuple[str, ...]
Positive = Annotated[float, Field(gt=0)]
_BYTES = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        # pydantic's own pattern takes any word for a unit, and its end is open.
        {"type": "string", "pattern": r"^\s*\d*\.?\d+\s*([kKmMgGtTpPeE]([iI]?[bB]([iI][tT])?)?|[bB]([iI][tT])?)?\s*$"},
    ],
    "x-allowed": "a number of bytes, or text such as 500MB or 2GiB",
}
Bytes = Annotated[ByteSize, WithJsonSchema(_BYTES)]


Problem = Literal["classification", "regression", "multi-label"]
"""What a label is: one class of several, a number, or any of several labels at once."""

GIVEN = "given"
"""Name of rows (task.name) and of a model (model.path) that a Python call hands over: no file can."""


class Record(BaseModel):
    """A group of keys: unknown ones are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Record):
    """The model, and which of its layers are trained."""

    path: str = Field(
        default="smollm2-135m",
        description="Hub id, local folder, `package:NAME/FILE.gguf`, a preset of `rayfed-sub list models`, or "
        "`random`, which builds the architecture of model.random with seeded weights. Its type decides how a text task "
        "is learned: an encoder-decoder (T5, BART) reads the prompt and writes the answer; of a model that sees or "
        "hears as well the language model is trained, and the export is whole. In a run's folder `given` stands for "
        "the object of `run(model=...)`.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the frozen backbone; everything that is trained is float32."
    )
    quantize: Literal["none", "int8", "nf4", "stored"] = Field(
        default="none",
        description="Frozen weights of fewer bits, packed in shared memory and dequantised layer by layer: `int8`, a "
        "byte a number in linear layers and the tokens' embedding, or `nf4`, bitsandbytes' half byte in linear layers "
        "but the output layer, both rounded when the model is loaded; `stored`, as a checkpoint of bitsandbytes (int8, "
        "nf4, fp4) or a GGUF file (Q4_0, Q4_1, Q8_0) has them. `none`: weights of model.dtype; those that a file has "
        "quantised are dequantised when it is read, as a classification's head always is.",
    )
    targets: str = Field(
        default="lower-mlp",
        description="Trained layers: `lower-mlp`, in every block the projection to its MLP's inner size that is no "
        "gate, of each expert in mixtures, in classifiers without one the projections into state spaces or of "
        "attention, else all in the blocks; `attention`, the projections into and out of what mixes tokens; "
        "`all-linear`, all but the output layer and routers; `peft`, peft's defaults for the type; or a regular "
        "expression over names of modules and of experts' parameters (mlp.experts.gate_up_proj).",
    )
    start_from: str | None = Field(
        default=None,
        description="What training begins from besides the pretrained weights: an adapter of peft's (folder or hub "
        "id), or an earlier run (its folder, also in an object store; its final model). null: nothing. It is merged "
        "into the weights; every client downloads it before its first round. An adapter's classification head is read "
        "in the order of its model's classes where it names model.path as its model, else in the task's order.",
    )
    random: dict[str, Any] = Field(
        default={},
        description="Architecture for model.path=random: `type`, a model type of transformers, and keys of its "
        "configuration, e.g. {type: llama, hidden_size: 128}.",
    )

    @property
    def precision(self) -> str:
        """The type of the model that is evaluated, in words.

        >>> Model(quantize="nf4").precision, Model(dtype="bfloat16", quantize="stored").precision
        ('nf4-quantised float32', 'quantised bfloat16')
        """
        if self.quantize == "none":
            return self.dtype
        return f"{'' if self.quantize == 'stored' else f'{self.quantize}-'}quantised {self.dtype}"


class Task(Record):
    """The rows: source, prompt, answer or label, and splits. A table row becomes a prompt by `prompt` and either an
    `answer` column (language modelling) or a `label` column (classification, regression); or its `image` column goes
    with a `label`; or it is a chat, its column `messages`, or plain text, its column `text`."""

    name: Literal["python-docs", "medquad", "dolly-15k", "brain-tumor", "table", "given"] = Field(
        default="python-docs",
        description="A task of `rayfed-sub list tasks`, which knows its source, columns and prompt, or `table` for any "
        "source that `datasets` reads. In a run's folder `given` stands for the rows of `run(data=...)`.",
    )
    path: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Hub id, file (Parquet, JSONL, JSON, CSV, TSV, text), glob, or folder (of such files, of images by "
        "class, or of `save_to_disk`), in place of the task's own source; or a list of these. The names of a folder's "
        "files say their splits; files that are named here, or by a glob, are training rows whatever their names.",
    )
    train: Names | None = Field(
        default=None,
        description="Training rows: splits of task.path (of a hub's data set, or a folder) by name, or files, folders "
        "or globs; one or a list. null stands for `train`, or all rows where there are no splits.",
    )
    validation: Names | None = Field(
        default=None,
        description="Official validation rows, named as in train; null stands for `validation` where task.path has it, "
        "else for validation_share; [] for that share in any case.",
    )
    test: Names | None = Field(
        default=None,
        description="Official test rows, the held-out ones, named as in train; null stands for `test` where task.path "
        "has it, else for test_share; [] for that share in any case.",
    )
    split_column: str | None = Field(
        default=None, description="Column whose values are the names of the splits, in place of folders and files."
    )
    prompt: str | Annotated[tuple[str, ...], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="Format string over the columns, e.g. '{title}: {question}'; a row whose columns there are all "
        "empty is dropped. With a label also two of them, e.g. ['{premise}', '{hypothesis}']: a pair of texts in the "
        "tokenizer's own pair encoding, of which the longer text loses tokens first.",
    )
    answer: str | None = Field(default=None, description="Column with the text to learn.")
    label: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        default=None,
        description="Column with the class, with a number, or with a list of labels (their names, their numbers, or 0 "
        "and 1 for each); or a list of columns that hold 0 or 1, one for each label.",
    )
    problem: Problem | None = Field(
        default=None,
        description="classification: one class a row. regression: a number, squared error, one output. multi-label: "
        "any of several labels a row, binary cross-entropy. null: regression where all labels are numbers and some "
        "have a fraction, multi-label where they are lists or several columns, else classification, as for any "
        "column of datasets.ClassLabel.",
    )
    image: str | None = Field(default=None, description="Column with the image.")
    messages: str | None = Field(
        default=None,
        description="Column with a chat: a list of {role, content} or of {from, value}, or the JSON text of one. "
        "Learned is what the assistant says, in all turns; by an encoder-decoder, which needs a chat template for "
        "it, in the last.",
    )
    image_size: Count | None = Field(
        default=None, description="Side of the square image in pixels; null stands for the model's own."
    )
    text: str | None = Field(
        default=None,
        description="Column with plain text, for next-token training on all of it: each row's text between the "
        "tokenizer's first and last token, in chunks of max_length tokens, in which every token but the first is a "
        "label once. Not for encoder-decoders.",
    )
    max_length: int = Field(
        default=128,
        ge=8,
        description="Tokens of a row at most, prompt and answer together. Longer rows are cut in the columns' texts, "
        "then in the answer; longer chats after an earlier answer.",
    )
    max_rows: Count | None = Field(
        default=None,
        description="Training rows at most, with those that shares hold out, drawn by task.seed; null: all.",
    )
    test_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="Share of the training rows that nobody trains on, for the reported scores, where there is no "
        "official test split.",
    )
    validation_share: Share = Field(
        default=0.0,
        description="Share of the training rows that nobody trains on, for choosing settings "
        "(evaluation.split=validation), where there is no official validation split.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of the splits, of the evaluated rows and of those that max_rows leaves. The run's own seed "
        "has no part in them, so runs of all seeds are evaluated on the same rows.",
    )
    mask_prompt: bool = Field(
        default=True,
        description="true: the loss is over the answer alone, of a chat over all of the assistant's turns. Always so "
        "with encoder-decoders.",
    )

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of the label."""
        return () if self.label is None else (self.label,) if isinstance(self.label, str) else self.label

    @property
    def label_name(self) -> str | None:
        """The column of the label, or all of them, as one name."""
        return ", ".join(self.labels) or None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates: one, or those of a pair."""
        return () if self.prompt is None else (self.prompt,) if isinstance(self.prompt, str) else self.prompt


PartitionKind = Literal[
    "column", "files", "rows", "flwr", "dirichlet", "shards", "power-law", "iid", "resample", "pool"
]
BY_SOURCE = ("files", "rows", "flwr")
"""Kinds of partitions that name each row's client by its place in the source."""
BY_CLIENT = ("column", *BY_SOURCE)
"""Kinds of partitions that name each row's client; of more clients than federation.clients the largest are taken."""


class Partition(Record):
    """Partition of the training rows among the clients."""

    kind: PartitionKind = Field(
        default="column",
        description="column: one client per value of `column`, the largest values first. files: one client per file or "
        "folder below task.path, or for each name in `run(data=...)`. rows: the lists of row numbers in `file`. flwr: "
        "flwr-datasets' `partitioner` with `args`, over the source's own rows. dirichlet: shares over the values of "
        "`column` drawn from Dirichlet(alpha). shards: the rows sorted by `column` are cut into equal shards, of which "
        "every client draws `shards_per_client`. power-law: the i-th largest client has a share proportional to i ** "
        "-exponent, rows at random. iid: equal shares. resample: every client draws `rows_per_client` different rows "
        "of its own from all of them, so clients overlap and may outnumber the rows. pool: one client holds all.",
    )
    column: str | None = Field(
        default=None,
        description="Column that deals out the rows; null stands for the task's own. Labels that are numbers deal "
        "them out by ten quantile bins, several labels a row by the rarest of each row.",
    )
    file: str | None = Field(
        default=None,
        description="For kind=rows: JSON file with a list of training row numbers, from 0 in the source's order, for "
        "each client, or lists for train and test.",
    )
    partitioner: str | None = Field(
        default=None, description="For kind=flwr: class of flwr_datasets.partitioner, such as DirichletPartitioner."
    )
    args: dict[str, Any] = Field(
        default={},
        description="Arguments of `partitioner`, its seed too; federation.clients stands for num_partitions.",
    )
    alpha: Positive = Field(
        default=0.5, description="Concentration of the Dirichlet distribution; smaller is more skewed."
    )
    shards_per_client: Count = Field(default=2, description="Shards that every client draws with kind=shards.")
    exponent: float = Field(
        default=1.0, ge=0, description="Exponent of the sizes with kind=power-law; 0 makes them equal."
    )
    rows_per_client: Count | None = Field(
        default=None, description="Rows that every client draws, for kind=resample alone."
    )
    largest: Count | None = Field(
        default=None,
        description="Only the rows of so many values of `column`, the largest; null stands for all. With kind=column "
        "federation.clients says it.",
    )


class StepRange(Record):
    """Local steps from low to high, both included: clients of different speed."""

    low: Count = Field(description="Optimizer steps of the slowest client.")
    high: Count = Field(description="Optimizer steps of the fastest client.")


class Asynchronous(Record):
    """Rules of federation.mode=async, where federation.sampled is the number of clients in flight, a round is one
    step of the server, and a client that has finished is replaced at once. A client's staleness is the number of steps
    that the server has taken since it began."""

    rule: Literal["fedbuff", "fedasync"] = Field(
        default="fedbuff",
        description="fedbuff (arXiv 2106.06639): the server takes a step with the mean change of `buffer` clients. "
        "fedasync (arXiv 1903.03934): it moves by `mixing` towards every client's model as it comes; for methods that "
        "send values, not changes.",
    )
    buffer: Count | None = Field(default=None, description="FedBuff's K, which rule=fedbuff needs.")
    mixing: Annotated[float, Field(gt=0, le=1)] = Field(default=0.6, description="FedAsync's alpha.")
    exponent: float = Field(
        default=0.5,
        ge=0,
        description="a of the discount (1 + staleness) ** -a on a client's change, of FedAsync on mixing; 0.5 is "
        "FedBuff's.",
    )
    max_staleness: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        default=None, description="A client that is staler is called off, its bytes are wasted; null: no limit."
    )


class Federation(Record):
    """The clients, their rounds, and the work of a round."""

    clients: Count = Field(default=8, description="Clients in all.")
    sampled: Count | None = Field(default=None, description="Clients sampled per round; null stands for all.")
    rounds: Count | None = Field(
        default=None, description="Rounds of training; 3 where neither rounds nor epochs is set. Set one of the two."
    )
    epochs: Positive | None = Field(
        default=None, description="Passes over all training rows together, in place of rounds; resolved to rounds."
    )
    local_steps: Count | Annotated[tuple[Count, ...], Field(min_length=1)] | StepRange = Field(
        default=4,
        description="Optimizer steps between two averagings: a number; a list, of which client i has entry i modulo "
        "its length; or {low, high}, from which every client draws its own number once.",
    )
    batch_size: Count = Field(default=4, description="Rows of a local step.")
    batching: Batching = Field(
        default="shuffled",
        description="shuffled: batches are cut from a random permutation of a client's rows. bucketed: their rows have "
        "like length, the same step long or short for all clients: fewer passes where rows do not lie side by side, "
        "but the order is tied to lengths.",
    )
    partition: Partition = Partition()
    same_batches: bool = Field(
        default=False,
        description="Every round a client trains on the batches of its first one again, as FlowerTune's clients do, "
        "instead of going on in its rows.",
    )
    client_weighting: Literal["samples", "uniform"] = Field(
        default="samples", description="Weight of a client in the average: its training rows, or 1."
    )
    availability: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Chance that a sampled client takes part in the round."
    )
    proximal: float = Field(
        default=0.0, ge=0, description="FedProx's mu, the weight of the pull to where the round began; 0 turns it off."
    )
    normalise_steps: bool = Field(
        default=False,
        description="FedNova: a client's change is weighted by its steps, with SGD's momentum and proximal as in the "
        "paper. For optimizer.name=sgd alone.",
    )
    on_client_failure: Literal["stop", "skip"] = Field(
        default="stop",
        description="A client that fails twice in a round (a loss that is not finite, data that cannot be read) stops "
        "the run, or is skipped for the round at weight 0.",
    )
    mode: Literal["sync", "semi-sync", "async"] = Field(
        default="sync",
        description="sync: a round waits for its clients. semi-sync: they all train for local_seconds of simulated "
        "time, fast devices more steps than slow ones. async: see `asynchronous`. All but sync need devices.classes.",
    )
    round_deadline: Positive | None = Field(
        default=None,
        description="Simulated seconds after which a round counts the updates that have come; the others are wasted. "
        "null: none. It needs devices.classes.",
    )
    over_selection: Annotated[float, Field(ge=1)] = Field(
        default=1.0,
        description="Sampled clients times this are drawn for a round, which ends with the first `sampled` updates; "
        "the others are wasted. It needs devices.classes.",
    )
    local_seconds: Positive | None = Field(
        default=None,
        description="Simulated seconds that every client trains in a round of mode=semi-sync, in place of local_steps, "
        "which has no effect then; at least one step.",
    )
    asynchronous: Asynchronous = Asynchronous()

    @property
    def cohort(self) -> int:
        """Clients of a round, or in flight with mode=async; their mean number under Poisson sampling."""
        return self.sampled or self.clients

    @property
    def drawn(self) -> int:
        """Clients drawn for a round, those included that over_selection adds."""
        return min(self.clients, math.ceil(self.cohort * self.over_selection - 1e-9))  # rounding adds no client

    @property
    def updates(self) -> int:
        """Clients whose updates are awaited in a round: those drawn for it, or with mode=async the buffer's."""
        return (self.asynchronous.buffer or 1) if self.mode == "async" else self.drawn

    @model_validator(mode="before")
    @classmethod
    def _long_enough(cls, tree: Any) -> Any:
        """Three rounds where nothing is said of the length."""
        if isinstance(tree, Mapping) and tree.get("rounds") is None and tree.get("epochs") is None:
            return {**tree, "rounds": 3}
        return tree


class Optimizer(Record):
    """The clients' optimizer, and its learning rate over the rounds."""

    name: Literal["adamw", "sgd"] = Field(
        default="adamw",
        description="AdamW as galore-torch computes it (eps before bias correction, decay after the step), or SGD with "
        "momentum.",
    )
    lr: float = Field(default=1e-3, ge=0, description="Learning rate.")
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.999), description="AdamW's decay of the first and second moments."
    )
    eps: Positive = Field(default=1e-6, description="AdamW's constant beside the root of the second moment.")
    momentum: Share = Field(default=0.0, description="SGD's momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay, times lr in every step.")
    clip_norm: Positive | None = Field(
        default=None,
        description="Bound on the norm of a client's gradient over its trained tensors; null: no clipping.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Course of the learning rate over the rounds after the warm-up."
    )
    warmup_rounds: int = Field(default=0, ge=0, description="Rounds in which the learning rate grows linearly to lr.")
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Share of lr that linear and cosine schedules fall to."
    )


class Server(Record):
    """The server's optimizer, on a round's mean change d."""

    optimizer: Literal["plain", "momentum", "adam"] = Field(
        default="plain",
        description="plain adds lr * d; momentum adds lr * v with v = momentum * v + d (FedAvgM, arXiv 1909.06335); "
        "adam is FedAdam (arXiv 2003.00295), its v beginning at tau^2.",
    )
    lr: Positive = Field(default=1.0, description="The server's learning rate.")
    momentum: Share = Field(default=0.9, description="Momentum of server.optimizer=momentum.")
    betas: tuple[Share, Share] = Field(
        default=(0.9, 0.99), description="FedAdam's decay of the first and second moments."
    )
    tau: Positive = Field(default=1e-3, description="FedAdam's constant beside the root of the second moment.")


class Privacy(Record):
    """Differential privacy, on where clip is set. unit=client: central (DP-FedAvg, arXiv 1710.06963); every client's
    change is scaled down to L2 norm clip, Gaussian noise of standard deviation noise * clip goes onto the sum, clients
    are drawn by Poisson sampling, and the mean has the expected cohort as its denominator. unit=example: DP-SGD (arXiv
    1607.00133) at every client; in each local step its rows are drawn by Poisson sampling, every row's gradient is
    scaled down to norm clip, noise goes onto their sum, and the expected batch is the denominator. The noise comes from
    the run's seed, so that runs repeat: a deployment would draw it from a secret source."""

    unit: Literal["client", "example"] = Field(
        default="client",
        description="What is protected: that a client takes part at all, with all its rows, or each training row; with "
        "task.text a row is a chunk, not a document.",
    )
    clip: Positive | None = Field(
        default=None, description="L2 norm at most of a client's change, or of a row's gradient; null: no privacy."
    )
    noise: Positive | None = Field(
        default=None,
        description="Standard deviation of the noise in multiples of clip. Set noise or epsilon, not both.",
    )
    epsilon: Positive | None = Field(
        default=None, description="Budget of all rounds together, for which the noise is found."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5, description="Chance with which the guarantee of epsilon may fail."
    )

    @property
    def of_clients(self) -> bool:
        """Whether clients' changes are clipped, and the server's sum gets noise."""
        return self.clip is not None and self.unit == "client"

    @property
    def of_examples(self) -> bool:
        """Whether rows' gradients are clipped, and every local step gets noise."""
        return self.clip is not None and self.unit == "example"


class Device(Record):
    """A class of devices. Set seconds_per_step or tokens_per_second, not both."""

    preset: Literal["jetson-tx2", "jetson-xavier-nx", "a100", "h100"] | None = Field(
        default=None,
        description="Published device whose memory and power stand where they are not set here "
        "(clock/device_presets.py has them, and their source); null: none. Speeds depend on the model: measure them.",
    )
    seconds_per_step: Positive | None = Field(default=None, description="Simulated seconds of a local step.")
    tokens_per_second: Positive | None = Field(
        default=None,
        description="Tokens of its rows (images: their number) that a client trains on in a simulated second.",
    )
    up_mbit: Positive | None = Field(
        default=None, description="Uplink in Mbit/s (10**6 bits); null: uploads take no time but latency."
    )
    down_mbit: Positive | None = Field(
        default=None, description="Downlink in Mbit/s; null: downloads take no time but latency."
    )
    latency: float = Field(default=0.0, ge=0, description="Simulated seconds before a download and before an upload.")
    memory: Bytes | None = Field(
        default=None, description="Memory for training, by which the plan judges; null: not known."
    )
    power: Positive | None = Field(default=None, description="Watts while it trains; null: not known.")
    hours: tuple[tuple[Annotated[float, Field(ge=0, le=24)], Annotated[float, Field(ge=0, le=24)]], ...] = Field(
        default=(),
        description="Hours of the simulated day, which begins at 0, in which it is available: [[22, 6]] is at night. "
        "Work that they cut off is wasted. Empty: always.",
    )
    dropout: Share = Field(
        default=0.0,
        description="Chance that a client breaks off a round that it has begun, at a random moment of its download and "
        "training, which are wasted.",
    )


class Devices(Record):
    """Devices of the clients, and with them a virtual clock: what a run would take in hours, bytes and energy. Training
    itself does not change with federation.mode=sync, unless federation.round_deadline, federation.over_selection,
    hours or dropout are set."""

    classes: dict[str, Device] = Field(
        default={}, description="Classes of devices by name; empty: no clock. Each class has the keys of a device."
    )
    shares: dict[str, Positive] = Field(
        default={},
        description="Parts of the clients that have a device of each class, in any unit, one for every class; clients "
        "are dealt out at random. Empty: equal parts.",
    )
    trace: str | None = Field(
        default=None,
        description="CSV file with the columns client (number, or name of the client, such as the value of the "
        "partition's column) and device (a class), in place of shares. With the columns from and to, hours of the day, "
        "a client has a line for each time that it is available, in place of its class's hours.",
    )
    spread: float = Field(
        default=0.0,
        ge=0,
        description="Clients of a class differ in speed by a log-normal factor with this standard deviation of its "
        "logarithm; 0: they are alike.",
    )


class Evaluation(Record):
    """Evaluation of the global model, or of the clients' own, on rows that nobody trains on."""

    every: Count = Field(
        default=1, description="Rounds between evaluations; the first and the last state are always evaluated."
    )
    split: Literal["held-out", "validation"] = Field(
        default="held-out",
        description="Evaluated rows: held-out, those of task.test or its share, or, to choose settings by, those of "
        "task.validation or its share.",
    )
    eval_rows: Count = Field(default=256, description="Rows for loss, accuracy and F1 at most, drawn by task.seed.")
    generate_rows: int = Field(
        default=0,
        ge=0,
        description="Of these, rows that are answered greedily before and after training, for ROUGE-L and BLEU-4 as "
        "published and over the words of any script, and for answers.parquet.",
    )
    metrics: tuple[str, ...] = Field(
        default=(),
        description="More metrics: ids of evaluate.load, or paths of files with an evaluate.Metric, of the answers to "
        "generate_rows questions, or of classes.",
    )
    max_new_tokens: Count = Field(default=40, description="Tokens of a generated answer at most.")
    batch_size: Count = Field(default=16, description="Rows of an evaluation's forward pass.")


class Diagnostics(Record):
    """Diagnostics of training, which change no bits: ranks, drift and overlap of clients, the rank of the server's
    change, and how low-rank gradients are. The rank of a dense change that is no mean of factors (fedavg, weight decay,
    server momentum, noise) takes seconds a large layer and is computed in evaluated rounds alone. The coordinator's
    time and memory grow with layers and (clients * rank)^2, the tables with rounds, layers and clients: diagnose runs
    of thousands of rounds less often."""

    every: int = Field(default=1, ge=0, description="Rounds between diagnoses; 0: none. The last round has one too.")
    clients: Count = Field(default=8, description="Clients of a cohort at most, evenly spaced.")
    layers: Count = Field(default=32, description="Target layers at most, evenly spaced.")
    gradient_layers: int = Field(
        default=2,
        ge=0,
        description="Of these layers, those where one of four such clients has its gradients examined; 0: none.",
    )


class Resources(Record):
    """Processors, memory and time of a run."""

    workers: int = Field(
        default=2,
        ge=0,
        description="Processes that train and evaluate; each holds clients. 0: the process that asks does it all, "
        "without Ray, to debug a method or to run something small; the bits are the same.",
    )
    cpus_per_worker: Positive = Field(
        default=1.0, description="CPUs of a worker; torch has max(1, floor(cpus_per_worker)) threads."
    )
    gpus_per_worker: float = Field(default=0.0, ge=0, description="Share of one GPU that a worker has, at most 1.")
    pack_size: Count | Literal["auto"] = Field(
        default="auto",
        description="Clients that a worker trains side by side, at most. auto: a run begins with packs of 4, times "
        "larger and smaller ones as it goes on and keeps the quickest that memory has room for; always 4 where bits "
        "depend on packs.",
    )
    micro_batch: Count | None = Field(
        default=None,
        description="Rows of a client that go through the model at a time, at most; null: all of a local step. The "
        "gradient is that of the whole batch, to rounding, for less memory; a refresh sees all rows, and keeps the "
        "target layers' inputs and gradients of all of them until the last.",
    )
    activation_checkpointing: Literal["none", "blocks", "auto"] = Field(
        default="auto",
        description="Whether a model's blocks keep their activations for the way back (none), or their inputs alone "
        "and are computed twice (blocks): a third more time, a fraction of the memory, the same bits. auto: blocks on "
        "GPUs where the first pack would not fit otherwise, or that this machine does not have; else none.",
    )
    executor: Literal["pack", "reference"] = Field(
        default="pack",
        description="pack, or reference: one client at a time with peft and galore-torch; slow, the tests' oracle.",
    )
    deterministic: bool = Field(default=False, description="Deterministic algorithms on GPUs, which are slower.")
    state_memory: Bytes = Field(
        default=ByteSize(10**9),
        description="Memory for stored client states, in bytes or as text such as 2GB, before the longest unused lie "
        "on disk alone.",
    )
    deadline: Positive = Field(
        default=3600.0,
        description="Seconds that a pack, or a shard of an evaluation, may take before its worker is replaced and the "
        "work given to another.",
    )

    @property
    def first_pack(self) -> int:
        """Clients of a pack at most when a run begins."""
        return 4 if self.pack_size == "auto" else self.pack_size

    @property
    def forked(self) -> bool:
        """Whether the processes of a Ray of the run's own are forks of one that has imported the libraries: on Linux
        alone, as elsewhere libraries do not stand it, and without GPUs, whose libraries do not once they are used."""
        return bool(self.workers) and not self.gpus_per_worker and sys.platform == "linux"

    @property
    def trainers(self) -> int:
        """Processes that train: the workers, or the one that asks."""
        return max(1, self.workers)

    @property
    def threads(self) -> int:
        """torch's threads in a worker, and in the coordinator."""
        return max(1, int(self.cpus_per_worker))


EachRound = Literal[
    "held_out_loss",
    "perplexity",
    "token_accuracy",
    "accuracy",
    "macro_f1",
    "matthews",
    "pearson",
    "spearman",
    "mean_absolute_error",
    "micro_f1",
    "subset_accuracy",
]
"""Scores that every evaluation has, of tasks of one kind or another."""


class EarlyStopping(Record):
    """The best round, and the end of a run that no longer gains, by a score of the validation rows."""

    metric: EachRound | None = Field(
        default=None,
        description="Score with which the best round's checkpoint is kept besides the last one's; null: none is. It "
        "needs evaluation.split=validation.",
    )
    patience: Count | None = Field(
        default=None,
        description="Evaluations in a row without a gain after which the run stops; null: it takes all its rounds.",
    )
    min_gain: float = Field(
        default=0.0, ge=0, description="Smallest gain over the best score so far that counts for patience."
    )


class Checkpoint(Record):
    """Checkpoints, from which an ended run goes on."""

    every: int = Field(
        default=1, ge=0, description="Rounds between checkpoints; 0: only at the end, or when the run is interrupted."
    )


class Config(Record):
    """One run."""

    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of the run, and of its folder runs/NAME.",
    )
    seed: int = Field(
        default=0, ge=0, le=2**63 - 1, description="Seed of clients' rows, batches, initial factors and cohorts."
    )
    model: Model = Model()
    task: Task = Task()
    federation: Federation = Federation()
    devices: Devices = Devices()
    method: dict[str, Any] = Field(
        default={"name": "fedftg"},
        description="The federated method: its name (`rayfed-sub list methods`, or package.module:Class) and its own "
        "fields.",
    )
    hook: dict[str, Any] = Field(
        default={},
        description="A hook into the clients' steps: its name (`rayfed-sub list hooks`, or package.module:Class) and "
        "its own fields. Empty: none.",
    )
    optimizer: Optimizer = Optimizer()
    server: Server = Server()
    privacy: Privacy = Privacy()
    evaluation: Evaluation = Evaluation()
    diagnostics: Diagnostics = Diagnostics()
    resources: Resources = Resources()
    early_stopping: EarlyStopping = EarlyStopping()
    checkpoint: Checkpoint = Checkpoint()
    callbacks: tuple[str, ...] = Field(
        default=(),
        description="Functions (package.module:name) that are asked between rounds, and may stop the run or change its "
        "learning rate.",
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        default=(),
        description="Trackers of the run besides TensorBoard: Weights & Biases, MLflow. They must be installed, and "
        "are set up by their own environment variables, such as WANDB_PROJECT and MLFLOW_TRACKING_URI. Trials of a "
        "sweep have sweep.loggers instead.",
    )

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, method: Any) -> Any:
        """FedFTG where fields of a method stand without a name."""
        return {"name": "fedftg", **method} if isinstance(method, Mapping) and method else method

    @property
    def programs(self) -> dict[str, tuple[str, ...]]:
        """The programs that the configuration names besides its method, by key."""
        return {"evaluation.metrics": self.evaluation.metrics, "callbacks": self.callbacks}

    @property
    def method_in_words(self) -> str:
        """Names of the method and its hook, such as `ffa-lora with scaffold`."""
        hook = self.hook.get("name")
        return str(self.method["name"]) + ("" if hook is None else f" with {hook}")
