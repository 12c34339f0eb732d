"""Keys of a record of settings with type, meaning, default and allowed values, read from the types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from rayfed_sub.config.schema import Config

Place = Mapping[str, Any]
"""A part of a JSON schema."""


@dataclass(frozen=True)
class Key:
    """name: dotted.  allowed: type and range, in words; default: as an override spells it, None for a key that must be
    given."""

    name: str
    allowed: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Group:
    """A group of keys by its dotted name, which is empty for top-level keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def groups(record: type = Config, name: str = "") -> list[Group]:
    """All groups of the configuration in order; `method` and `hook` without keys, because each method and each hook has
    its own.  Or those of another record by its name.

    >>> [group.name for group in groups()][:5]
    ['', 'model', 'task', 'federation', 'federation.partition']
    """
    schema = schema_of(record)
    return list(_groups(schema, schema, name))


def fields(cls: type, prefix: str) -> tuple[Key, ...]:
    """The keys of a method's class, or a hook's.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Half:
    ...     ratio: float = 0.5
    >>> fields(Half, "method")
    (Key(name='method.ratio', allowed='a number', default='0.5', meaning=''),)
    """
    schema = schema_of(cls)
    return tuple(_key(place, schema, f"{prefix}.{name}") for name, place in schema.get("properties", {}).items())


def schema_of(cls: type) -> dict[str, Any]:
    """The JSON schema of a pydantic model or a dataclass, in the words of draft 7, which editors know: no
    `prefixItems`.  Titles, which repeat names, are left out; descriptions are one line."""
    schema: dict[str, Any] = _plain(TypeAdapter(cls).json_schema())
    return schema


def resolved(place: Place, schema: Place) -> Place:
    """The part itself where `place` refers to one."""
    return schema["$defs"][place["$ref"].rpartition("/")[2]] if "$ref" in place else place


def in_words(place: Place, schema: Place) -> str:
    """A part of a JSON schema in words, such as "a number > 0 and < 1"."""
    if "x-allowed" in place:
        return str(place["x-allowed"])
    if "anyOf" in place:
        return ", or ".join(in_words(resolved(choice, schema), schema) for choice in place["anyOf"])
    if "enum" in place:
        return ", ".join(map(str, place["enum"][:-1])) + f" or {place['enum'][-1]}"
    if "const" in place:
        return str(place["const"])
    if "properties" in place:
        return f"keys with values: {', '.join(place['properties'])}"
    if isinstance(place.get("items"), list):
        inner = [in_words(resolved(item, schema), schema) for item in place["items"]]
        return f"a list of {len(inner)}, {', '.join(inner)}"
    if "items" in place:
        length = f" of {place['maxItems']}" if "maxItems" in place else ""
        return f"a list{length}, each {in_words(resolved(place['items'], schema), schema)}"
    values = place.get("additionalProperties")
    if isinstance(values, Mapping) and "properties" not in (value := resolved(values, schema)):
        return f"texts as keys, each with {in_words(value, schema)}"
    if "pattern" in place:
        return f"text that matches {place['pattern']}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {place[name]:g}" for name, sign in bounds.items() if name in place)
    return f"{_KINDS.get(place.get('type', ''), 'another value')} {limits}".strip()


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "array": "a list",
    "object": "keys with values",
}


def _groups(place: Place, schema: Place, name: str) -> Iterator[Group]:
    """The group and those in it."""
    inner, own = dict[str, Place](), list[Key]()
    for key, value in place["properties"].items():
        dotted = f"{name}.{key}" if name else key
        part = resolved(value, schema)
        if "properties" in part:
            inner[dotted] = part
        elif dotted in ("method", "hook"):
            inner[dotted] = {**part, "properties": {}}
        else:
            own.append(_key(part, schema, dotted))
    yield Group(name, str(place.get("description", "")), tuple(own))
    for dotted, part in inner.items():
        yield from _groups(part, schema, dotted)


def _key(place: Place, schema: Place, name: str) -> Key:
    words = in_words(place, schema)
    words = f"text: {words}" if "enum" in place else words
    default = place.get("default")
    shown = default if isinstance(default, str) else json.dumps(default, separators=(",", ":"))
    return Key(name, words, shown if "default" in place else None, str(place.get("description", "")))


def _plain(part: Any) -> Any:
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    plain = {key: _plain(value) for key, value in part.items() if key != "title" or not isinstance(value, str)}
    if isinstance(plain.get("description"), str):
        plain["description"] = " ".join(plain["description"].split())
    items = plain.pop("prefixItems", None)
    if items is not None:
        plain["items"] = items[0] if all(item == items[0] for item in items) else items
    return plain
