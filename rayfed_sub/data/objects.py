"""Rows of the caller's own, which only the caller's own functions understand: pickled one by one into one buffer that
processes share, and read again for each batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayfed_sub.core.rng import seeded
from rayfed_sub.data.rows import Ints

MakeBatch = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class OwnBatch:
    """A batch as the caller's own function makes it, of so many rows; seed: of what the caller's code draws, to make
    the batch and to work out its loss."""

    content: Any
    rows: int
    seed: int = 0

    def to(self, device: torch.device) -> OwnBatch:
        """The batch with its tensors on a device; on a processor they lie as they are."""
        if device.type == "cpu":
            return self
        return replace(self, content=_moved(self.content, device))


@dataclass(frozen=True)
class AsTheyAre:
    """Processor of rows that the caller's own function `batch` reads: nothing is filled up, closed or generated."""

    batch: MakeBatch
    pad: int = 0
    eos: int = 0
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Objects:
    """Rows of the caller's own.

    content uint8 (bytes,), the pickles of all rows one after the other; offsets int64 (rows + 1,), where each begins
    and ends; digests uint8 (rows, 16), of what rows hold; batch: the function that makes a batch of a list of rows.
    """

    content: NDArray[np.uint8]
    offsets: Ints
    digests: NDArray[np.uint8]
    batch: MakeBatch

    @classmethod
    def of(cls, pickles: Sequence[bytes], digests: Sequence[bytes], batch: MakeBatch) -> Objects:
        """Rows from lists, one entry a row.

        >>> rows = Objects.of([pickle.dumps(letter) for letter in "abc"], [bytes(16)] * 3, batch="".join)
        >>> len(rows), rows.batch_of(np.array([2, 0]))
        (3, OwnBatch(content='ca', rows=2, seed=0))
        """
        ends = np.cumsum([len(one) for one in pickles], dtype=np.int64)
        content = np.frombuffer(b"".join(pickles), np.uint8)
        hashes = np.frombuffer(b"".join(digests), np.uint8).reshape(len(pickles), -1)
        return cls(content, np.concatenate([np.zeros(1, np.int64), ends]), hashes, batch)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays."""
        return self.content, self.offsets, self.digests

    def batch_of(self, indices: Ints, seed: int = 0) -> OwnBatch:
        """The batch of the rows at `indices`, in that order, as new objects.  Raises what the caller's function
        raises."""
        rows = [pickle.loads(self._pickle(int(index)).data) for index in indices]
        with seeded(seed):
            return OwnBatch(self.batch(rows), len(indices), seed)

    def take(self, indices: Ints) -> Objects:
        """The rows at `indices`, in that order, as new arrays."""
        pickles = [self._pickle(int(index)).tobytes() for index in indices]
        return Objects.of(pickles, [self.digests[index].tobytes() for index in indices], self.batch)

    def _pickle(self, index: int) -> NDArray[np.uint8]:
        return self.content[self.offsets[index] : self.offsets[index + 1]]


def _moved(content: Any, device: torch.device) -> Any:
    if hasattr(content, "to"):  # a tensor, or a container of a library's
        return content.to(device)
    if isinstance(content, Mapping):
        return {key: _moved(value, device) for key, value in content.items()}
    if isinstance(content, tuple) and hasattr(content, "_fields"):  # a named tuple
        return type(content)(*(_moved(value, device) for value in content))
    if isinstance(content, list | tuple):
        return type(content)(_moved(value, device) for value in content)
    return content
