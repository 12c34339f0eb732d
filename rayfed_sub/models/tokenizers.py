"""Tokenizers for training: prompts, answers and texts to classify as tokens, and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.chats import Turn
from rayfed_sub.data.processors import PairTokens
from rayfed_sub.models.chat_masks import chat_tokens
from rayfed_sub.models.chat_templates import default_template, rendered, set_default_template, trained_template
from rayfed_sub.models.hub import RANDOM, Source, locate, reading, stored_file

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 3..258, for models without a tokenizer.  pad 0, bos 1, eos 2.

    >>> processor = ByteTokenizer()
    >>> processor.answer("AB"), processor.decode(processor.prompt("x"))
    ([68, 69, 2], 'Q: x\\nA: ')
    """

    pad: int = 0
    bos: int = 1
    eos: int = 2
    vocabulary: int = 259

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens at which generation stops."""
        return (self.eos,)

    @property
    def tail(self) -> int:
        return 0

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def pair_identity(self) -> str:
        return ""

    def prompt(self, text: str) -> list[int]:
        return [self.bos, *self._tokens(f"Q: {text}\nA: ")]

    def answer(self, text: str) -> list[int]:
        return [*self._tokens(text), self.eos]

    def text(self, text: str) -> list[int]:
        """bos, bytes, eos: decoders that classify look at the last token, encoders at the first."""
        return [self.bos, *self._tokens(text), self.eos]

    def decode(self, tokens: Sequence[int]) -> str:
        # A model may have a larger vocabulary than the processor; such tokens stand for nothing.
        return bytes(token - 3 for token in tokens if 3 <= token < 259).decode("utf-8", errors="replace")

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.prompt(text) for text in texts]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.answer(text) for text in texts]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.text(text) for text in texts]

    def pairs(self, max_length: int) -> Callable[[Sequence[tuple[str, str]]], list[PairTokens]]:
        """bos, the first text, eos, the second, eos."""

        def encode(pairs: Sequence[tuple[str, str]]) -> list[PairTokens]:
            return [self._pair(self._tokens(first), self._tokens(second), max_length - 3) for first, second in pairs]

        return encode

    def _pair(self, first: list[int], second: list[int], room: int) -> PairTokens:
        """room: tokens of both texts together; the longer text is cut to what the other leaves, both to a half."""
        small, large = sorted((len(first), len(second)))
        large = min(large, max(small, room - small))
        if small + large > room:
            small, large = room // 2, room - room // 2
        own, other = (large, small) if len(first) > len(second) else (small, large)
        tokens = [self.bos, *first[: max(own, 0)], self.eos, *second[: max(other, 0)], self.eos]
        types = [0] * (max(own, 0) + 2) + [1] * (max(other, 0) + 1)
        return PairTokens(tokens, types, own < len(first) or other < len(second), fits=min(own, other) > 0)

    def chats(self, chats: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[bool]]]:
        """A chat of one question has the tokens of a prompt and its answer."""
        forms = {"system": "S: {}\n", "user": "Q: {}\n", "assistant": "A: "}
        return [_in_turns(turns, forms, self._opening, self._tokens, self.eos) for turns in chats]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.text(text) if text else [] for text in texts]

    def _opening(self, text: str) -> list[int]:
        return [self.bos, *self._tokens(text)]

    def _tokens(self, text: str) -> list[int]:
        # Lone surrogates, which JSON can bring in, have no UTF-8 form.
        return [byte + 3 for byte in text.encode("utf-8", errors="replace")]


@dataclass(frozen=True)
class HubTokenizer:
    """A transformers tokenizer.  Build it with `hub_codec`.

    With a chat template a prompt is a user's message up to where the assistant speaks, and eos is the token
    that ends the assistant's turn.  Without one a prompt is what the tokenizer puts before a text, the text and a
    newline, and eos the tokenizer's.
    writer: of an encoder-decoder the tokenizer of answers, which may mark another language; without a chat template
    its prompts, and answers, are the text between the tokens that the tokenizer puts around it.
    chat: True with a chat template; the tokenizer holds the one that the run trains with, to be saved as it is.
    ends: the tokens at which generation stops, eos first, then those with which the pretrained model ends.
    """

    tokenizer: Any
    pad: int
    eos: int
    vocabulary: int
    chat: bool
    ends: tuple[int, ...]
    writer: Any = None

    @property
    def tail(self) -> int:
        return self.answer("?")[::-1].index(self.eos)

    @property
    def identity(self) -> str:
        named = sorted((key, str(token)) for key, token in self.tokenizer.special_tokens_map.items())
        kind, template = type(self.tokenizer).__name__, default_template(self.tokenizer)
        own = (kind, _coded(self.tokenizer), named, template, self.eos, self.chat)
        return repr(own if self.writer is None else (*own, _coded(self.writer), self.writer("?")["input_ids"]))

    @property
    def pair_identity(self) -> str:
        return repr((self.tokenizer.truncation_side, self._typed))

    @property
    def _typed(self) -> bool:
        return "token_type_ids" in self.tokenizer.model_input_names

    def prompt(self, text: str) -> list[int]:
        return self.prompts([text])[0]

    def answer(self, text: str) -> list[int]:
        return self.answers([text])[0]

    def text(self, text: str) -> list[int]:
        return self.texts([text])[0]

    def decode(self, tokens: Sequence[int]) -> str:
        decoded: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.chat:
            return self._openings([f"{text}\n" for text in texts]) if self.writer is None else self.texts(texts)
        rendered = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
        return self._tokens(rendered, special=False)  # the template has written them

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        if self.writer is None or self.chat:
            return [[*tokens, self.eos] for tokens in self._tokens(texts, special=False)]
        written = _encoded(self.writer, texts, special=True)
        # mBART's language follows its eos.
        return [tokens if self.eos in tokens[-2:] else [*tokens, self.eos] for tokens in written]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokens(texts, special=True)

    def pairs(self, max_length: int) -> Callable[[Sequence[tuple[str, str]]], list[PairTokens]]:
        """The tokenizer's own pairs, with the types of tokens that its models are given."""
        typed = self._typed
        plain = _Pairs(self.tokenizer, None)
        shorter = _Pairs(self.tokenizer, max_length)

        def encode(pairs: Sequence[tuple[str, str]]) -> list[PairTokens]:
            whole = plain.encoded(pairs)
            long = [row for row, (tokens, _) in enumerate(whole) if len(tokens) > max_length]
            cut = dict(zip(long, shorter.encoded([pairs[row] for row in long]), strict=True))
            made = (cut.get(row, one) for row, one in enumerate(whole))
            fits = max_length >= self.tokenizer.num_special_tokens_to_add(pair=True) + 2
            return [
                PairTokens(tokens, types if typed else [], row in cut, fits or row not in cut)
                for row, (tokens, types) in enumerate(made)
            ]

        return encode

    def chats(self, chats: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[bool]]]:
        """Chats in the chat template; without one the texts of system and user, each with a newline, and the answers,
        each with eos.  A chat of one question has the tokens of a prompt and its answer."""
        if self.chat:
            return chat_tokens(self.tokenizer, str(default_template(self.tokenizer)), self.eos, chats)
        forms = {"system": "{}\n", "user": "{}\n", "assistant": ""}

        def opening(text: str) -> list[int]:
            return self._openings([text])[0]

        def more(text: str) -> list[int]:
            return self._tokens([text], special=False)[0]

        return [_in_turns(turns, forms, opening, more, self.eos) for turns in chats]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts between the tokens that the tokenizer puts around a text; where it puts none before or none after it,
        its eos, with which pretraining separates texts."""
        before, after = self._around()
        between = self.eos if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        before, after = before or [between], after or [between]
        return [[*before, *own, *after] if own else [] for own in self._tokens(texts, special=False)]

    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        bare, around = (self._tokens(["a"], special=special)[0] for special in (False, True))
        begins = [at for at in range(len(around)) if around[at : at + len(bare)] == bare]
        at = begins[0] if bare and begins else len(around)
        return around[:at], around[at + len(bare) :]

    def _openings(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts that go on: with the tokens before a text, without those after it, which would say that it ends."""
        _, after = self._around()
        return [tokens[: len(tokens) - len(after)] for tokens in self._tokens(texts, special=True)]

    def _tokens(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return _encoded(self.tokenizer, texts, special)


def _encoded(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    if tokenizer.is_fast:  # without the lists of each token's type, mask and place
        backend = tokenizer.backend_tokenizer
        return [made.ids for made in backend.encode_batch_fast(list(texts), add_special_tokens=special)]
    # verbose=False: cutting rows to length is the data layer's work, so no word about long ones.
    encoded = tokenizer(list(texts), add_special_tokens=special, verbose=False, return_attention_mask=False)
    return [list(tokens) for tokens in encoded["input_ids"]]


def _coded(tokenizer: Any) -> Any:
    """All that a tokenizer makes tokens by."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())


class _Pairs:
    """A tokenizer's pairs of texts, at most `most` tokens, longest text first; None: whole."""

    def __init__(self, tokenizer: Any, most: int | None) -> None:
        self._tokenizer, self._most, self._backend = tokenizer, most, None
        if tokenizer.is_fast:
            # A copy of its own: truncation is a state of the tokenizer, which other threads use meanwhile.
            self._backend = tokenizer.backend_tokenizer
            if most is not None:
                self._backend = type(self._backend).from_str(self._backend.to_str())
                self._backend.enable_truncation(most, strategy="longest_first", direction=tokenizer.truncation_side)

    def encoded(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokens and their types."""
        if not pairs:
            return []
        if self._backend is not None:
            return [(made.ids, made.type_ids) for made in self._backend.encode_batch_fast([*pairs])]
        how: dict[str, Any] = {"truncation": "longest_first", "max_length": self._most} if self._most else {}
        firsts, seconds = (list(texts) for texts in zip(*pairs, strict=True))
        made = self._tokenizer(firsts, seconds, return_token_type_ids=True, verbose=False, **how)
        return [(list(ids), list(types)) for ids, types in zip(made["input_ids"], made["token_type_ids"], strict=True)]


def _in_turns(
    turns: Sequence[Turn],
    forms: Mapping[str, str],
    opening: Callable[[str], list[int]],
    more: Callable[[str], list[int]],
    eos: int,
) -> tuple[list[int], list[bool]]:
    """A chat without a chat template: its tokens, and for each whether it is an answer's.

    forms: of each role's text, of the assistant what comes before it; opening, more: tokens of the beginning, and of
    what follows."""
    tokens, learned, before = list[int](), list[bool](), ""
    for role, text in turns:
        if role != "assistant":
            before += forms[role].replace("{}", text)
            continue
        before += forms[role]
        asked = (more if tokens else opening)(before) if before or not tokens else []
        answer = [*more(text), eos]
        tokens += [*asked, *answer]
        learned += [*[False] * len(asked), *[True] * len(answer)]
        before = ""
    return tokens, learned


def hub_codec(tokenizer: Any, ends: Sequence[int] = (), *, apart: bool = False) -> HubTokenizer:
    """The processor of a transformers tokenizer, whose default chat template becomes the one that the run trains with.

    Some templates put in a system text of their own, SmolLM2's is 22 tokens in every row.  Where that is
    shorter an empty system message is made the template's default (6 tokens for SmolLM2: rows of short documentation
    are 38 tokens long on average instead of 54, and their loss before any training is 4.04 instead of 4.13).
    ends: the tokens with which the pretrained model ends, besides the tokenizer's own.  apart: for an encoder-decoder.
    Raises ValueError where the tokenizer has no token that could end an answer, or its template renders no user's
    message.
    """
    template, turn_end = default_template(tokenizer), None
    if template is not None:
        template = trained_template(tokenizer, template)
        if rendered(tokenizer, template, [{"role": "user", "content": "?"}]) is None:
            raise ValueError("the chat template renders no conversation that begins with a user's message")
        set_default_template(tokenizer, template)
        turn_end = _turn_end(tokenizer, template)
    eos_token = tokenizer.eos_token_id
    eos = next(
        (token for token in (turn_end, eos_token, tokenizer.sep_token_id, tokenizer.pad_token_id) if token is not None),
        None,
    )
    if eos is None:
        raise ValueError("the tokenizer has no end, separator or padding token")
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if tokenizer.is_fast:  # rows are cut to length by the data layer alone, whatever the tokenizer's file says
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    every = tuple(dict.fromkeys(token for token in (eos, eos_token, *ends) if token is not None))
    writer = _writer(tokenizer) if apart else None
    return HubTokenizer(tokenizer, pad, eos, len(tokenizer), template is not None, every, writer)


def _writer(tokenizer: Any) -> Any:
    """A copy of the tokenizer for the texts that a model writes; one that switched to and fro would be wrong where
    several threads ask."""
    writer = copy.deepcopy(tokenizer)
    if hasattr(writer, "_switch_to_target_mode"):  # all that transformers has, besides its call with `text_target`
        writer._switch_to_target_mode()
    return writer


def load_tokenizer(model: Model, *, apart: bool = False) -> HubTokenizer | ByteTokenizer:
    """The processor of `model.path`: bytes for `random`, the tokenizer that comes with the model otherwise.  apart: for
    an encoder-decoder.

    Raises UserError on model.path where there is no tokenizer or it cannot be read.
    """
    if model.path == RANDOM:
        return ByteTokenizer()
    source = locate(model.path)
    try:
        with reading(source):
            return hub_codec(_tokenizer(source), _ends(source), apart=apart)
    except Exception as error:  # a stranger's file may cause any error in the libraries
        if _reads_images(source):
            allowed = "a model with a tokenizer; this one reads images"
            raise UserError("model.path", model.path, allowed, "take another model or task") from error
        raise UserError(
            "model.path",
            model.path,
            "a model with a tokenizer that transformers can load",
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
        ) from error


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.gguf is not None:
        # AutoTokenizer would first build the model's configuration, ten times the work of the tokenizer.
        return PreTrainedTokenizerFast.from_pretrained(source.name, gguf_file=source.gguf)
    tokenizer = AutoTokenizer.from_pretrained(source.name, trust_remote_code=False)
    if getattr(tokenizer, "chat_template", None) is None and "processor_class" in tokenizer.init_kwargs:
        # Where a processor's chat template was before tokenizers had it too.
        stored = stored_file(source, "chat_template.json")
        if stored is not None:
            tokenizer.chat_template = json.loads(stored.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _reads_images(source: Source) -> bool:
    """True where the configuration asks for it; False where it cannot be read."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    try:
        with reading(source):
            hf_config = AutoConfig.from_pretrained(source.name, gguf_file=source.gguf, trust_remote_code=False)
    except Exception:  # the tokenizer's error, which the caller reports, has the same cause
        return False
    # Perceivers classify images too, and read text.
    return type(hf_config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and not hasattr(hf_config, "vocab_size")


def _ends(source: Source) -> list[int]:
    """The end tokens that the model's own files name; a GGUF file names the tokenizer's alone."""
    from transformers import AutoConfig, GenerationConfig

    if source.gguf is not None:
        return []
    named = [AutoConfig.from_pretrained(source.name, trust_remote_code=False).get_text_config(decoder=True)]
    with suppress(OSError):  # not every model has a generation_config.json
        named.append(GenerationConfig.from_pretrained(source.name))
    return _eos_of(named)


def end_tokens(module: Any) -> list[int]:
    """The end tokens that a loaded transformers model names; none for any other module."""
    return _eos_of([getattr(module, "config", None), getattr(module, "generation_config", None)])


def _eos_of(named: Sequence[Any]) -> list[int]:
    found = [getattr(config, "eos_token_id", None) for config in named]
    return [token for ids in found if ids is not None for token in (ids if isinstance(ids, list) else [ids])]


def _turn_end(tokenizer: Any, template: str) -> int | None:
    """The first special token after the assistant's answer: not every model ends a turn with its eos."""
    words = "so be it"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    _, found, tail = (rendered(tokenizer, template, turns, prompt=False) or "").rpartition(words)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokens = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in tokens if token in special), None)
