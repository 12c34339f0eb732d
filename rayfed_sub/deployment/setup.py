"""What the server and every node of a federation know before it begins: model, method and rule, from the configuration
alone; weights and rows follow where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ModelShape, ServerState
from rayfed_sub.data.dataset import Dataset, load_dataset, own_rows
from rayfed_sub.data.processors import Processor
from rayfed_sub.methods import adopted
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture, architecture
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import check_settings, model_kind, processor_of


@dataclass(frozen=True, eq=False)
class Setup:
    """config: resolved, with the number of rounds; problem: see `config.schema.Problem`; classes: names of a
    classification's classes, in their order."""

    config: Config
    method: Method
    architecture: Architecture
    processor: Processor
    problem: str
    classes: tuple[str, ...]

    @property
    def shape(self) -> ModelShape:
        return self.architecture.shape


def set_up(config: Config, classes: Sequence[str] = (), problem: str = "classification") -> Setup:
    """The setup of a configuration.  classes: names of the classes, for a language model none; problem: see
    `config.schema.Problem`.

    Raises UserError for settings that a federation cannot have (`check_deployable`), or that do not fit the model."""
    config, _ = adopted(config)
    check_deployable(config)
    method, kind = check_settings(config), model_kind(config)
    processor = processor_of(config, kind)
    known = (kind, tuple(classes), processor.vocabulary, processor.pad)
    found = architecture(config.model, *known, problem=problem)
    method.check(found.shape)
    return Setup(config, method, found, processor, problem, tuple(classes))


def run_config(values: Mapping[str, Any]) -> Config:
    """The configuration from flat keys, as a Flower app has them; texts are read as on rayfed-sub's command line.

    >>> run_config({"federation.clients": 4, "federation.local_steps": "[1, 2]"}).federation.local_steps
    (1, 2)
    """
    words = [f"{key}={value if isinstance(value, str) else _yaml(value)}" for key, value in values.items()]
    return load_config({}, words)


def _yaml(value: object) -> str:
    """A number or truth as YAML; repr of a float reads back as the same float."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def check_deployable(config: Config) -> None:
    """UserError naming the first setting that real machines cannot have."""
    simulated = "nothing in a federation of real machines"
    stopping, federation, resources = config.early_stopping, config.federation, config.resources
    refused: list[tuple[str, object, bool, str]] = [
        (
            "privacy.clip",
            config.privacy.clip,
            config.privacy.clip is not None,
            "the noise follows from a seed that all nodes know, and clients are drawn one by one by the coordinator",
        ),
        (
            "devices.classes",
            list(config.devices.classes),
            bool(config.devices.classes),
            "devices and their clock are virtual",
        ),
        ("federation.mode", federation.mode, federation.mode != "sync", "its rounds follow from the virtual clock"),
        ("resources.executor", resources.executor, resources.executor != "pack", "it is the judge of tests"),
        (
            "model.start_from",
            config.model.start_from,
            config.model.start_from is not None,
            "merge the adapter with peft, or export the run with `--format hf`, and set model.path to that folder",
        ),
        ("early_stopping.metric", stopping.metric, stopping.metric is not None, "the server has no rows to judge by"),
        ("callbacks", list(config.callbacks), bool(config.callbacks), "the server's strategy is where to add them"),
    ]
    for field, value, is_set, why in refused:
        if is_set:
            raise UserError(field, value, f"{simulated}: {why}", "remove it")
    for field in ("model.path", "task.name"):
        group, _, key = field.partition(".")
        if getattr(getattr(config, group), key) == "given":
            allowed = f"what a file or hub holds, {simulated.removeprefix('nothing ')}"
            raise UserError(field, "given", allowed, "save what the Python call hands over, and name it")


def pretrained(setup: Setup) -> dict[str, Tensor]:
    """The model's weights by name, as they were published, or drawn from the seed."""
    return load_weights(setup.config.model, setup.architecture, setup.config.seed)


def initial(setup: Setup, weights: Mapping[str, Tensor]) -> ServerState:
    """The server before round 0, which every node makes itself; weights: see `pretrained`."""
    shape = setup.shape
    targets = target_weights(shape, setup.architecture.transposed, weights)
    return setup.method.init_server(targets, shape, setup.config.seed)


def rows_of(setup: Setup, client: int, own: str | Path | None = None) -> Dataset:
    """The data set in which `rows_of(client)` are the client's rows.

    own: a file or folder of the node's own rows, in the columns of the task, which may lack some of its classes; None:
    the client's part of the task's rows, dealt out as in a simulation.  Raises UserError where they cannot be read or
    have other classes."""
    config = setup.config
    task, federation = config.task, config.federation
    if own is not None:
        task = task.model_copy(update={"path": str(own)})
        return own_rows(task, federation, setup.processor, setup.problem, setup.classes, client)
    dataset = load_dataset(task, federation, setup.processor, seed=config.seed, judged=config.evaluation.split)
    if dataset.class_names != setup.classes:
        allowed = f"rows of the classes {', '.join(setup.classes) or '(none)'}"
        advice = f"these have {', '.join(dataset.class_names) or 'none'}"
        raise UserError("rows", str(task.path or task.name), allowed, advice)
    return dataset
