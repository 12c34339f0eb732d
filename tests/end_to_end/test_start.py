"""`model.start_from`: adapters and earlier runs as peft loads and merges them, counted, checked at resume, exported.

Runs are without Ray, of one round or two, on models of 10,000 parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from rayfed_sub import load_config, run
from rayfed_sub.config.schema import Config, Model
from rayfed_sub.core.arrays import unpacked
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Block, Change
from rayfed_sub.export.exported import export_hf, export_peft
from rayfed_sub.models.architecture import architecture
from rayfed_sub.models.start import StartFrom, fitted
from rayfed_sub.models.weights import assemble, load_weights
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.plan import job_parts, plan_of
from rayfed_sub.runtime.session import load_backbone
from rayfed_sub.storage.earlier_runs import read_start
from tests.helpers.word_tokenizers import numbers

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, "initializer_range": 0.1},
}
LLAMA = {"type": "llama", "num_key_value_heads": 1, **SIZES}
BERT = {"type": "bert", **SIZES}
GPT2 = {"type": "gpt2", "n_embd": 32, "n_inner": 96, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
IDS = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    rows = [f"what {i},answer {i * i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in range(40)]
    path.write_text("q,a,kind,three\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def configured(table: Path, start: Path | str | None, *overrides: str, random: dict[str, Any] = LLAMA) -> Config:
    learned = {"label": "kind"} if random["type"] == "bert" else {"answer": "a"}
    tree = {
        "model": {"path": "random", "random": random, "start_from": None if start is None else str(start)},
        "task": {"name": "table", "path": str(table), "prompt": "{q}", "max_length": 24, **learned},
        "federation": {"clients": 3, "rounds": 1, "local_steps": 2, "partition": {"kind": "iid"}},
        "method": {"name": "fedit", "rank": 2},
        "optimizer": {"lr": 0.02},
        "resources": {"workers": 0},
        "diagnostics": {"every": 0},
    }
    return load_config(tree, overrides)


def job_of(config: Config) -> Job:
    return prepare(config, start=read_start(config))


def plain(config: Config) -> Any:
    """The pretrained model, as it is without a start."""
    job = prepare(config.model_copy(update={"model": config.model.model_copy(update={"start_from": None})}))
    return assemble(job.architecture, load_weights(job.config.model, job.architecture, config.seed))


def begun(config: Config) -> Any:
    """The model with which the run begins."""
    job = job_of(config)
    return assemble(job.architecture, unpacked(load_backbone(job)))


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def adapter(config: Config, folder: Path, **fields: Any) -> Any:
    """peft's model over the pretrained one, with random factors, saved to the folder."""
    from peft import LoraConfig, get_peft_model

    kind = "SEQ_CLS" if config.model.random["type"] == "bert" else "CAUSAL_LM"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        given = {"task_type": kind, "init_lora_weights": False, **fields}
        model = get_peft_model(plain(config), LoraConfig(**given))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.normal_()
    model.save_pretrained(str(folder))
    return model


def loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """peft's model of an exported adapter over the base beside it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), str(folder))


PATTERNS = {"rank_pattern": {"layers.1.*": 5}, "alpha_pattern": {"up_proj": 3.0}, "use_rslora": True}
MODELS = {
    "llama": (LLAMA, {"target_modules": ["q_proj", "up_proj", "lm_head"], "r": 3, **PATTERNS}),
    "gpt2": (GPT2, {"target_modules": ["c_fc", "c_attn"], "r": 2, "fan_in_fan_out": True}),
    "bert": (BERT, {"target_modules": ["query"], "r": 2, "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name == "gpt2") == (dtype == "bfloat16") else pytest.mark.slow)
        for name in MODELS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_run_begins_with_the_model_that_peft_loads_and_merges(
    name: str, dtype: str, table: Path, tmp_path: Path
) -> None:
    """Layers that are no targets of the run too.  Over a bfloat16 backbone the merged weights stay float32."""
    random, fields = MODELS[name]
    config = configured(table, None, f"model.dtype={dtype}", random=random)
    adapter(config, tmp_path / "adapter", **fields)
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(plain(config).float(), str(tmp_path / "adapter"))
    config = configured(table, tmp_path / "adapter", f"model.dtype={dtype}", random=random)
    ours = begun(config).float()
    before = logits(plain(config).float())
    assert float((logits(theirs) - before).abs().max()) > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(ours), logits(theirs.merge_and_unload()), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def start(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of layers that are targets and of some that are not."""
    folder = tmp_path_factory.mktemp("start") / "adapter"
    adapter(configured(table, None), folder, **MODELS["llama"][1])
    return folder


Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a run from `start` with these overrides, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(start: Path | None, *overrides: str) -> Path:
        key = (str(start), *overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            run(configured(table, start, *overrides), made[key])
        return made[key]

    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize("method", ["fedit", pytest.param("fedftg", marks=pytest.mark.slow)])
def test_start_is_counted_hashed_planned_and_exported(
    method: str, start: Path, runs: Runs, table: Path, tmp_path: Path
) -> None:
    """Per client 4 bytes a number of the adapter, before its first round alone; after round 1 the method's own."""
    overrides = (f"method={{name: {method}, rank: 2}}", "federation.rounds=2")
    folder, bare = runs(start, *overrides), runs(None, *overrides)
    stored = load_file(start / "adapter_model.safetensors").items()
    size = sum(4 * tensor.numel() for name, tensor in stored if "lora_" in name)  # without the copy of lm_head
    found, without = (pd.read_parquet(at / "clients.parquet")["downlink_bytes"] for at in (folder, bare))
    assert (found - without).tolist() == [size] * 3 + [0] * 3
    assert summary(folder)["start_from"]["wire_bytes"] == size
    assert summary(folder)["dense_downlink_bytes"] - summary(bare)["dense_downlink_bytes"] == 3 * size
    planned = job_parts(job_of(configured(table, start, *overrides))).traffic()
    downs = [sum(client.down for client in walked.values()) for walked in planned.rounds]
    assert downs == [found[:3].sum(), found[3:].sum()]
    assert summary(folder)["weights_sha256"] != summary(bare)["weights_sha256"]

    export_hf(folder, tmp_path / "hf")
    export_peft(folder, tmp_path / "peft")
    whole, held = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), loaded(tmp_path / "peft")
    config = configured(table, start, *overrides)
    torch.testing.assert_close(logits(held), logits(whole), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(held.unload()), logits(plain(config)))  # the base is the pretrained model
    assert float((logits(whole) - logits(begun(config))).abs().max()) > 1e-2
    q_proj = whole.get_submodule("model.layers.0.self_attn.q_proj").weight  # no target: as the adapter left it
    assert torch.equal(q_proj, begun(config).get_submodule("model.layers.0.self_attn.q_proj").weight)


@pytest.mark.parametrize(
    "method", ["fedit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedftg", "fed-sb"))]
)
def test_run_goes_on_from_an_earlier_run_s_final_model(method: str, start: Path, runs: Runs, table: Path) -> None:
    """The first run has a start of its own, and another method."""
    first = runs(start, "method={name: fedftg, rank: 2}", "federation.rounds=2")
    second = runs(first, f"method={{name: {method}, rank: 3}}")
    scores = summary(second)["metrics"]
    assert scores["held_out_loss_before"] == pytest.approx(summary(first)["metrics"]["held_out_loss"], rel=1e-6)
    assert scores["held_out_loss"] < scores["held_out_loss_before"]
    info = summary(second)["start_from"]
    assert info["what"] == "a run of fedftg, 2 rounds"


@pytest.mark.slow
def test_export_of_a_run_from_a_run_holds_all_of_it(start: Path, runs: Runs, tmp_path: Path) -> None:
    first = runs(start, "method={name: fedftg, rank: 2}", "federation.rounds=2")
    second = runs(first, "method={name: fedit, rank: 3}")
    export_hf(second, tmp_path / "hf")
    export_peft(second, tmp_path / "peft")
    whole, held = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), loaded(tmp_path / "peft")
    torch.testing.assert_close(logits(held), logits(whole), atol=1e-3, rtol=1e-3)


def test_resuming_needs_the_same_tensors(start: Path, runs: Runs, table: Path) -> None:
    overrides, file = ("method={name: fedit, rank: 2}", "federation.rounds=2"), start / "adapter_model.safetensors"
    folder, config = runs(start, *overrides), configured(table, start, *overrides)
    before, tensors = file.read_bytes(), load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    try:
        save_file({**tensors, first: tensors[first] + 1}, file)
        with pytest.raises(UserError, match=r"model\.start_from: .*its tensors are others now; restore it"):
            run(config, folder, resume=True)
    finally:
        file.write_bytes(before)
    assert run(config, folder, resume=True).rounds == 2


@pytest.mark.slow
def test_plan_names_the_start(start: Path, table: Path) -> None:
    planned = plan_of(job_of(configured(table, start)))
    assert any(str(start) in note and "to every client before its first round" in note for note in planned.notes)
    # Two of q_proj (32 x 32) and up_proj (96 x 32), and lm_head (259 x 32), two bytes more a number over bfloat16.
    narrow = [plan_of(job_of(configured(table, at, "model.dtype=bfloat16"))).backbone for at in (start, None)]
    assert narrow[0] - narrow[1] == 2 * (2 * (32 + 96) * 32 + 259 * 32)


@pytest.mark.slow
def test_earlier_run_may_lie_in_an_object_store(start: Path, table: Path, bucket: str) -> None:
    run(configured(table, start), f"{bucket}/run")
    found = read_start(configured(table, f"{bucket}/run"))
    assert found is not None
    assert found.what == "a run of fedit, 1 round"
    assert "model.layers.0.self_attn.q_proj" in found.changes  # of the adapter, no target of the run


def test_layer_that_shares_its_weight_is_refused(table: Path, tmp_path: Path) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    adapter(configured(table, None, random=tied), tmp_path / "adapter", target_modules=["lm_head"], r=2)
    refused(configured(table, tmp_path / "adapter", random=tied), "lm_head shares its weight with another layer")


def test_head_of_other_classes_is_drawn_anew(table: Path, tmp_path: Path) -> None:
    adapter(configured(table, None, random=BERT), tmp_path / "two", **MODELS["bert"][1])
    three = configured(table, tmp_path / "two", "task.label=three", random=BERT)
    job = job_of(three)
    assert job.begun is not None
    assert job.begun.what == "an adapter of peft's, without its head, which is for other classes"
    assert begun(three).classifier.weight.shape == (3, 32)


def test_head_of_an_adapter_follows_the_order_of_its_model_s_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft numbers classes as the model does on which it trains; an adapter of another model counts as in order."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf = BertConfig(vocab_size=50, id2label={0: "pos", 1: "neg", 2: "neu"}, **sizes)
    hf.save_pretrained(tmp_path / "model")
    names, head = ("neg", "neu", "pos"), {"classifier/weight": torch.eye(3, 16), "classifier/bias": torch.arange(3.0)}
    bones = architecture(Model(path=str(tmp_path / "model")), "text-classification", names)
    layer = bones.shape.targets[0]
    change = Change(blocks=(Block(torch.ones(layer.m, 1), torch.ones(1, layer.n), 1.0),))
    for base, order in ((tmp_path / "model", [1, 2, 0]), (tmp_path / "other", [0, 1, 2])):
        start = StartFrom("x", "x", {layer.name: (change,)}, head, base=str(base))
        found = fitted(start, bones, names).head
        assert found["classifier/bias"].tolist() == order
        assert torch.equal(found["classifier/weight"], torch.eye(3, 16)[order])
    (said,) = [record.getMessage() for record in caplog.records if "by number" in record.getMessage()]
    assert "for neg, neu, pos in this order" in said
    assert said.endswith("the head of model.path itself has pos, neg, neu")


def test_run_without_its_start_s_head_is_exported_and_gone_on_from(table: Path, tmp_path: Path) -> None:
    run(configured(table, None, random=BERT), tmp_path / "two")
    three = ("task.label=three", "federation.local_steps=1")
    run(configured(table, tmp_path / "two", *three, random=BERT), tmp_path / "three")
    export_hf(tmp_path / "three", tmp_path / "hf")
    found = job_of(configured(table, tmp_path / "three", *three, random=BERT))
    assert found.start is not None
    assert found.start.head.keys() == {"classifier/weight", "classifier/bias"}
    assert {len(changes) for changes in found.start.changes.values()} == {2}


@pytest.mark.slow
def test_classifier_of_a_start_is_exported(table: Path, tmp_path: Path) -> None:
    adapter(configured(table, None, random=BERT), tmp_path / "two", **MODELS["bert"][1])
    config = configured(table, tmp_path / "two", random=BERT)
    run(config, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "hf")
    export_peft(tmp_path / "run", tmp_path / "peft")
    auto = AutoModelForSequenceClassification
    whole, held = auto.from_pretrained(tmp_path / "hf"), loaded(tmp_path / "peft", auto)
    torch.testing.assert_close(logits(held), logits(whole), atol=1e-4, rtol=1e-4)
    drift = (whole.classifier.weight - begun(config).classifier.weight).abs().max()
    assert 0 < float(drift) < 0.1  # it went on from the adapter's head, drawn with deviation 1


WRONG = {
    "peft_type=IA3": {"peft_type": "IA3"},
    "use_dora=True": {"use_dora": True},
    "init_lora_weights=pissa, which changes the base itself": {"init_lora_weights": "pissa"},
    "bias=all": {"bias": "all"},
    r"layer_replication=\[\[0, 2\]\]": {"layer_replication": [[0, 2]]},
    r"target_parameters=\['mlp.experts.gate_up_proj'\]": {"target_parameters": ["mlp.experts.gate_up_proj"]},
}


@pytest.mark.parametrize("said", WRONG)
def test_adapter_that_cannot_be_merged_exactly_is_refused(said: str, start: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **WRONG[said]}))
    refused(configured(table, tmp_path / "adapter"), f"an adapter that can be merged exactly.*this one has {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.lm_head.weight", "lm_head.weight in modules_to_save"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", r"layers\.7\.mlp\.up_proj\.lora_A"),
        ("pair", "one for this model; model.layers.7.mlp.up_proj is not in it"),
        ("wide", "whose model.layers.0.mlp.up_proj is no linear layer of 7 x 32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, said: str, start: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "adapter")
    tensors = load_file(start / "adapter_model.safetensors")
    up = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    if name == "pair":
        tensors |= {up.format(7, side): tensors[up.format(0, side)].clone() for side in "AB"}
    elif name == "wide":
        tensors[up.format(0, "B")] = torch.zeros(7, 3)
    else:
        tensors[name] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    refused(configured(table, tmp_path / "adapter"), said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_alpha": None}, "a whole adapter; in this one lora_alpha is None"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"alpha_pattern": {"up_proj": None}}, "up_proj is None"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
        ({"alpha_pattern": {".*": 2, "(": 3}}, r"alpha_pattern's \( is no regular expression: missing \)"),
    ],
)
def test_damaged_scales_are_named(fields: dict[str, Any], said: str, start: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    refused(configured(table, tmp_path / "adapter"), said)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda A_rn: A_rn[:1], r"up_proj has lora_A 1 x 32 and lora_B 96 x 3; write it again"),
        (lambda A_rn: A_rn.flatten(), r"an adapter that can be merged exactly.*this one has model\S*up_proj\.lora_A"),
        (lambda A_rn: A_rn / 0, r"up_proj\.lora_A\.weight holds numbers that are not finite"),
    ],
)
def test_damaged_factors_are_named(
    damage: Callable[[Tensor], Tensor], said: str, start: Path, table: Path, tmp_path: Path
) -> None:
    shutil.copytree(start, tmp_path / "adapter")
    file, name = tmp_path / "adapter" / "adapter_model.safetensors", "model.layers.0.mlp.up_proj.lora_A.weight"
    tensors = load_file(file)
    save_file({**tensors, f"base_model.model.{name}": damage(tensors[f"base_model.model.{name}"]).contiguous()}, file)
    refused(configured(table, tmp_path / "adapter"), said)


def test_places_and_runs_that_do_not_fit_are_refused(runs: Runs, table: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(configured(table, tmp_path / "empty"), "the folder of a finished run")
    refused(configured(table, "no such/place/anywhere"), "the folder of a finished run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    refused(
        configured(table, tmp_path / "broken"), "adapter_config.json and adapter_model.safetensors.*JSONDecodeError"
    )
    first = runs(None, "method={name: fedit, rank: 2}", "federation.rounds=2")
    refused(configured(table, first, "seed=1"), "this one trained random drawn by seed 0")
    refused(configured(table, first, random={**LLAMA, "hidden_size": 16}), "a run of the same model")
    personal = tmp_path / "personal"
    shutil.copytree(first, personal)
    file = personal / "config.yaml"
    file.write_text(file.read_text().replace("name: fedit", "name: fedsa-lora"))
    refused(configured(table, personal), "one model for all; fedsa-lora has one for each client; export .* whole")


def test_run_of_other_weights_under_the_same_name_is_refused(runs: Runs, table: Path, tmp_path: Path) -> None:
    """Before anything trains, and in one line."""
    first = runs(None, "method={name: fedit, rank: 2}", "federation.rounds=2")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    log = other / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line | ({"backbone": "0" * 16} if "backbone" in line else {}) for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"model\.start_from: got .*of the same model; the weights of model\.path"):
        load_backbone(job_of(configured(table, other)))
    load_backbone(job_of(configured(table, first)))
    load_backbone(job_of(configured(table, other, "model.dtype=bfloat16")))  # nothing is known of these


def test_parameter_of_all_experts_is_planned_in_float32_where_one_is_changed(table: Path) -> None:
    mixtral = {"type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 3, **SIZES}
    bones = prepare(configured(table, None, random=mixtral)).architecture
    first = Change(blocks=(Block(torch.ones(2 * 96, 1), torch.ones(1, 32), 1.0),))
    start = StartFrom("x", "x", {"model.layers.0.mlp.experts.gate_up_proj.0": (first,)})
    assert fitted(start, bones, ()).info.numbers == 3 * 2 * 96 * 32


def test_classifier_s_run_needs_the_seed_that_drew_its_pooler(table: Path, tmp_path: Path) -> None:
    plain(configured(table, None, random=BERT)).bert.save_pretrained(tmp_path / "encoder")
    numbers().save_pretrained(tmp_path / "encoder")

    def over(start: Path | None, *overrides: str) -> Config:
        config = configured(table, start, "federation.local_steps=1", *overrides, random=BERT)
        model = config.model.model_copy(update={"path": str(tmp_path / "encoder"), "random": {}})
        return config.model_copy(update={"model": model})

    run(over(None), tmp_path / "two")
    refused(over(tmp_path / "two", "seed=1"), "a run of the same seed.*this one has seed 0; set seed=0")
    load_backbone(job_of(over(tmp_path / "two")))


def refused(config: Config, said: str) -> None:
    with pytest.raises(UserError, match=rf"model\.start_from: got .*{said}") as refusal:
        job_of(config)
    assert "\n" not in str(refusal.value)
