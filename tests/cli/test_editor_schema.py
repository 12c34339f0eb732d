"""The JSON schema for editors accepts every experiment and locates wrong keys and values."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from rayfed_sub.cli import main
from rayfed_sub.cli.editor_schema import editor_schema
from rayfed_sub.config.loading import load_config, overridden, read_yaml
from rayfed_sub.methods import METHODS, build

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.glob("*.yaml"))
SWEEPS = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.glob("sweeps/*.yaml"))
TINY = read_yaml(EXPERIMENTS / "tiny.yaml")


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    schema = editor_schema()
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def error_paths(validator: Draft7Validator, tree: Any) -> list[str]:
    """The dotted paths of all errors."""
    return sorted(".".join(map(str, error.absolute_path)) for error in validator.iter_errors(tree))


def test_there_are_experiments() -> None:
    assert {"quickstart.yaml", "tiny.yaml"} <= set(FILES)
    assert SWEEPS


@pytest.mark.parametrize("name", [*FILES, *SWEEPS])
def test_schema_accepts_experiments(name: str, validator: Draft7Validator) -> None:
    assert error_paths(validator, read_yaml(EXPERIMENTS / name)) == []


def test_schema_accepts_a_resolved_configuration(validator: Draft7Validator) -> None:
    assert error_paths(validator, load_config(TINY).model_dump(mode="json")) == []


@pytest.mark.parametrize("name", METHODS)
def test_schema_accepts_every_method_with_all_its_fields(name: str, validator: Draft7Validator) -> None:
    method = {"name": name, **json.loads(json.dumps(vars(build({"name": name}))))}
    assert error_paths(validator, {**TINY, "method": method}) == []
    assert error_paths(validator, {**TINY, "method": {**method, "rnak": 4}}) == ["method"]


def test_schema_accepts_hooks_with_their_fields(validator: Draft7Validator) -> None:
    """No hook, a built-in one, and one of the user's own, whose fields are unknown."""
    for hook in ({}, {"name": "scaffold"}, {"name": "feddyn:FedDyn", "alpha": 0.1}):
        assert error_paths(validator, {**TINY, "hook": hook}) == []
    assert error_paths(validator, {**TINY, "hook": {"name": "scaffold", "alpha": 0.1}}) == ["hook"]


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("colour=red", ""),
        ("federation.round=3", "federation"),
        ("federation.rounds=2.5", "federation.rounds"),
        ("federation.partition.kind=columns", "federation.partition.kind"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas.1"),
        ("resources.state_memory=much", "resources.state_memory"),
        ("federation.local_steps={low: 1}", "federation.local_steps"),
        ("method.rank=0", "method.rank"),
        ("method.projector=best", "method.projector"),
        ("method.optimizer_state=average", "method.optimizer_state"),
        ("method.alpha=16", "method"),
        ("method.name=fedfgt", "method.name"),
        ("hook.name=scafold", "hook.name"),
        ("method={}", "method"),
    ],
)
def test_wrong_key_or_value_is_located(override: str, place: str, validator: Draft7Validator) -> None:
    assert error_paths(validator, overridden(TINY, [override])) == [place]


@pytest.mark.parametrize(
    "override",
    [
        "federation.local_steps={low: 1, high: 8}",
        "federation.local_steps=[1,2]",
        "federation.sampled=null",
        "resources.state_memory=2GB",
        "optimizer.clip_norm=1",
        "method={name: momentum:FFALoRAM, momentum: 0.5}",
        "method={name: fedit, optimizer_state: average}",
    ],
)
def test_schema_accepts_what_a_run_accepts(override: str, validator: Draft7Validator) -> None:
    tree = overridden(TINY, [override])
    load_config(copy.deepcopy(tree))
    assert error_paths(validator, tree) == []


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("sweep.trails=3", "sweep"),
        ("sweep.metric=loss", "sweep.metric"),
        ("sweep.space={}", "sweep.space"),
        ("sweep.space={method.rank: {grid: []}}", "sweep.space.method.rank.grid"),
        ("sweep.space={method.rank: {values: [1]}}", "sweep.space.method.rank"),
        ("sweep.space={optimizer.lr: {loguniform: [0.1]}}", "sweep.space.optimizer.lr.loguniform"),
    ],
)
def test_wrong_key_or_value_of_a_sweep_is_located(override: str, place: str, validator: Draft7Validator) -> None:
    tree = overridden(read_yaml(EXPERIMENTS / SWEEPS[0]), [override])
    assert error_paths(validator, tree) == [place]


def test_only_a_sweep_builds_on_a_file(validator: Draft7Validator) -> None:
    """Which has the method's name then."""
    sweep = {"space": {"seed": {"grid": [0, 1]}}}
    assert error_paths(validator, {"base": "tiny.yaml", "method": {"rank": 2}, "sweep": sweep}) == []
    assert error_paths(validator, {"base": "tiny.yaml"}) == [""]
    assert error_paths(validator, {"method": {"rank": 2}, "sweep": sweep}) == ["method"]


def test_schema_has_meanings_and_defaults() -> None:
    schema = editor_schema()
    federation = schema["$defs"]["Federation"]
    assert federation["properties"]["clients"] == {
        **{"type": "integer", "minimum": 1, "default": 8, "description": "Clients in all."},
    }
    rules = schema["properties"]["method"]["allOf"]
    (fields,) = (rule["then"] for rule in rules if rule["if"]["properties"]["name"] == {"const": "fedit"})
    assert fields["properties"]["alpha"]["default"] == 16.0
    assert fields["properties"]["alpha"]["description"].startswith("Scale of")


def test_command_prints_the_schema(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rayfed-sub", "config", "--schema"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == editor_schema()
