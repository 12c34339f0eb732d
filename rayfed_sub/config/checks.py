"""Validation of what a person wrote; every fault becomes one line with field, value, allowed values and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rayfed_sub.config.keys import allowed, resolved, schema_of
from rayfed_sub.core.errors import UserError

R = TypeVar("R")

RENAMED = {
    "evaluation.examples": "evaluation.eval_rows",
    "evaluation.generate": "evaluation.generate_rows",
    "evaluation.on": "evaluation.split",
    "federation.weights": "federation.client_weighting",
    "method.state": "method.optimizer_state",
    "optimizer.final": "optimizer.final_lr_ratio",
}
"""Keys of earlier versions, with those that took their places."""


def check(cls: type[R], tree: Mapping[str, Any], prefix: str = "") -> R:
    """`tree` as a `cls` (a pydantic model or a dataclass), or a UserError for its first fault, named `prefix.field`.

    >>> from rayfed_sub.config.schema import Checkpoint
    >>> check(Checkpoint, {"every": -1}, "checkpoint")
    Traceback (most recent call last):
    rayfed_sub.core.errors.UserError: checkpoint.every: got -1; allowed: an integer >= 0; e.g. checkpoint.every=1
    """
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        faults = error.errors()
        # Where a field may be one of several things, each says why it is not; our own checks know best.
        fault = next((fault for fault in faults if fault["type"] == "value_error"), faults[0])
        raise _user_error(fault, schema_of(cls), tree, prefix) from None


def unknown_key(path: str, value: object, keys: Sequence[str]) -> UserError:
    """The refusal of a key; keys: those known in its section.

    >>> unknown_key("evaluation.examples", 64, ["every", "eval_rows"]).advice
    'set evaluation.eval_rows instead'
    """
    renamed = RENAMED.get(path)
    if renamed is not None and renamed.rpartition(".")[2] in keys:
        return UserError(path, value, f"{renamed}, which replaces it", f"set {renamed} instead")
    near = get_close_matches(path.rpartition(".")[2], keys, n=1)
    advice = f"did you mean {near[0]}?" if near else "remove it"
    return UserError(path, value, f"these keys here: {', '.join(keys)}", advice)


def _user_error(fault: ErrorDetails, schema: Mapping[str, Any], tree: object, prefix: str) -> UserError:
    """One pydantic fault as one line; schema: the JSON schema of what `tree` should be."""
    place, path = resolved(schema, schema), prefix
    for part in fault["loc"]:
        path = f"{path}.{part}" if path else str(part)
        if fault["type"] in ("extra_forbidden", "invalid_key") and part not in place["properties"]:
            return unknown_key(path, fault["input"], list(place["properties"]))
        place = resolved(place["properties"][part], schema)
        tree = tree.get(part) if isinstance(tree, Mapping) else tree
        if "properties" not in place:  # a fault inside a list is reported with the list
            break
    if fault["type"] == "value_error":  # our own checks: field|what is allowed|advice
        field, words, advice = str(fault["ctx"]["error"]).split("|")
        for part in field.split("."):
            inner = place.get("properties", {}).get(part, {})
            tree = tree.get(part, inner.get("default")) if isinstance(tree, Mapping) else inner.get("default")
            place = resolved(inner, schema)
        return UserError(f"{path}.{field}" if path else field, tree, words, advice)
    words = allowed(place, schema)
    if fault["type"] == "finite_number":
        words = words.replace("a number", "a finite number")
    advice = f"e.g. {path}={place['default']}" if place.get("default") not in (None, {}) else f"change {path}"
    if fault["type"] == "string_type" and tree is not None:  # YAML takes 5, yes and {column} for no text
        advice = f"put it in quotes, and on the command line those in quotes: {path}='\"...\"'"
    return UserError(path, tree, words, advice)
