"""What the data layer asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Codec(Protocol):
    """Text to tokens and back, for one model."""

    @property
    def pad(self) -> int:
        """The token that fills up short rows."""

    @property
    def eos(self) -> int:
        """The token that closes an answer or a text."""

    def prompt(self, text: str) -> list[int]:
        """The question, in the model's chat template where it has one, ready for the answer to follow."""

    def answer(self, text: str) -> list[int]:
        """The answer, closed by the end-of-turn token."""

    def text(self, text: str) -> list[int]:
        """Plain text for classification, with the special tokens the model was trained with."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""
