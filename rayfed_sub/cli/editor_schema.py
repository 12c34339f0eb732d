"""JSON schema of a configuration's file, or a sweep's, for editors that complete and check YAML by one."""

from __future__ import annotations

from typing import Any

from rayfed_sub.config.keys import schema_of
from rayfed_sub.config.schema import Config
from rayfed_sub.methods import GROUPS, class_of, table_of
from rayfed_sub.sweeps.space import Search


def editor_schema() -> dict[str, Any]:
    """The schema, of draft 7, the newest that editors' YAML servers support well.

    The fields of `method` and `hook` follow from their names; a class of the user's own may have any.  A sweep's file
    has `sweep` as well, and may have a `base`, which has the other keys.  Rules between keys are left out, for instance
    that a cohort is no larger than the federation.
    """
    schema, search = schema_of(Config), schema_of(Search)
    known = {group: {name: schema_of(class_of(name, group)) for name in table_of(group)} for group in GROUPS}
    records = (*(record for of_group in known.values() for record in of_group.values()), search)
    inner = {key: part for record in records for key, part in record.pop("$defs", {}).items()}
    base = {"type": "string", "description": "File of the configuration that a sweep builds on, relative to its own."}
    named = {group: _named(schema["properties"][group], classes) for group, classes in known.items()}
    properties = {**schema["properties"], **named}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "rayfed-sub configuration",
        **schema,
        "properties": {**properties, "sweep": search, "base": base},
        "if": {"required": ["base"]},
        "then": {"required": ["sweep"]},
        "else": {"properties": {"method": {"required": ["name"]}}},
        "$defs": {**schema["$defs"], **inner},
    }


def _named(place: dict[str, Any], classes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The group of `method` or `hook`; classes: the schemas of those with a name."""
    names = {"anyOf": [{"enum": list(classes)}, {"type": "string", "pattern": "^.+:.+$"}]}
    return {
        "type": "object",
        "description": place["description"],
        "default": place["default"],
        "properties": {"name": names},
        "allOf": [_fields(name, schema) for name, schema in classes.items()],
    }


def _fields(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Condition that allows exactly the class's fields where it is named."""
    name_schema = {"const": name}
    return {
        "if": {"properties": {"name": name_schema}, "required": ["name"]},
        "then": {"properties": {"name": name_schema, **schema.get("properties", {})}, "additionalProperties": False},
    }
