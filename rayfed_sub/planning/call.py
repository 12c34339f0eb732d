"""What a Python call hands over in place of what a configuration names: rows, a model, a method, a hook, callbacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, cast

from rayfed_sub.config.checks import check
from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.digests import digest, module_digest
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.given import GivenRows, given_rows
from rayfed_sub.methods import HOOKS, METHODS
from rayfed_sub.methods.hooks import LocalHook
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.own_architecture import own_dtype
from rayfed_sub.models.own_model import OwnModel

_COLUMNS = ("prompt", "answer", "label", "image", "messages", "text")
_SOURCES = ("path", "train", "validation", "test", "split_column")


@dataclass(frozen=True, eq=False)
class Given:
    """Objects of a Python call, each in place of what the configuration names; None: as the configuration says.
    callbacks: besides those that it names."""

    rows: GivenRows | None = None
    model: OwnModel | None = None
    method: Method | None = None
    hook: LocalHook | None = None
    callbacks: tuple[Callable[..., Any], ...] = ()

    @property
    def has_any(self) -> bool:
        """Whether the call has handed over anything."""
        return bool(self.callbacks) or any(x is not None for x in (self.rows, self.model, self.method, self.hook))


NOTHING = Given()


def given(
    data: Any = None,
    validation: Any = None,
    test: Any = None,
    model: Any = None,
    method: Any = None,
    hooks: Any = None,
) -> Given:
    """The arguments of `run`, checked by themselves.  Raises UserError naming the argument."""
    if data is None and (validation is not None or test is not None):
        field = "validation" if validation is not None else "test"
        raise UserError(field, "rows", "nothing without data, the clients' training rows", "give data as well")
    if model is not None:
        _check_model(model)
    if method is not None:
        _check_object("method", method, "start_client", "rayfed_sub/methods/README.md")
    several = list(hooks) if isinstance(hooks, list | tuple) else [] if hooks is None else [hooks]
    if len(several) > 1:
        raise UserError("hooks", f"{len(several)} hooks", "one hook", "write one that does what they do")
    for hook in several:
        _check_object("hooks", hook, "correct", "rayfed_sub/methods/README.md")
    rows = None if data is None else given_rows(data, validation, test)
    return Given(rows, model, method, next(iter(several), None))


def named(config: Config, objects: Given) -> Config:
    """The configuration with `given` in place of what the call hands over, as it stands in the run folder.

    A mapping of rows is the partition: federation.clients is their number.  Raises UserError for keys that say
    something else than the objects.
    """
    tree: dict[str, Any] = {}
    if objects.rows is not None:
        _check_task(config)
        partition = config.federation.partition.model_copy(update={"kind": "files"})
        clients = len(objects.rows.clients)
        tree["task"] = config.task.model_copy(update={"name": GIVEN})
        tree["federation"] = config.federation.model_copy(update={"partition": partition, "clients": clients})
    if objects.model is not None:
        if objects.model.loss is not None:
            _check_own(config, objects)
        if config.model.quantize != "none":
            allowed = "none with a model that the call hands over"
            raise UserError(
                "model.quantize", config.model.quantize, allowed, "remove it, or name the model in model.path"
            )
        dtype = own_dtype(objects.model)
        tree["model"] = config.model.model_copy(update={"path": GIVEN, "dtype": dtype, "random": {}})
    if objects.method is not None:
        tree["method"] = {"name": name_of(objects.method, METHODS), **asdict(cast(Any, objects.method))}
    if objects.hook is not None:
        tree["hook"] = {"name": name_of(objects.hook, HOOKS), **asdict(cast(Any, objects.hook))}
    return config.model_copy(update=tree)


def code_digests(objects: Given) -> dict[str, str]:
    """A digest of the code and the settings of each object that brings some, by the argument's name; rows and weights
    have digests of their own."""
    found: dict[str, bytes] = {}
    if (model := objects.model) is not None:
        found["model"] = module_digest(model.module)
        functions = {"loss": model.loss, "batch": model.batch, "measure": model.measure}
        found |= {name: digest(function) for name, function in functions.items() if function is not None}
    if objects.method is not None and name_of(objects.method, METHODS) not in METHODS:
        found["method"] = digest(type(objects.method))
    if objects.hook is not None and name_of(objects.hook, HOOKS) not in HOOKS:
        found["hooks"] = digest(type(objects.hook))
    if objects.callbacks:
        found["callbacks"] = digest(objects.callbacks)
    return {name: value.hex() for name, value in found.items()}


def name_of(value: object, table: Mapping[str, str]) -> str:
    """The name by which `methods.build` or `build_hook` finds the object's class: of the table, or
    package.module:Class."""
    path = f"{type(value).__module__}:{type(value).__qualname__}"
    return next((name for name, place in table.items() if place == path), path)


def _check_model(model: Any) -> None:
    if not isinstance(model, OwnModel):
        allowed = "OwnModel(module, tokenizer=...) or OwnModel(module, loss=..., batch=...)"
        raise UserError("model", type(model).__qualname__, allowed, "from rayfed_sub import OwnModel")
    if (model.tokenizer is None) == (model.loss is None):
        given = "both" if model.loss is not None else "neither"
        raise UserError("model", given, "OwnModel with one of tokenizer and loss", "give the one that reads the rows")
    for name in ("loss", "batch", "measure"):
        function = getattr(model, name)
        if function is not None and model.loss is None:
            raise UserError(name, _shown(function), "nothing without loss", "give a loss, or leave it out")
        if function is not None and not callable(function):
            raise UserError(name, type(function).__qualname__, "a function", "see rayfed_sub.OwnModel")


def _check_object(field: str, value: Any, function: str, page: str) -> None:
    """UserError for an object without a function of its protocol, or with fields that no configuration holds."""
    kind = type(value)
    if isinstance(value, type) or not is_dataclass(value) or not hasattr(value, function):
        shown = value.__qualname__ if isinstance(value, type) else kind.__qualname__
        allowed = f"an instance of a dataclass with a {field.removesuffix('s')}'s functions, such as {function}"
        raise UserError(field, shown, allowed, f"see {page}")
    fields = asdict(cast(Any, value))
    try:
        json.dumps(fields)
        check(kind, fields, field)
    except UserError:
        raise
    except Exception as error:  # pydantic raises a family of errors for types that it cannot check
        allowed = "fields that YAML can hold: numbers, text, lists"
        raise UserError(field, kind.__qualname__, allowed, str(error).partition("\n")[0]) from None


def _check_task(config: Config) -> None:
    task, kind = config.task, config.federation.partition.kind
    if task.name not in ("python-docs", "table", GIVEN):
        raise UserError("task.name", task.name, "table with data=..., which brings the rows", "set task.name=table")
    for name in _SOURCES:
        if (value := getattr(task, name)) is not None:
            raise UserError(
                f"task.{name}", value, "nothing with data=..., which brings the rows", f"remove task.{name}"
            )
    if kind not in ("column", "files"):
        allowed = "nothing else than the default with data=..., whose names are the clients"
        raise UserError("federation.partition.kind", kind, allowed, "remove it, or give the rows of other clients")


def _check_own(config: Config, objects: Given) -> None:
    """UserError for keys that read rows which only the caller's own functions understand."""
    if objects.rows is None:
        raise UserError("data", None, "rows for the model's own loss", "call run(config, data={'client': rows}, ...)")
    for name in _COLUMNS:
        if (value := getattr(config.task, name)) is not None:
            allowed = "nothing with a loss of the caller's own, whose batch reads the rows"
            raise UserError(f"task.{name}", value, allowed, f"remove task.{name}")
    if rows := config.evaluation.generate_rows:
        allowed = "0 with a loss of the caller's own, which answers nothing"
        raise UserError("evaluation.generate_rows", rows, allowed, "remove it")


def _shown(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
