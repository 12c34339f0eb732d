"""Runs on pairs of texts, numbers and several labels a row, from rows to exports, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from rayfed_sub import load_config, run
from rayfed_sub.export.exported import export_hf
from rayfed_sub.telemetry.events import Summary
from tests.helpers.pictures import drawn, filed

BERT = {"type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {**BERT, "type": "vit", "image_size": 16, "patch_size": 8}


def keys(path: Path, model: dict[str, Any], **task: Any) -> dict[str, Any]:
    return {
        "model": {"path": "random", "random": model},
        "task": {"name": "table", "path": str(path), "label": "y", **task},
        "federation": {"clients": 2, "rounds": 2, "local_steps": 2, "partition": {"kind": "dirichlet"}},
        "method": {"name": "fedit", "rank": 2},
        "optimizer": {"lr": 0.02},
        "diagnostics": {"every": 0},
        "resources": {"workers": 0},
    }


def scores_of(summary: Summary) -> set[str]:
    return {name for name in summary.metrics if not name.endswith("_before") and "/" not in name}


def test_regression_of_pairs(tmp_path: Path) -> None:
    """The number is the share of equal letters of the two texts; the export is judged as transformers reads it."""
    rows = [{"a": "ab" * (1 + i % 5), "b": f"{i}" * (1 + i % 3), "y": 1 + i % 7 / 4} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = load_config(
        keys(path, BERT, prompt=["{a}", "{b}"], validation_share=0.2),
        ["evaluation.split=validation", "early_stopping.metric=pearson"],
    )
    summary = run(config, tmp_path / "run")
    assert scores_of(summary) >= {"held_out_loss", "pearson", "spearman", "mean_absolute_error"}
    assert summary.metrics["held_out_loss"] < summary.metrics["held_out_loss_before"]  # from a mean of 0 towards 1.75
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    best = scores[(scores.metric == "pearson") & scores.client.isna() & (scores.rounds > 0)]
    assert summary.best is not None
    assert summary.best["value"] == best.value.max()
    alone = config.model_copy(update={"resources": config.resources.model_copy(update={"pack_size": 1})})
    apart = run(alone, tmp_path / "alone")
    assert apart.weights_sha256 == summary.weights_sha256
    export_hf(tmp_path / "run", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["problem_type"], written["id2label"]) == ("regression", {"0": "LABEL_0"})
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    one = torch.tensor([[1, *(byte + 3 for byte in b"ab"), 2, *(byte + 3 for byte in b"0"), 2]])
    types = torch.tensor([[0, 0, 0, 0, 1, 1]])
    answers = [module(input_ids=one, token_type_ids=given).logits for given in (types, 0 * types)]
    assert answers[0].shape == (1, 1)
    assert not torch.equal(*answers)


@pytest.mark.parametrize("several", [True, False], ids=["lists", "columns"])
def test_several_labels_of_images(several: bool, tmp_path: Path) -> None:
    """The same labels as lists and as columns: the same rows, and the same weights but for the head's order."""
    kinds = [["dark"], ["dark", "round"], [], ["round"]]
    rows = [{"image": filed(drawn("disc", i)), "y": kinds[i % 4]} for i in range(24)]
    columns = [{"image": row["image"], **{name: name in row["y"] for name in ("dark", "round")}} for row in rows]
    path = tmp_path / "rows.parquet"
    pd.DataFrame(rows if several else columns).to_parquet(path)
    label = "y" if several else ["dark", "round"]
    summary = run(load_config(keys(path, VIT, image="image", label=label)), tmp_path / "run")
    assert scores_of(summary) >= {"held_out_loss", "subset_accuracy", "micro_f1", "macro_f1"}
    assert not any(name.startswith("confusion") for name in pd.read_parquet(tmp_path / "run" / "scores.parquet").metric)
    export_hf(tmp_path / "run", tmp_path / "hf")
    module = AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
    assert module.config.problem_type == "multi_label_classification"
    assert module.config.id2label == {0: "dark", 1: "round"}
