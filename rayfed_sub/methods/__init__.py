"""The tables of methods and hooks, and how a configuration's `method` and `hook` become one.  A new one is one file and
one line here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from rayfed_sub.core.errors import UserError
from rayfed_sub.methods.hooks import LocalHook
from rayfed_sub.methods.protocol import Method

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Config

FAMILIES = {
    "coefficients in gradient or random subspaces; averaged: the changes": {
        "fedftg": "rayfed_sub.methods.fedftg:FedFTG",
        "fedkrso": "rayfed_sub.methods.fedkrso:FedKRSO",
        "fedsub": "rayfed_sub.methods.fedsub:FedSub",
        "shared-galore": "rayfed_sub.methods.shared_galore:SharedGaLore",
    },
    "dense weights; averaged: these": {
        "fedavg": "rayfed_sub.methods.fedavg:FedAvg",
    },
    "LoRA's A and B; averaged: each factor by itself": {
        "fedit": "rayfed_sub.methods.fedit:FedIT",
        "hetlora": "rayfed_sub.methods.hetlora:HetLoRA",
        "fslora": "rayfed_sub.methods.fslora:FSLoRA",
        "fed-plora": "rayfed_sub.methods.fed_plora:FedPLoRA",
        "fedrot-lora": "rayfed_sub.methods.fedrot_lora:FedRotLoRA",
        "lora-fair": "rayfed_sub.methods.lora_fair:LoRAFAIR",
        "flora-na": "rayfed_sub.methods.flora_na:FLoRANA",
        "frlora": "rayfed_sub.methods.frlora:FRLoRA",
    },
    "LoRA's A and B; averaged: their products": {
        "flexlora": "rayfed_sub.methods.flexlora:FlexLoRA",
        "florist": "rayfed_sub.methods.florist:FLoRIST",
        "raflora": "rayfed_sub.methods.raflora:RaFLoRA",
        "flora": "rayfed_sub.methods.flora:FLoRA",
        "fedex-lora": "rayfed_sub.methods.fedex_lora:FedExLoRA",
        "fedmomentum": "rayfed_sub.methods.fedmomentum:FedMomentum",
    },
    "one of LoRA's factors at a time; averaged: this one": {
        "ffa-lora": "rayfed_sub.methods.ffa_lora:FFALoRA",
        "rolora": "rayfed_sub.methods.rolora:RoLoRA",
        "fedsvd": "rayfed_sub.methods.fedsvd:FedSVD",
    },
    "a small core between factors at rest; averaged: the core": {
        "fed-sb": "rayfed_sub.methods.fed_sb:FedSB",
        "fed-sb-gradient": "rayfed_sub.methods.fed_sb_gradient:FedSBGradient",
        "ravan": "rayfed_sub.methods.ravan:Ravan",
    },
    "models of each client's own; averaged: one factor, or both, over which clients train their own": {
        "fedsa-lora": "rayfed_sub.methods.fedsa_lora:FedSALoRA",
        "fedalt": "rayfed_sub.methods.fedalt:FedALT",
    },
}
"""The methods by what clients train and what is averaged, in the order of tables."""

METHODS = {name: place for family in FAMILIES.values() for name, place in family.items()}


HOOKS = {"scaffold": "rayfed_sub.methods.scaffold:Scaffold"}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a group of the configuration names.  noun: in words; table: the built-in ones; parts: attributes by which a
    class is known as one."""

    noun: str
    table: Mapping[str, str]
    parts: tuple[str, ...]


_HOOK = ("name", "check", "init_server", "broadcast", "begin", "correct", "upload", "client_state", "aggregate")
_KINDS = {"method": _Kind("a method", METHODS, ("start_client",)), "hook": _Kind("a hook", HOOKS, _HOOK)}
GROUPS = tuple(_KINDS)
"""Groups of the configuration that name a class, whose fields are the group's other keys."""


def table_of(group: str) -> Mapping[str, str]:
    """The built-in names of a group of GROUPS, and where their classes are."""
    return _KINDS[group].table


def strangers(config: Config) -> dict[str, str]:
    """The configuration's classes that no table has, by the keys that name them."""
    names = {group: str(getattr(config, group).get("name")) for group in GROUPS if getattr(config, group).get("name")}
    return {f"{group}.name": name for group, name in names.items() if name not in _KINDS[group].table}


def check_named(group: str, name: object, given: Sequence[str], place: str, add: str) -> None:
    """UserError where `place`, which anybody may have written, names a class that the caller does not name as well.

    A class outside the table is imported, and so its module is run, only where the caller asks for it.  group: one of
    GROUPS; given: the command line's values of it; add: what to add to them.
    """
    kind = _KINDS[group]
    if str(name) in kind.table or ":" not in str(name) or any(str(name) in word for word in given):
        return
    listed = f"{kind.noun} of `rayfed-sub list {group}s`"
    allowed = f"{listed}, for what {place} names is not imported unless you name it too"
    raise UserError(f"{group}.name", name, allowed, f"if you trust that module, add {add}")


def class_of(name: object, group: str = "method") -> type:
    """The class of a method's name, or a hook's, which is imported.  Raises UserError where there is none."""
    kind, field = _KINDS[group], f"{group}.name"
    known, given = ", ".join(kind.table), str(name)
    if given not in kind.table and ":" not in given:
        near = get_close_matches(given.lower(), kind.table, n=1)
        advice = f"did you mean {near[0]}?" if near else "pick one of them"
        raise UserError(field, name, f"{known}, or package.module:Class", advice)
    try:
        module, _, attribute = kind.table.get(given, given).partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(field, given, f"an importable class, or one of {known}", str(error)) from None
    missing = [part for part in kind.parts if not hasattr(cls, part)]
    if missing or not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        lacks = f"it has no {missing[0]}; " if missing and len(missing) < len(kind.parts) else ""
        advice = f"{lacks}see rayfed_sub/methods/README.md"
        raise UserError(field, given, f"a dataclass with {kind.noun}'s functions", advice)
    return cls


def shared_fields(fields: Mapping[str, Any], name: object) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of another method: those that the method called `name` has as well, and the names of the others.

    Raises UserError for a field of an earlier version, which has another name now.

    >>> shared_fields({"rank": 4, "scale": 1.0}, "fedit")
    ({'rank': 4}, ('scale',))
    """
    from rayfed_sub.config.checks import RENAMED, renamed_key

    keys = _field_names(class_of(name))
    others = tuple(key for key in fields if key not in keys)
    for key in others:
        if f"method.{key}" in RENAMED:
            raise renamed_key(f"method.{key}", fields[key])
    return {key: value for key, value in fields.items() if key in keys}, others


def adopted(config: Config) -> tuple[Config, str]:
    """The configuration with fields that were written for another method as far as this one has them, and a line that
    names the others; empty where there are none.  Raises UserError as `shared_fields`."""
    from rayfed_sub.config.loading import INHERITED

    method = config.method
    if INHERITED not in method:
        return config, ""
    kept, others = _adopted(method)
    line = f"left out, for {method['name']} has no such field: {', '.join(f'method.{key}' for key in others)}"
    return config.model_copy(update={"method": kept}), line if others else ""


def _adopted(fields: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration's `method` without the fields that it cannot take over, and the names of these."""
    from rayfed_sub.config.loading import INHERITED

    inherited = {key: value for key, value in fields.items() if key in fields.get(INHERITED, ())}
    _, others = shared_fields(inherited, fields.get("name"))
    return {key: value for key, value in fields.items() if key not in (INHERITED, *others)}, others


def _field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, cls))]


def build(fields: Mapping[str, Any]) -> Method:
    """The method named by `fields["name"]` (a name of the table, or `package.module:Class`) with its own fields set.

    Raises UserError for an unknown name, an unknown field or a value out of range.

    >>> build({"name": "fedftg", "rank": 4}).rank
    4
    """
    return cast(Method, _built(_adopted(fields)[0], "method"))


def build_hook(fields: Mapping[str, Any]) -> LocalHook | None:
    """The hook named by `fields["name"]` with its own fields set; None where there are no fields.

    Raises UserError as `build`.

    >>> build_hook({"name": "scaffold"}), build_hook({})
    (Scaffold(), None)
    """
    return cast(LocalHook, _built(fields, "hook")) if fields else None


def fields_of(config: Config, method: Method, hook: LocalHook | None) -> dict[str, dict[str, Any]]:
    """`method` and `hook` of the configuration with every field of the objects that were built from them; a group of
    the configuration that is empty stays so."""
    named = {"method": (config.method, method), "hook": (config.hook, hook)}
    return {
        group: {"name": fields["name"], **dataclasses.asdict(cast(Any, built))} if fields else {}
        for group, (fields, built) in named.items()
    }


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A `method` of the table with the defaults of the fields that it does not name: those of later versions than a
    stored configuration's change nothing by their defaults."""
    if fields.get("name") not in METHODS:
        return dict(fields)
    known = dataclasses.fields(cast(Any, class_of(fields["name"])))
    return {**{field.name: field.default for field in known}, **fields}


def _built(fields: Mapping[str, Any], group: str) -> object:
    from rayfed_sub.config.checks import check, unknown_key

    cls = class_of(fields.get("name"), group)
    keys = _field_names(cls)
    values = {key: value for key, value in fields.items() if key != "name"}
    for key, value in values.items():
        if key not in keys:
            error = unknown_key(f"{group}.{key}", value, ["name", *keys] if group == "hook" else keys)
            having = [name for name in _KINDS[group].table if key in _field_names(class_of(name, group))]
            of = f"; it is a key of {', '.join(having)}" if having else ""
            raise UserError(error.field, value, error.allowed, error.advice + of)
    return check(cls, values, group)
