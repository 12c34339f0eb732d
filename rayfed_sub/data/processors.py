"""Protocols of a tokenizer and of an image processor, as the data room uses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rayfed_sub.data.chats import Turn
from rayfed_sub.data.images import Pixels
from rayfed_sub.data.objects import AsTheyAre


@dataclass(frozen=True)
class PairTokens:
    """A pair of texts as tokens.  types: each token's text, empty where the model does not tell them apart; cut:
    whether it was longer; fits: False where max_length leaves no room for both texts."""

    tokens: list[int]
    types: list[int]
    cut: bool = False
    fits: bool = True


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back, for one model.  Many texts at a time: tokenizers are an order faster so."""

    @property
    def pad(self) -> int:
        """The token that fills up short rows."""

    @property
    def eos(self) -> int:
        """The token that closes an answer or a text."""

    @property
    def ends(self) -> Sequence[int]:
        """The tokens at which generation stops, eos among them."""

    @property
    def tail(self) -> int:
        """Tokens behind an answer's eos, which a cut answer keeps: mBART's language, with which its decoder begins."""

    @property
    def identity(self) -> str:
        """A text of all that tokens follow from, equal for tokenizers that read every text alike."""

    @property
    def pair_identity(self) -> str:
        """What the tokens of pairs follow from besides `identity`."""

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The questions, in the model's chat template where it has one, ready for the answers to follow."""

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """The answers, each closed by the end-of-turn token."""

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain text for classification, with the special tokens the model was trained with."""

    def pairs(self, max_length: int) -> Callable[[Sequence[tuple[str, str]]], list[PairTokens]]:
        """The function that makes pairs of texts tokens, at most `max_length`: the tokenizer's own pair encoding and
        truncation, which takes tokens of the longer text first."""

    def chats(self, chats: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[bool]]]:
        """Each chat in the model's chat template where it has one: its tokens, and for each of them whether it is
        learned, that is said by the assistant.  Raises ChatError."""

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain text for next-token training, between a token that begins it and one that ends it; nothing where the
        text has no token of its own."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""


@runtime_checkable
class ImageProcessor(Protocol):
    """Images to pixels, for one model."""

    @property
    def pad(self) -> int:
        """0: nothing is filled up."""

    @property
    def eos(self) -> int:
        """0: nothing is closed."""

    @property
    def ends(self) -> Sequence[int]:
        """Empty: nothing is generated."""

    @property
    def mean(self) -> Sequence[float]:
        """Mean of the model's inputs, for values from 0 to 1: red, green, blue."""

    @property
    def std(self) -> Sequence[float]:
        """Standard deviation of the model's inputs, as `mean`."""

    def pixels(self, content: bytes) -> Pixels:
        """The image of an encoded file as a square, uint8 (1 or 3, side, side).  Raises ValueError for a broken one."""


Processor = Tokenizer | ImageProcessor | AsTheyAre
