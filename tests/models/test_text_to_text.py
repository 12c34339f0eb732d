"""Encoder-decoders: which models they are, what their decoders read, and how their rows are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from rayfed_sub.config.schema import Model
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import collate
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.tokenization import tokenised
from rayfed_sub.models.architecture import architecture, bare_config, kind_of_model
from rayfed_sub.models.positions import position_limit
from rayfed_sub.models.text_to_text import decoder_inputs, start_token
from rayfed_sub.models.tokenizers import hub_codec
from tests.helpers.word_tokenizers import numbers

SIZES = {
    **{
        "vocab_size": 259,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
    },
    **{"num_heads": 2, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24},
    **{"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"max_position_embeddings": 48, "decoder_start_token_id": 1},
}


def config_of(name: str, **more: Any) -> Any:
    known = AutoConfig.for_model(name)
    own = known.to_dict().keys() | known.attribute_map.keys() | {"decoder_start_token_id"}
    return AutoConfig.for_model(name, **{key: value for key, value in SIZES.items() if key in own}, **more)


def built(name: str, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(config_of(name, **more)).eval()


@pytest.mark.parametrize(
    ("random", "kind"),
    [
        ({"type": "t5"}, "seq2seq-lm"),
        ({"type": "bart"}, "seq2seq-lm"),
        ({"type": "bart", "is_encoder_decoder": False}, "causal-lm"),  # the decoder alone
        ({"type": "whisper"}, "causal-lm"),  # its encoder hears
        ({"type": "gemma3"}, "causal-lm"),
        ({"type": "llama"}, "causal-lm"),
    ],
)
def test_configuration_says_the_kind(random: dict[str, Any], kind: str) -> None:
    model = Model(path="random", random=random)
    assert kind_of_model(model, "causal-lm") == kind
    assert kind_of_model(model, "text-classification") == "text-classification"
    assert kind_of_model(Model(path="given"), "causal-lm", bare_config(model, "causal-lm")) == kind


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "m2m_100", "blenderbot"])
def test_decoder_reads_what_the_model_makes_of_labels(name: str) -> None:
    """The model, given labels, shifts them itself."""
    model = built(name)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    labels = torch.tensor([[10, 11, 2], [12, 2, -100]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    read = decoder_inputs(model, labels)
    with torch.no_grad():
        theirs = model(**inputs, labels=labels).logits
        ours = model(**inputs, decoder_input_ids=read).logits
    assert torch.equal(ours, theirs)
    first = 2 if name == "mbart" else 1  # mBART begins with a row's last token, its language
    assert read.tolist()[0] == [first, 10, 11]
    assert start_token(model, [10, 11, 2]) == first  # as it learns, so it writes
    if name == "mbart":
        model.config.decoder_start_token_id = None
        assert start_token(model, [10, 11, 2, 258]) == 258


def test_model_without_a_first_token_is_refused(tmp_path: Path) -> None:
    model = built("t5")
    del model.config.decoder_start_token_id
    model.generation_config.decoder_start_token_id = None
    model.save_pretrained(tmp_path)
    there = Model(path=str(tmp_path))
    with pytest.raises(UserError, match="decoder_start_token_id, with which answers begin; set it in") as refused:
        architecture(there, "causal-lm", vocabulary=259, pad=0)
    assert refused.value.field == "model.path"
    model.generation_config.decoder_start_token_id = 5
    model.save_pretrained(tmp_path)
    assert architecture(there, "causal-lm", vocabulary=259, pad=0).hf_config.decoder_start_token_id == 5


def test_each_side_has_its_positions() -> None:
    for name, more, limits in (
        ("bart", {}, (48, 48)),
        ("led", {"max_encoder_position_embeddings": 64, "attention_window": 4}, (64, 32)),
        ("t5", {}, (None, None)),
    ):
        if name == "led":
            more |= {"max_decoder_position_embeddings": 32}
        model = built(name, **more)
        assert tuple(position_limit(model, model.config, side) for side in ("encoder", "decoder")) == limits


def test_rows_are_a_source_and_an_answer() -> None:
    """BART's tokenizer puts <s> and </s> around both; T5's ends both with </s>."""
    pairs = Pairs("causal-lm", ("10 11", "12 13 14"), ("20", "21 22"), ("", ""))
    for begin, source, answer in (("<s>", [1, 10, 11, 2], [1, 20, 2]), ("", [10, 11, 2], [20, 2])):
        rows, _, _ = tokenised(pairs, hub_codec(numbers(begin), apart=True), 16)
        batch = collate(rows, np.array([0, 1]), mask_prompt=True, pad=0, apart=True)
        assert batch["input_ids"].tolist()[0] == [*source, 0]
        assert batch["attention_mask"].tolist()[0] == [*[1] * len(source), 0]
        assert batch["labels"].tolist()[0] == [*answer, -100]


def test_tokenizer_without_an_end_gets_one_and_chat_templates_are_kept() -> None:
    bare = hub_codec(numbers(end=""), apart=True)
    assert (bare.prompt("10"), bare.answer("20"), bare.tail) == ([10], [20, 2], 0)
    template = "{% for m in messages %}9 {{ m['content'] }} {% endfor %}"
    asked = hub_codec(numbers(template=template), apart=True)
    assert (asked.prompt("10"), asked.answer("20")) == ([9, 10], [20, 2])
    assert hub_codec(numbers(), apart=True).identity != hub_codec(numbers()).identity


def test_answer_that_is_cut_keeps_its_language() -> None:
    """mBART writes the language last, and begins with it."""
    tokenizer = numbers()
    codec = hub_codec(tokenizer, apart=True)
    codec.writer.backend_tokenizer.post_processor = numbers(end="</s> 258").backend_tokenizer.post_processor
    assert (codec.answer("20"), codec.tail) == ([20, 2, 258], 1)
    pairs = Pairs("causal-lm", ("10",), (" ".join(["20"] * 30),), ("",))
    rows, _, cuts = tokenised(pairs, codec, 8)
    assert rows.row(0).tolist() == [10, 2, 20, 20, 20, 20, 20, 258]
    assert cuts.answers == 1
