"""Runs over quantised frozen weights: the same bits in any pack, after a kill and from a file or its dense weights; the
reference's change; starts, exports and plans.

Runs are without Ray, of two rounds, on models of 10,000 parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayfed_sub import run
from rayfed_sub.core.arrays import unpacked
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import wire_bytes
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.models.weights import assemble, dense
from rayfed_sub.planning.needs import DRIVER, need
from rayfed_sub.planning.plan import job_parts, plan_of
from rayfed_sub.runtime.session import load_backbone
from rayfed_sub.telemetry.events import Summary
from tests.end_to_end.test_going_on import dies
from tests.end_to_end.test_start import adapter, configured, job_of, loaded, logits, table

__all__ = ["table"]  # a fixture

SETTINGS = ("federation.clients=6", "federation.rounds=2", "method.name=fedit", "method.rank=2")
FEDFTG = ("method={name: fedftg, rank: 2, refresh_every: 3}",)
WAYS = ("none", "int8")
KINDS = {"nf4": (), "int8": FEDFTG}


def config_of(table: Path, *overrides: str, start: Path | None = None) -> Any:
    return configured(table, start, *SETTINGS, *overrides)


@pytest.fixture(scope="module", params=["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def quantised(request: pytest.FixtureRequest, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind, its settings, and a run in packs of one."""
    kind: str = request.param
    overrides = (f"model.quantize={kind}", *KINDS[kind])
    folder = tmp_path_factory.mktemp("runs") / "run"
    return overrides, run(config_of(table, *overrides, "resources.pack_size=1"), folder)


def test_any_pack_has_the_same_bits(quantised: tuple[Any, Summary], table: Path, tmp_path: Path) -> None:
    overrides, alone = quantised
    four = run(config_of(table, *overrides, "resources.pack_size=4"), tmp_path / "four")
    assert four.weights_sha256 == alone.weights_sha256
    assert four.metrics["held_out_loss"] == alone.metrics["held_out_loss"]


def test_resumed_run_has_the_same_bits(quantised: tuple[Any, Summary], table: Path, tmp_path: Path) -> None:
    overrides, whole = quantised
    with pytest.raises(MemoryError):
        run(config_of(table, *overrides), tmp_path / "run", dies(1))
    assert run(config_of(table, *overrides), tmp_path / "run", resume=True).weights_sha256 == whole.weights_sha256
    with pytest.raises(UserError, match=r"^model.quantize: got 'none'; allowed: "):
        run(config_of(table, *overrides, "model.quantize=none"), tmp_path / "run", resume=True)


@pytest.mark.slow
def test_workers_have_the_same_bits(
    ray_session: None, quantised: tuple[Any, Summary], table: Path, tmp_path: Path
) -> None:
    overrides, alone = quantised
    two = run(config_of(table, *overrides, "resources.workers=2"), tmp_path / "two")
    assert two.weights_sha256 == alone.weights_sha256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param((), "bfloat16", id="fedit"),
        pytest.param(FEDFTG, "bfloat16", marks=pytest.mark.slow, id="fedftg"),
        pytest.param(("method={name: fedavg}",), "float32", marks=pytest.mark.slow, id="fedavg"),
    ],
)
def test_packed_weights_train_as_their_dense_ones(
    method: tuple[str, ...], dtype: str, table: Path, tmp_path: Path
) -> None:
    """The same bytes packed, or dequantised when they are loaded, give the same run, to the bit."""
    job = job_of(config_of(table, "model.quantize=nf4"))
    _saved(job, tmp_path / "model")
    ways = []
    for way in ("stored", "none"):
        model = f"model={{path: '{tmp_path}/model', quantize: {way}, dtype: {dtype}}}"
        ways.append(run(config_of(table, *method, model), tmp_path / way))
    assert ways[0].weights_sha256 == ways[1].weights_sha256
    assert ways[0].metrics == ways[1].metrics


@pytest.mark.slow
def test_adapter_over_a_quantised_checkpoint_is_the_whole_model(table: Path, tmp_path: Path) -> None:
    """It has its dense base beside it: transformers loads model.path itself as it is quantised."""
    _saved(job_of(config_of(table, "model.quantize=nf4")), tmp_path / "model")
    model = f"model={{path: '{tmp_path}/model', quantize: none, dtype: bfloat16}}"
    run(config_of(table, model), tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    export_peft(tmp_path / "run", tmp_path / "peft")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded(tmp_path / "peft").float()), logits(whole), rtol=1e-4, atol=1e-5)
    assert "from_pretrained('base', dtype=" in (tmp_path / "peft" / "README.md").read_text()


def _saved(job: Any, folder: Path) -> None:
    """The job's model as a checkpoint of bitsandbytes, with its tokenizer."""
    from transformers import BitsAndBytesConfig

    from tests.helpers.word_tokenizers import numbers

    assemble(job.architecture, dense(job.architecture, unpacked(load_backbone(job)))).save_pretrained(folder / "plain")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    given = {"quantization_config": how, "device_map": {"": "cpu"}, "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(folder / "plain", **given).save_pretrained(folder)
    numbers().save_pretrained(folder)


@pytest.mark.slow
def test_reference_trains_on_the_dense_weights(table: Path, tmp_path: Path) -> None:
    found = [
        run(config_of(table, "model.quantize=int8", "federation.rounds=1", *way), tmp_path / str(number))
        for number, way in enumerate([(), ("resources.executor=reference",)])
    ]
    ours, theirs = (one.metrics["held_out_loss"] for one in found)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert found[0].metrics["held_out_loss_before"] == found[1].metrics["held_out_loss_before"] != ours


@pytest.mark.slow
def test_exports_are_the_dense_model_with_its_change(table: Path, tmp_path: Path) -> None:
    config = config_of(table, "model.quantize=int8", "federation.rounds=1", "optimizer.lr=0.1")
    run(config, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    export_peft(tmp_path / "run", tmp_path / "peft")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    job = job_of(config)
    before = dense(job.architecture, unpacked(load_backbone(job)))
    after = dict(whole.named_parameters())
    targets = {f"{layer.name}.weight" for layer in job.architecture.shape.targets}
    assert all(torch.equal(after[name], before[name]) == (name not in targets) for name in after)
    torch.testing.assert_close(logits(loaded(tmp_path / "peft")), logits(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_start_makes_its_layers_dense(table: Path, tmp_path: Path) -> None:
    """What it changes is float32 from then on; the plan counts that.  peft stores a copy of the output layer."""
    fields = {"target_modules": ["q_proj", "up_proj", "lm_head"], "r": 2}
    adapter(config_of(table), tmp_path / "adapter", **fields)
    config = config_of(table, "model.quantize=int8", start=tmp_path / "adapter")
    job, plain = job_of(config), job_of(config_of(table, "model.quantize=int8"))
    began, tensors = unpacked(load_backbone(job)), unpacked(load_backbone(plain))
    changed = {name for name in began if name not in tensors}
    parts = [f"model.layers.{block}.{part}" for block in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    assert changed == {f"{name}.weight" for name in (*parts, "lm_head")}
    (before, after) = (dense(one.architecture, held) for one, held in ((plain, tensors), (job, began)))
    assert all(torch.equal(before[name], after[name]) == (name not in changed) for name in before)
    plans = [plan_of(one) for one in (plain, job)]
    assert [one.backbone for one in plans] == [wire_bytes(tensors), wire_bytes(began)]


def test_plan_counts_the_model_before_it_is_quantised(table: Path) -> None:
    """40 million parameters, dense while they are loaded."""
    sizes = "hidden_size: 1024, intermediate_size: 2048, num_hidden_layers: 4, num_attention_heads: 4"
    llama = f"model.random={{type: llama, {sizes}}}"
    needs = {
        way: need(job_parts(job_of(config_of(table, llama, f"model.quantize={way}"))), rounds=1, most=1) for way in WAYS
    }
    assert needs["none"].loading == 0
    assert needs["int8"].loading > DRIVER + needs["none"].backbone > DRIVER + 4 * 40e6
    assert needs["int8"].least(0, 0) == needs["int8"].loading


@pytest.mark.slow
def test_run_goes_on_from_a_run(table: Path, tmp_path: Path) -> None:
    """The earlier run's change belongs to the quantised weights with which it began."""
    run(config_of(table, "model.quantize=int8"), tmp_path / "run")
    more = run(config_of(table, "model.quantize=int8", start=tmp_path / "run"), tmp_path / "more")
    ended = run(config_of(table, "model.quantize=int8", "federation.rounds=1"), tmp_path / "short").metrics
    assert more.metrics["held_out_loss_before"] < ended["held_out_loss_before"]


@pytest.mark.slow
def test_bfloat16_and_one_layer_at_a_time(table: Path, tmp_path: Path) -> None:
    """A classifier, GPT-2's layers, bfloat16, blocks computed twice and micro-batches."""
    kinds = {
        "gpt2": "{type: gpt2, n_embd: 32, n_inner: 96, n_layer: 2, n_head: 2}",
        "bert": "{type: bert, hidden_size: 32, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2}",
    }
    often = ("model.dtype=bfloat16", "resources.micro_batch=2", "resources.activation_checkpointing=blocks")
    for kind, random in kinds.items():
        task = ("task.answer=null", "task.label=kind") if kind == "bert" else ()
        both = (config_of(table, *task, *often, f"model.random={random}", f"model.quantize={way}") for way in WAYS)
        found = [run(config, tmp_path / kind / config.model.quantize).metrics["held_out_loss"] for config in both]
        assert found[0] != found[1] == pytest.approx(found[0], rel=0.05)
