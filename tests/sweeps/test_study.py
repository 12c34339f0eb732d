"""The experiments' studies: they load, choose what they say, and their tables are those of the raw rows beside them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rayfed_sub import load_config
from rayfed_sub.methods import build

ROOT = Path(__file__).parents[2]
DIFFERENCES = ", ".join([r"[+-]\d\.\d{3}"] * 3)
TOLD = {"loss": "held_out_loss", "ROUGE-L": "rouge_l", "F1": "macro_f1"}
STUDIES = sorted((ROOT / "experiments" / "studies").glob("*.yaml"))


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "experiments" / "study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


study = loaded()


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_run_of_a_study_has_a_configuration(file: Path) -> None:
    read = study.read_study(file)
    folders = []
    for variant in read.variants:
        chosen = read.tune.values[0] if read.tune else None
        runs = [*study.counted_trials(read, variant, ["task.path=x.parquet"], chosen)]
        runs += study.tuning_trials(read, variant, [])
        for trial in runs:
            config = load_config(read.base, trial.overrides)
            build(config.method)
            assert config.seed == trial.seed
            assert (config.evaluation.split == "validation") == trial.tuning
            folders.append(trial.folder)
    assert len(set(folders)) == len(folders)
    assert read.equal_bytes is None or read.equal_bytes in read.variants


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_tables_of_the_readme_are_those_of_the_raw_rows(file: Path) -> None:
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert f"studies/{file.name}" in readme
    if file.with_suffix(".csv").exists():
        assert "\n".join(study.tables(file)) in readme


def test_the_figures_of_the_verdicts_are_those_of_the_raw_rows() -> None:
    """What came out is told as `A - B: SCORE differences (ratio)`, by the names of variants of the row's studies."""
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    claims = [line.split("|") for line in readme.partition("## Tables")[0].splitlines() if line.count("|") == 7]
    told = 0
    for _, claim, _, names, _, came_out, _, _ in claims:
        files = [ROOT / "experiments" / "studies" / f"{name.strip()}.csv" for name in names.split(",")]
        for said in came_out.strip().split("<br>") if re.search(DIFFERENCES, came_out) else ():
            rows = [row for file in files for row in study.read(file)]
            one, other = said.partition(": ")[0].split(" - ")
            for score, differences, times in re.findall(rf"({'|'.join(TOLD)}) ({DIFFERENCES})(?: \((.*?)x\))?", said):
                found, ratio = study.paired(rows, one, other, TOLD[score])
                assert differences == ", ".join(f"{difference:+.3f}" for difference in found), (claim, said)
                assert times == (f"{ratio:.2f}" if score == "ROUGE-L" else ""), (claim, said)
                told += 1
    assert told == len(re.findall(DIFFERENCES, readme)) > 50


def test_a_difference_is_taken_in_seeds_that_both_have() -> None:
    def row(variant: str, seed: str, loss: str, tuning: str = "False") -> dict[str, str]:
        return {"variant": variant, "seed": seed, "tuning": tuning, "held_out_loss": loss}

    rows = [row("a", "10", "3.0"), row("a", "2", "1.0"), row("a", "0", "", "False"), row("a", "3", "5.0")]
    rows += [row("b", "2", "2.5"), row("b", "10", "1.5"), row("b", "0", "9.0"), row("b", "2", "7.0", "True")]
    differences, ratio = study.paired(rows, "a", "b", "held_out_loss")
    assert differences == [1.0 - 2.5, 3.0 - 1.5]  # seeds 2 and 10
    assert ratio == (1.0 + 3.0) / (2.5 + 1.5)
    with pytest.raises(ValueError, match="no seed"):
        study.paired(rows, "a", "c", "held_out_loss")


def test_tuning_cannot_be_talked_into_judging_held_out_rows() -> None:
    read = study.read_study(ROOT / "experiments" / "studies" / "medquad-small.yaml")
    for trial in study.tuning_trials(read, "fedftg", ["evaluation.split=held-out", "evaluation.generate_rows=9"]):
        config = load_config(read.base, trial.overrides)
        assert (config.evaluation.split, config.evaluation.generate_rows) == ("validation", 0)
        assert config.task.seed == 0  # so that no seed's held-out rows are among these


def test_the_lowest_mean_validation_loss_is_chosen_and_what_diverged_is_not() -> None:
    def row(value: float, loss: float | None) -> dict[str, Any]:
        return {"value": value, "held_out_loss": loss}

    rows = [row(0.1, 2.0), row(0.1, 4.0), row(0.2, 2.5), row(0.2, 3.0), row(0.3, 0.1), row(0.3, None)]
    assert study.best(rows, (0.1, 0.2, 0.3)) == 0.2  # means 3 and 2.75
    assert study.best([row(0.1, float("nan")), row(0.2, 9.0)], (0.1, 0.2)) == 0.2
    with pytest.raises(ValueError, match="diverged"):
        study.best([row(0.3, None)], (0.3,))


def test_rows_of_an_earlier_sitting_count_only_for_trials_that_there_still_are() -> None:
    def row(seed: int, value: float, tuning: bool = False) -> dict[str, Any]:
        return {"variant": "a", "seed": seed, "tuning": tuning, "value": value}

    before = [row(0, 0.03), row(1, 0.03), row(0, 0.03, tuning=True)]
    results = study.Results(list(before), list(before))
    results.keep([study.Trial("a", 0, 0.1, False, ()), study.Trial("a", 0, 0.03, False, ())], tuning=False)
    assert results.rows == results.curves == [row(0, 0.03), row(0, 0.03, tuning=True)]
    results.take({**row(0, 0.03), "rounds": 7}, [])
    assert results.rows == [row(0, 0.03, tuning=True), {**row(0, 0.03), "rounds": 7}]
    assert results.curves == [row(0, 0.03, tuning=True)]


def test_loss_at_equal_bytes_lies_between_the_evaluated_rounds() -> None:
    curve = [{"bytes": str(sent), "held_out_loss": str(loss)} for sent, loss in ((0, 4.0), (100, 3.0), (300, 2.0))]
    assert study._loss_at(curve, 150) == pytest.approx(3.0 - 50 / 200)
    assert study._loss_at(curve, 999) == 2.0  # less was sent in all
    assert study._loss_at(curve, 99) is None  # nobody knows how it fell from the untrained model's


def test_a_study_does_not_mix_models() -> None:
    read = study.read_study(ROOT / "experiments" / "studies" / "t-agg.yaml")
    rows = [{"model": "stories260K"}]
    study.check_model(read, rows, ["model.path=models/stories260K"])
    with pytest.raises(study.UserError, match=r"model.path: got 'other'; allowed: stories260K"):
        study.check_model(read, rows, ["model.path=models/other"])


def test_a_table_gives_mean_and_deviation_over_seeds_and_marks_the_edge(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "claim: c\nbase: b.yaml\nseeds: [0, 1]\nvariants: {a: [], b: [], c: [], d: []}\nequal_bytes: a\n"
        "tune: {key: optimizer.lr, values: [1, 2, 3]}\n"
    )
    empty = dict.fromkeys(study.COLUMNS, "")

    def row(variant: str, seed: int, loss: float, up: int, lr: int) -> dict[str, str]:
        told = {"variant": variant, "seed": seed, "tuning": False, "value": lr, "held_out_loss": loss}
        return {**empty, **{k: str(v) for k, v in {**told, "uplink_bytes": up, "downlink_bytes": up}.items()}}

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
    head, _, first, second, third, fourth = study.markdown(study.read_study(file), rows, curves)
    assert head == "| variant | optimizer.lr | held out loss | loss at 2 MB | MB up | MB down | runs |"
    assert first == "| a | 2 | 1.500 ± 0.707 | 1.500 ± 0.707 | 1 | 1 | 2 of 2 |"  # sqrt(0.5 ** 2 + 0.5 ** 2)
    assert second == "| b | 3 (edge) | 3.000 | 4.333 | 2 | 2 | 1 of 2 |"  # 2 MB: a third of the way from 5 to 3
    assert third == "| c | diverged | diverged | diverged | diverged | diverged | 0 of 2 |"
    assert fourth == "| d | not run | not run | not run | not run | not run | 0 of 2 |"
