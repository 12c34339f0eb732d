"""Validation of configurations; every fault becomes one line with field, value, allowed values and advice.

`check` holds each key against its type; `check_rules` and `check_training` hold keys against each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache, reduce
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rayfed_sub.config.keys import in_words, resolved, schema_of
from rayfed_sub.config.schema import (
    BY_CLIENT,
    BY_SOURCE,
    GIVEN,
    Asynchronous,
    Config,
    Devices,
    Federation,
    Partition,
    Privacy,
    StepRange,
)
from rayfed_sub.core.errors import UserError

R = TypeVar("R")

RENAMED = {
    "evaluation.examples": "evaluation.eval_rows",
    "evaluation.generate": "evaluation.generate_rows",
    "evaluation.on": "evaluation.split",
    "federation.weights": "federation.client_weighting",
    "method.state": "method.optimizer_state",
    "optimizer.final": "optimizer.final_lr_ratio",
    "task.held_out": "task.test_share",
    "task.split": "task.train",
}
"""Keys of earlier versions, with the keys that replace them."""

NEEDS = (
    ("federation.partition.alpha", "federation.partition.kind", ("dirichlet",)),
    ("federation.partition.shards_per_client", "federation.partition.kind", ("shards",)),
    ("federation.partition.exponent", "federation.partition.kind", ("power-law",)),
    ("federation.round_deadline", "federation.mode", ("sync", "semi-sync")),
    ("federation.over_selection", "federation.mode", ("sync", "semi-sync")),
    ("federation.local_seconds", "federation.mode", ("semi-sync",)),
    *((f"federation.asynchronous.{name}", "federation.mode", ("async",)) for name in Asynchronous.model_fields),
    ("federation.asynchronous.buffer", "federation.asynchronous.rule", ("fedbuff",)),
    ("federation.asynchronous.mixing", "federation.asynchronous.rule", ("fedasync",)),
    ("optimizer.betas", "optimizer.name", ("adamw",)),
    ("optimizer.eps", "optimizer.name", ("adamw",)),
    ("optimizer.momentum", "optimizer.name", ("sgd",)),
    ("optimizer.final_lr_ratio", "optimizer.schedule", ("linear", "cosine")),
    ("server.momentum", "server.optimizer", ("momentum",)),
    ("server.betas", "server.optimizer", ("adam",)),
    ("server.tau", "server.optimizer", ("adam",)),
)
"""Keys that have an effect only with some values of another key: both, and these values."""


def check(cls: type[R], tree: Mapping[str, Any], prefix: str = "") -> R:
    """`tree` as a `cls` (a pydantic model or a dataclass), or a UserError for its first fault, named `prefix.field`.

    >>> from rayfed_sub.config.schema import Checkpoint
    >>> check(Checkpoint, {"every": -1}, "checkpoint")
    Traceback (most recent call last):
    rayfed_sub.core.errors.UserError: checkpoint.every: got -1; allowed: an integer >= 0; e.g. checkpoint.every=1
    """
    try:
        checked: R = _adapter(cls).validate_python(tree)  # type: ignore[arg-type]  # mypy: no type[R] is Hashable
    except ValidationError as error:
        raise _user_error(error.errors()[0], schema_of(cls), tree, prefix) from None
    return checked


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    """The validator of a class; making it takes longer than to use it."""
    return TypeAdapter(cls)


def unknown_key(path: str, value: object, keys: Sequence[str]) -> UserError:
    """Error for an unknown key; keys: those known in its section.

    >>> unknown_key("evaluation.examples", 64, ["every", "eval_rows"]).advice
    'set evaluation.eval_rows instead'
    """
    if RENAMED.get(path, "").rpartition(".")[2] in keys:
        return renamed_key(path, value)
    near = get_close_matches(path.rpartition(".")[2], keys, n=1)
    advice = f"did you mean {near[0]}?" if near else "remove it"
    return UserError(path, value, f"these keys here: {', '.join(keys)}", advice)


def renamed_key(path: str, value: object) -> UserError:
    """Error for a key of `RENAMED`."""
    return UserError(path, value, f"{RENAMED[path]}, which replaces it", f"set {RENAMED[path]} instead")


def check_rules(config: Config) -> None:
    """UserError for keys that contradict each other."""
    _check_effects(config)
    _check_method(config)
    _check_rows(config)
    _check_partition(config.federation)
    _check_rounds(config.federation)
    _check_budget(config.privacy)
    _check_stopping(config)
    _check_devices(config.devices)
    _check_mode(config)


def _check_effects(config: Config) -> None:
    """UserError for a key that is set and has no effect."""
    for path, selector, values in NEEDS:
        prefix, _, name = path.rpartition(".")
        section: Any = reduce(getattr, prefix.split("."), config)
        value, default = getattr(section, name), type(section).model_fields[name].default
        chosen: Any = reduce(getattr, selector.split("."), config)
        if value != default and chosen not in values:
            allowed = f"{json.dumps(default)}, for it is of {selector}={' and '.join(values)} alone"
            raise UserError(path, value, allowed, f"set {selector}={values[0]}, or {path}={json.dumps(default)}")


def check_training(config: Config) -> None:
    """UserError for keys of the training that contradict each other with any method: limits of the reference executor,
    assumptions of the accountant of `privacy`, and conditions of FedNova."""
    _check_reference(config)
    _check_privacy(config)
    _check_nova(config)


def _check_method(config: Config) -> None:
    """UserError for `centralized`, a method of earlier versions, with the keys that replace it."""
    federation, partition = config.federation, config.federation.partition
    if config.method.get("name") != "centralized":
        return
    keys = ["method.name=fedftg", "federation.clients=1", "federation.sampled=null", "federation.partition.kind=pool"]
    if partition.kind == "column":  # the rows of as many values as there are clients
        keys.append(f"federation.partition.largest={federation.clients}")
    if partition.rows_per_client is not None:
        keys.append("federation.partition.rows_per_client=null")
    defaults = {name: Partition.model_fields[name].default for name in ("alpha", "shards_per_client", "exponent")}
    keys += [f"federation.partition.{name}={x}" for name, x in defaults.items() if getattr(partition, name) != x]
    allowed = "a method; all rows at one client are a matter of the partition"
    raise UserError("method.name", "centralized", allowed, f"set {' '.join(keys)}")


def _check_rows(config: Config) -> None:
    task = config.task
    if task.test_share + task.validation_share >= 1:
        allowed = f"less than {1 - task.test_share:g}, what task.test_share leaves"
        raise UserError("task.validation_share", task.validation_share, allowed, "e.g. task.validation_share=0.05")
    # Whether a source has official validation rows is known once it is read.
    known = task.validation_share or task.validation or task.path or task.name == GIVEN
    if config.evaluation.split == "validation" and not known:
        raise no_validation()


def no_validation() -> UserError:
    """Error for an evaluation of validation rows where there are none."""
    allowed = "held-out without validation rows: task.validation names none, task.validation_share is 0"
    return UserError("evaluation.split", "validation", allowed, "set a share, e.g. task.validation_share=0.05")


def not_given(field: str) -> UserError:
    """Error for a configuration that names an object of a Python call, where there is none; field: task.name or
    model.path."""
    argument = {"task.name": "data", "model.path": "model"}[field]
    allowed = f"anything but {GIVEN}, which stands for an object that only the call of run() in Python knows"
    return UserError(field, GIVEN, allowed, f"call rayfed_sub.run(config, {argument}=...) again in Python")


def _check_partition(federation: Federation) -> None:
    partition, prefix = federation.partition, "federation.partition"
    if partition.kind in BY_CLIENT and partition.largest is not None:
        allowed = f"nothing with partition.kind={partition.kind}, which has a value for each client"
        raise UserError(f"{prefix}.largest", partition.largest, allowed, "remove it")
    if (partition.kind == "resample") != (partition.rows_per_client is not None):
        needed = "a number of rows with" if partition.kind == "resample" else "nothing without"
        allowed, advice = f"{needed} partition.kind=resample", "e.g. 32 with kind=resample, else none"
        raise UserError(f"{prefix}.rows_per_client", partition.rows_per_client, allowed, advice)
    for name, kind in {"file": "rows", "partitioner": "flwr"}.items():
        value = getattr(partition, name)
        if (partition.kind == kind) != (value is not None):
            needed = "a value with" if partition.kind == kind else "nothing without"
            raise UserError(
                f"{prefix}.{name}", value, f"{needed} partition.kind={kind}", f"set or remove {prefix}.{name}"
            )
    if partition.kind in BY_SOURCE and partition.column is not None:
        allowed = f"nothing with partition.kind={partition.kind}, which deals out the rows by itself"
        raise UserError(f"{prefix}.column", partition.column, allowed, "remove it")
    if partition.args and partition.kind != "flwr":
        raise UserError(f"{prefix}.args", partition.args, "nothing without partition.kind=flwr", "remove it")
    if partition.kind == "pool" and federation.clients != 1:
        allowed = "1 with partition.kind=pool"
        raise UserError("federation.clients", federation.clients, allowed, "set federation.clients=1")


def _check_rounds(federation: Federation) -> None:
    steps, clients, sampled = federation.local_steps, federation.clients, federation.sampled
    if isinstance(steps, StepRange) and steps.high < steps.low:
        raise UserError("federation.local_steps.high", steps.high, f"{steps.low} or more", "raise it or lower low")
    if federation.rounds is not None and federation.epochs is not None:
        allowed = "one of rounds and epochs, not both"
        raise UserError("federation.rounds", federation.rounds, allowed, "remove one of them")
    if federation.epochs is not None and federation.same_batches:
        allowed = "null with federation.same_batches, by which clients do not go through all of their rows"
        raise UserError("federation.epochs", federation.epochs, allowed, "set federation.rounds instead")
    if sampled is not None and sampled > clients:
        allowed = f"1 to federation.clients={clients}"
        raise UserError("federation.sampled", sampled, allowed, "lower it or raise federation.clients")


def _check_stopping(config: Config) -> None:
    stopping, prefix = config.early_stopping, "early_stopping"
    if stopping.metric is None:
        for field, unset in {"patience": None, "min_gain": 0.0}.items():
            if (value := getattr(stopping, field)) != unset:
                allowed = f"nothing without {prefix}.metric, the score to look at"
                raise UserError(f"{prefix}.{field}", value, allowed, f"e.g. {prefix}.metric=held_out_loss")
    elif config.evaluation.split != "validation":
        allowed = f"null with evaluation.split={config.evaluation.split}, whose rows would choose the round"
        advice = "set evaluation.split=validation and, where there are no such rows, task.validation_share=0.1"
        raise UserError(f"{prefix}.metric", stopping.metric, allowed, advice)
    if stopping.patience is None and stopping.min_gain:
        allowed = f"0 without {prefix}.patience, for the best round is that of the best score"
        raise UserError(f"{prefix}.min_gain", stopping.min_gain, allowed, f"e.g. {prefix}.patience=3")


def no_time(begin: float, end: float) -> bool:
    """Whether a window of the day from hour to hour has no length: 0 and 24 are one moment.

    >>> no_time(24, 0), no_time(0, 24)
    (True, False)
    """
    return begin % 24 == end % 24 and (begin, end) != (0, 24)


def _check_devices(devices: Devices) -> None:
    for name, device in devices.classes.items():
        prefix = f"devices.classes.{name}"
        if (device.seconds_per_step is None) == (device.tokens_per_second is None):
            allowed = "one of seconds_per_step and tokens_per_second, not both"
            advice = f"set one of them, e.g. {prefix}.seconds_per_step=1.0"
            raise UserError(f"{prefix}.seconds_per_step", device.seconds_per_step, allowed, advice)
        for begin, end in device.hours:
            if no_time(begin, end):
                allowed = "pairs of hours that differ; none at all for a device that is always available"
                raise UserError(f"{prefix}.hours", [list(pair) for pair in device.hours], allowed, "remove the pair")
    if unknown := [name for name in devices.shares if name not in devices.classes]:
        allowed = f"shares of devices.classes: {', '.join(devices.classes) or 'none'}"
        raise UserError(f"devices.shares.{unknown[0]}", devices.shares[unknown[0]], allowed, "add the class")
    if devices.shares and (left_out := [name for name in devices.classes if name not in devices.shares]):
        allowed = f"a share for each of devices.classes; {', '.join(left_out)} would have no clients"
        advice = f"e.g. devices.shares.{left_out[0]}=1, or remove the class"
        raise UserError("devices.shares", dict(devices.shares), allowed, advice)
    if devices.trace is not None and devices.shares:
        allowed = "nothing with devices.trace, which names each client's device"
        raise UserError("devices.shares", dict(devices.shares), allowed, "remove one of them")
    for field, value in (("trace", devices.trace), ("spread", devices.spread or None)):
        if value is not None and not devices.classes:
            allowed = "nothing without devices.classes, which it is about"
            raise UserError(f"devices.{field}", value, allowed, "add the classes")


def _check_mode(config: Config) -> None:
    """Settings of the simulated time and of the way in which rounds end."""
    federation = config.federation
    mode, timed = federation.mode, bool(config.devices.classes)
    clocked = {
        "mode": (mode, mode != "sync"),
        "round_deadline": (federation.round_deadline, federation.round_deadline is not None),
        "over_selection": (federation.over_selection, federation.over_selection != 1.0),
    }
    for field, (value, used) in clocked.items():
        if used and not timed:
            allowed = "nothing else than the default without devices.classes, which give the time"
            raise UserError(f"federation.{field}", value, allowed, "add devices.classes")
    if clocked["over_selection"][1] and federation.drawn == federation.cohort:
        allowed = f"what adds a client to the {federation.cohort} of a round, of {federation.clients} in all"
        advice = "lower federation.sampled or raise federation.over_selection"
        raise UserError("federation.over_selection", federation.over_selection, allowed, advice)
    if mode == "semi-sync" and federation.local_seconds is None:
        allowed = "a number of seconds with federation.mode=semi-sync"
        raise UserError("federation.local_seconds", None, allowed, "e.g. federation.local_seconds=60")
    if mode == "async":
        _check_asynchronous(config)


def _check_asynchronous(config: Config) -> None:
    federation, rule, prefix = config.federation, config.federation.asynchronous, "federation.asynchronous"
    if rule.rule == "fedbuff":
        most = federation.clients
        if rule.buffer is None or rule.buffer > most:
            allowed = f"1 to federation.clients={most} with rule=fedbuff"
            raise UserError(f"{prefix}.buffer", rule.buffer, allowed, f"e.g. {prefix}.buffer={max(1, most // 2)}")
    if federation.availability != 1.0:
        allowed = "1.0 with federation.mode=async; a device's hours say when it is available"
        raise UserError("federation.availability", federation.availability, allowed, "remove it")
    if federation.normalise_steps:
        allowed = "false with federation.mode=async: FedNova's rule is for the cohort of a round"
        raise UserError("federation.normalise_steps", True, allowed, "remove it")
    if federation.epochs is not None:
        allowed = "null with federation.mode=async, whose rounds are steps of the server"
        raise UserError("federation.epochs", federation.epochs, allowed, "set federation.rounds instead")
    if config.privacy.clip is not None:
        allowed = f"nothing with federation.mode=async: {clock_reason(config.privacy)}"
        raise UserError("privacy.clip", config.privacy.clip, allowed, "remove one of them")
    if config.hook:
        allowed = "nothing with federation.mode=async: a hook's tensors are those of a round"
        raise UserError("hook.name", config.hook.get("name"), allowed, "remove one of them")


def clock_reason(privacy: Privacy) -> str:
    """Why clients whom the clock chooses do not fit the accountant."""
    if privacy.of_examples:
        return "the accountant counts each client's steps in cohorts that are drawn whatever the time"
    return "the accountant assumes that every client is drawn by itself, with the same chance in every round"


def _check_budget(privacy: Privacy) -> None:
    if privacy.clip is None and privacy.unit != "client":
        allowed = "a number > 0 with privacy.unit=example"
        raise UserError("privacy.clip", None, allowed, "e.g. privacy.clip=1.0")
    if privacy.clip is None and (privacy.noise, privacy.epsilon) != (None, None):
        allowed = "a number > 0 where privacy.noise or privacy.epsilon is set"
        raise UserError("privacy.clip", None, allowed, "e.g. privacy.clip=1.0")
    if privacy.clip is not None and (privacy.noise is None) == (privacy.epsilon is None):
        allowed, advice = (
            "one of privacy.noise and privacy.epsilon, not both",
            "set one of them, e.g. privacy.noise=1.0",
        )
        raise UserError("privacy.noise", privacy.noise, allowed, advice)


def _check_reference(config: Config) -> None:
    resources, proximal = config.resources, config.federation.proximal
    if resources.executor != "reference":
        return
    if proximal:
        raise UserError("federation.proximal", proximal, "0 with resources.executor=reference", "remove it")
    if config.privacy.of_examples:
        allowed = "pack with privacy.unit=example, for the reference's libraries give no gradients of single rows"
        raise UserError("resources.executor", "reference", allowed, "remove it")
    if resources.gpus_per_worker:
        advice = "the reference executor runs on CPUs"
        raise UserError("resources.executor", "reference", "pack where gpus_per_worker > 0", advice)
    if resources.micro_batch is not None:
        allowed = "null with resources.executor=reference, which takes whole batches"
        raise UserError("resources.micro_batch", resources.micro_batch, allowed, "remove it")
    if resources.activation_checkpointing == "blocks":
        allowed = "none or auto with resources.executor=reference, which keeps activations"
        raise UserError("resources.activation_checkpointing", "blocks", allowed, "remove it")


def _check_nova(config: Config) -> None:
    """FedNova normalises a weighted sum of a round's gradients, with weights that are not negative."""
    optimizer, mu = config.optimizer, config.federation.proximal
    if not config.federation.normalise_steps:
        return
    if optimizer.name != "sgd":
        allowed = f"false with optimizer.name={optimizer.name}: FedNova's rule is for SGD"
        advice = "remove it or set optimizer.name=sgd with a learning rate for it"
        raise UserError("federation.normalise_steps", True, allowed, advice)
    if optimizer.weight_decay:
        allowed = "0 with federation.normalise_steps, whose rule knows no decay"
        raise UserError("optimizer.weight_decay", optimizer.weight_decay, allowed, "set optimizer.weight_decay=0")
    if mu * optimizer.lr >= 1:
        allowed = f"less than {1 / optimizer.lr:g}, 1 / optimizer.lr, with federation.normalise_steps"
        raise UserError("federation.proximal", mu, allowed, "lower it")


def _check_privacy(config: Config) -> None:
    """The accountant's assumptions: see `privacy/mechanism.py` and `privacy/examples.py`."""
    kind = config.federation.partition.kind
    if config.privacy.of_examples and kind == "resample":
        allowed = "a kind that gives each row to one client with privacy.unit=example, whose epsilon is one client's"
        raise UserError("federation.partition.kind", kind, allowed, "e.g. iid, without rows_per_client")
    assumed: dict[str, tuple[Any, str]] = {}
    if config.privacy.of_clients:
        assumed = {
            "client_weighting": ("uniform", "every client counts the same"),
            "availability": (1.0, "every client is drawn by itself, whatever the others do"),
            "normalise_steps": (False, "the denominator is fixed"),
        }
    if config.privacy.of_examples:
        assumed = {
            "batching": ("shuffled", "every row is drawn by itself, whatever its length"),
            "same_batches": (False, "every step draws its rows anew"),
        }
    if config.privacy.clip is not None:
        why = (
            "the steps of a client that is dropped draw the same noise again in its next round"
            if config.privacy.of_examples
            else "who is counted must not depend on updates"
        )
        assumed |= {"round_deadline": (None, why), "over_selection": (1.0, why)}
    for field, (value, why) in assumed.items():
        if getattr(config.federation, field) != value:
            shown = "null" if value is None else str(value).lower()
            key, allowed = f"federation.{field}", f"{shown} with privacy.clip: {why}"
            raise UserError(key, getattr(config.federation, field), allowed, f"set {key}={shown}")


def _user_error(fault: ErrorDetails, schema: Mapping[str, Any], tree: object, prefix: str) -> UserError:
    """A pydantic error as one line; schema: the JSON schema for `tree`."""
    place, path = resolved(schema, schema), prefix
    of_key = fault["loc"][-1:] == ("[key]",)  # of a mapping
    for part in fault["loc"][:-2] if of_key else fault["loc"]:
        path = f"{path}.{part}" if path else str(part)
        if fault["type"] in ("extra_forbidden", "invalid_key") and part not in place.get("properties", {part: 0}):
            return unknown_key(path, fault["input"], list(place["properties"]))
        place = resolved(place["properties"][part] if "properties" in place else _values(place), schema)
        tree = tree.get(part) if isinstance(tree, Mapping) else tree
        inner = resolved(_values(place), schema)
        if "properties" not in place and "properties" not in inner:  # a fault in a list is reported with the list
            break
    words = in_words(place, schema)
    if fault["type"] == "finite_number":
        words = words.replace("a number", "a finite number")
    if path == "task.validation" and isinstance(tree, float):  # of earlier versions
        allowed = "names of splits or files; a share is task.validation_share"
        return UserError(path, tree, allowed, f"set task.validation_share={tree} instead")
    advice = f"e.g. {path}={place['default']}" if place.get("default") not in (None, {}) else f"change {path}"
    if isinstance(tree, str) and (key := _key_of(tree, path, place, schema)):
        advice = f"set {path}.{key}={tree}"
    if of_key:  # YAML takes 5 and yes for no text
        advice = f"put the key in quotes: {path}='{{\"{fault['input']}\": ...}}'"
    elif (
        fault["type"] == "string_type" and tree is not None and not isinstance(tree, list | tuple)
    ):  # YAML takes 5, yes and {column} for no text
        advice = f"put it in quotes, and on the command line those in quotes: {path}='\"...\"'"
    return UserError(path, tree, words, advice)


def _values(place: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the values of a mapping with any keys; empty for anything else."""
    values = place.get("additionalProperties")
    return values if isinstance(values, Mapping) else {}


def _key_of(word: str, path: str, place: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """The key of a group that a word in the group's own place was meant for, if any: one that allows the word, else
    the one that names the thing."""
    if path in ("method", "hook", "model.random"):  # whose keys depend on this one
        return "type" if path == "model.random" else "name"
    keys = {key: resolved(part, schema) for key, part in place.get("properties", {}).items()}
    allowing = [key for key, part in keys.items() if word in part.get("enum", ())]
    naming = [key for key in ("path", "kind", "name") if key in keys]
    return next(iter([*allowing, *naming]), None)
