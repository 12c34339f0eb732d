"""The benchmarks at their smallest: rayfed_sub and the bare loop do the same work, whatever time they take."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.benchmarks import gpu, growth, quantised, race
from experiments.benchmarks.cases import GROWTH, LEAST, LOADS, LOW_RANK, RACED, TRAIN, Case
from experiments.benchmarks.marks import case_of
from experiments.benchmarks.work import write_run
from rayfed_sub import load_config
from rayfed_sub.config.schema import Model
from rayfed_sub.methods import build
from rayfed_sub.models.architecture import architecture
from rayfed_sub.models.quantised import quantised_in
from rayfed_sub.models.weights import load_weights
from tests.models.test_quantised import LLAMA

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", [*RACED.values(), *(case for part in LOADS.values() for case in part), GROWTH])
def test_every_case_is_a_configuration(case: Case, tmp_path: Path) -> None:
    write_run(case, tmp_path / "work", workers=2)
    config = load_config(tmp_path / "work" / "config.yaml")
    build(config.method)
    read = case_of(tmp_path / "work")
    assert replace(read, contestants=tuple(read.contestants)) == case  # JSON has no tuples
    assert (config.federation.clients, config.federation.rounds) == (case.clients, case.rounds)
    assert (config.federation.partition.kind == "column") == (case.does == TRAIN)
    assert (config.method["name"] == "fedftg") == (case.does in (TRAIN, LOW_RANK))


def test_doctests() -> None:
    for module in (growth, race):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_sides_end_with_the_same_weights_and_the_engine_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "race.json"
    command = [sys.executable, "-m", "experiments.benchmarks.race", "smoke", "load-smoke", "--out", str(out)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    passed = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    found = {(result["case"], result["contestant"], result["does"]): result for result in record["results"]}
    ours, idle = found["smoke", "rayfed_sub", TRAIN], found["load-smoke", "rayfed_sub", LEAST]
    assert set(found) == {
        *(("smoke", "bare", TRAIN), ("smoke", "rayfed_sub", TRAIN)),
        *(("load-smoke", "rayfed_sub", LEAST), ("load-smoke", "rayfed_sub", LOW_RANK)),
    }
    # Three rounds move weights by about 3 x 2 steps x lr = 6e-3; the difference compared is rounding.
    assert ours["away"] < 1e-5
    assert 0 < ours["floor"] < ours["steady"]
    assert ours["stored"] is None
    # Idle clients: the store gets the broadcast in a round, at least 16 x 16 float32.
    assert idle["clients"] * idle["stored"] >= 16 * 16 * 4
    assert idle["start"] + idle["steady"] < passed
    assert record["cores"] == os.cpu_count()


def test_quantised_weights_are_compared_with_bitsandbytes() -> None:
    whole = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}  # others' rows bitsandbytes gets wrong with AVX-512
    found = []
    for quantize in ("none", "nf4"):
        model = Model(path="random", random=whole, dtype="bfloat16", quantize=quantize)
        found.append(load_weights(model, architecture(model, "causal-lm"), seed=0))
    plain, nf4 = found[0], quantised_in(found[1])
    assert quantised.exact(nf4, plain)
    name = next(iter(nf4))
    assert not quantised.exact(nf4, {**plain, name: plain[name] * 1.1})


@pytest.mark.slow
def test_galore_step_agrees_with_galore_torch(tmp_path: Path) -> None:
    out = tmp_path / "galore.csv"
    command = [sys.executable, "-m", "experiments.benchmarks.galore", "24x16", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(out.read_text().splitlines()) > 1


@pytest.mark.parametrize("asked", ["race Z", "growth Z", "growth --show --out Z", "gpu Z", "gpu --wheels Z"])
def test_wrong_name_is_refused_in_one_line(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", asked.split())
    with pytest.raises(SystemExit) as ended:
        {"race": race, "growth": growth, "gpu": gpu}[asked.split(maxsplit=1)[0]].main()
    assert ended.value.code == 2
    assert "Z" in capsys.readouterr().err.splitlines()[-1]
