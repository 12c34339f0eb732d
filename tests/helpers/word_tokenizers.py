"""Tokenizers of whole words for models in folders."""

from __future__ import annotations

from typing import Any


def numbers(begin: str = "", end: str = "</s>", template: str | None = None, size: int = 259) -> Any:
    """A fast tokenizer whose words are the numbers of their tokens, 4 to size - 1, and which puts `begin` and `end`
    around a text; 0 is <pad>, 1 <s>, 2 </s>, 3 unknown.  template: of chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {**{"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, **{str(i): i for i in range(4, size)}}
    fast = Tokenizer(models.WordLevel(words, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    around = " ".join(part for part in (begin, "$A", end) if part)
    special = [(word, words[word]) for word in f"{begin} {end}".split()]
    fast.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    made.chat_template = template
    return made
