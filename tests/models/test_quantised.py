"""Quantised weights: their forms against the libraries that define them, what of a model is quantised, and files."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayfed_sub.config.schema import Model
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import wire_bytes
from rayfed_sub.models.architecture import Architecture, architecture
from rayfed_sub.models.frozen_linear import FrozenLinear, product
from rayfed_sub.models.model_folder import write_folder
from rayfed_sub.models.quantisation import _of_blocks, reads_no_weight, row_order
from rayfed_sub.models.quantised import BLOCK, FORMS, Quantised, empty, nbytes, parts_of, quantised, quantised_in
from rayfed_sub.models.weights import assemble, dense, load_weights, target_weights, with_targets
from rayfed_sub.planning.allocations import Allocations
from rayfed_sub.planning.worker_memory import backbone_bytes
from tests.helpers.gguf_files import write_gguf

LLAMA: dict[str, Any] = {
    **{"type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": True},
}
GPT2: dict[str, Any] = {"type": "gpt2", "n_embd": 32, "n_inner": 48, "n_layer": 1, "n_head": 2, "n_positions": 64}
BERT: dict[str, Any] = {**LLAMA, "type": "bert", "num_hidden_layers": 1}
for _name in ("num_key_value_heads", "tie_word_embeddings"):
    BERT.pop(_name)
IDS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
W = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


def built(numbers: dict[str, Any] = LLAMA, classes: tuple[str, ...] = (), **fields: Any) -> tuple[Model, Architecture]:
    model = Model(path="random", random=numbers, **fields)
    return model, architecture(model, "text-classification" if classes else "causal-lm", classes)


def of_gguf(kind: str) -> tuple[Quantised, Tensor]:
    """W in a type of GGUF's, and gguf's own dequantised one."""
    form = gguf.GGMLQuantizationType[kind.upper()]
    data = gguf.quants.quantize(W.numpy(), form)
    return _of_blocks(kind, torch.from_numpy(data)), torch.from_numpy(gguf.quants.dequantize(data, form))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_gguf_types_have_the_bits_of_gguf(kind: str) -> None:
    weight, theirs_mn = of_gguf(kind)
    assert torch.equal(weight.dense(), theirs_mn)
    assert 0 < (theirs_mn - W).abs().max() < 0.5
    # 4.5, 5 and 8.5 bits a number
    assert (
        sum(x.numel() * x.element_size() for x in weight.parts.values())
        == 24 * 64 * {"q4_0": 18, "q4_1": 20}.get(kind, 34) // 32
    )


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_rounded_weights_have_the_bits_of_bitsandbytes(form: str) -> None:
    from bitsandbytes import functional as theirs

    weight = quantised(W, form)
    if form == "int8":
        codes_mn, scales_m, _ = theirs.int8_vectorwise_quant(W)
        assert torch.equal(weight.dense(), theirs.int8_vectorwise_dequant(codes_mn, scales_m))
    else:
        codes, state = theirs.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4")
        assert torch.equal(weight.dense(), theirs.dequantize_4bit(codes, state))
        half_mn = theirs.dequantize_4bit(*theirs.quantize_4bit(W.bfloat16(), blocksize=BLOCK, quant_type="nf4"))
        assert half_mn.dtype == torch.bfloat16
        assert torch.equal(quantised(W.bfloat16(), "nf4").dense(torch.bfloat16), half_mn)
    assert {name: (tuple(x.shape), x.dtype) for name, x in weight.parts.items()} == FORMS[form].sizes(*W.shape)


@pytest.mark.parametrize("n", [16, 48, 96, 100])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_blocks_lie_across_rows_that_are_no_multiple_of_them(form: str, n: int) -> None:
    from bitsandbytes import functional as theirs

    W_mn = torch.randn(5, n, generator=torch.Generator().manual_seed(1))
    codes, state = theirs.quantize_4bit(W_mn, blocksize=BLOCK, quant_type=form)
    halves = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1)
    scales = state.absmax.repeat_interleave(BLOCK)[: 5 * n]
    expected = (state.code[halves.view(-1).long()] * scales).view(5, n)
    weight = Quantised(form, {"codes": codes.view(5, n // 2), "scales": state.absmax[:, None]}, torch.float32)
    assert torch.equal(weight.dense(), expected)


def test_row_of_zeros_stays_zero() -> None:
    """As embeddings of padding are: its scale is 0."""
    weight = quantised(torch.cat([W[:1], torch.zeros(1, 64)]), "int8")
    assert weight.parts["codes"][1].eq(0).all()
    assert weight.dense()[1].eq(0).all()


@pytest.mark.parametrize("form", ["int8", "nf4", "q4_0", "q4_1", "q8_0"])
def test_rows_are_those_of_the_whole(form: str) -> None:
    weight = quantised(W, form) if form in ("int8", "nf4") else of_gguf(form)[0]
    index = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(weight.rows(index), weight.dense()[index])
    assert functional.embedding(index, weight).equal(weight.dense()[index])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_product_and_gradient_are_those_of_the_dense_weight(form: str, dtype: torch.dtype) -> None:
    weight, bias_m = quantised(W, form), torch.arange(24.0, dtype=dtype)
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    d = torch.ones(5, 3, 24, dtype=dtype)
    ours, theirs = product(x, weight, bias_m), product(x, weight.dense(dtype), bias_m)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours, x, d)[0], torch.autograd.grad(theirs, x, d)[0])
    assert torch.equal(product(d, weight.mT), product(d, weight.dense(dtype).mT))
    with torch.no_grad():
        own = replace(weight, dtype=dtype)
        assert torch.equal(functional.linear(x, own), functional.linear(x, own.dense()))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_backward_pass_holds_one_dense_weight(form: str) -> None:
    """Of six layers of a million numbers, whose dense weights take 24 MB."""
    layers = [FrozenLinear(empty(form, 1024, 1024), None, transposed=False) for _ in range(6)]
    x = torch.zeros(8, 1024, device="meta", requires_grad=True)
    known = [part for layer in layers for part in layer.weight.parts.values()]  # type: ignore[union-attr]
    with Allocations([x, *known]) as seen:
        y = x
        for layer in layers:
            y = layer(y)
        y.sum().backward()
    # codes of four bits are taken apart as bytes before
    assert 4 * 2**20 < seen.peak < 4 * 2**20 + 2 * 2**20


# What of a model is quantised


def test_int8_takes_layers_and_embedding_and_nf4_takes_layers() -> None:
    _, bones = built(quantize="int8")
    layers = [f"model.layers.{block}.{part}" for block in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
    assert set(bones.quantised) > {f"{name}.weight" for name in layers}
    assert len(bones.quantised) == 2 * 7 + 1  # the embedding is the output layer too
    assert set(bones.quantised.values()) == {"int8"}
    _, bones = built(quantize="nf4")
    assert len(bones.quantised) == 2 * 7
    _, bones = built({**LLAMA, "tie_word_embeddings": False}, quantize="nf4")
    assert len(bones.quantised) == 2 * 7  # the output layer is not taken
    _, bones = built({**LLAMA, "tie_word_embeddings": False}, quantize="int8")
    assert len(bones.quantised) == 2 * 7 + 2


def test_head_of_a_classification_is_not_quantised() -> None:
    _, bones = built(BERT, classes=("a", "b"), quantize="int8")
    assert not {f"{layer.name}.weight" for layer in bones.shape.head} & bones.quantised.keys()
    assert "bert.embeddings.word_embeddings.weight" in bones.quantised
    assert "bert.embeddings.position_embeddings.weight" not in bones.quantised


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("numbers", [LLAMA, GPT2, BERT], ids=["llama", "gpt2", "bert"])
def test_quantised_model_is_its_dense_one(numbers: dict[str, Any], quantize: str) -> None:
    """GPT-2 stores its layers as (n, m)."""
    classes = ("a", "b") if numbers["type"] == "bert" else ()
    model, bones = built(numbers, classes, quantize=quantize)
    tensors = load_weights(model, bones, seed=0)
    assert quantised_in(tensors).keys() == bones.quantised.keys()
    assert backbone_bytes(bones) == wire_bytes(tensors)
    whole, (plain_model, plain) = dense(bones, tensors), built(numbers, classes)
    drawn = load_weights(plain_model, plain, seed=0)
    assert whole.keys() == drawn.keys()
    for name in bones.quantised:
        assert 0 < (whole[name] - drawn[name]).abs().max() < 0.15 * drawn[name].abs().max()
        m, n = reversed(drawn[name].shape) if numbers is GPT2 and "h.0" in name else drawn[name].shape
        assert nbytes(bones.quantised[name], m, n) == wire_bytes(parts_of(name, quantised_in(tensors)[name]))
    with torch.no_grad():
        ours, theirs = (assemble(bones, found)(input_ids=IDS).logits for found in (tensors, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    targets = target_weights(bones.shape, bones.transposed, tensors)
    stored = with_targets(bones.shape, bones.transposed, whole, targets)
    assert all(torch.equal(stored[name], whole[name]) for name in whole)


def test_stored_goes_with_a_file_that_is_quantised() -> None:
    with pytest.raises(UserError, match=r"^model.quantize: got 'stored'; allowed: none, int8 or nf4 where model.path"):
        built(quantize="stored")


def test_code_that_reads_weights_itself_is_refused() -> None:
    """As in `weight.div_(2)` on a layer's own."""
    _, bones = built(quantize="int8")
    said = r"^model.quantize: got 'int8'; allowed: none for models of type llama, whose"
    refused = pytest.raises(UserError, match=said)
    with refused, reads_no_weight("int8", bones.hf_config):
        quantised(W, "int8").div_(2)  # type: ignore[attr-defined]


# bitsandbytes' checkpoints


def checkpoint(folder: Path, *, classes: tuple[str, ...] = (), dtype: str = "float32", **how: Any) -> Any:
    """A tiny Llama, or Bert that classifies, as transformers and bitsandbytes quantise and save it in this type."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    # Rows of whole blocks: on processors with AVX-512 bitsandbytes 0.50 dequantises others wrongly.
    model, bones = built({**(BERT if classes else LLAMA), "hidden_size": 64, "intermediate_size": 128}, classes)
    write_folder(bones, load_weights(model, bones, seed=7), {}, folder / "plain")
    given = {"quantization_config": BitsAndBytesConfig(**how), "device_map": {"": "cpu"}, "dtype": dtype}
    auto: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder / "plain", **given)
    loaded.save_pretrained(folder / "stored")
    return loaded


KINDS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float32},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}


QUICK = ("int8", "nf4-double")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in QUICK else pytest.mark.slow) for form in KINDS]
)
def test_checkpoint_of_bitsandbytes_is_read_as_it_is(form: str, tmp_path: Path) -> None:
    """Whatever the type of its other weights, and of the model."""
    own = {"int8": "float16", "nf4-double": "bfloat16"}.get(form, "float32")
    theirs = checkpoint(tmp_path, dtype=own, **KINDS[form]).dequantize(torch.float32)
    for quantize, dtype in (("stored", "float32"), ("stored", "bfloat16"), ("none", "bfloat16")):
        kind = getattr(torch, dtype)
        whole = {name: parameter.detach().to(kind) for name, parameter in theirs.named_parameters()}
        model = Model(path=str(tmp_path / "stored"), quantize=quantize, dtype=dtype)
        bones = architecture(model, "causal-lm")
        assert set(bones.quantised.values()) == ({form} if quantize == "stored" else set())
        assert len(bones.quantised) == (14 if quantize == "stored" else 0)
        tensors = load_weights(model, bones, seed=0)
        assert backbone_bytes(bones) == wire_bytes(tensors)
        ours = dense(bones, tensors)
        assert {ours[name].dtype for name in whole} == {kind}
        stored = getattr(torch, own)  # in which transformers dequantises
        assert all(torch.equal(ours[name].to(stored), whole[name].to(stored)) for name in whole)


@pytest.mark.parametrize("form", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_head_that_a_checkpoint_has_quantised_is_read(form: str, tmp_path: Path) -> None:
    """transformers quantises Bert's, not Llama's; one for other classes is drawn."""
    theirs = checkpoint(tmp_path, classes=("a", "b"), **KINDS[form])
    assert type(theirs.classifier) is not torch.nn.Linear
    whole = theirs.dequantize(torch.float32).classifier
    found = {}
    for quantize, classes in (("stored", "ab"), ("none", "ab"), ("stored", "abc")):
        model = Model(path=str(tmp_path / "stored"), quantize=quantize)
        bones = architecture(model, "text-classification", tuple(classes))
        tensors = load_weights(model, bones, seed=0)
        assert "classifier.weight" not in bones.quantised
        found[quantize, classes] = tensors["classifier.weight"], tensors["classifier.bias"]
    for quantize in ("stored", "none"):
        assert torch.equal(found[quantize, "ab"][0], whole.weight)
        assert torch.equal(found[quantize, "ab"][1], whole.bias)
    drawn_mn, bias_m = found["stored", "abc"]
    assert drawn_mn.shape == (3, 64)
    assert 0.05 < drawn_mn.std() < 0.2  # initializer_range is 0.1
    assert not bias_m.any()


def test_head_that_a_checkpoint_lacks_is_drawn(tmp_path: Path) -> None:
    checkpoint(tmp_path, load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = Model(path=str(tmp_path / "stored"), quantize="stored")
    bones = architecture(model, "text-classification", ("a", "b"))
    assert 0.05 < load_weights(model, bones, seed=0)["score.weight"].std() < 0.2


def test_checkpoint_is_not_rounded_twice(tmp_path: Path) -> None:
    checkpoint(tmp_path, load_in_8bit=True)
    with pytest.raises(UserError, match=r"^model.quantize: got 'nf4'; allowed: none or stored, for .* already; set"):
        architecture(Model(path=str(tmp_path / "stored"), quantize="nf4"), "causal-lm")


def test_damaged_quantisation_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, load_in_4bit=True)
    file = tmp_path / "stored" / "config.json"
    config = json.loads(file.read_text())
    for entries, said in (
        ({"quant_method": "gptq"}, "a checkpoint of bitsandbytes; this one is quantised by gptq; take the original"),
        ({"load_in_4bit": False}, "load_in_8bit=False and load_in_4bit=False, of which one must be true"),
        ({"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type=nf5, which is neither nf4 nor fp4"),
        ({"llm_int8_skip_modules": 3}, "llm_int8_skip_modules=3, which is no list of names or regular expressions"),
        ({"llm_int8_skip_modules": [3]}, "llm_int8_skip_modules=[3], which is no list"),
        ({"llm_int8_skip_modules": ["lm_head", "("]}, "llm_int8_skip_modules=['lm_head', '('], which is no list"),
        ({"llm_int8_skip_modules": ["*x"]}, "llm_int8_skip_modules=['*x'], which is no list"),
        ({"bnb_4bit_compute_dtype": "xx"}, "entries that transformers refuses (AttributeError: "),
    ):
        file.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **entries}}))
        with pytest.raises(UserError) as caught:
            architecture(Model(path=str(tmp_path / "stored"), quantize="stored"), "causal-lm")
        assert str(caught.value).startswith("model.path: got ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


# GGUF


@pytest.mark.parametrize("kind", ["Q4_1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Q4_0", "Q8_0"))])
def test_gguf_file_is_read_as_it_is(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Queries and keys, whose rows lie in another order there, too; down projections, of 48 inputs, are float32."""
    model, bones = built()
    write_gguf(tmp_path / "a.gguf", load_weights(model, bones, seed=0), kind, "Q8_0")
    there = {quantize: Model(path=str(tmp_path / "a.gguf"), quantize=quantize) for quantize in ("none", "stored")}
    known = {quantize: architecture(there[quantize], "causal-lm", vocabulary=259) for quantize in there}
    plain, tensors = (load_weights(there[quantize], known[quantize], seed=0) for quantize in there)
    forms = known["stored"].quantised
    assert len(forms) == 2 * 6 + 1
    assert forms["model.embed_tokens.weight"] == "q8_0"
    assert forms["model.layers.1.self_attn.q_proj.weight"] == kind.lower()
    ours = dense(known["stored"], tensors)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert wire_bytes(tensors) == backbone_bytes(known["stored"]) < wire_bytes(plain) / 2
    assert not caplog.records


def test_order_of_rows_is_that_of_transformers() -> None:
    """Of 2 heads of 4 rows each: llama.cpp interleaves the halves that rotary positions pair.  GPT-2's are turned."""
    from transformers.modeling_gguf_pytorch_utils import GPT2TensorProcessor, LlamaTensorProcessor

    rule = LlamaTensorProcessor({"num_attention_heads": 2, "num_key_value_heads": 2})
    assert row_order(rule, "blk.0.attn_q.weight", 8, 3).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(rule, "blk.0.ffn_up.weight", 8, 3).tolist() == list(range(8))
    for n in (3, 8):
        assert row_order(GPT2TensorProcessor({}), "blk.0.ffn_up.weight", 8, n).tolist() == list(range(8))


def test_other_types_of_gguf_are_dequantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, bones = built()
    write_gguf(tmp_path / "a.gguf", load_weights(model, bones, seed=0), "Q8_0", "Q5_1")
    with caplog.at_level(logging.WARNING):
        known = architecture(Model(path=str(tmp_path / "a.gguf"), quantize="stored"), "causal-lm", vocabulary=259)
    assert "model.embed_tokens.weight" not in known.quantised
    assert "of the file's matrices 1 in Q5_1 are dequantised when they are loaded" in caplog.text
    write_gguf(tmp_path / "b.gguf", load_weights(model, bones, seed=0), "Q5_1", "Q5_1")
    with pytest.raises(UserError, match=r"^model.quantize: got 'stored'; allowed: none, int8 or nf4 where model.path"):
        architecture(Model(path=str(tmp_path / "b.gguf"), quantize="stored"), "causal-lm", vocabulary=259)
