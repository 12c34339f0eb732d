"""Columns of many rows in few arrays: texts as one run of bytes, which a file can hold, names as numbers."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.rows import Ints

_AT_ONCE = 10_000  # rows that are Python's texts at a time
_BUFFER = 2**24  # bytes in memory before they go to a file


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """Texts of which only those that are asked for become Python's.

    content: uint8 (bytes,), UTF-8, all texts one after the other, lone surrogates as Python writes them; begins int64
    and sizes int32 (rows,): where each begins, and its bytes.
    """

    content: NDArray[np.uint8]
    begins: Ints
    sizes: NDArray[np.int32]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Texts from Python's.

        >>> texts = Texts.of(["one", "", "zwölf"])
        >>> texts[2], list(texts.take(np.array([2, 0])))
        ('zwölf', ['zwölf', 'one'])
        """
        coded = list(coded_texts(texts))
        sizes = np.fromiter(map(len, coded), np.int32, len(coded))
        ends = np.cumsum(sizes, dtype=np.int64)
        return cls(np.frombuffer(b"".join(coded), np.uint8), ends - sizes, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int, /) -> str: ...
    @overload
    def __getitem__(self, index: slice, /) -> Texts: ...
    def __getitem__(self, index: int | slice, /) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self.content, self.begins[index], self.sizes[index])
        return self.coded(index).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (coded.decode("utf-8", "surrogatepass") for coded in self.every_coded())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def coded(self, index: int) -> bytes:
        """A text as UTF-8."""
        begin = int(self.begins[index])
        return self.content[begin : begin + int(self.sizes[index])].tobytes()

    def every_coded(self) -> Iterator[bytes]:
        """All texts as UTF-8."""
        for begin in range(0, len(self), _AT_ONCE):
            yield from [self.coded(index) for index in range(begin, min(begin + _AT_ONCE, len(self)))]
            forget(self.content)

    def take(self, rows: Ints) -> Texts:
        """The texts at `rows`, in that order; their bytes are not copied."""
        return Texts(self.content, self.begins[rows], self.sizes[rows])


class ArrayWriter:
    """Builds an array, (items,), part by part; from some size on it lies in a file without a name, which goes with the
    array."""

    def __init__(self, kind: DTypeLike) -> None:
        self._kind, self._coded = np.dtype(kind), bytearray()
        self._file: IO[bytes] | None = None

    def add(self, part: bytes | NDArray[Any]) -> None:
        """Adds items, as an array of the writer's kind or as its bytes."""
        self._coded += part if isinstance(part, bytes) else part.tobytes()
        if len(self._coded) >= _BUFFER:
            self._flush()

    def done(self) -> NDArray[Any]:
        if self._file is None:
            return np.frombuffer(bytes(self._coded), self._kind)
        self._flush()
        return np.memmap(self._file, self._kind, mode="r")  # the mapping keeps the file

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="rayfed-sub-")  # noqa: SIM115 - open until `done`
            self._file.write(self._coded)
            self._file.flush()
        except OSError as error:
            allowed = "a folder with room for the texts and tokens of the task"
            raise UserError("TMPDIR", tempfile.gettempdir(), allowed, str(error)) from None
        self._coded.clear()


class TextWriter:
    """Builds `Texts` one by one."""

    def __init__(self) -> None:
        self._content, self._sizes = ArrayWriter(np.uint8), array("i")

    def add(self, text: str) -> None:
        coded = text.encode("utf-8", "surrogatepass")
        self._content.add(coded)
        self._sizes.append(len(coded))

    def done(self) -> Texts:
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.empty(0, np.int32)
        return Texts(self._content.done(), np.cumsum(sizes, dtype=np.int64) - sizes, sizes)


@dataclass(frozen=True, eq=False)
class Labels(Sequence[str]):
    """A text for each row, of few different ones.  names: the different ones, sorted, each used or not; numbers int32
    (rows,): names[numbers[i]] is row i's."""

    names: tuple[str, ...]
    numbers: NDArray[np.int32]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Labels:
        """Labels from Python's texts.

        >>> labels = Labels.of(["b", "a", "b"])
        >>> labels.names, labels.numbers.tolist(), labels[0]
        (('a', 'b'), [1, 0, 1], 'b')
        """
        if isinstance(texts, Labels):
            return texts
        place: dict[str, int] = {}
        met = np.fromiter((place.setdefault(text, len(place)) for text in texts), np.int32)
        return cls._sorted(list(place), met)

    @classmethod
    def runs(cls, names: Sequence[str], counts: Sequence[int]) -> Labels:
        """`counts[i]` rows of `names[i]`, one run after the other; names may come again."""
        return cls._sorted(names, np.repeat(np.arange(len(names), dtype=np.int32), counts))

    @classmethod
    def _sorted(cls, names: Sequence[str], numbers: NDArray[np.int32]) -> Labels:
        """Labels whose names have any order, and may stand there twice."""
        place = {name: index for index, name in enumerate(sorted(set(names)))}
        moved = np.fromiter((place[name] for name in names), np.int32, len(names))
        return cls(tuple(place), moved[numbers] if len(names) else numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int, /) -> str: ...
    @overload
    def __getitem__(self, index: slice, /) -> Labels: ...
    def __getitem__(self, index: int | slice, /) -> str | Labels:
        if isinstance(index, slice):
            return Labels(self.names, self.numbers[index])
        return self.names[int(self.numbers[index])]

    def __iter__(self) -> Iterator[str]:
        return (self.names[number] for number in self.numbers.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of rows of each name that a row has, by name, sorted."""
        counts = np.bincount(self.numbers, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    @property
    def used(self) -> tuple[str, ...]:
        """The names that a row has, sorted."""
        return tuple(self.counts)

    def take(self, rows: Ints) -> Labels:
        """The labels at `rows`, in that order."""
        return Labels(self.names, self.numbers[rows])

    def renamed(self, names: Sequence[str]) -> Labels:
        """The labels with other names, one for each of `self.names`."""
        return self._sorted(list(names), self.numbers)

    def renamed_one(self, old: str, new: str) -> Labels:
        """The labels with one name in place of another."""
        return self.renamed([new if name == old else name for name in self.names])

    def are(self, *names: str) -> NDArray[np.bool_]:
        """Which rows have one of these names, (rows,)."""
        marked = np.fromiter((name in names for name in self.names), bool, len(self.names))
        return marked[self.numbers] if len(marked) else np.zeros(len(self), bool)

    def compact(self) -> Labels:
        """The labels without names that no row has."""
        moved = np.cumsum([name in self.counts for name in self.names], dtype=np.int32) - 1
        return Labels(self.used, moved[self.numbers] if len(moved) else self.numbers)


def coded_texts(texts: Iterable[str]) -> Iterator[bytes]:
    """Texts as UTF-8, lone surrogates as Python writes them."""
    if isinstance(texts, Texts):
        return texts.every_coded()
    return (text.encode("utf-8", "surrogatepass") for text in texts)


def taken(column: Any, rows: Ints) -> Any:
    """The entries of a column at `rows`, in that order, as a column of its kind."""
    if hasattr(column, "take"):
        return column.take(rows)
    return tuple(column[int(row)] for row in rows) if len(column) else column


def forget(array: NDArray[Any]) -> None:
    """Takes what was read of a mapped file out of this process's memory; reading it again costs little, as long as the
    system has it.  Arrays in memory stay."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    mapped = getattr(base, "_mmap", None)
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


def numbers_of(digests_R16: NDArray[np.uint8]) -> Ints:
    """A number for each digest, equal for equal digests alone.

    >>> numbers_of(np.array([[7] * 16, [1] * 16, [7] * 16], np.uint8)).tolist()
    [1, 0, 1]
    """
    high, low = np.ascontiguousarray(digests_R16).view(np.uint64).T
    order = np.lexsort((low, high))
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(new) - 1
    return numbers
