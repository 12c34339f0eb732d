"""Settings that meet: peft's with experts and encoder-decoders, starts of mixtures and of regressions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config, Optimizer
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Broadcast, Client
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.methods import build
from rayfed_sub.models.weights import assemble, load_weights
from tests.helpers.model_types import built
from tests.helpers.tiny_models import (
    Tiny,
    change,
    draw_batches,
    draw_pairs,
    lora_start,
    mixture,
    run_pack,
    run_reference,
    worst,
)

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL = {
    "type": "mixtral",
    **SIZES,
    **{"num_key_value_heads": 1, "num_local_experts": 3, "initializer_range": 0.1, "max_position_embeddings": 64},
}
BERT = {"type": "bert", **SIZES, "max_position_embeddings": 64, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    rows = [f"what {i},answer {i * i},{i / 7:.2f}" for i in range(40)]
    path.write_text("q,a,score\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def configured(table: Path, random: dict[str, Any], learned: dict[str, str], *overrides: str) -> Config:
    tree = {
        "model": {"path": "random", "random": random},
        "task": {"name": "table", "path": str(table), "prompt": "{q}", "max_length": 24, **learned},
        "federation": {"clients": 2, "rounds": 1, "local_steps": 2, "partition": {"kind": "iid"}},
        "method": {"name": "fedit", "rank": 2},
        "optimizer": {"lr": 0.02},
        "resources": {"workers": 0},
        "diagnostics": {"every": 0},
    }
    return load_config(tree, overrides)


@pytest.mark.parametrize("kind", ["lora", "galore"])
def test_run_of_a_mixture_goes_on_from_an_earlier_one(table: Path, tmp_path: Path, kind: str) -> None:
    """Experts' matrices too: the second begins where the first ended, and so does what they export."""
    method = ("method.name=fedit",) if kind == "lora" else ("method.name=fedftg",)
    answer = {"answer": "a"}
    first = run(configured(table, MIXTRAL, answer, *method), tmp_path / "first")
    begun = [f"model.start_from={tmp_path / 'first'}", "model.targets=attention"]
    begun += ["method.dropout=0.1"] if kind == "lora" else []  # which peft refuses beside the first's experts
    second = run(configured(table, MIXTRAL, answer, *method, *begun), tmp_path / "second")
    assert second.metrics["held_out_loss_before"] == pytest.approx(first.metrics["held_out_loss"], rel=1e-6)
    exports = [export_hf(tmp_path / "second", tmp_path / "hf").loading]
    if kind == "lora":
        exports.append(export_peft(tmp_path / "second", tmp_path / "peft").loading)
    ids = torch.arange(5, 25)[None]
    logits = []
    for name, loading in zip(("hf", "peft"), exports, strict=False):
        scope: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / name)
            exec(loading.partition("#")[0], scope)
        with torch.no_grad():
            logits.append(scope["model"].eval()(ids).logits)
    assert all(torch.allclose(logits[0], other, atol=1e-5) for other in logits[1:])


def test_start_of_a_regression(table: Path, tmp_path: Path) -> None:
    learned = {"label": "score"}
    first = run(configured(table, BERT, learned), tmp_path / "first")
    second = run(configured(table, BERT, learned, f"model.start_from={tmp_path / 'first'}"), tmp_path / "second")
    assert second.metrics["held_out_loss_before"] == pytest.approx(first.metrics["held_out_loss"], rel=1e-6)


def test_patterns_name_the_parameter_that_holds_experts() -> None:
    shape = mixture().shape
    method = build({"name": "fedit", "rank": 2, "rank_pattern": {"experts.down_proj": 3}})
    weights = {f"{layer.name}/weight": torch.zeros(layer.m, layer.n) for layer in shape.targets}
    method.check(shape)
    server = method.init_server(weights, shape, 0)
    start = method.start_client(Broadcast(0, server.tensors), None, Client(0, 0), shape)
    ranks = {layer.name.split(".")[-2]: start.tensors[f"{layer.name}/left"].shape[1] for layer in shape.experts}
    assert ranks == {"gate_up_proj": 2, "down_proj": 3}


def test_dropout_of_experts_is_refused() -> None:
    with pytest.raises(UserError, match=r"method.dropout: got 0.1; allowed: 0 where experts are targets"):
        build({"name": "fedit", "dropout": 0.1}).check(mixture().shape)


def test_dropout_in_an_encoder_decoder() -> None:
    """As in peft's layers, for rows of unequal lengths on both sides, in a pack and alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, bones = built("bart", "seq2seq-lm", blocks=1)
        tiny = Tiny(assemble(bones, load_weights(model, bones, seed=0)), bones.shape, draw_pairs)
    start = replace(lora_start(tiny, 2), dropout=0.3)
    batches = [draw_batches(tiny, seed, 2, rows=3) for seed in (1, 2)]
    adam = Optimizer()
    ours = run_pack(tiny, [start, start], batches, adam, lr=1e-2)
    alone = [run_reference(tiny, [start], [own], adam, lr=1e-2)[0] for own in batches]
    assert worst(change(tiny, start, ours[0]), change(tiny, start, alone[0])) < 1e-4
    without = run_pack(tiny, [replace(start, dropout=0.0)], [batches[0]], adam, lr=1e-2)
    assert worst(change(tiny, start, ours[0]), change(tiny, start, without[0])) > 1e-2
