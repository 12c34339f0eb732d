"""Runs with peft's settings: the bits of any pack, planned bytes, the exported adapter, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM

from rayfed_sub import run
from rayfed_sub.core.errors import UserError
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.planning.plan import job_parts
from rayfed_sub.telemetry.events import Summary
from tests.end_to_end.test_start import configured, job_of, loaded, logits

# Layers of one shape with other ranks: up_proj and gate_proj of either block.
RANKS = "method.rank_pattern={layers.1.*: 3, up_proj: 1}"
SETTINGS = (
    *("method.name=fedit", "method.rank=2", "method.use_rslora=true", RANKS, "method.alpha_pattern={gate_proj: 4.0}"),
    *("model.targets=(up|gate|down)_proj$", "federation.clients=8", "federation.rounds=2"),
)
DROPOUT = "method.dropout=0.25"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    path.write_text("q,a\n" + "\n".join(f"what {'so ' * (i % 5)}{i},answer {i * i}" for i in range(80)) + "\n")
    return path


@pytest.fixture(scope="module")
def dropped(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A run with all settings, in packs of one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run(configured(table, None, *SETTINGS, DROPOUT, "resources.pack_size=1"), folder)


@pytest.mark.parametrize("most", [3, *(pytest.param(most, marks=pytest.mark.slow) for most in (2, 8))])
def test_dropout_has_the_same_bits_in_any_pack(most: int, dropped: tuple[Path, Summary], table: Path, tmp_path: Path):
    summary = run(configured(table, None, *SETTINGS, DROPOUT, f"resources.pack_size={most}"), tmp_path / "run")
    assert summary.weights_sha256 == dropped[1].weights_sha256


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_dropout_has_the_same_bits_for_any_workers(
    ray_session: None, workers: int, dropped: tuple[Path, Summary], table: Path, tmp_path: Path
) -> None:
    summary = run(configured(table, None, *SETTINGS, DROPOUT, f"resources.workers={workers}"), tmp_path / "run")
    assert summary.weights_sha256 == dropped[1].weights_sha256


@pytest.mark.slow
def test_dropout_is_off_in_evaluation(dropped: tuple[Path, Summary], table: Path, tmp_path: Path) -> None:
    """The loss before training is that of the run without; training differs."""
    plain = run(configured(table, None, *SETTINGS, "method.dropout=0", "federation.rounds=1"), tmp_path / "run")
    assert plain.metrics["held_out_loss_before"] == dropped[1].metrics["held_out_loss_before"]
    assert plain.metrics["held_out_loss"] != dropped[1].metrics["held_out_loss"]


def test_planned_bytes_are_the_run_s(dropped: tuple[Path, Summary], table: Path) -> None:
    """Numbers up, each client: block 0 has 1 (96 + 32) of up_proj and 2 (96 + 32) of the other two, block 1 has 3 of
    each."""
    numbers = (1 + 2 + 2 + 3 * 3) * (96 + 32)
    job = job_of(configured(table, None, *SETTINGS, DROPOUT))
    planned, clients = job_parts(job).traffic(), pd.read_parquet(dropped[0] / "clients.parquet")
    assert clients["uplink_bytes"].tolist() == [4 * numbers] * 16
    assert {client.up for client in planned.clients} == {4 * numbers}
    assert sum(client.down for client in planned.clients) == clients["downlink_bytes"].sum()
    assert dropped[1].planned_memory_bytes is not None


def test_exported_adapter_carries_the_settings(dropped: tuple[Path, Summary], tmp_path: Path) -> None:
    export_hf(dropped[0], tmp_path / "hf")
    export_peft(dropped[0], tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.25)
    model = loaded(tmp_path / "peft")
    assert {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")} == {1, 2, 3}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert float((logits(whole) - logits(model.get_base_model())).abs().max()) < 1e-4
    with model.disable_adapter():
        assert float((logits(whole) - logits(model)).abs().max()) > 1e-2


def test_run_of_a_version_without_the_settings_goes_on(table: Path, tmp_path: Path) -> None:
    """What its configuration does not name had no effect then, as the defaults have none now."""
    config = configured(table, None)
    whole = run(config, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    for field in ("dropout", "use_rslora", "rank_pattern", "alpha_pattern"):
        del tree["method"][field]
    del tree["model"]["start_from"]
    file.write_text(yaml.safe_dump(tree))
    (tmp_path / "run" / "summary.json").unlink()
    assert run(config, tmp_path / "run", resume=True).weights_sha256 == whole.weights_sha256


def test_patterns_in_another_order_are_another_run(dropped: tuple[Path, Summary], table: Path) -> None:
    other = RANKS.replace("layers.1.*: 3, up_proj: 1", "up_proj: 1, layers.1.*: 3")
    config = configured(table, None, *[other if text == RANKS else text for text in SETTINGS], DROPOUT)
    with pytest.raises(UserError, match=r"method\.rank_pattern: got 'up_proj'; allowed: the order of patterns"):
        run(config.model_copy(update={"resources": config.resources}), dropped[0], resume=True)
