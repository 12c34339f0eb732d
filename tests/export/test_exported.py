"""Exports of runs: transformers and peft load models with the logits of our own evaluation.

The runs go through their rounds without Ray: one Worker as a plain object, two clients, two rounds, on models of 10,000
parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayfed_sub import load_config
from rayfed_sub.cli import main
from rayfed_sub.config.loading import yaml_text
from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Change, ClientState, ServerState
from rayfed_sub.data.batching import collate
from rayfed_sub.export.exported import evaluation_command, export_hf, export_peft, factorised, loadable
from rayfed_sub.methods import METHODS, build
from rayfed_sub.models.weights import assemble, load_weights, target_weights
from rayfed_sub.planning.job import Job, prepare
from rayfed_sub.planning.sampling import pack_work
from rayfed_sub.runtime.worker import Spec, Worker
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.remote import Place
from rayfed_sub.storage.run_folder import create
from rayfed_sub.storage.state_store import StateStore
from rayfed_sub.telemetry.events import Summary
from rayfed_sub.training.inference import global_model
from rayfed_sub.training.losses import predicted
from rayfed_sub.training.pack_experts import install

ROOT = Path(__file__).parents[2]
PERSONAL = [name for name in METHODS if build({"name": name}).personal]
# Federated AdamW moves every direction of a dense weight; there is no adapter for it.
ALIKE = ("fslora", "fed-plora", "fed-sb-gradient", "fedkrso", "fedsub")  # models as other methods': factors, a core, W
ADAPTED = [
    pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in METHODS if name != "fedavg"
]
# The rank of two rounds' changes of dense weights, with two clients of rank 2.
RANKS = {
    "fedftg": 4,  # each client's basis stays, as it is renewed only after 200 steps
    "shared-galore": 2,  # one basis for both, renewed after 200 steps
    "flora": 6,  # fresh factors every round, of rank 2 and 1
    "fedkrso": 8,  # the four clients of two rounds have drawn four subspaces
    "fedsub": 4,  # one basis for both, another in every round
    "fedmomentum": 6,  # as fedex-lora
    "frlora": 6,  # two averages of rank 2, and the first factors that they took the place of
    "fedex-lora": 6,  # every round's residual of rank (2 - 1) * 2, and the averaged factors
}
LLAMA = {
    **{"type": "llama", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.1},
}
GPT2 = {"type": "gpt2", "n_embd": 32, "n_inner": 96, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
BERT = {
    **{"type": "bert", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, "initializer_range": 0.1},
}
DISTILBERT = {"type": "distilbert", "dim": 32, "hidden_dim": 96, "n_layers": 2, "n_heads": 2, "initializer_range": 0.1}
PERCEIVER = {
    **{"type": "perceiver", "d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    **{"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "initializer_range": 0.3},
}
MIXTRAL, GPT_OSS = (
    {
        **{"type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"initializer_range": 0.1, "max_position_embeddings": 64},
    }
    for kind in ("mixtral", "gpt_oss")
)
DEEPSEEK = {
    **{"type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16},
    **{"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    **{"initializer_range": 0.1, "max_position_embeddings": 64},
}
TARGETS = {
    "deepseek_v3": "lower-mlp",
    "mixtral": r"mlp\.experts\.|o_proj$",
    "gpt_oss": r"experts\.gate_up_proj$",
    "llama": r"(up_proj|down_proj)$",
    "gpt2": r"(c_fc|mlp\.c_proj)$",
    "bert": r"(intermediate|\d\.output)\.dense$",
    "distilbert": r"ffn\.lin[12]$",
    "perceiver": "lower-mlp",
}

Export = Callable[..., Any]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    rows = [f"what {i},answer {i * i},{'ab'[i % 2]}" for i in range(40)]
    path.write_text("q,a,kind\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def configured(table: Path, method: str, random: Mapping[str, Any] = LLAMA, **fields: object) -> Config:
    """Two clients, two rounds of two steps, rank 2 if the method has one, client ranks 2 and 1 if it has them, no
    component left out, and unequal shares of a client's own adapter and of the others', with which two clients
    differ."""
    ranks = {"rank": 2, "client_ranks": [2, 1], "share": 0.9, "energy": 1.0}
    known = {field.name for field in dataclasses.fields(build({"name": method}))}  # type: ignore[arg-type]
    own = {key: value for key, value in ranks.items() if key in known}
    classifies = random["type"] in ("bert", "distilbert", "perceiver")
    return load_config(
        {
            "model": {"path": "random", "random": dict(random), "targets": TARGETS[random["type"]]},
            "task": {
                **{"name": "table", "path": str(table), "prompt": "{q}", "max_length": 24},
                **({"label": "kind"} if classifies else {"answer": "a"}),
            },
            "federation": {"clients": 2, "rounds": 2, "local_steps": 2, "partition": {"kind": "iid"}},
            "method": {"name": method, **own, **fields},
            "optimizer": {"lr": 0.02},
        }
    )


def write_run(folder: Path, config: Config, server: ServerState, states: Mapping[int, ClientState]) -> Path:
    """A finished run's folder."""
    folder.mkdir()
    written = create(Place(folder), config)
    store = StateStore(folder, 10**9, lambda: server, lambda state: [state], lambda box: box[0])
    store.commit(server, {}, [store.add(client, state) for client, state in states.items()])
    store.pin()
    store.checkpoint()
    written.write_summary(
        Summary(config.name, str(config.method["name"]), 2, "0" * 64, 1, 1, 1, 1.0, 1.0, 1.0, 1, {}, {}, {})
    )
    return folder


def stored(run: Path) -> tuple[ServerState, dict[int, ClientState]]:
    """The contents of a run's checkpoint."""
    found = checkpoints.read(run)
    assert found is not None
    clients = {client: checkpoints.stored_state(run, found, client) for client, _ in found.state_files}
    return ServerState(found.round, found.server), clients


def trained(folder: Path, config: Config, clients: Sequence[int] = (0, 1)) -> Path:
    """A run as the coordinator executes it, with one pack of `clients` a round."""
    job = prepare(config)
    method, shape = job.method, job.architecture.shape
    backbone = load_weights(config.model, job.architecture, config.seed)
    server = method.init_server(target_weights(shape, job.architecture.transposed, backbone), shape, config.seed)
    worker = Worker(Spec(job.config, method, job.architecture, job.processor), packed(backbone), job.dataset)
    states: dict[int, ClientState] = {}
    for n in range(2):
        # The worker has the states at hand.
        stored = [((k, states[k].round), None) if k in states else None for k in clients]
        broadcast = method.broadcast(server)
        outcome = worker.train(pack_work(job.config, job.dataset, n, clients), stored, broadcast)
        total = method.accumulator(server, shape)
        for sent in outcome.updates:
            total = method.accumulate(total, sent, shape)
        server = method.aggregate(server, total, shape)
        states = dict(zip(clients, outcome.states, strict=True))
    return write_run(folder, job.config, server, states)


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> the folder of a run with it, made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = trained(tmp_path_factory.mktemp("runs") / method, configured(table, method))
        return made[method]

    return run


@pytest.fixture(scope="module")
def runs_of_one(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> the folder of a run in which only client 0 of the two ever trained, made once."""

    @cache
    def run(method: str) -> Path:
        return trained(tmp_path_factory.mktemp("runs of one") / method, configured(table, method), clients=(0,))

    return run


def client_of(method: str) -> int | None:
    return 1 if method in PERSONAL else None


@cache
def job_of(run: Path) -> Job:
    return prepare(load_config(run / "config.yaml"))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(5, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    return model.eval()(**tokens()).logits


def ours(run: Path, client: int | None = None) -> tuple[Tensor, Tensor]:
    """The logits of our own evaluation: of the pretrained model, and of the trained one."""
    job = job_of(run)
    shape = job.architecture.shape
    server, states = stored(run)
    backbone = load_weights(job.config.model, job.architecture, job.config.seed)
    model = assemble(job.architecture, backbone)
    before = logits(model)
    if client is None:
        changes = job.method.model(server, shape)
    else:
        changes = job.method.personal_model(server, states[client], shape)
    with global_model(install(model, shape), shape, changes, server.tensors):
        return before, logits(model)


def loss_of(model: Any, job: Job) -> float:
    """Mean loss (nats) over the labels of the held-out rows."""
    rows = np.arange(len(job.dataset.held_out))
    batch = collate(job.dataset.held_out, rows, mask_prompt=True, pad=job.processor.pad)
    return float(predicted(model, batch).loss_L.double().mean())


@pytest.mark.parametrize("method", ["fedftg", "fedavg", "fedit", "flora"])
def test_export_of_a_bfloat16_run_keeps_the_whole_change(method: str, table: Path, tmp_path: Path) -> None:
    """In float32 the exported weights have the loss of our evaluation; the run's own score is the bfloat16 model's."""
    config = configured(table, method)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    run = trained(tmp_path / "run", config)
    job, (server, _) = job_of(run), stored(run)
    shape, changes = job.architecture.shape, job.method.model(server, job.architecture.shape)
    backbone = load_weights(job.config.model, job.architecture, job.config.seed)
    scores = []
    for tensors in ({name: tensor.float() for name, tensor in backbone.items()}, backbone):
        model = assemble(job.architecture, tensors)
        before = loss_of(model, job)
        with global_model(install(model, shape), shape, changes, server.tensors):
            scores.append(loss_of(model, job))
        assert before - scores[-1] > 0.1
    export_hf(run, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert exported.dtype == torch.float32
    wide, narrow = scores
    assert loss_of(exported, job) == pytest.approx(wide, abs=1e-5)
    assert narrow == pytest.approx(wide, abs=0.01)
    assert narrow != pytest.approx(wide, abs=1e-5)  # hence the label "bfloat16 model"


def loaded(adapter: Path, auto: Any = AutoModelForCausalLM) -> tuple[Tensor, Tensor]:
    """The logits of peft's model over the base that the adapter names: with its factors beside, and merged."""
    from peft import PeftModel

    base = auto.from_pretrained(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of tensors that are missing or unexpected
        model = PeftModel.from_pretrained(base, str(adapter))
    return logits(model), logits(model.merge_and_unload())


def agree(run: Path, folder: Path, client: int | None = None, auto: Any = AutoModelForCausalLM) -> str | None:
    """Check that both formats give our logits, which differ from the pretrained model's; return the adapter's
    warning."""
    before, expected = ours(run, client)
    assert float((expected - before).abs().max()) > 0.05
    export_hf(run, folder / "hf", client)
    torch.testing.assert_close(logits(auto.from_pretrained(folder / "hf")), expected, atol=1e-4, rtol=0)
    written = export_peft(run, folder / "peft", client)
    for found in loaded(folder / "peft", auto):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for name in ("hf", "peft"):  # moved, and loaded by the line in its README
        (folder / name).rename(folder / f"moved-{name}")
        torch.testing.assert_close(logits(by_readme(folder / f"moved-{name}")["model"]), expected, atol=1e-5, rtol=0)
        (folder / f"moved-{name}").rename(folder / name)
    assert written.loading in (folder / "peft" / "README.md").read_text()
    return written.warning


def by_readme(folder: Path, **given: object) -> dict[str, Any]:
    """The names defined by the Python lines of a folder's README when run in it."""
    lines = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = dict(given)
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of tensors that are missing or unexpected
        for line in lines if given else lines[:1]:
            exec(line, names)
    return names


@pytest.mark.parametrize("method", ADAPTED)
def test_every_format_gives_the_logits_of_our_own_evaluation(
    method: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run, client = runs(method), client_of(method)
    warning = agree(run, tmp_path, client)
    job, (server, states) = job_of(run), stored(run)
    shape = job.architecture.shape
    changes = job.method.model(server, shape) if client is None else None
    changes = changes or job.method.personal_model(server, states[client or 0], shape)
    dense = any(change.dense is not None for change in changes.values())
    # Only changes of dense weights had to be factorised, which the warning reports.
    assert dense == (method in RANKS)
    rank = RANKS.get(method)
    note = f"the change of dense weights is written at its numerical rank, {rank} a layer"
    assert warning == (note if dense else None)
    if dense:
        assert {t.shape[0] for name, t in adapter_of(tmp_path / "peft").items() if "lora_A" in name} == {rank}


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["fedit", "fedftg"])
def test_gpt2_export_stores_weights_transposed(method: str, table: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", configured(table, method, GPT2))
    agree(run, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


BOTH = [f"{block}.mlp.experts.{key}" for block in range(2) for key in ("down_proj", "gate_up_proj")]


@pytest.mark.parametrize(
    ("method", "random", "keys"),
    [
        ("fedit", MIXTRAL, BOTH),
        ("fedftg", MIXTRAL, BOTH),
        ("fedit", GPT_OSS, ["0.mlp.experts.gate_up_proj", "1.mlp.experts.gate_up_proj"]),
        # Modules of these names peft takes for parts of the experts.
        (
            "fedit",
            DEEPSEEK,
            ["0.mlp.up_proj.weight", "1.mlp.experts.gate_up_proj", "1.mlp.shared_experts.up_proj.weight"],
        ),
    ],
    ids=["lora", "dense", "transposed", "shared"],
)
def test_experts_are_written_as_target_parameters(
    method: str, random: Mapping[str, Any], keys: list[str], table: Path, tmp_path: Path
) -> None:
    agree(trained(tmp_path / "run", configured(table, method, random)), tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == [f"model.layers.{key}" for key in keys]


@pytest.mark.parametrize(
    ("random", "heads"), [(BERT, 1), (DISTILBERT, 2), (PERCEIVER, 1)], ids=["bert", "distilbert", "perceiver"]
)
def test_classifier_export_includes_its_head(
    random: Mapping[str, Any], heads: int, table: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "run", configured(table, "fedit", random))
    agree(run, tmp_path, auto=AutoModelForSequenceClassification)
    plain = [name for name in adapter_of(tmp_path / "peft") if "lora_" not in name]
    assert len(plain) == 2 * heads  # a weight and a bias each


def test_factors_are_the_server_s_own_with_the_scale_in_b(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """fedit: alpha 16 over rank 2 is a scale of 8, and alpha = r afterwards, a scale of 1."""
    run, name = runs("fedit"), "model.layers.1.mlp.down_proj"
    export_peft(run, tmp_path / "peft")
    adapter, (server, _) = adapter_of(tmp_path / "peft"), stored(run)
    assert torch.equal(adapter[f"base_model.model.{name}.lora_A.weight"], server.tensors[f"{name}/right"])
    assert torch.equal(adapter[f"base_model.model.{name}.lora_B.weight"], 8 * server.tensors[f"{name}/left"])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    assert config["target_modules"] == [t.name for t in job_of(run).architecture.shape.targets]


def dense_run(folder: Path, table: Path, ranks: Sequence[int]) -> Path:
    """A fedavg run whose four target weights have changed by the given ranks."""
    config = configured(table, "fedavg")
    job = prepare(config)
    shape, rng = job.architecture.shape, torch.Generator().manual_seed(0)
    backbone = load_weights(config.model, job.architecture, config.seed)
    tensors = target_weights(shape, job.architecture.transposed, backbone)
    for layer, rank in zip(shape.targets, ranks, strict=True):
        left, right = torch.randn(layer.m, rank, generator=rng), torch.randn(rank, layer.n, generator=rng)
        tensors[f"{layer.name}/weight"] = tensors[f"{layer.name}/weight"] + 0.05 * (left @ right)
    return write_run(folder, job.config, ServerState(2, tensors), {})


def test_every_layer_is_written_at_the_rank_of_its_change(table: Path, tmp_path: Path) -> None:
    run = dense_run(tmp_path / "run", table, [3, 0, 3, 7])
    warning = agree(run, tmp_path)
    assert warning == "the change of dense weights is written at its numerical rank, 1 to 7 a layer"
    adapter = adapter_of(tmp_path / "peft")
    found = [adapter[f"base_model.model.{t.name}.lora_A.weight"] for t in job_of(run).architecture.shape.targets]
    assert [right.shape[0] for right in found] == [3, 1, 3, 7]  # peft has no rank 0: rank 1, and B is zero
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert sorted(config["rank_pattern"].values()) == [1, 7]
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_change_without_a_smaller_adapter_is_refused(table: Path, tmp_path: Path) -> None:
    """A layer of 96 x 32 has 3,072 numbers, one rank of it 128: 24 ranks are as many numbers as the layer itself."""
    run = dense_run(tmp_path / "almost", table, [24, 24, 24, 23])
    export_peft(run, tmp_path / "peft")
    run = dense_run(tmp_path / "run", table, [24] * 4)
    with pytest.raises(UserError, match=r"^--format: got 'peft'; allowed: hf, for fedavg changed .*, by rank 24.*hf$"):
        export_peft(run, tmp_path / "refused")


@pytest.mark.parametrize(
    ("method", "optimizer"), [("fedavg", {}), ("fedftg", {"weight_decay": 0.1})], ids=["fedavg", "fedftg with decay"]
)
def test_full_rank_training_is_refused(
    method: str, optimizer: Mapping[str, float], table: Path, tmp_path: Path
) -> None:
    config = configured(table, method)
    changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})
    run = trained(tmp_path / "run", changed)
    with pytest.raises(UserError, match="by rank 32, too high for an adapter; use --format hf"):
        export_peft(run, tmp_path / "peft")
    before, expected = ours(run)
    export_hf(run, tmp_path / "hf")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(found, before, atol=1e-2)


def test_scaled_base_weight_is_not_a_low_rank_term(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base_scale of 0.9 removes a tenth of every direction, whatever blocks are added."""
    run = runs("fedit")
    method = type(job_of(run).method)
    plain = method.model

    def shrunk(*arguments: Any) -> dict[str, Change]:
        return {name: dataclasses.replace(c, base_scale=0.9) for name, c in plain(*arguments).items()}

    monkeypatch.setattr(method, "model", shrunk)
    with pytest.raises(UserError, match="by rank 32, too high for an adapter"):
        export_peft(run, tmp_path / "peft")


def test_base_in_a_folder_is_named_and_not_copied(runs: Callable[[str], Path], table: Path, tmp_path: Path) -> None:
    """The model of a finished run as the start of the next one."""
    export_hf(runs("fedit"), tmp_path / "first")
    config = configured(table, "fedit")
    model = config.model.model_copy(update={"path": str(tmp_path / "first"), "random": {}})
    tokenizer().save_pretrained(tmp_path / "first")  # a model in a folder needs a tokenizer; bytes need none
    run = trained(tmp_path / "run", config.model_copy(update={"model": model}))
    agree(run, tmp_path)
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config_of = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config_of["base_model_name_or_path"] == str(tmp_path / "first")


def test_encoder_made_causal_is_loaded_as_causal(table: Path, tmp_path: Path) -> None:
    """By the line in the README: BERT's own configuration lets tokens attend to later ones."""
    sizes = {key: value for key, value in BERT.items() if key != "type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=300, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer().save_pretrained(tmp_path / "bert")
    config = configured(table, "fedit")
    model = config.model.model_copy(update={"path": str(tmp_path / "bert"), "random": {}, "targets": TARGETS["bert"]})
    run = trained(tmp_path / "run", config.model_copy(update={"model": model}))
    _, expected = ours(run)
    for name, write in (("hf", export_hf), ("peft", export_peft)):
        write(run, tmp_path / name)
        torch.testing.assert_close(logits(by_readme(tmp_path / name)["model"]), expected, atol=1e-5, rtol=0)
    assert "is_decoder=True" in (tmp_path / "peft" / "README.md").read_text()


def tokenizer() -> Any:
    """A tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {**{"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, **{str(i): i for i in range(4, 259)}}
    fast = Tokenizer(models.WordLevel(words, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)


CHAT = (
    "{% if messages[0]['role'] != 'system' %}1 4 5 6 7 8 9 3 {% endif %}"
    "{% for m in messages %}10 {{ m['content'] }} 11 {% endfor %}{% if add_generation_prompt %}12{% endif %}"
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_has_prompts_and_stops_as_in_training(
    dtype: str, runs: Callable[[str], Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in a folder, named by a relative path, with turns that end with token 11 and an end token of 2."""
    export_hf(runs("fedit"), tmp_path / "first")
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["10", "11"]})
    words.chat_template = CHAT
    words.save_pretrained(tmp_path / "first")
    generation = tmp_path / "first" / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "top_k": 33, "do_sample": True}))
    monkeypatch.chdir(tmp_path)
    config = configured(table, "fedit")
    model = config.model.model_copy(update={"path": "./first", "random": {}, "dtype": dtype})
    run = trained(tmp_path / "run", config.model_copy(update={"model": model}))
    processor = job_of(run).processor
    prompt = processor.prompts(["7 9"])[0]  # type: ignore[union-attr]
    assert processor.tokenizer.decode(prompt) == "10 11 10 7 9 11 12"  # type: ignore[union-attr]
    for name, export in {"hf": export_hf, "peft": export_peft}.items():
        written = export(run, tmp_path / name)
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved = (tmp_path / name).rename(tmp_path / "moved" / name)
        monkeypatch.chdir(tmp_path / "moved")
        named = by_readme(moved, text="7 9")
        assert written.loading in (moved / "README.md").read_text()
        assert named["ids"] == prompt
        assert named["model"].generation_config.eos_token_id == [11, 2]
        assert (named["model"].generation_config.top_k, named["model"].generation_config.pad_token_id) == (33, 0)
        monkeypatch.chdir(tmp_path)
    # The adapter over its base computes the same as the full model.
    whole, adapted = (logits(by_readme(tmp_path / "moved" / name)["model"]) for name in ("hf", "peft"))
    torch.testing.assert_close(adapted, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("label", [False, True], ids=["answers", "classes"])
def test_inputs_of_a_byte_model(label: bool, runs: Callable[[str], Path], table: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", configured(table, "fedit", BERT)) if label else runs("fedit")
    processor = job_of(run).processor
    wanted = processor.texts(["why é?"])[0] if label else processor.prompts(["why é?"])[0]  # type: ignore[union-attr]
    for name, export in {"hf": export_hf, "peft": export_peft}.items():
        export(run, tmp_path / name)
        assert by_readme(tmp_path / name, text="why é?")["ids"] == wanted


def test_inputs_of_a_tokenizer_without_a_template(runs: Callable[[str], Path], table: Path, tmp_path: Path) -> None:
    export_hf(runs("fedit"), tmp_path / "first")
    tokenizer().save_pretrained(tmp_path / "first")
    config = configured(table, "fedit")
    model = config.model.model_copy(update={"path": str(tmp_path / "first"), "random": {}})
    run = trained(tmp_path / "run", config.model_copy(update={"model": model}))
    export_peft(run, tmp_path / "peft")
    assert by_readme(tmp_path / "peft", text="7 9")["ids"] == job_of(run).processor.prompts(["7 9"])[0]  # type: ignore[union-attr]


# --- lm-evaluation-harness

LM_EVAL = next((ROOT / ".venv-lm-eval" / "bin").glob("lm_eval"), None)
WRITTEN = re.compile(r"```sh\n(lm_eval .*)\n```")


def in_words(runs: Callable[[str], Path], table: Path, tmp_path: Path, template: str | None = None) -> Path:
    """A run with fedit from a model in the folder "first", whose tokenizer has a word for each token."""
    export_hf(runs("fedit"), tmp_path / "first")
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(tmp_path / "first")
    config = configured(table, "fedit")
    model = config.model.model_copy(update={"path": str(tmp_path / "first"), "random": {}})
    return trained(tmp_path / "run", config.model_copy(update={"model": model}))


@pytest.mark.parametrize("chat", [False, True])
def test_export_names_the_command_that_evaluates_it(
    chat: bool, runs: Callable[[str], Path], table: Path, tmp_path: Path
) -> None:
    run = in_words(runs, table, tmp_path, CHAT if chat else None)
    loading = {"hf": "pretrained=.", "peft": f"pretrained={tmp_path / 'first'},peft=.,tokenizer=."}
    for name, export in {"hf": export_hf, "peft": export_peft}.items():
        export(run, tmp_path / name)
        (command,) = WRITTEN.findall((tmp_path / name / "README.md").read_text())
        turns = " --apply_chat_template" if chat else ""
        assert command == f"lm_eval --model hf --model_args {loading[name]},dtype=float32{turns} --tasks TASK"
        assert "cuts an adapter's base" not in (tmp_path / name / "README.md").read_text()
    job = job_of(run)
    assert evaluation_command(job, {"pretrained": "a,b"}) is None
    assert evaluation_command(job, {"pretrained": "a b"}) == (
        f"lm_eval --model hf --model_args 'pretrained=a b,dtype=float32'{turns} --tasks TASK"
    )


def test_export_says_that_the_harness_cuts_an_adapter_s_base(
    runs: Callable[[str], Path], table: Path, tmp_path: Path
) -> None:
    run = in_words(runs, table, tmp_path)
    config = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
    del config["model"]["vocab"]["258"]
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(config))
    for name, export in {"hf": export_hf, "peft": export_peft}.items():
        export(run, tmp_path / name)
        cut = "It cuts an adapter's base to the tokenizer's 258 of 259 tokens"
        assert (cut in (tmp_path / name / "README.md").read_text()) == (name == "peft")


def test_model_that_the_harness_cannot_load_has_no_command(
    runs: Callable[[str], Path], table: Path, tmp_path: Path
) -> None:
    """Bytes for a tokenizer, and a classifier."""
    classifies = trained(tmp_path / "run", configured(table, "fedit", BERT))
    for at, run in enumerate((runs("fedit"), classifies)):
        export_hf(run, tmp_path / f"{at}")
        assert "lm_eval" not in (tmp_path / f"{at}" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(LM_EVAL is None, reason="no .venv-lm-eval: make .venv-lm-eval/.installed")
def test_harness_computes_the_exported_model_s_likelihoods(
    runs: Callable[[str], Path], table: Path, tmp_path: Path
) -> None:
    """Bits per byte of two texts: of the whole model, of the adapter, and worked out from the whole model's logits."""
    run, texts = in_words(runs, table, tmp_path), ["7 9 11 13 40", "100 3 5"]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "texts.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        **{"task": "texts", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling"},
        "dataset_kwargs": {"data_files": {"test": str(tasks / "texts.json")}},
        **{"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]},
    }
    (tasks / "texts.yaml").write_text(yaml_text(task))
    found = {}
    for name, export in {"hf": export_hf, "peft": export_peft}.items():
        export(run, tmp_path / name)
        (command,) = WRITTEN.findall((tmp_path / name / "README.md").read_text())
        words = [str(LM_EVAL), *shlex.split(command.replace("TASK", "texts"))[1:]]
        words += ["--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / f"{name}.json")]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        subprocess.run(words, cwd=tmp_path / name, env={**os.environ, **quiet}, check=True, timeout=280)
        (written,) = tmp_path.glob(f"{name}_*.json")
        found[name] = json.loads(written.read_text())["results"]["texts"]["bits_per_byte,none"]
    model, words_of = by_readme(tmp_path / "hf")["model"], tokenizer()
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[words_of.bos_token_id, *words_of(text, add_special_tokens=False)["input_ids"]]])
        nats += len(ids[0][1:]) * model(input_ids=ids, labels=ids).loss.item()
    wanted = nats / sum(len(text) for text in texts) / np.log(2)
    assert found["hf"] == pytest.approx(wanted, rel=1e-4)
    assert found["peft"] == pytest.approx(wanted, rel=1e-4)


def test_gguf_file_cannot_name_a_base(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert loadable(str(tmp_path / "model.gguf"), "causal-lm") is None


# --- the model's client


@pytest.mark.parametrize("export", [export_hf, export_peft])
def test_client_is_refused_for_a_method_with_one_model(
    export: Export, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^--client: got 1; allowed: nothing, for fedit has one model for all"):
        export(runs("fedit"), tmp_path / "to", 1)


@pytest.mark.parametrize("method", PERSONAL)
@pytest.mark.parametrize("export", [export_hf, export_peft])
@pytest.mark.parametrize("client", [None, 1, -1])
def test_personal_model_needs_a_client_that_took_part(
    client: int | None, export: Export, method: str, runs_of_one: Callable[[str], Path], tmp_path: Path
) -> None:
    """Only client 0 of the two clients ever trained."""
    run = runs_of_one(method)
    with pytest.raises(UserError, match=rf"^--client: got {client}; allowed: .* {method}: 0; e\.g\. --client 0$"):
        export(run, tmp_path / "to", client)
    export(run, tmp_path / "again", 0)


@pytest.mark.parametrize("method", PERSONAL)
def test_clients_have_models_of_their_own(method: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    found = []
    for client in (0, 1):
        export_peft(runs(method), tmp_path / str(client), client)
        found.append(loaded(tmp_path / str(client))[0])
    assert not torch.allclose(*found, atol=1e-3)


# --- the command


def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, str, str]:
    """`rayfed-sub WORDS`: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["rayfed-sub", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    captured = capsys.readouterr()
    return int(str(ended.value.code)), captured.out, captured.err


def test_command_warns_on_stderr_and_prints_how_to_load(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "peft"
    words = ("export", str(runs("fedftg")), "--to", str(to), "--format", "peft")
    code, out, err = run_command(capsys, monkeypatch, *words)
    assert (code, out.count("\n"), err.count("\n")) == (0, 1, 1)
    base = "AutoModelForCausalLM.from_pretrained('base', dtype='float32')"
    assert out == (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM; "
        f'model = PeftModel.from_pretrained({base}, ".")  # in the exported folder\n'
    )
    assert err.startswith("rayfed-sub: the change of dense weights is written at its numerical rank, ")
    assert (to / "adapter_config.json").exists()
    code, out, err = run_command(capsys, monkeypatch, *words)
    assert (code, err.split(";")[0]) == (2, f"rayfed-sub: --to: got '{to}'")


def test_command_accepts_a_client(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", str(runs("fedit")), "--to", str(tmp_path / "to"), "--client", "3")
    code, out, err = run_command(capsys, monkeypatch, *words)
    assert (code, out) == (2, "")
    assert err == "rayfed-sub: --client: got 3; allowed: nothing, for fedit has one model for all; leave it out\n"


# --- the factors


@pytest.mark.parametrize(("m", "n"), [(9, 5), (5, 9), (6, 6)])
def test_factorisation_keeps_the_largest_directions(m: int, n: int) -> None:
    """Singular values 8, 4, 2, 1 cut at rank 2 leave an error of 2 in the spectral norm."""
    rng = torch.Generator().manual_seed(m)
    U, _ = torch.linalg.qr(torch.randn(m, 4, generator=rng, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, 4, generator=rng, dtype=torch.float64))
    change = U @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)) @ V.T
    left, right = factorised(change, 2)
    assert (left.shape, right.shape, left.dtype) == ((m, 2), (2, n), torch.float32)
    assert float(torch.linalg.matrix_norm(change - left.double() @ right.double(), 2)) == pytest.approx(2.0, abs=1e-5)
    left, right = factorised(change, 4)
    torch.testing.assert_close(left @ right, change.float(), atol=1e-5, rtol=0)
