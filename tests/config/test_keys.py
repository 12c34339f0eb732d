"""Every key has a meaning, and its type, default and range are read from the types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft7Validator
from pydantic import Field, TypeAdapter, ValidationError

from rayfed_sub.config.keys import Group, Key, fields, groups, schema_of
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Bytes, Config
from rayfed_sub.methods import METHODS, class_of

WHOLE = ("model.random", "federation.partition.args", "devices.classes", "devices.shares")


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a dumped configuration; fields of a method, and those in `WHOLE`, count as values."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        whole = not isinstance(value, dict) or key in WHOLE
        found |= {key: value} if whole else leaves(value, f"{key}.")
    return found


def by_name(of: list[Group]) -> dict[str, Key]:
    return {key.name: key for group in of for key in group.keys}


def test_every_key_has_its_default() -> None:
    """Compare with a dumped configuration, in which the length of training is filled in."""
    expected = leaves(Config().model_dump(mode="json"))
    del expected["method.name"]
    found = {name: load_config({}, [f"{name}={key.default}"]) for name, key in by_name(groups()).items()}
    assert set(found) == set(expected)
    assert {name for name, config in found.items() if config != Config()} == set()


def test_every_key_and_every_group_has_a_meaning() -> None:
    of_methods = [key for name in METHODS for key in fields(class_of(name), "method")]
    keys = [*by_name(groups()).values(), *of_methods]
    assert [key.name for key in keys if not key.meaning.endswith((".", ")."))] == []
    assert [group.name for group in groups() if not group.meaning] == []


def test_descriptions_follow_the_types() -> None:
    found = by_name(groups())
    assert found["federation.sampled"] == Key(
        "federation.sampled", "an integer >= 1, or null", "null", "Clients sampled per round; null stands for all."
    )
    assert found["optimizer.name"].allowed == "text: adamw or sgd"
    assert found["optimizer.betas"].allowed == "a list of 2, each a number >= 0 and < 1"
    assert found["optimizer.betas"].default == "[0.9,0.999]"
    assert found["resources.state_memory"].allowed == "a number of bytes, or text such as 500MB or 2GiB"
    assert found["model.random"].default == "{}"


@dataclass(frozen=True)
class Half:
    kind: Annotated[Literal["a", "b"], Field(description="Two\n  lines.")] = "a"
    pair: tuple[int, str] = (1, "x")


def test_fields_of_a_method_s_class() -> None:
    assert fields(Half, "method") == (
        Key("method.kind", "text: a or b", "a", "Two lines."),
        Key("method.pair", "a list of 2, an integer, text", '[1,"x"]', ""),
    )
    pair = schema_of(Half)["properties"]["pair"]
    assert pair["items"] == [{"type": "integer"}, {"type": "string"}]
    assert "prefixItems" not in json.dumps(schema_of(Config))


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        *[(size, True) for size in (0, 5, "500MB", "2GiB", " 1.5 gb", "7", ".5k", "3b", "8 Mbit", "8kibit")],
        *[(size, False) for size in (-1, "5 XB", "MB", "5 ki", "")],
    ],
)
def test_schema_of_a_byte_count_matches_the_configuration(size: Any, taken: bool) -> None:
    assert Draft7Validator(TypeAdapter(Bytes).json_schema()).is_valid(size) == taken
    if taken:
        assert TypeAdapter(Bytes).validate_python(size) >= 0
    else:
        with pytest.raises(ValidationError):
            TypeAdapter(Bytes).validate_python(size)
