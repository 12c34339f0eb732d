"""Configuration: overrides, defaults, the resolved form, and the arithmetic of rounds and resources."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfed_sub.config.checks import check
from rayfed_sub.config.loading import load_config, read_yaml, yaml_text
from rayfed_sub.config.schema import Checkpoint, Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.methods import build
from rayfed_sub.planning.job import check_resources, prepare
from rayfed_sub.planning.machines import Node

TINY = Path(__file__).parents[2] / "experiments" / "tiny.yaml"
SMALL = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def load(overrides: str, source: Any = TINY) -> Config:
    return load_config(source, overrides.split())


def fault(call: Any, *arguments: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


# Overrides


def test_override_replaces_one_value_only() -> None:
    before, after = load(""), load("federation.local_steps=10 optimizer.lr=1e-3 optimizer.betas=[0.5,0.9]")
    assert (before.federation.local_steps, after.federation.local_steps) == (4, 10)
    assert after.optimizer.lr == 0.001  # YAML reads 1e-3 as text; the loader makes it a number
    assert after.optimizer.betas == (0.5, 0.9)
    assert after.federation.clients == before.federation.clients
    assert after.method == before.method


def test_last_override_wins() -> None:
    assert load("seed=1 seed=2").seed == 2


def test_override_can_replace_a_whole_section() -> None:
    config = load('method={"name":"fedit","rank":2} federation.partition.kind=iid')
    assert config.method == {"name": "fedit", "rank": 2}
    assert config.federation.partition.kind == "iid"


def test_override_value_can_contain_equals_signs() -> None:
    assert load("model.targets=up=x").model.targets == "up=x"


def test_rounds_and_epochs_replace_each_other_on_the_command_line() -> None:
    epochs = load("federation.epochs=1.5").federation  # the file has rounds: 3
    assert (epochs.rounds, epochs.epochs) == (None, 1.5)
    rounds = load("federation.rounds=2", {"federation": {"epochs": 4}}).federation
    assert (rounds.rounds, rounds.epochs) == (2, None)


@pytest.mark.parametrize(
    ("source", "overrides", "length"),
    [
        ({"rounds": 100}, "federation.epochs=null", (100, None)),
        ({"epochs": 4}, "federation.rounds=null", (None, 4)),
        ({}, "federation.rounds=50 federation.epochs=null", (50, None)),
        ({"rounds": 100}, "federation.rounds=null", (3, None)),
    ],
)
def test_null_takes_no_other_length_away(source: Any, overrides: str, length: Any) -> None:
    found = load(overrides, {"federation": source}).federation
    assert (found.rounds, found.epochs) == length


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("0o17", 15), ("0x1F", 31), ("-5", -5), ("+5", 5), ("1e3", 1000.0)),
        *(("1:30", "1:30"), ("1_0", "1_0"), ("2024-13-45", "2024-13-45"), ("2024-01-02", "2024-01-02")),
    ],
)
def test_numbers_and_texts_are_those_of_yaml_1_2(text: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"a: {text}\n")
    assert (read := read_yaml(file)) == {"a": value}
    assert type(read["a"]) is type(value)
    file.write_text(yaml_text({"a": text}))
    assert read_yaml(file) == {"a": text}  # a text is written so that it stays one


@pytest.mark.parametrize("text", ["!!timestamp 2024-13-45", "!!int two", "!!float x"])
def test_value_that_its_tag_cannot_hold_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: {text}\n")
    assert fault(load_config, file).field == "CONFIG"
    assert fault(load_config, TINY, [f"seed={text}"]).field == "seed"


def test_key_with_nothing_below_it_can_be_filled_by_overrides() -> None:
    assert load("resources.workers=1", {"resources": None}).resources.workers == 1


def test_fields_of_a_method_without_a_name_are_fedftg_s() -> None:
    assert load("method.rank=4", {}).method == {"name": "fedftg", "rank": 4}
    assert load("method={}", {}).method == {}  # refused where it is built


def test_rounds_and_epochs_together_in_one_file_are_refused() -> None:
    refused = fault(load_config, {"federation": {"rounds": 1, "epochs": 1}})
    assert (refused.field, refused.value) == ("federation.rounds", 1)


def test_override_leaves_other_uses_of_an_anchor(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: &same {lr: 0.5}\nserver: *same\n")
    config = load_config(file, ["optimizer.lr=0.25"])
    assert (config.optimizer.lr, config.server.lr) == (0.25, 0.5)


def test_overrides_do_not_change_the_given_mapping() -> None:
    source = {"method": {"name": "fedftg", "rank": 4}, "optimizer": {"lr": 0.1}}
    kept = copy.deepcopy(source)
    assert load("method.rank=2 optimizer.lr=1 seed=3", source).method["rank"] == 2
    assert source == kept


# Sources and defaults


def test_empty_mapping_is_the_default_configuration() -> None:
    config = load_config({})
    assert config == Config()
    assert (config.method, config.model.path, config.task.name) == ({"name": "fedftg"}, "smollm2-135m", "python-docs")
    assert (config.federation.clients, config.federation.local_steps, config.resources.workers) == (8, 4, 2)


def test_file_name_and_mapping_give_the_same_configuration(tmp_path: Path) -> None:
    tree = yaml.safe_load(TINY.read_text())
    assert load_config(str(TINY)) == load_config(TINY) == load_config(tree)


def test_configuration_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().federation.clients = 3


@pytest.mark.parametrize(
    ("tree", "field", "known"),
    [
        ({"colour": 1}, "colour", "name, seed, model, task"),
        ({"optimizer": {"rate": 1}}, "optimizer.rate", "name, lr, betas"),
        ({"federation": {"partition": {"kinds": "iid"}}}, "federation.partition.kinds", "kind, column, file"),
    ],
)
def test_unknown_key_is_refused_with_the_known_keys(tree: Any, field: str, known: str) -> None:
    refused = fault(load_config, tree)
    assert refused.field == field
    assert refused.allowed.startswith(f"these keys here: {known}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.examples=64",
            "evaluation.examples: got 64; allowed: evaluation.eval_rows, which replaces",
        ),
        (
            "evaluation={on: validation}",
            "evaluation.on: got 'validation'; allowed: evaluation.split, which replaces",
        ),
        ("evaluation.generate=4", "evaluation.generate: got 4; allowed: evaluation.generate_rows, which replaces it"),
        ("optimizer.final=0.1", "optimizer.final: got 0.1; allowed: optimizer.final_lr_ratio, which replaces it"),
        (
            "federation.weights=uniform",
            "federation.weights: got 'uniform'; allowed: federation.client_weighting, ",
        ),
        ("method.state=keep", "method.state: got 'keep'; allowed: method.optimizer_state, which replaces it"),
    ],
)
def test_renamed_key_is_refused_with_its_new_name(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(load_config({"method": {"name": "fedftg"}}, [override]).method)
    assert str(caught.value).startswith(message)


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("method: {rank: 4, rank: 8}\n", encoding="utf-8")
    assert "each key once; method.rank stands again in line 1" in str(fault(load_config, tmp_path / "twice.yaml"))
    (tmp_path / "once.yaml").write_text("optimizer: {name: sgd}\nmethod: {name: fedit}\n", encoding="utf-8")
    assert load_config(tmp_path / "once.yaml").method == {"name": "fedit"}


# A refusal's text is read from the types: integer or number, bounds, choices, default.


@dataclass(frozen=True)
class Fields:
    """A plain dataclass, as for a method's own fields."""

    size: int
    words: tuple[str, ...] = ()
    ratio: tuple[int, float] = (1, 0.5)


@pytest.mark.parametrize(
    ("cls", "tree", "message"),
    [
        (Checkpoint, {"every": -1}, "at.every: got -1; allowed: an integer >= 0; e.g. at.every=1"),
        (Fields, {"size": "x"}, "at.size: got 'x'; allowed: an integer; change at.size"),
        (Fields, {}, "at.size: got None; allowed: an integer; change at.size"),
        (Fields, {"size": 1, "words": 3}, "at.words: got 3; allowed: a list, each text; e.g. at.words=[]"),
        (
            Fields,
            {"size": 1, "ratio": ["x", 1]},
            "at.ratio: got ['x', 1]; allowed: a list of 2, an integer, a number; e.g. at.ratio=[1, 0.5]",
        ),
    ],
)
def test_refusal_names_the_allowed_values(cls: type, tree: Any, message: str) -> None:
    assert str(fault(check, cls, tree, "at")) == message


@pytest.mark.parametrize("steps", ["0", "[]", "[1,0]", '{"low":1}', '{"low":0,"high":2}', "x"])
def test_field_of_several_types_names_them_all(steps: str) -> None:
    refused = fault(load, f"federation.local_steps={steps}")
    assert refused.field == "federation.local_steps"
    assert refused.allowed == "an integer >= 1, or a list, each an integer >= 1, or keys with values: low, high"


def test_range_of_steps_must_be_ordered() -> None:
    refused = fault(load, 'federation.local_steps={"low":5,"high":3}')
    assert (refused.field, refused.value, refused.allowed) == ("federation.local_steps.high", 3, "5 or more")


def test_dataclasses_are_checked_too() -> None:
    assert check(Fields, {"size": "3"}) == Fields(3)


# The resolved form


def small(overrides: str = "") -> Config:
    """A model of one block, for speed."""
    return load_config(TINY, [f"model.random={SMALL}", "task.max_length=64", *overrides.split()])


def test_resolved_form_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    resolved = prepare(small("federation.epochs=0.2 optimizer.clip_norm=1 optimizer.eps=1e-6")).config
    text = yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == resolved
    assert prepare(resolved).config == resolved


def test_resolved_form_has_every_field_of_the_method() -> None:
    assert prepare(small()).config.method == {
        **{"name": "fedftg", "rank": 4, "scale": 1.0, "refresh_every": 8},
        **{"projector": "exact", "moments": "keep", "optimizer_state": "keep"},
    }


def test_default_is_three_rounds() -> None:
    source = {"model": {"path": "random", "random": SMALL}, "task": {"max_length": 64}}
    assert prepare(load_config(source)).config.federation.rounds == 3


@pytest.mark.parametrize(
    ("more", "rounds"),
    [
        # 40 rows, of which round(40 * 0.25) = 10 are held out: 30 for training.
        # A round takes clients x local steps x batch size rows: 4 * 2 * 3 = 24.
        ("federation.epochs=1", 2),  # 30 / 24 = 1.25
        ("federation.epochs=0.8", 1),  # 24 / 24
        ("federation.epochs=0.81", 2),  # 24.3 / 24
        ("federation.epochs=4", 5),  # 120 / 24
        # Of the four clients two are sampled: 2 * 2 * 3 = 12 rows a round.
        ("federation.epochs=1 federation.sampled=2", 3),  # 30 / 12 = 2.5
        ("federation.rounds=7", 7),
    ],
)
def test_epochs_are_converted_to_rounds(more: str, rounds: int, tmp_path: Path) -> None:
    lines = [f'{{"q": "what {i}?", "a": "{i}"}}' for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {
        "model": {"path": "random", "random": SMALL},
        "task": {
            **{"name": "table", "path": str(tmp_path / "rows.jsonl"), "prompt": "{q}", "answer": "a"},
            **{"test_share": 0.25, "max_length": 32},
        },
        "federation": {"clients": 4, "local_steps": 2, "batch_size": 3, "partition": {"kind": "iid"}},
    }
    resolved = prepare(load(more, source)).config.federation
    assert (resolved.rounds, resolved.epochs) == (rounds, None)


# Resources


@pytest.mark.parametrize(
    ("gpus", "per_worker", "most"),
    [
        (1, 0.25, 4),  # 1 / 0.25
        (1, 0.3, 3),  # 1 / 0.3 = 3.33
        (1, 0.1, 10),
        (2, 0.4, 4),  # two on each, and not 2 / 0.4 = 5: a worker's share is on one GPU
        (3, 0.7, 3),  # one on each, and not 3 / 0.7 = 4.29
        (2, 1, 2),
    ],
)
def test_number_of_gpu_workers_that_fit(gpus: int, per_worker: float, most: int) -> None:
    there = [Node(16, gpus)]
    asked = f"resources.gpus_per_worker={per_worker}"
    check_resources(load(f"{asked} resources.workers={most}"), there)
    refused = fault(check_resources, load(f"{asked} resources.workers={most + 1}"), there)
    assert (refused.field, refused.value) == ("resources.workers", most + 1)
    assert refused.allowed == f"1 to {most} with gpus_per_worker={per_worker} on {gpus} GPUs"


@pytest.mark.parametrize(
    ("cpus", "per_worker", "most"),
    [
        (16, 1, 16),
        (16, 3, 5),
        (2, 0.1, 20),  # 2 // 0.1 would be 19
        (3, 1.5, 2),
    ],
)
def test_number_of_cpu_workers_that_fit(cpus: int, per_worker: float, most: int) -> None:
    asked = f"resources.cpus_per_worker={per_worker}"
    check_resources(load(f"{asked} resources.workers={most}"), [Node(cpus)])
    refused = fault(check_resources, load(f"{asked} resources.workers={most + 1}"), [Node(cpus)])
    assert refused.allowed == f"1 to {most} with cpus_per_worker={per_worker} on {cpus} CPUs"


@pytest.mark.parametrize(
    ("asked", "there", "field", "allowed"),
    [
        ("gpus_per_worker=0.5", Node(8), "gpus_per_worker", "0, for no GPU is found"),
        ("gpus_per_worker=1.5", Node(8, 8), "gpus_per_worker", "at most 1: a worker uses one GPU"),
        ("gpus_per_worker=2", Node(8, 1), "gpus_per_worker", "at most 1: a worker uses one GPU"),
        ("cpus_per_worker=9", Node(8), "cpus_per_worker", "at most 8, the CPUs here"),
    ],
)
def test_missing_resources_are_refused(asked: str, there: Node, field: str, allowed: str) -> None:
    refused = fault(check_resources, load(f"resources.{asked}"), [there])
    assert (refused.field, refused.allowed) == (f"resources.{field}", allowed)


@pytest.mark.parametrize(
    ("asked", "field", "allowed"),
    [
        # Nodes of 4, 4 and 1 CPUs, the last with a GPU: 2 + 2 + 0 workers of two CPUs each.
        ("cpus_per_worker=2 resources.workers=5", "workers", "1 to 4 with cpus_per_worker=2 on 4 + 4 + 1 CPUs"),
        # Nine CPUs in all, but no node has eight.
        ("cpus_per_worker=8 resources.workers=1", "cpus_per_worker", "at most 4, the CPUs of the largest node"),
        # Four halves of the two GPUs, but only one CPU beside them.
        (
            "gpus_per_worker=0.5 resources.workers=2",
            "workers",
            "1 to 1 with cpus_per_worker=1 and gpus_per_worker=0.5 on the same node",
        ),
    ],
)
def test_resources_of_several_nodes(asked: str, field: str, allowed: str) -> None:
    refused = fault(check_resources, load(f"resources.{asked}"), [Node(4), Node(4), Node(1, 2)])
    assert (refused.field, refused.allowed) == (f"resources.{field}", allowed)


def test_default_task_seed_is_a_number_and_default_eval_rows_are_256() -> None:
    assert (Config().task.seed, Config().evaluation.eval_rows) == (0, 256)
    with pytest.raises(UserError, match=r"^task\.seed: got None; allowed: an integer >= 0; e\.g\. task\.seed=0$"):
        load_config({"task": {"seed": None}})


def test_merged_key_may_be_overridden(tmp_path: Path) -> None:
    """YAML's `<<` is no repeat of the key that it brings along."""
    file = tmp_path / "merged.yaml"
    file.write_text("base: &base {pack_size: 4, workers: 1}\nresources: {<<: *base, pack_size: 16}\n")
    assert read_yaml(file)["resources"] == {"pack_size": 16, "workers": 1}
    file.write_text("resources: {pack_size: 4, pack_size: 16}\n")
    with pytest.raises(UserError, match=r"each key once; resources\.pack_size stands again in line 1"):
        read_yaml(file)
