"""Which rows each client has, and the clients' names: few arrays however many clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from rayfed_sub.data.rows import Ints, RowNumbers

_AT_ONCE = 2**16  # rows that a pass over all clients has in hand: what fits into a cache
_TAIL = 5  # digits of a client's number that are written once for all clients
_ALIKE = 10**_TAIL


@dataclass(frozen=True, eq=False)
class Assignment(Sequence[RowNumbers]):
    """Row numbers of all clients, one client after the other; as a sequence, each client's, ascending, as a view.

    rows: int32 or int64 (total,), as `row_dtype` says; offsets: int64 (clients + 1,).

    >>> dealt = Assignment.of([np.array([0, 3]), np.array([1])])
    >>> len(dealt), dealt[0].tolist(), dealt.sizes.tolist()
    (2, [0, 3], [2, 1])
    """

    rows: RowNumbers
    offsets: Ints

    @classmethod
    def of(cls, parts: Sequence[RowNumbers]) -> Assignment:
        """From the rows of each of a few clients."""
        dtype = row_dtype(max((int(part[-1]) + 1 for part in parts if len(part)), default=0))
        rows = np.concatenate([np.empty(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])
        return cls(rows, np.cumsum([0, *map(len, parts)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, client: int, /) -> RowNumbers: ...
    @overload
    def __getitem__(self, client: slice, /) -> Sequence[RowNumbers]: ...
    def __getitem__(self, client: int | slice, /) -> RowNumbers | Sequence[RowNumbers]:
        if isinstance(client, slice):
            return [self[k] for k in range(*client.indices(len(self)))]
        if not -len(self) <= client < len(self):
            raise IndexError(client)
        begin = client % len(self)
        return self.rows[self.offsets[begin] : self.offsets[begin + 1]]

    @property
    def sizes(self) -> Ints:
        """Each client's number of rows, int64 (clients,)."""
        return np.diff(self.offsets)

    def blocks(self) -> Iterator[Block]:
        """All clients in order, some at a time, each once."""
        begin = 0
        while begin < len(self):
            fitting = int(np.searchsorted(self.offsets, self.offsets[begin] + _AT_ONCE, "right")) - 1
            end = max(begin + 1, min(fitting, begin + _AT_ONCE))
            offsets = self.offsets[begin : end + 1]
            yield Block(begin, self.rows[offsets[0] : offsets[-1]], np.diff(offsets))
            begin = end

    def coded(self) -> Iterator[bytes]:
        """For digests: each client's rows as int64, with the number of their bytes before them, likewise."""
        for block in self.blocks():
            words = np.empty(len(block.rows) + len(block.sizes), np.int64)
            is_row = np.ones(len(words), bool)
            heads = np.cumsum(block.sizes + 1) - block.sizes - 1
            is_row[heads] = False
            words[heads], words[is_row] = 8 * block.sizes, block.rows
            yield words.astype("<i8", copy=False).tobytes()


@dataclass(frozen=True, eq=False)
class Block:
    """Clients next to each other: the number of the first, their rows one after the other, and the number of each
    one's rows, int64."""

    first: int
    rows: RowNumbers
    sizes: Ints


def row_dtype(rows: int) -> type[np.int32 | np.int64]:
    """The smaller of int32 and int64 that holds the numbers of so many rows."""
    return np.int32 if rows <= 2**31 else np.int64


@dataclass(frozen=True, eq=False)
class NumberedClients(Sequence[str]):
    """The names of clients that have numbers only, made when they are asked for.

    >>> names = NumberedClients(3)
    >>> len(names), names[2], names == ("client 0", "client 1", "client 2")
    (3, 'client 2', True)
    """

    clients: int

    def __len__(self) -> int:
        return self.clients

    @overload
    def __getitem__(self, client: int, /) -> str: ...
    @overload
    def __getitem__(self, client: slice, /) -> Sequence[str]: ...
    def __getitem__(self, client: int | slice, /) -> str | Sequence[str]:
        numbers = range(self.clients)[client]
        return f"client {numbers}" if isinstance(numbers, int) else [f"client {number}" for number in numbers]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, NumberedClients):
            return self.clients == other.clients
        return isinstance(other, Sequence) and len(self) == len(other) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def coded(self) -> Iterator[bytes]:
        """For digests: the names, as `coded_names`."""
        yield from coded_names(self[:_ALIKE])
        tails = np.frombuffer("".join(f"{number:0{_TAIL}}" for number in range(_ALIKE)).encode(), np.uint8)
        for begin in range(_ALIKE, self.clients, _ALIKE):
            first = next(coded_names([self[begin]]))
            coded = np.empty((_ALIKE, len(first)), np.uint8)
            coded[:, :-_TAIL], coded[:, -_TAIL:] = list(first[:-_TAIL]), tails.reshape(_ALIKE, _TAIL)
            yield coded[: self.clients - begin].tobytes()


def coded_names(names: Sequence[str]) -> Iterator[bytes]:
    """For digests: UTF-8 of each name with the number of its bytes before it, 8 bytes, little-endian."""
    if isinstance(names, NumberedClients):
        yield from names.coded()
        return
    for name in names:
        coded = name.encode("utf-8", errors="surrogatepass")  # JSON can bring in lone surrogates
        yield len(coded).to_bytes(8, "little") + coded
