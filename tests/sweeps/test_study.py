"""Studies: loading, choice, missing runs, and the README's tables against the raw rows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rayfed_sub import UserError, load_config, run
from rayfed_sub.config.loading import read_yaml
from rayfed_sub.core.errors import RunError
from rayfed_sub.data.fingerprint import Fingerprint
from rayfed_sub.methods import build
from rayfed_sub.models.start import StartInfo
from rayfed_sub.sweeps import study_clocks, study_runner, study_tables
from rayfed_sub.sweeps import trial as trials
from rayfed_sub.sweeps.progress import Begun, TrialNow, failure_of
from rayfed_sub.sweeps.runner import check_bases
from rayfed_sub.sweeps.shared_inputs import input_key
from rayfed_sub.sweeps.study import Part, Study, StudyTrial, check_trials, counted_trials, load_study, tuning_trials
from rayfed_sub.training.client_errors import client_failed

ROOT = Path(__file__).parents[2]
DIFFERENCES = ", ".join([r"[+-]\d\.\d{3}"] * 3)
SCORES = {"loss": "held_out_loss", "ROUGE-L": "rouge_l", "F1": "macro_f1"}
FILES = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))
PLANNED = sorted((ROOT / "experiments" / "studies" / "planned").glob("*.yaml"))  # not run yet
BASE = f"claim: c\nbase: {ROOT / 'experiments' / 'tiny.yaml'}\nseeds: [0]\n"
SMALL = (
    "set: [federation.clients=2, federation.rounds=1, federation.local_steps=1, evaluation.eval_rows=16,\n"
    "      resources.workers=0, task.validation_share=0.1]\n"
)


def named(name: str) -> Study:
    return load_study(ROOT / "experiments" / "studies" / f"{name}.yaml")


def written(folder: Path, text: str) -> Path:
    file = folder / "s.yaml"
    file.write_text(text)
    return file


# --- the experiments' studies


@pytest.mark.parametrize("file", [*FILES, *PLANNED], ids=lambda file: file.stem)
def test_every_run_of_a_study_has_a_configuration(file: Path) -> None:
    read, folders = load_study(file), []
    base = read_yaml(read.base)
    for variant in read.variants:
        chosen = read.tune.values[0] if read.tune else None
        runs = [*counted_trials(read, variant, ["task.path=x.parquet"], chosen)]
        runs += tuning_trials(read, variant, [])
        for trial in runs:
            config = load_config(base, trial.overrides)
            build(config.method)
            assert config.seed == trial.seed
            assert (config.evaluation.split == "validation") == trial.tuning
            folders.append(trial.folder)
    check_trials(read, ["task.path=x.parquet"])
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_readme_tables_match_the_raw_rows(file: Path) -> None:
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert f"rayfed-sub study experiments/studies/{file.name}" in readme
    assert "\n".join(study_clocks.tables(load_study(file))) in readme


def test_figures_of_the_conclusions_match_the_raw_rows() -> None:
    """The outcome column has `A - B: SCORE differences (ratio)`, by names of variants of the row's studies."""
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    claims = [line.split("|") for line in readme.partition("## Tables")[0].splitlines() if line.count("|") == 7]
    compared = 0
    for _, claim, _, names, _, came_out, _, _ in claims:
        if not re.search(DIFFERENCES, came_out):
            continue
        files = [study_tables.csv_files(named(name.strip()))[0] for name in names.split(",")]
        rows = [row for file in files for row in study_tables.read_rows(file)]
        for outcome in came_out.strip().split("<br>"):
            one, other = outcome.partition(": ")[0].split(" - ")
            for score, differences, times in re.findall(
                rf"({'|'.join(SCORES)}) ({DIFFERENCES})(?: \((.*?)x\))?", outcome
            ):
                found, ratio = study_tables.paired(rows, one, other, SCORES[score])
                assert differences == ", ".join(f"{difference:+.3f}" for difference in found), (claim, outcome)
                assert times == (f"{ratio:.2f}" if score == "ROUGE-L" else ""), (claim, outcome)
                compared += 1
    assert compared == len(re.findall(DIFFERENCES, readme)) > 50


# --- trials and their choice


def test_tuning_never_evaluates_held_out_rows() -> None:
    read = named("medquad-small")
    for trial in tuning_trials(read, "fedftg", ["evaluation.split=held-out", "evaluation.generate_rows=9"]):
        config = load_config(read.base, trial.overrides)
        assert (config.evaluation.split, config.evaluation.generate_rows) == ("validation", 0)
        assert config.task.seed == 0  # so that they contain no seed's held-out rows


def test_lowest_mean_validation_loss_is_chosen_without_diverged_trials() -> None:
    def row(value: float, loss: float | None) -> dict[str, Any]:
        return {"variant": "a", "value": value, "held_out_loss": loss}

    rows = [row(0.1, 2.0), row(0.1, 4.0), row(0.2, 2.5), row(0.2, 3.0), row(0.3, 0.1), row(0.3, None)]
    assert study_runner.best_value(rows, (0.1, 0.2, 0.3)) == 0.2  # means 3 and 2.75
    assert study_runner.best_value([row(0.1, float("nan")), row(0.2, 9.0)], (0.1, 0.2)) == 0.2
    with pytest.raises(UserError, match=r"study\.tune\.values: got \[0\.3\]; .* all did with a; add smaller ones"):
        study_runner.best_value([row(0.3, None)], (0.3,))


@pytest.mark.parametrize(
    ("error", "its_own"),
    [
        (client_failed("non-finite loss at local step 1", 4, 17), True),
        (client_failed("non-finite norm of its change", 4, 17), True),
        (RunError("aggregation", "non-finite values in a/left; lower optimizer.lr", round=4, resume=None), True),
        (RunError("callback halve", "answered lr_factor=inf, not a finite number >= 0", round=4), False),
        (client_failed("batch of local step 2: ValueError: not a finite number", 4, 17), False),
        (RunError("coordinator", "died 5 times: non-finite"), False),
    ],
)
def test_only_numbers_of_training_diverge(error: RunError, its_own: bool) -> None:
    failure = failure_of(f"Traceback\n  raise error\nrayfed_sub.core.errors.RunError: {error}")
    assert study_runner.diverged(failure or "") == its_own


def test_study_does_not_mix_models() -> None:
    read, rows = named("t-agg"), [{"model": "stories260K"}]
    study_runner.check_model(read, rows, ["model.path=models/stories260K"])
    with pytest.raises(UserError, match=r"model.path: got 'other'; allowed: stories260K"):
        study_runner.check_model(read, rows, ["model.path=models/other"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("claim: c\nseeds: [0]\nvariants: {a: []}\n", "study.base: got None; allowed: the configuration that all"),
        (f"{BASE}variants: {{a: []}}\nseed: 1\n", r"study\.seed: got 1; .*did you mean seeds"),
        (f"{BASE}variants: {{}}\n", r"study\.variants: got {}; "),
        (f"{BASE}variants: {{a: []}}\nset: 3\n", r"study\.set: got 3; allowed: a list, each text"),
        (f"{BASE}variants: {{a: [], ..: []}}\n", r"study\.variants: got '\.\.'; allowed: names that may be a folder's"),
        (f"{BASE}variants: {{a: []}}\nequal_bytes: b\n", r"study\.equal_bytes: got 'b'; allowed: a variant of s: a;"),
        (f"{BASE}variants: {{a: []}}\ntune: {{key: seed}}\n", r"study\.tune\.values: got None; "),
        (f"{BASE}variants: {{a: []}}\ntune: {{key: seed, values: [1], seeds: [3, 3]}}\n", r"tune\.seeds: got \[3, 3\]"),
        (
            f"{BASE}variants: {{a: []}}\ntune: {{key: optimizer.betas, values: [[0.9, 0.99]]}}\n",
            r"study\.tune\.values: got",
        ),
        (
            f"{BASE}variants: {{a: []}}\ntune: {{key: optimizer.lr, values: [1], more: {{b: [2]}}}}\n",
            r"study\.tune\.more: got 'b'; allowed: a variant of",
        ),
        (
            f"{BASE}variants: {{a: []}}\ntune: {{key: optimizer.name, values: [sgd], more: {{a: [2]}}}}\n",
            r"study\.tune\.more: got .*; allowed: nothing where study\.tune\.values are no",
        ),
        (f"{BASE}variants: {{a: []}}\nresults: 3\n", r"study\.results: got 3; allowed: a path"),
        ("variants: [", r"STUDY\.yaml: got"),
    ],
)
def test_error_in_a_study_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_study(written(tmp_path, text))


def test_every_run_is_checked_before_the_first(tmp_path: Path) -> None:
    read = load_study(written(tmp_path, f"{BASE}variants: {{a: [], b: [method.rank=0]}}\n"))
    with pytest.raises(UserError, match=r"method\.rank: got 0"):
        study_runner.run_study(read, [], tmp_path / "runs", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.yaml"]


@pytest.mark.slow  # that a trial has the bits of a run alone is quick in `tests/end_to_end/test_sweep.py`
def test_study_runs_missing_trials_only(ray_session: None, tmp_path: Path) -> None:
    """Two values, one of which diverges; the other's run has the bits of a run alone.  One run at a time, so that both
    share a process, whose start takes longer than they."""
    tune = "tune: {key: optimizer.lr, values: [0.003, 1.0e+39]}\n"
    file = written(tmp_path, f"{BASE}{SMALL}{tune}variants: {{a: []}}\nresults: out\n")
    read, begun, failures = load_study(file), list[int](), list[str | None]()

    def count(record: object) -> None:
        if isinstance(record, Begun):
            begun.append(record.total)
        if isinstance(record, TrialNow) and record.status == "failed":
            failures.append(record.failure)

    table = study_runner.run_study(read, [], tmp_path / "runs", 1, count)
    assert begun == [2, 1]
    assert table == study_tables.study_table(read)
    assert (tmp_path / "runs" / "s" / "a" / "run-0.003-0" / "report.html").exists()
    rows, points = map(study_tables.read_rows, study_tables.csv_files(read))
    (failed,) = (row for row in rows if row["failure"])
    assert (failed["value"], failed["held_out_loss"], failed["weights_sha256"]) == ("1e+39", "", "")
    assert re.fullmatch(r"round 0, client \d, local training: non-finite [^;]*", failed["failure"])
    assert [(failure or "").partition(";")[0] for failure in failures] == [failed["failure"]]
    (counted,) = (row for row in rows if row["tuning"] == "False")
    assert counted["value"] == "0.003"
    (trial,) = counted_trials(read, "a", [], counted["value"])
    alone = run(load_config(read.base, trial.overrides), tmp_path / "alone")
    assert counted["weights_sha256"] == alone.weights_sha256
    assert counted["versions"].startswith("rayfed_sub 0.1.0")
    assert float(counted["held_out_loss"]) == alone.metrics["held_out_loss"]
    (end,) = (row for row in points if row["tuning"] == "False" and row["rounds"] == "1")
    assert int(end["bytes"]) == alone.uplink_bytes + alone.downlink_bytes


@pytest.mark.slow
def test_one_more_seed_is_one_more_run(ray_session: None, tmp_path: Path) -> None:
    """A diverged run has no end to resume from, so it begins anew."""
    tune = "tune: {key: optimizer.lr, values: [0.003, 1.0e+39]}\n"
    file = written(tmp_path, f"{BASE}{SMALL}{tune}variants: {{a: []}}\nresults: out\n")
    begun: list[int] = []

    def count(record: object) -> None:
        if isinstance(record, Begun):
            begun.append(record.total)

    study_runner.run_study(load_study(file), [], tmp_path / "runs", 2, count)
    rows = study_tables.read_rows(tmp_path / "out" / "s.csv")
    file.write_text(file.read_text().replace("seeds: [0]", "seeds: [0, 1]"))
    begun.clear()
    study_runner.run_study(load_study(file), [], tmp_path / "runs", 1, count)
    assert begun == [1, 1]
    assert len(study_tables.read_rows(tmp_path / "out" / "s.csv")) == len(rows) + 1


@pytest.mark.parametrize("whose", ["study", "sweep", "data.json"])
def test_finished_runs_do_not_stand_beside_those_from_another_start(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter that model.start_from names was trained in place since."""
    data, digest = Fingerprint(1, "a", "b", "c"), "then"
    log = {"event": "started", "scores": [], "data": asdict(data), "start": digest}
    read = load_study(written(tmp_path, f"{BASE}variants: {{a: []}}\n"))
    (one,) = counted_trials(read, "a", [], None)
    folder = tmp_path / "runs" / one.folder
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps(log) + "\n")
    (folder / "config.yaml").write_text("")
    begun = StartInfo("./adapter", "an adapter", 1, "now", 1)
    base = SimpleNamespace(dataset=SimpleNamespace(fingerprint=data, kind="causal-lm"), begun=begun)
    job = SimpleNamespace(**vars(base), config=load_config(read.base), code={}, any_pack=True)
    for module in (study_runner, trials):
        monkeypatch.setattr(module, "summary_of", lambda *given: None)
    monkeypatch.setattr(study_runner, "job_on", lambda *given: job)
    part = Part("s", read_yaml(read.base), (one,), 1)
    config = part.config(one.values)
    shared, results = cast(Any, SimpleNamespace(job=lambda config: (job, None))), cast(Any, None)
    monkeypatch.setattr(trials.tune, "get_context", lambda: SimpleNamespace(get_trial_dir=lambda: "tune/00000"))
    own = {input_key(config): (config, cast(Any, base))}
    again = {
        "study": partial(study_runner.missing_trials, part, tmp_path / "runs", own, results),
        "sweep": partial(trials.trial, {"trial": one.values}, part, shared, str(tmp_path / "runs")),
        "data.json": partial(check_bases, [{**asdict(data), "start": digest}], [cast(Any, base)], "runs/s"),
    }
    with pytest.raises(UserError, match=r"model\.start_from: got './adapter'; .* began; its tensors are others now"):
        again[whose]()
    check_bases([asdict(data)], [cast(Any, base)], "runs/s")  # of a version that did not write it


# --- tables


def test_rows_of_an_earlier_session_count_only_for_current_trials() -> None:
    def row(seed: int, value: float, tuning: bool = False) -> dict[str, Any]:
        return {"variant": "a", "seed": seed, "tuning": tuning, "value": value}

    before = [row(0, 0.03), row(1, 0.03), row(0, 0.03, tuning=True)]
    found = study_tables.StudyRows(tuple(before), tuple(before))
    found = found.keeping([StudyTrial("a", 0, 0.1, False, ()), StudyTrial("a", 0, 0.03, False, ())], tuning=False)
    assert found.rows == found.curves == (row(0, 0.03), row(0, 0.03, tuning=True))
    found = found.taking({**row(0, 0.03), "rounds": 7}, [])
    assert found.rows == (row(0, 0.03, tuning=True), {**row(0, 0.03), "rounds": 7})
    assert found.curves == (row(0, 0.03, tuning=True),)


def test_difference_uses_common_seeds() -> None:
    def row(variant: str, seed: str, loss: str, tuning: str = "False") -> dict[str, str]:
        return {"variant": variant, "seed": seed, "tuning": tuning, "held_out_loss": loss}

    rows = [row("a", "10", "3.0"), row("a", "2", "1.0"), row("a", "0", "", "False"), row("a", "3", "5.0")]
    rows += [row("b", "2", "2.5"), row("b", "10", "1.5"), row("b", "0", "9.0"), row("b", "2", "7.0", "True")]
    differences, ratio = study_tables.paired(rows, "a", "b", "held_out_loss")
    assert differences == [1.0 - 2.5, 3.0 - 1.5]  # seeds 2 and 10
    assert ratio == (1.0 + 3.0) / (2.5 + 1.5)
    with pytest.raises(UserError, match="a seed with held_out_loss in common with c"):
        study_tables.paired(rows, "a", "c", "held_out_loss")


def test_differences_of_scores_that_are_0_or_not_there(tmp_path: Path) -> None:
    """A ratio to 0 is left out, and so is a score that the other variant has not."""
    read = load_study(written(tmp_path, f"{BASE}variants: {{a: [], b: []}}\n"))
    empty = {**dict.fromkeys(study_tables.COLUMNS, ""), "tuning": "False", "seed": "0"}
    rows = [
        {**empty, "variant": "a", "held_out_loss": "1.0", "matthews": "0.5", "pearson": "0.5"},
        {**empty, "variant": "b", "held_out_loss": "2.0", "matthews": "0.0"},
    ]
    assert study_tables.differences(read, rows, "a")[2:] == ["| b | -1.000; 0.50x | +0.500 |  |"]


def test_loss_at_equal_bytes_is_interpolated_between_evaluated_rounds() -> None:
    curve = [{"bytes": str(sent), "held_out_loss": str(loss)} for sent, loss in ((0, 4.0), (100, 3.0), (300, 2.0))]
    assert study_tables._loss_at(curve, 150) == pytest.approx(3.0 - 50 / 200)
    assert study_tables._loss_at(curve, 999) == 2.0  # fewer bytes were sent in total
    assert study_tables._loss_at(curve, 99) is None  # the loss curve from the untrained model is unknown


def test_table_has_mean_and_deviation_over_seeds_and_marks_the_edge(tmp_path: Path) -> None:
    read = load_study(
        written(
            tmp_path,
            "claim: c\nbase: b.yaml\nseeds: [0, 1]\nvariants: {a: [], b: [], c: [], d: []}\nequal_bytes: a\n"
            "tune: {key: optimizer.lr, values: [1, 2, 3], more: {a: [0.5], b: [2.5]}}\n",
        )
    )
    assert [read.tune.values_of(name) for name in "abc"] == [(0.5, 1, 2, 3), (1, 2, 2.5, 3), (1, 2, 3)]  # type: ignore[union-attr]
    assert study_tables.edged(read.tune, "a", "1") == "1"  # type: ignore[arg-type]
    empty = dict.fromkeys(study_tables.COLUMNS, "")

    def row(variant: str, seed: int, loss: float, up: int, lr: int) -> dict[str, str]:
        own = {"variant": variant, "seed": seed, "tuning": False, "value": lr, "held_out_loss": loss}
        return {**empty, **{k: str(v) for k, v in {**own, "uplink_bytes": up, "downlink_bytes": up}.items()}}

    rows = [row("a", 0, 1.0, 10**6, 2), row("a", 1, 2.0, 10**6, 2), row("b", 0, 3.0, 2 * 10**6, 3)]
    rows.append({**row("b", 1, 0, 0, 3), "failure": "diverged"})
    rows.append({**row("b", 0, 0.5, 0, 1), "tuning": "True"})
    rows.append({**empty, "variant": "c", "seed": "0", "tuning": "False", "failure": "diverged"})
    curves = [
        {"variant": v, "seed": s, "tuning": "False", "bytes": str(sent), "held_out_loss": str(loss)}
        for v, s, *points in (
            ("a", "0", (0, 9.0), (2e6, 1.0)),
            ("a", "1", (0, 9.0), (2e6, 2.0)),
            ("b", "0", (0, 9.0), (1e6, 5.0), (4e6, 3.0)),
        )
        for sent, loss in points
    ]
    head, _, first, second, third, fourth = study_tables.markdown(read, rows, curves)
    assert head == "| variant | optimizer.lr | held out loss | loss at 2 MB | MB up | MB down | runs |"
    assert first == "| a | 2 | 1.500 ± 0.707 | 1.500 ± 0.707 | 1 | 1 | 2 of 2 |"  # sqrt(0.5 ** 2 + 0.5 ** 2)
    assert second == "| b | 3 (edge) | 3.000 | 4.333 | 2 | 2 | 1 of 2 |"  # 2 MB: a third of the way from 5 to 3
    assert third == "| c | diverged | diverged | diverged | diverged | diverged | 0 of 2 |"
    assert fourth == "| d | not run | not run | not run | not run | not run | 0 of 2 |"


def test_score_that_some_seeds_lack_says_of_how_many_it_is(tmp_path: Path) -> None:
    read = load_study(written(tmp_path, f"{BASE.replace('[0]', '[0, 1, 2]')}variants: {{a: [], b: []}}\n"))
    empty = {**dict.fromkeys(study_tables.COLUMNS, ""), "tuning": "False", "uplink_bytes": "0", "downlink_bytes": "0"}
    scores = [("a", ("0.5", "", "0.7")), ("b", ("", "", ""))]
    rows = [
        {**empty, "variant": variant, "seed": f"{seed}", "held_out_loss": "1.0", "matthews": value}
        for variant, values in scores
        for seed, value in enumerate(values)
    ]
    _, _, a, b = study_tables.markdown(read, rows, [])
    assert a == "| a | 1.000 ± 0.000 | 0.600 ± 0.141 (2 of 3) | 0 | 0 | 3 of 3 |"  # sqrt(2 * 0.1 ** 2)
    assert b == "| b | 1.000 ± 0.000 |  | 0 | 0 | 3 of 3 |"


# --- simulated time

MIXES = (
    "variants: {a: [], b: [method.name=fedavg]}\ntarget: 2.4\nequal_hours: a\n"
    "mixes:\n  alike: {classes: {one: {seconds_per_step: 1}}}\n  phones: {classes: {one: {seconds_per_step: 4}}}\n"
)


def test_table_of_hours_by_hand(tmp_path: Path) -> None:
    """Two seeds of a, one of b: a takes 2 h and reaches 2.4 in one of them; b's loss after a's 2 h lies between its
    evaluations after 1 h (3.0) and 4 h (1.5)."""
    read = load_study(written(tmp_path, f"{BASE.replace('[0]', '[0, 1]')}{MIXES}"))

    def rows(variant: str, seed: int, *points: tuple[float, float, float]) -> list[dict[str, str]]:
        keys = {"mix": "phones", "variant": variant, "seed": f"{seed}", "joules": "", "idle_share": "0.25"}
        return [
            {**keys, "rounds": f"{n}", "held_out_loss": f"{loss}", "bytes": f"{1e6 * mb}", "seconds": f"{3600 * hours}"}
            for n, (hours, loss, mb) in enumerate(points)
        ]

    points = rows("a", 0, (0, 4.0, 0), (1, 2.5, 1), (2, 2.4, 2)) + rows("a", 1, (0, 4.0, 0), (1, 2.9, 1), (2, 2.6, 2))
    points += rows("b", 0, (0, 4.0, 0), (1, 3.0, 8), (4, 1.5, 32))
    head, _, first, second = study_clocks.markdown(read, points)
    assert head == "| devices | variant | hours | loss in the hours of a | hours to 2.4 | MB to 2.4 | idle | runs |"
    assert first == "| phones | a | 2 ± 0 | 2.500 ± 0.141 | 2 (1 of 2) | 2 (1 of 2) | 25% | 2 of 2 |"
    shorter = [*points[:1], *points[2:]]  # seed 0 was evaluated once less, and counts as much
    waits = [{**point, "idle_share": "0.75"} if point["seed"] == "0" else point for point in shorter]
    assert study_clocks.markdown(read, waits)[2].split(" | ")[6] == "50%"
    known = [{**point, "joules": "1500"} if point["variant"] == "a" else point for point in points]
    energies = [line.split(" | ")[6] for line in study_clocks.markdown(read, known)]
    assert [energies[0], *energies[2:]] == ["kJ", "1.5", "-"]
    assert second == "| phones | b | 4 | 2.500 | 4 | 32 | 25% | 1 of 2 |"


def test_finished_runs_are_told_again_for_every_mix(tmp_path: Path) -> None:
    text = f"{BASE}{SMALL}{MIXES}"
    read = load_study(written(tmp_path, text))
    (trial, *_) = counted_trials(read, "a", [], None)
    run(load_config(read_yaml(read.base), trial.overrides), tmp_path / "runs" / trial.folder)
    study_clocks.write_clocks(read, counted_trials(read, "a", [], None), tmp_path / "runs")
    rows = study_tables.read_rows(study_clocks.clocks_file(read))
    assert [(row["mix"], row["rounds"], float(row["seconds"])) for row in rows] == [
        ("alike", "0", 0.0),
        ("alike", "1", 1.0),
        ("phones", "0", 0.0),
        ("phones", "1", 4.0),
    ]
    assert len(study_clocks.clock_table(read)) == 2 + 2


def test_budget_of_hours_needs_devices_of_its_variant(tmp_path: Path) -> None:
    variants = "{v: [], w: ['devices.classes={a: {seconds_per_step: 1}}']}\ntarget: 2.5\n"
    check_trials(load_study(written(tmp_path, f"{BASE}variants: {variants}equal_hours: w\n")), [])
    with pytest.raises(UserError, match=r"study.equal_hours: got 'v'; allowed: a variant with devices"):
        check_trials(load_study(written(tmp_path, f"{BASE}variants: {variants}equal_hours: v\n")), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixes: {x: {}}", r"study.mixes.x: got \{\}; allowed: a file with devices.classes"),
        ("mixes: {x: {classes: {a: {}}}}", r"study.mixes.x.classes.a.seconds_per_step: got None; allowed: one of"),
        (
            "mixes: {x: {classes: {a: {seconds_per_step: 1}}, trace: phones.csv}}",
            "study.mixes.x.trace: got 'phones.csv'; allowed: null",
        ),
        ("mixes: {x: {classes: {a: {seconds_per_step: 1, dropout: 0.1}}}}", "study.mixes.x.classes.a: got 'hours or"),
        (
            "mixes: {x: {classes: {a: {seconds_per_step: 1}}}}\nset: ['devices.classes={a: {seconds_per_step: 1}}']",
            r"study.mixes: got \['x'\]; allowed: nothing with v, whose training depends on devices of its own",
        ),
        ("equal_hours: w", "study.equal_hours: got 'w'; allowed: a variant of s: v"),
        ("target: 2.5", "study.target: got 2.5; allowed: null in a study without devices, which has no hours; give"),
        ("equal_hours: v", "study.equal_hours: got 'v'; allowed: a variant with devices, whose hours are known; give"),
    ],
)
def test_error_in_mixes_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_trials(load_study(written(tmp_path, f"{BASE}variants: {{v: []}}\n{text}\n")), [])
