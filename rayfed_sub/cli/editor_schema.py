"""JSON schema of a configuration's file, or a sweep's, for editors that complete and check YAML by one."""

from __future__ import annotations

from typing import Any

from rayfed_sub.config.keys import schema_of
from rayfed_sub.config.schema import Config
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.sweeps.space import Search


def editor_schema() -> dict[str, Any]:
    """The schema, of draft 7, the newest that editors' YAML servers support well.

    The fields of `method` follow from its name; a class of the user's own may have any.  A sweep's file has `sweep` as
    well, and may have a `base`, which has the other keys.  Rules between keys are left out, for instance that a cohort
    is no larger than the federation.
    """
    schema, methods = schema_of(Config), {name: schema_of(class_of(name)) for name in METHODS}
    search = schema_of(Search)
    inner = {key: part for record in (*methods.values(), search) for key, part in record.pop("$defs", {}).items()}
    base = {"type": "string", "description": "File of the configuration that a sweep builds on, relative to its own."}
    properties = {**schema["properties"], "method": _method(schema["properties"]["method"], methods)}
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


def _method(place: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = {"anyOf": [{"enum": list(methods)}, {"type": "string", "pattern": "^.+:.+$"}]}
    return {
        "type": "object",
        "description": place["description"],
        "default": place["default"],
        "properties": {"name": names},
        "allOf": [_fields(name, schema) for name, schema in methods.items()],
    }


def _fields(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Condition that allows exactly the method's fields where it is named."""
    name_schema = {"const": name}
    return {
        "if": {"properties": {"name": name_schema}, "required": ["name"]},
        "then": {"properties": {"name": name_schema, **schema.get("properties", {})}, "additionalProperties": False},
    }
