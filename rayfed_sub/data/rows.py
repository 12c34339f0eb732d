"""Token rows as flat arrays: few buffers however many rows, which processes can share without a copy."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
RowNumbers = NDArray[np.int32 | np.int64]

_AT_ONCE = 10_000  # rows that are copied at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens.

    tokens int32 (total,), of all rows and maybe of others; begins int64 and lengths int32 (rows,), where each row
    begins among them, and its number of tokens; prompts int32 (rows,), how many of a row's first tokens are its prompt,
    of a chat the history of its last answer; classes int64 (rows,) numbers of classes, or float32 (rows, labels) as
    `labels.targets` has them, or empty for language modelling; learned bool (total,), of chats the tokens that the
    assistant says, or empty: what follows the prompt is learned; types int8 (total,), of pairs of texts for models that
    tell them apart each token's text, or empty.
    """

    tokens: NDArray[np.int32]
    begins: Ints
    lengths: NDArray[np.int32]
    prompts: NDArray[np.int32]
    classes: NDArray[Any]
    learned: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    types: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))

    @classmethod
    def of(
        cls,
        tokens: Sequence[Sequence[int]],
        prompts: Sequence[int],
        classes: Sequence[int] | NDArray[Any] = (),
        learned: Sequence[Sequence[bool]] = (),
        types: Sequence[Sequence[int]] = (),
    ) -> Rows:
        """Rows from lists, one entry a row.

        >>> rows = Rows.of([[5, 6, 7], [8]], prompts=[2, 0])
        >>> len(rows), rows.begins.tolist(), rows.row(0).tolist()
        (2, [0, 3], [5, 6, 7])
        """
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        ends = np.cumsum(lengths, dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(tokens), np.int32, int(ends[-1]) if len(ends) else 0)
        mask = np.fromiter(chain.from_iterable(learned), bool)
        own = classes if isinstance(classes, np.ndarray) else np.asarray(classes, np.int64)
        kinds = np.fromiter(chain.from_iterable(types), np.int8)
        return cls(flat, ends - lengths, lengths, np.asarray(prompts, np.int32), own, mask, kinds)

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Tokens in a file that has a name travel as its name, which other processes of the machine map, too."""
        return _received, tuple(_sent(getattr(self, field.name)) for field in fields(self))

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays that lie in memory."""
        every = (getattr(self, field.name) for field in fields(self))
        return tuple(array for array in every if _file_of(array) is None)

    def in_memory(self) -> Rows:
        """The rows with their own tokens alone, in memory."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        begins = ends - self.lengths
        tokens = np.empty(int(self.lengths.sum()), np.int32)
        learned = np.empty(len(tokens) if len(self.learned) else 0, bool)
        types = np.empty(len(tokens) if len(self.types) else 0, np.int8)
        for low in range(0, len(self), _AT_ONCE):
            rows = slice(low, low + _AT_ONCE)
            own = slice(begins[low], ends[rows][-1])
            places = np.arange(own.start, own.stop) + np.repeat((self.begins - begins)[rows], self.lengths[rows])
            tokens[own] = self.tokens[places]
            if len(learned):
                learned[own] = self.learned[places]
            if len(types):
                types[own] = self.types[places]
        return replace(self, tokens=tokens, begins=begins, learned=learned, types=types)

    @cached_property
    def labels(self) -> Ints:
        """Tokens of every row that are learned where prompts carry no loss, (rows,)."""
        if not len(self.learned):
            return (self.lengths - self.prompts).astype(np.int64)
        counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.learned)])
        labels: Ints = counted[self.begins + self.lengths] - counted[self.begins]
        return labels

    def row(self, index: int) -> NDArray[np.int32]:
        """The tokens of one row, a view."""
        return self.tokens[self.begins[index] : self.begins[index] + self.lengths[index]]

    def types_of(self, index: int) -> NDArray[np.int8]:
        """Which of a pair's texts each token of one row is of, a view."""
        return self.types[self.begins[index] : self.begins[index] + self.lengths[index]]

    def answered(self, index: int) -> NDArray[np.bool_]:
        """The tokens of one row that are learned where prompts carry no loss, bool (tokens,)."""
        if len(self.learned):
            return self.learned[self.begins[index] : self.begins[index] + self.lengths[index]]
        learned: NDArray[np.bool_] = np.arange(self.lengths[index]) >= self.prompts[index]
        return learned

    def take(self, indices: Ints) -> Rows:
        """The rows at `indices`, in that order; their tokens are not copied."""
        classes = self.classes[indices] if len(self.classes) else self.classes
        places = (self.begins[indices], self.lengths[indices], self.prompts[indices])
        return Rows(self.tokens, *places, classes, self.learned, self.types)


@dataclass(frozen=True)
class _File:
    """An array in a file of NumPy's format."""

    path: str


def _file_of(array: NDArray[Any]) -> str | None:
    """The file of NumPy's format that holds just this array, where it has a name."""
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap):
        return None  # in memory, or a part of a file
    name = str(array.filename)
    return name if name.endswith(".npy") else None


def _sent(array: NDArray[Any]) -> NDArray[Any] | _File:
    file = _file_of(array)
    # Arrays of a file without a name as plain ones, which pickle and Ray send without a copy.
    return np.asarray(array) if file is None else _File(file)


def _received(*arrays: NDArray[Any] | _File) -> Rows:
    return Rows(*(np.load(array.path, mmap_mode="r") if isinstance(array, _File) else array for array in arrays))
