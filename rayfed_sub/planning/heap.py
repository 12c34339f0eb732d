"""Memory of a process by its allocations: more than the bytes alive, since freed memory leaves holes of other sizes.

A model of glibc's malloc (see mallopt(3)) as workers set it (`telemetry/process_memory.py`): the smallest hole that is
large enough serves a request, neighbouring holes grow together, nothing goes back to the system, and only requests
above a threshold are mapped by themselves.  Aligned memory is asked for with a margin, so that the hole that a tensor
leaves is too small for its like.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

MMAP_BYTES = 32 * 2**20
"""Larger requests are mapped by themselves; the largest threshold of malloc."""
PRODUCT_KERNELS = 64
"""Kernels that oneDNN keeps of those it writes, one for each shape of a product (`telemetry/process_memory.py`)."""

_PAGE = 4096
_HEAD = 16  # malloc's header, in front of each piece
_SEARCH = 96  # posix_memalign, which torch uses with 64, asks for this much more and frees the rest


class Heap:
    """peak: the largest number of bytes taken from the system.

    >>> heap = Heap()
    >>> for key, size in ("a", 1000), ("b", 3000), ("c", 1000): heap.take(key, size)
    >>> heap.give("b"); heap.take("d", 2000); heap.take("e", 2000)   # e does not fit into what is left of b's place
    >>> heap.peak  # a, b, c and e with 16 more each, in whole 16s; d lies where b was
    7088
    """

    def __init__(self) -> None:
        self.peak = 0
        self._end = 0  # where the heap in use ends
        self._held = 0  # bytes from the system; at least _end
        self._mapped = 0
        self._used: dict[Hashable, tuple[int | None, int]] = {}  # -> address (None: a mapping of its own), size
        self._holes: list[tuple[int, int]] = []  # (size, address), sorted
        self._hole_at: dict[int, int] = {}  # address -> size
        self._hole_to: dict[int, int] = {}  # end -> address

    def take(self, key: Hashable, size: int) -> None:
        """Allocates `size` bytes under a name."""
        size = (size + _HEAD + 15) // 16 * 16
        if size >= MMAP_BYTES:
            size = -(-size // _PAGE) * _PAGE
            self._used[key] = (None, size)
            self._mapped += size
        else:
            self._used[key] = (self._place(size), size)
        self.peak = max(self.peak, self._held + self._mapped)

    def give(self, key: Hashable) -> None:
        """Frees what was allocated under the name."""
        address, size = self._used.pop(key)
        if address is None:
            self._mapped -= size
            return
        if address + size in self._hole_at:
            size += self._fill(address + size)
        if address in self._hole_to:
            address = self._hole_to[address]
            size += self._fill(address)
        if address + size == self._end:
            self._end = address
        else:
            self._dig(address, size)

    def _place(self, size: int) -> int:
        found = bisect_left(self._holes, (size + _SEARCH, -1))
        if found == len(self._holes):
            address, self._end = self._end, self._end + size
            self._held = max(self._held, self._end)
            return address
        larger, address = self._holes[found]
        self._fill(address)
        if larger > size:
            self._dig(address + size, larger - size)
        return address

    def _dig(self, address: int, size: int) -> None:
        insort(self._holes, (size, address))
        self._hole_at[address], self._hole_to[address + size] = size, address

    def _fill(self, address: int) -> int:
        size = self._hole_at.pop(address)
        del self._hole_to[address + size]
        self._holes.pop(bisect_left(self._holes, (size, address)))
        return size
