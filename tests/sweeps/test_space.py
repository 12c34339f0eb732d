"""A sweep before it starts: its file, its draws, its refusals, and the number of trials side by side."""

from __future__ import annotations

import json
import math
import re
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub import UserError, load_config
from rayfed_sub.planning import plan
from rayfed_sub.planning.job import prepare
from rayfed_sub.planning.machines import Machine, Node
from rayfed_sub.runtime.cluster import nodes
from rayfed_sub.storage.remote import Mirror, Place
from rayfed_sub.sweeps import capacity
from rayfed_sub.sweeps.runner import checked
from rayfed_sub.sweeps.shared_inputs import input_key, weights_key
from rayfed_sub.sweeps.space import Axis, Search, Sweep, largest, load_sweep

ROOT = Path(__file__).parents[2]
GRID = ROOT / "experiments" / "sweeps" / "tagg-rank-lr.yaml"
TINY = ROOT / "experiments" / "tiny.yaml"


def space(text: str, *overrides: str) -> Sweep:
    """The grid's file with another space."""
    return load_sweep(GRID, [f"sweep.space={{{text}}}", *overrides])


# The file


def test_grid_of_the_paper_is_three_by_three_by_three() -> None:
    sweep = load_sweep(GRID)
    points = sweep.points()
    assert sweep.count == len(points) == 27  # 3 * 3 * 3
    assert len({tuple(point.items()) for point in points}) == 27
    assert set(sweep.search.space) == {"federation.local_steps", "method.rank", "optimizer.lr"}


def test_trial_is_the_base_with_the_file_s_keys_and_its_own() -> None:
    sweep = load_sweep(GRID, ["federation.rounds=7"])
    config = sweep.config({"method.rank": 2, "optimizer.lr": 0.01})
    assert config.model == load_config(TINY).model  # from the base
    assert config.task.validation_share == 0.1  # from the sweep's own keys
    assert config.federation.rounds == 7  # from the command line
    assert (config.method["rank"], config.optimizer.lr) == (2, 0.01)  # from the space


def test_other_method_keeps_the_fields_it_has() -> None:
    # tiny.yaml has rank and refresh_every; fedit has a rank and no periods.
    sweep = space("method.name: {grid: [fedftg, fedit]}")
    assert [sweep.config(point).method["name"] for point in sweep.points()] == ["fedftg", "fedit"]
    assert prepare(sweep.config({"method.name": "fedit"})).config.method["rank"] == 4
    assert sweep.config({"method.name": "fedit"}).method == {"name": "fedit", "rank": 4}
    assert sweep.left_out == ("left out, for fedit has no such field: method.refresh_every",)
    assert space("method.rank: {grid: [2]}").left_out == ()


def test_values_are_normalised_by_the_configuration() -> None:
    values = space(
        "optimizer.lr: {grid: [1e-3, 1]}, model.dtype: {grid: [bfloat16]}, federation.availability: {grid: [1]}"
    ).search.space
    assert values["optimizer.lr"].grid == (0.001, 1.0)
    assert [type(value) for value in values["federation.availability"].grid or ()] == [float]


# Draws


def test_draws_are_reproducible_and_within_bounds() -> None:
    text = "optimizer.lr: {loguniform: [1e-4, 1e-1]}, method.scale: {uniform: [0.5, 2]}, method.rank: {choice: [2, 8]}"
    points = space(text, "sweep.trials=200").points()
    assert points == space(text, "sweep.trials=200").points()
    assert points != space(text, "sweep.trials=200", "sweep.seed=1").points()
    assert all(0.0001 <= point["optimizer.lr"] <= 0.1 and 0.5 <= point["method.scale"] <= 2 for point in points)
    # Half of the draws are below the middle of the three decades, 10 ** -2.5: 100 with a deviation of 7.
    assert 72 <= sum(math.log10(point["optimizer.lr"]) < -2.5 for point in points) <= 128
    assert 72 <= sum(point["method.rank"] == 2 for point in points) <= 128


def test_more_trials_do_not_change_the_first_ones() -> None:
    text = "optimizer.lr: {loguniform: [1e-4, 1e-1]}"
    assert space(text, "sweep.trials=3").points() == space(text, "sweep.trials=9").points()[:3]


def test_every_point_of_the_grid_has_the_same_number_of_draws() -> None:
    sweep = space("method.rank: {grid: [2, 4]}, optimizer.lr: {uniform: [0.1, 0.2]}", "sweep.trials=3")
    assert sweep.count == len(sweep.points()) == 6  # 2 * 3
    assert sorted(point["method.rank"] for point in sweep.points()) == [2, 2, 2, 4, 4, 4]
    assert len({point["optimizer.lr"] for point in sweep.points()}) == 6


def test_points_leave_out_keys_that_have_no_effect_there() -> None:
    """A base for some of the points; elsewhere such a key is refused."""
    text = "optimizer.name: {grid: [sgd, adamw]}, federation.partition.alpha: {grid: [0.1, 0.3]}, "
    text += "federation.partition.kind: {grid: [iid, dirichlet]}"
    sweep = space(text, "optimizer.momentum=0.9")
    found = [(config.optimizer, config.federation.partition) for config in map(sweep.config, sweep.points())]
    assert {(one.name, one.momentum) for one, _ in found} == {("sgd", 0.9), ("adamw", 0.0)}
    assert {(one.kind, one.alpha) for _, one in found} == {("iid", 0.5), ("dirichlet", 0.1), ("dirichlet", 0.3)}
    with pytest.raises(UserError, match=r"^server\.momentum: got 0\.5; .* or server\.momentum=0\.9"):
        space(text, "server.momentum=0.5")


@pytest.mark.parametrize(
    ("text", "given", "left"),
    [
        ("federation.mode: {grid: [sync, async]}", "federation.asynchronous.buffer=2", ["null", "2"]),
        ("federation.mode: {grid: [sync, semi-sync]}", "federation.local_seconds=9.0", ["null", "9.0"]),
        ("federation.mode: {grid: [sync, async]}", "federation.round_deadline=9.0", ["9.0", "null"]),
        ("optimizer: {grid: [{name: sgd}, {name: adamw}]}", "optimizer.momentum=0.9", ["0.0", "0.0"]),
        (
            "federation.asynchronous.rule: {grid: [fedbuff, fedasync]}",
            "federation.asynchronous.buffer=2",
            ["2", "null"],
        ),
    ],
)
def test_keys_of_a_mode_are_left_out_at_points_of_others(text: str, given: str, left: list[str]) -> None:
    path = given.partition("=")[0].split(".")
    mode = ["federation.mode=async"] if "rule" in text else []
    if given.startswith("federation.round_deadline"):
        mode = ["federation.asynchronous.buffer=2"]
    sweep = space(
        text, "devices.classes={a: {seconds_per_step: 1}}", "method.name=fedit", "federation.rounds=2", given, *mode
    )
    assert [json.dumps(reduce(getattr, path, sweep.config(values))) for values in sweep.points()] == left


def test_checked_points_of_optuna_are_each_value_with_the_ends_of_the_others() -> None:
    text = "optimizer.lr: {loguniform: [1e-3, 1e-1]}, method.rank: {choice: [2, 4, 8]}"
    points = space(text, "sweep.searcher=optuna", "sweep.trials=50").points()
    pairs = {(point["optimizer.lr"], point["method.rank"]) for point in points}
    assert pairs == {(0.001, 2), (0.001, 4), (0.001, 8), (0.1, 2), (0.1, 4), (0.1, 8)}


def test_many_choices_of_optuna_give_few_checked_points() -> None:
    text = ", ".join(f"model.random.{key}: {{choice: [4, 8, 16, 32]}}" for key in ("hidden_size", "intermediate_size"))
    assert len(space(text, "sweep.searcher=optuna").points()) == 2 * (4 + 4)  # and not their product


# Refusals


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("federation.localsteps: {grid: [1]}", "federation.localsteps", "did you mean local_steps?"),
        ("method.rang: {grid: [1]}", "method.rang", "did you mean rank?"),
        ("method.rank: {grid: [4, 0]}", "method.rank", "an integer >= 1"),
        ("optimizer.lr: {loguniform: [0, 1]}", "sweep.space.optimizer.lr.loguniform", "> 0"),
        ("optimizer.lr: {uniform: [2, 1]}", "sweep.space.optimizer.lr.uniform", "a lower and a higher number"),
        ("optimizer.lr: {grid: [1], choice: [2]}", "sweep.space.optimizer.lr.choice", "one of grid, choice, uniform"),
        ("optimizer.lr: {gird: [1]}", "sweep.space.optimizer.lr.gird", "did you mean grid?"),
        ("optimizer.lr: 3", "sweep.space.optimizer.lr", "keys with values"),
        # 9 of 8 clients: neither value is wrong by itself.
        ("federation.sampled: {grid: [4, 9]}", "federation.sampled", "1 to federation.clients=8"),
        ("name: {grid: [a, b]}", "sweep.space", "keys that change what a trial does"),
    ],
)
def test_invalid_space_is_refused(text: str, field: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        space(text)
    assert refused.value.field == field
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("sweep.metric=simulated_hours", "sweep.metric"),  # no devices
        ("sweep.metric=loss", "sweep.metric"),
        ("sweep.metric=macro_f1", "sweep.metric"),  # no classes
        ("sweep.metric=rouge_l", "sweep.metric"),  # no answers
        ("sweep.scheduler=hyperband", "sweep.scheduler"),
        ("sweep.searcher=optuna", "sweep.searcher"),  # a grid
        ("sweep.trials=0", "sweep.trials"),
        ("sweep.trails=3", "sweep.trails"),
        ("task.validation_share=0", "evaluation.split"),  # of the shared configuration
    ],
)
def test_invalid_section_is_refused(override: str, field: str) -> None:
    with pytest.raises(UserError) as refused:
        load_sweep(GRID, [override])
    assert refused.value.field == field


@pytest.mark.parametrize("override", ["sweep.scheduler=asha", "sweep.searcher=optuna"])
def test_scheduler_and_searcher_refuse_metrics_known_only_at_the_end(override: str) -> None:
    more = ("sweep.metric=rouge_l", "evaluation.generate_rows=4", override)
    with pytest.raises(UserError, match="known at a trial's end"):
        space("optimizer.lr: {choice: [0.1, 0.2]}", *more)


def test_every_point_must_have_the_metric() -> None:
    text = "evaluation.generate_rows: {grid: [8, 0]}"
    with pytest.raises(UserError, match=r"sweep\.metric: got 'rouge_l'; allowed: a metric that is measured"):
        space(text, "sweep.metric=rouge_l")
    assert space("evaluation.generate_rows: {grid: [8, 16]}", "sweep.metric=rouge_l").count == 2


def test_plain_configuration_is_refused_as_a_sweep() -> None:
    with pytest.raises(UserError, match=r"this is the configuration of a run: use rayfed-sub run .*tiny\.yaml$"):
        load_sweep(TINY)


# Side by side


def test_largest_points_are_pareto_optimal() -> None:
    points = [
        {"method.rank": 8, "federation.local_steps": 1, "optimizer.lr": 0.1},
        {"method.rank": 2, "federation.local_steps": 4, "optimizer.lr": 0.1},
        {"method.rank": 2, "federation.local_steps": 1, "optimizer.lr": 0.5},  # smaller than both; no size: the rate
    ]
    assert sorted(point["method.rank"] for point in largest(points)) == [2, 8]
    assert points[2] not in largest(points)


def test_every_name_and_every_resource_counts_separately() -> None:
    points = [
        {"method.name": name, "method.rank": rank, "resources.workers": workers}
        for name in ("fedftg", "fedavg")
        for rank in (2, 8)
        for workers in (1, 2)
    ]
    assert largest(points) == [point for point in points if point["method.rank"] == 8]


@pytest.mark.parametrize(
    ("key", "values", "kept"),
    [
        ("federation.availability", [0.1, 1.0], [1.0]),  # 3 or 32 clients of a cohort
        ("federation.over_selection", [1.0, 1.5], [1.5]),
        ("federation.local_seconds", [60.0, 5.0], [60.0]),
        ("federation.proximal", [0.0, 0.1], [0.1]),
        ("method.refresh_every", [20, 5, 200], [5, 200]),  # 5 closes more blocks
        ("method.of_somebody", [0.5, 0.1, 0.9], [0.1, 0.9]),
        ("optimizer.lr", [0.1, 0.3, 0.2], [0.1]),  # whichever: the first
        ("seed", [1, 2, 0], [1]),
        ("resources.gpus_per_worker", [0.25, 0.5], [0.25, 0.5]),
        ("federation.local_steps", [[4, 8], 2, 8], [[4, 8], 8]),  # a list compares with nothing
    ],
)
def test_ends_that_may_take_the_most_are_kept(key: str, values: list[Any], kept: list[Any]) -> None:
    assert [point[key] for point in largest([{key: value} for value in values])] == kept


def test_ends_of_several_keys_are_corners() -> None:
    """Up by rank alone, and to both sides by the two others: of 27 points 4."""
    keys = ("method.rank", "method.refresh_every", "method.of_somebody")
    points = [dict(zip(keys, point, strict=True)) for point in product((2, 4, 8), (5, 20, 200), (0.1, 0.5, 0.9))]
    corners = [(8, 5, 0.1), (8, 5, 0.9), (8, 200, 0.1), (8, 200, 0.9)]
    assert [tuple(point.values()) for point in largest(points)] == corners


@pytest.mark.parametrize(
    ("labels", "metric", "allowed"),
    [
        (["p", "q"], "pearson", "a score of a classification: held_out_loss, accuracy, macro_f1, matthews"),
        ([0.25, 1.5], "accuracy", "a score of a regression: held_out_loss, pearson, spearman, mean_absolute_error"),
        ([0.25, 1.5], "pearson", None),
    ],
)
def test_metric_is_one_of_the_rows_labels(
    labels: list[str] | list[float], metric: str, allowed: str | None, tmp_path: Path
) -> None:
    """Which the rows alone say where task.problem is not set; nothing trains before."""
    rows = [{"a": f"text {n}", "y": labels[n % 2]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    keys = {
        "task": {"name": "table", "path": str(tmp_path / "rows.jsonl"), "prompt": "{a}", "label": "y"},
        "model": {"path": "random", "random": {"type": "bert", **sizes}},
        "federation": {"clients": 2, "rounds": 1, "partition": {"kind": "iid"}},
        "resources": {"workers": 0},
        "sweep": {"metric": metric, "space": {"optimizer.lr": {"grid": [0.1, 0.2]}}},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(keys))  # JSON is YAML
    sweep = load_sweep(tmp_path / "sweep.yaml")
    if allowed is None:
        checked(sweep, nodes(), tmp_path, lambda record: None)
        return
    with pytest.raises(UserError, match=re.escape(f"sweep.metric: got '{metric}'; allowed: {allowed}; change")):
        checked(sweep, nodes(), tmp_path, lambda record: None)


@pytest.mark.parametrize("key", ["trackers=[wandb]", "sweep.space.trackers={grid: [[mlflow], []]}"])
def test_trials_have_no_trackers(tmp_path: Path, key: str) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps({"sweep": {"space": {"optimizer.lr": {"grid": [0.1, 0.2]}}}}))
    sweep = load_sweep(tmp_path / "sweep.yaml", [key])
    with pytest.raises(
        UserError, match=r"^trackers: got \['\w+'\]; allowed: none in a sweep or study, .*; set trackers="
    ):
        checked(sweep, nodes(), tmp_path, lambda record: None)


@pytest.mark.parametrize(
    ("there", "asked", "most"),
    [
        ([Node(8)], "resources.workers=2", 4),  # 8 / 2
        ([Node(8)], "resources.workers=3", 2),  # 8 // 3
        ([Node(2)], "resources.workers=1 resources.cpus_per_worker=0.5", 4),  # 2 / 0.5
        ([Node(16, 1)], "resources.workers=2 resources.gpus_per_worker=0.25", 2),  # 4 quarters, two each
        ([Node(0), Node(4), Node(4)], "resources.workers=2", 4),  # 8 CPUs on two nodes
    ],
)
def test_trials_side_by_side_follow_from_resources(there: list[Node], asked: str, most: int) -> None:
    job = prepare(load_config(TINY, [*asked.split(), "task.max_rows=120"]))
    assert capacity.at_once([job], there, most=100) == most
    assert capacity.at_once([job], there, most=1) == 1


def test_trials_side_by_side_follow_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(load_config(TINY, ["resources.workers=1", "task.max_rows=120"]))
    needed = capacity.need(capacity.job_parts(job), rounds=2, most=capacity.FEW)
    here = Machine("here", 0, 64, 10**12)
    one = capacity.trial_bytes(needed, here, 4, workers_here=True)
    once = needed.backbone + needed.data + needed.libraries + capacity.DRIVER + capacity.RAY
    for bytes_free, most in ((once + 3 * one, 3), (once + 3 * one - 1, 2), (once, 1)):
        monkeypatch.setattr(capacity, "here", lambda job, free=bytes_free: Machine("here", free, 64, 10**12))
        assert capacity.at_once([job], [Node(64)], most=100) == most


def test_disk_is_for_the_run_folders_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a resumed sweep lie there; in an object store the trials side by side have a temporary one each."""
    job = prepare(load_config(TINY, ["task.max_rows=120"]))
    one = capacity.need(capacity.job_parts(job), rounds=2, most=capacity.FEW).disk
    monkeypatch.setattr(capacity, "here", lambda job, folder: Machine("here", 0, 64, 2 * one))
    for number in (0, 1, 2):
        (tmp_path / "trials" / f"{number:05d}").mkdir(parents=True)
    here, store = Place(tmp_path), Place(tmp_path, Mirror("s3://bucket/sweep", None, "bucket/sweep"))
    with pytest.raises(UserError, match=r"^sweep\.trials: got 3; .* 3 run folders may take .*; make fewer, or choose"):
        capacity.check_disk([job], 3, 3, here, resumed=True)
    (tmp_path / "trials" / "00000" / "config.yaml").write_text("")
    capacity.check_disk([job], 3, 3, here, resumed=True)
    with pytest.raises(UserError, match=r"^sweep\.trials: got 3; "):
        capacity.check_disk([job], 3, 3, here, resumed=False)
    capacity.check_disk([job], 27, 2, store, resumed=False)
    with pytest.raises(UserError, match=r"^sweep\.concurrent: got 3; .* 3 run folders may .*; set fewer, or TMPDIR"):
        capacity.check_disk([job], 27, 3, store, resumed=False)


def test_model_without_a_plan_runs_one_trial_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Longformer asks its tensors for numbers; a plan of it alone ends in one line, and a check warns."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"a": f"text {n}", "y": "pq"[n % 2]}) + "\n" for n in range(12)))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    keys = {
        "task": {"name": "table", "path": str(file), "prompt": "{a}", "label": "y"},
        "model": {"path": "random", "random": {"type": "longformer", "attention_window": 4, **sizes}},
        "federation": {"clients": 2, "rounds": 1, "partition": {"kind": "iid"}},
        "resources": {"workers": 0},
    }
    job = prepare(load_config(keys))
    assert capacity.at_once([job], [Node(64)], most=100) == 1
    assert "trials run one at a time, for their memory is not known before they train" in caplog.text
    with pytest.raises(
        UserError, match=r"^model.path: got 'random'; allowed: a model whose memory follows from shapes"
    ):
        plan.plan_of(job)
    plan.check(job)
    assert "whether the run fits into memory is not known" in caplog.text


# Shared inputs


def test_keys_that_rows_and_weights_depend_on() -> None:
    def keys(*overrides: str) -> tuple[str, str]:
        config = load_config(TINY, overrides)
        return input_key(config), weights_key(config)

    rows, weights = keys()
    assert keys("method.rank=2", "optimizer.lr=1", "federation.local_steps=9") == (rows, weights)
    assert keys("federation.partition={kind: iid}")[0] != rows
    assert keys("federation.partition={kind: iid}")[1] == weights
    assert keys("seed=1") != (rows, weights)  # drawn weights
    assert keys("model.random.num_hidden_layers=2")[1] != weights
    pretrained = [keys("model.path=smollm2-135m", f"seed={seed}")[1] for seed in (0, 1)]
    assert pretrained[0] == pretrained[1]


def test_axis_values_are_its_ends() -> None:
    assert Axis(uniform=(0.5, 2)).values == (0.5, 2.0)


def test_programs_of_all_trials_are_named() -> None:
    """Of the shared configuration, or of every value where the space varies them."""
    shared = {"evaluation": {"metrics": ["a.py"], "generate_rows": 2}, "callbacks": ["a:b"]}
    fixed = {"space": {"seed": {"grid": [0, 1]}}}
    varied = {"space": {"evaluation.metrics": {"grid": [["b.py"], ["c.py", "b.py"]]}, "seed": {"grid": [0, 1]}}}
    found = [Sweep(shared, Search.model_validate(search)).programs for search in (fixed, varied)]
    assert found == [
        {"evaluation.metrics": ("a.py",), "callbacks": ("a:b",)},
        {"evaluation.metrics": ("b.py", "c.py"), "callbacks": ("a:b",)},
    ]
