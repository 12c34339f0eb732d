"""Which layers are trained: by their place in the model, and by patterns."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from rayfed_sub.config.schema import Model
from rayfed_sub.core.errors import UserError
from rayfed_sub.models.architecture import architecture, build
from rayfed_sub.models.experts import place
from rayfed_sub.models.targets import find_targets, linear_layers, multiplies
from tests.helpers.model_types import CLASSES, built, sizes, types_of

FORMER: dict[str, tuple[str, ...]] = {
    r"\.\d+\.mlp\.up_proj$": (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3"),
        *("olmo", "olmo2", "stablelm", "cohere", "granite", "exaone4"),
    ),
    r"\.\d+\.mlp\.gate_up_proj$": ("phi3", "glm"),  # gate and up are one matrix there
    # The block's number keeps out SigLIP's pooling head, whose MLP has an fc1 too and is not a block.
    r"\.\d+\.mlp\.fc1$": (
        *("vit", "dinov2", "dinov2_with_registers", "siglip", "clip", "beit", "deit", "ijepa"),
        "phi",
    ),
    r"\.layers\.\d+\.fc1$": ("opt",),
    r"\.layer\.\d+\.intermediate\.dense$": (
        *("bert", "roberta", "electra", "xlm-roberta", "camembert", "mpnet", "deberta", "deberta-v2"),
    ),
    r"\.layer\.\d+\.ffn\.lin1$": ("distilbert",),
    r"\.albert_layers\.\d+\.ffn$": ("albert",),
    r"\.layers\.\d+\.mlp\.Wi$": ("modernbert",),
    r"\.\d+\.mlp\.c_fc$": ("gpt2", "gpt_neo", "starcoder2"),
    r"\.\d+\.mlp\.dense_h_to_4h$": ("gpt_neox", "falcon", "bloom"),
    r"\.\d+\.mlp\.fc_in$": ("gptj", "codegen"),
}
"""Expressions by which runs had their targets, type by type, before these were found by structure: runs of those types
go on with the same layers."""

OFTEN = {"albert", "deberta-v2", "dinov2", "gemma3", "glm", "modernbert"}
"""One of a kind; others are in more tests."""
KINDS = ("causal-lm", "text-classification", "image-classification")


def former() -> Iterator[Any]:
    """Each type with the kind that its models are most used for."""
    for pattern, names in FORMER.items():
        for name in names:
            kind = next(kind for kind in KINDS if name in types_of(kind) and not (kind == KINDS[0] and "bert" in name))
            yield pytest.param(name, kind, pattern, marks=() if name in OFTEN else pytest.mark.slow, id=name)


@pytest.mark.parametrize(("name", "kind", "pattern"), list(former()))
def test_targets_of_the_first_types_stay(name: str, kind: str, pattern: str, tmp_path: Path) -> None:
    if name == "deit":  # transformers asks its configuration for the class, which a file has
        config = AutoConfig.for_model(**{"model_type" if k == "type" else k: x for k, x in sizes(name).items()})
        config.architectures = ["DeiTForImageClassification"]
        config.save_pretrained(tmp_path)
        bones = architecture(Model(path=str(tmp_path)), kind, CLASSES)
    else:
        _, bones = built(name, kind)
    linears = {n for n, _ in linear_layers(build(bones.hf_config, kind))} - {layer.name for layer in bones.shape.head}
    expected = [n for n in linears if re.search(pattern, n)]
    assert expected
    assert {layer.name for layer in bones.shape.targets} == set(expected)


def kinds_of(name: str, kind: str = "causal-lm", **fields: Any) -> list[str]:
    """The targets of a tiny model, one for each place in a block."""
    _, bones = built(name, kind, **fields)
    names = (place(layer)[0] if layer.expert else layer.name for layer in bones.shape.targets)
    places = (re.sub(r"^.*?\.\d+\.", "", name) for name in names)
    return list(dict.fromkeys(places))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bitnet", ["mlp.up_proj"]),  # a norm stands between the product with the gate and the projection back
        ("ctrl", ["ffn.0"]),
        # Low-rank attention looks like an MLP.
        ("deepseek_v3", ["mlp.up_proj", "mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj"]),
        # Gate and projection are limited, which is no activation.
        ("deepseek_v4", ["mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj"]),
        ("gemma4_text", ["mlp.up_proj"]),  # there is a gate for what each block is given beside its tokens
        ("lfm2", ["feed_forward.w3"]),
        ("mamba", ["mixer.in_proj"]),
        ("gpt_oss", ["mlp.experts.gate_up_proj"]),
        pytest.param("dbrx", ["ffn.experts.mlp.v1"], marks=pytest.mark.slow),  # gate and projection apart
        pytest.param(
            "granitemoehybrid",
            ["block_sparse_moe.experts.gate_up_proj", "shared_mlp.input_linear"],
            marks=pytest.mark.slow,
        ),
        pytest.param("jetmoe", ["mlp.input_linear.weight"], marks=pytest.mark.slow),
        pytest.param(
            "llama4",
            ["feed_forward.experts.gate_up_proj", "feed_forward.shared_expert.up_proj"],
            marks=pytest.mark.slow,
        ),
        pytest.param("rwkv", ["feed_forward.key"], marks=pytest.mark.slow),
        pytest.param(  # gated norms
            "axk2", ["mlp.up_proj", "mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj"], marks=pytest.mark.slow
        ),
        pytest.param("hrm_text", ["mlp.up_proj"], marks=pytest.mark.slow),  # blocks that are used more than once
        pytest.param("xlstm", ["ffn.proj_up"], marks=pytest.mark.slow),
        pytest.param(  # rows by language
            "xmod", ["intermediate.dense", "output.adapter_modules.en_XX.dense1"], marks=pytest.mark.slow
        ),
        # Blocks share one MLP.
        pytest.param("zamba", ["mamba.in_proj", "mamba_decoder.mamba.in_proj"], marks=pytest.mark.slow),
    ],
)
def test_lower_mlp_by_structure(name: str, expected: list[str]) -> None:
    assert kinds_of(name) == expected


class Gated(nn.Module):
    """An MLP whose names say nothing, in a block of a model that classifies nothing."""

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.sigmoid = sigmoid

    def forward(self, x: Tensor) -> Tensor:
        act = torch.sigmoid if self.sigmoid else nn.functional.silu
        return x + self.three(self.one(x) * act(self.two(x)))


@pytest.mark.parametrize("sigmoid", [True, False])
def test_gate_is_known_by_its_activation(sigmoid: bool) -> None:
    module: Any = nn.Module()
    with torch.device("meta"):
        module.embed, module.layers, module.head = nn.Embedding(9, 8), nn.ModuleList([Gated(sigmoid=sigmoid)] * 1), None
    module.config = SimpleNamespace(model_type="mine")
    module.get_input_embeddings, module.get_output_embeddings = lambda: module.embed, lambda: None
    module.forward = lambda input_ids, use_cache: SimpleNamespace(logits=module.layers[0](module.embed(input_ids)))
    assert list(find_targets("lower-mlp", module, "causal-lm", ())) == ["layers.0.one"]
    assert list(find_targets("all-linear", module, "causal-lm", ())) == [
        "layers.0.one",
        "layers.0.two",
        "layers.0.three",
    ]


# Other choices


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", "attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("gpt2", "attention", ["c_attn", "c_proj"]),
        ("deepseek_v3", "attention", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]),
        ("mixtral", "attention", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("mamba", "attention", ["in_proj", "x_proj", "out_proj"]),
        ("llama", "peft", ["q_proj", "v_proj"]),
        ("llama", "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("llama", r"\.1\.mlp\.(up|down)_proj$", ["up_proj", "down_proj"]),
        ("mixtral", "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("mixtral", r"\.1\.mlp\.experts\.down_proj$", ["down_proj"]),
    ],
)
def test_targets_can_be_chosen(name: str, targets: str, expected: list[str]) -> None:
    assert [place.rpartition(".")[2] for place in kinds_of(name, targets=targets)] == expected


def test_output_layer_is_no_target(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(path="random", random={**sizes("llama"), "tie_word_embeddings": False}, targets=r"3\.mlp|lm_head")
    names = [layer.name.removeprefix("model.layers.3.mlp.") for layer in architecture(model, "causal-lm").shape.targets]
    assert names == ["gate_proj", "up_proj", "down_proj"]  # the module's order
    assert [record.getMessage() for record in caplog.records] == [
        "model.targets: 3\\.mlp|lm_head leaves out lm_head (the output layer)"
    ]


def test_what_a_pattern_matches_in_vain_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A decoder cut from an encoder-decoder has attention to an encoder that is not there."""
    assert kinds_of("trocr", targets=r"layers\.\d+\.(self|encoder)_attn") == [
        *("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")
    ]
    (line,) = (record.getMessage() for record in caplog.records)
    assert "model.decoder.layers.0.encoder_attn.k_proj, " in line
    assert "(not called, or without a gradient); model.decoder.layers.0.self_attn_layer_norm, " in line
    assert line.endswith("(not linear)")


def test_experts_are_targets_one_by_one() -> None:
    _, bones = built("qwen2_moe", "causal-lm", blocks=1)
    names = [layer.name.removeprefix("model.layers.0.mlp.") for layer in bones.shape.targets]
    assert names == [*(f"experts.gate_up_proj.{number}" for number in range(4)), "shared_expert.up_proj"]
    _, bones = built("qwen2_moe", "causal-lm", blocks=1, targets=r"down_proj\.[02]$")
    names = [layer.name.removeprefix("model.layers.0.mlp.") for layer in bones.shape.targets]
    assert names == ["experts.down_proj.0", "experts.down_proj.2"]


def test_matrices_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """JetMoE's attention has experts too, which are not trained."""
    assert kinds_of("jetmoe") == ["mlp.input_linear.weight"]
    line = caplog.records[0].getMessage()
    assert "leaves out model.layers.0.self_attention.experts.input_linear.weight, " in line
    assert line.endswith("(several matrices in one parameter)")


def test_decoder_without_its_encoder_is_not_trained_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert kinds_of("trocr") == ["fc1"]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("model.path: a decoder's attention to an encoder or to images")
    assert line.endswith("stays untrained: model.decoder.layers.0.encoder_attn.k_proj, ...")


# User errors


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", "up_proj(", "got 'up_proj\\('; allowed: a regular expression; "),
        ("llama", "fc9", "got 'fc9'; .*matches no module; linear layers: model.layers.0.self_attn.q_proj"),
        ("llama", "layernorm", "got .*matches only model.layers.0.input_layernorm, .*not linear"),
        ("llama", "lm_head", "got .*matches only lm_head .the output layer"),
        ("trocr", "encoder_attn.k", "got .*matches only model.decoder.layers.0.encoder_attn.k_proj .not called"),
        ("opt", "act", "got .*matches only model.decoder.layers.0.activation_fn; linear layers: "),
        ("smollm3", "peft", "got 'peft'; .*peft has no default for smollm3"),
    ],
)
def test_target_errors(name: str, targets: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        built(name, "causal-lm", targets=targets)
    assert re.match(f"model.targets: {expected}", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_layers_that_see_tokens_before_rows_train_one_client_at_a_time() -> None:
    """XLNet's see the first token of all rows first, so that a client's would be taken for its neighbour's."""
    _, bones = built("xlnet", "text-classification", targets="layer_1$")
    assert bones.alone
    assert bones.one_at_a_time
    assert not bones.any_pack
    with pytest.raises(UserError, match=r"not seen row by row"):
        built("xlnet", "causal-lm", targets="layer_1$")


def test_other_layers_stand_in_where_mlps_have_none_to_train(caplog: pytest.LogCaptureFixture) -> None:
    """Zamba's MLP is one for all blocks: trained are the projections into its state spaces."""
    _, bones = built("zamba", "text-classification")
    assert {layer.name.rpartition(".")[2] for layer in bones.shape.targets} == {"in_proj"}
    assert "the blocks' MLPs have no linear layer to train; trained are the projections into" in caplog.text


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_layers_that_do_more_than_multiply_are_no_targets() -> None:
    assert not multiplies(Doubled(4, 6))
    assert multiplies(Plain(4, 6))
    assert multiplies(nn.Linear(4, 6, bias=False))
    assert multiplies(Conv1D(6, 4))


def test_asking_peft_mutes_what_bitsandbytes_remarks_on_import() -> None:
    remarks = logging.getLogger("bitsandbytes")
    remarks.setLevel(logging.NOTSET)
    assert kinds_of("llama", targets="peft")
    assert remarks.level == logging.ERROR
