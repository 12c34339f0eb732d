"""Token rows as flat arrays: few buffers however many rows, which processes can share without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens.

    tokens int32 (total,), all rows one after the other; offsets int64 (rows + 1,), where each begins and
    ends; prompts int32 (rows,), how many of a row's first tokens are its prompt, of a chat the history of its last
    answer; classes int64 (rows,), or empty for language modelling; learned bool (total,), of chats the tokens that the
    assistant says, or empty: what follows the prompt is learned.
    """

    tokens: NDArray[np.int32]
    offsets: Ints
    prompts: NDArray[np.int32]
    classes: Ints
    learned: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[int],
        classes: Sequence[int] = (),
        learned: Sequence[Sequence[bool]] = (),
    ) -> Rows:
        """Rows from lists, one entry a row.

        >>> rows = Rows.of([[5, 6, 7], [8]], prompts=[2, 0])
        >>> len(rows), rows.offsets.tolist(), rows.row(0).tolist()
        (2, [0, 3, 4], [5, 6, 7])
        """
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        flat = np.fromiter((token for row in tokens for token in row), np.int32, int(offsets[-1]))
        mask = np.fromiter((token for row in learned for token in row), bool)
        return cls(flat, offsets, np.asarray(prompts, np.int32), np.asarray(classes, np.int64), mask)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of every row, (rows,)."""
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (self.tokens, self.offsets, self.prompts, self.classes, self.learned))

    @cached_property
    def labels(self) -> Ints:
        """Tokens of every row that are learned where prompts carry no loss, (rows,)."""
        if not len(self.learned):
            return self.lengths - self.prompts
        counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.learned)])
        labels: Ints = counted[self.offsets[1:]] - counted[self.offsets[:-1]]
        return labels

    def row(self, index: int) -> NDArray[np.int32]:
        """The tokens of one row, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def answered(self, index: int) -> NDArray[np.bool_]:
        """The tokens of one row that are learned where prompts carry no loss, bool (tokens,)."""
        if len(self.learned):
            return self.learned[self.offsets[index] : self.offsets[index + 1]]
        learned: NDArray[np.bool_] = np.arange(self.lengths[index]) >= self.prompts[index]
        return learned

    def take(self, indices: Ints) -> Rows:
        """The rows at `indices`, in that order, as new arrays."""
        tokens = [self.row(int(index)) for index in indices]
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        learned = [self.answered(int(index)) for index in indices] if len(self.learned) else []
        return Rows(
            np.concatenate([np.empty(0, np.int32), *tokens]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            self.prompts[indices],
            self.classes[indices] if len(self.classes) else self.classes,
            np.concatenate([np.empty(0, bool), *learned]),
        )
