"""Dropout of what adapters read: which numbers are dropped follows from client, step, row, token, layer and column.

A token has the same numbers dropped wherever it is computed, so packs, filling, workers and retries change nothing, and
the reference executor drops the same.  Two words of 32 bits decide over a number, one of its token and one of its
column: their bits are mixed and compared with the rate.  The words come from Philox streams, a client's by its own
(seed, client, step), a column's by (seed, layer, use); the mixing is integer arithmetic, exact on every device.

Why no stream for each row: a generator costs 20 us to begin, and there is one for every row, layer and client; its
numbers would be made on a processor and sent to a GPU.  The hash is a few calls for the whole pack.

Legend: S tokens of a pass, k of each of its rows, G clients, n columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayfed_sub.core.devices import onto, sent
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import ModelShape
from rayfed_sub.training.pass_rows import Seen

_ROW, _ONE, _TWO = 0x9E3779B1, 0x7FEB352D, 0x846CA68B  # odd; the last two mix well (Wellons' lowbias32)
_BLOCK = 2**16  # numbers whose masks are made at a time: their words stay in a processor's cache


@dataclass(eq=False)
class TokenWords:
    """The words of a pass's tokens.  where: for each row of the pass, (R, 3) int64, the client's place, the row of its
    batch, and its first token's place in the row; key_G: int64."""

    where: Tensor
    key_G: Tensor
    made: dict[int, Tensor] = field(default_factory=dict)

    def of(self, k: int) -> Tensor:
        """Words (R k,) int32 of the tokens, where every row of the pass has k."""
        if k not in self.made:
            client_R, row_R, first_R = self.where.unbind(1)
            token_Rk = (row_R * _ROW + first_R)[:, None] + torch.arange(k, device=self.where.device)
            self.made[k] = _mixed(_int32(token_Rk).bitwise_xor_(_int32(self.key_G[client_R])[:, None]).flatten())
        return self.made[k]


@dataclass
class Dropout:
    """A layer's dropout in one pass of `rows` rows; uses: forward passes of the layer so far."""

    seed: int
    layer: str
    rate: float
    words: TokenWords
    rows: int
    uses: int = 0

    @property
    def factor(self) -> float:
        """What kept numbers are multiplied by."""
        return 1 / (1 - self.rate)

    def kept(self, x_Sn: Tensor) -> Tensor:
        """Which numbers of the next use's input are kept, (S, n) bool."""
        S, n = x_Sn.shape
        word_S = self.words.of(S // self.rows)
        word_n = sent(column_words(self.seed, self.layer, self.uses, n), x_Sn.device)
        self.uses += 1
        return kept(word_S, word_n, self.rate)


def dropouts(
    shape: ModelShape, seen_by: Callable[[str], Seen], clients: Sequence[tuple[int, int]], seed: int, rate: float
) -> dict[str, Dropout]:
    """Every target's dropout in a pass; none at rate 0.  seen_by: layer -> the rows that it sees; clients: number and
    local step (counted over its life) of each."""
    found = dict[str, Dropout]()
    words = dict[int, TokenWords]()
    for layer in shape.targets if rate else ():
        where = seen_by(layer.name).where
        if id(where) not in words:
            words[id(where)] = TokenWords(where, onto([_key(seed, *client) for client in clients], where.device))
        found[layer.name] = Dropout(seed, layer.name, rate, words[id(where)], len(where))
    return found


def kept(word_S: Tensor, word_n: Tensor, rate: float) -> Tensor:
    """Which numbers stay, (S, n) bool: each with probability 1 - rate."""
    threshold = round(rate * 2**32) - 2**31
    block = max(1, _BLOCK // len(word_n)) if word_S.device.type == "cpu" else len(word_S)
    parts = [
        _mixed(words[:, None].bitwise_xor(word_n)).ge(threshold) for words in word_S.split(block)
    ]  # the last shift of a full hash would reach the lower bits alone
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def column_words(seed: int, layer: str, use: int, n: int) -> Tensor:
    """The words (n,) int32 of a layer's columns in one of its uses within a forward pass."""
    return torch.from_numpy(_columns(seed, layer, use, n))


@lru_cache(maxsize=1024)
def _columns(seed: int, layer: str, use: int, n: int) -> NDArray[np.int32]:
    """As `column_words`; kept as no tensor, which the first plan of a process would count."""
    return stream(seed, "dropout columns", layer, use).integers(-(2**31), 2**31, n, dtype=np.int32)


@lru_cache(maxsize=1024)
def _key(seed: int, client: int, step: int) -> int:
    return int(stream(seed, "dropout", client, step).integers(2**32))


def _mixed(x: Tensor) -> Tensor:
    """The int32 words with their bits mixed, in place.  Products wrap around; a shift drags the sign along, which the
    mask removes."""
    x.mul_(_signed(_ONE))
    x.bitwise_xor_(x.bitwise_right_shift(15).bitwise_and_(0x1FFFF))
    return x.mul_(_signed(_TWO))


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _int32(x: Tensor) -> Tensor:
    """The lowest 32 bits of int64."""
    return (x + 2**31).remainder(2**32).sub(2**31).to(torch.int32)


class GivenDropout(nn.Module):
    """In the place of a library's dropout: it drops what the pack executor drops, not what torch's generator says.
    `begin` each forward pass of a local step."""

    def __init__(self, seed: int, client: int, layer: str, rate: float) -> None:
        super().__init__()
        self.seed, self.client, self.layer, self.rate = seed, client, layer, rate

    def begin(self, step: int, rows: Sequence[int]) -> None:
        """step: local steps of the client's life before this one; rows: those of its batch that the pass has, as the
        layers see them."""
        where = torch.tensor([(0, row, 0) for row in rows])
        words = TokenWords(where, torch.tensor([_key(self.seed, self.client, step)]))
        self.now = Dropout(self.seed, self.layer, self.rate, words, len(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.now.kept(x.reshape(-1, x.shape[-1])).reshape(x.shape) * self.now.factor
