"""Digests of a data set, by which a resumed run compares its rows with those that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.data.assignment import Assignment, coded_names
from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.columns import forget
from rayfed_sub.data.images import Images
from rayfed_sub.data.objects import Objects
from rayfed_sub.data.rows import Ints, Rows
from rayfed_sub.data.splits import Splits

_AT_ONCE = 10_000  # rows whose tokens are read between two looks at memory


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256, in hex.  rows: the rows of tokens or pixels with their classes and the classes' names, in any order;
    splits: the rows of each split, in order; owners: the clients' names and rows, and whose data judged rows are like.
    count: rows."""

    count: int
    rows: str
    splits: str
    owners: str


def fingerprint(
    rows: str,
    hashes: NDArray[np.uint8],
    splits: Splits,
    client_names: Sequence[str],
    dealt: Assignment,
    judged_clients: Ints,
) -> Fingerprint:
    """The fingerprint of all rows, of which `splits` holds the numbers.  rows: their digest (`of_rows`); hashes: each
    row's; dealt: the clients' numbers of training rows."""
    return Fingerprint(
        count=len(hashes),
        rows=rows,
        splits=_sum(_led(hashes[part].tobytes() for part in (splits.train, splits.validation, splits.held_out))),
        owners=_sum(chain(coded_names(client_names), dealt.coded(), _led([judged_clients.tobytes()]))),
    )


def of_rows(rows: AnyRows, hashes: NDArray[np.uint8], class_names: Sequence[str]) -> str:
    """The digest of the rows in any order and of their classes' names, in hex.  hashes: of each row."""
    return _sum(chain(coded_names(class_names), _led([*_settings(rows), _sorted(hashes)])))


def hashes(rows: AnyRows) -> NDArray[np.uint8]:
    """A digest of all of each row, uint8 (rows, 16): about a microsecond for a row of tokens, a millisecond for a
    megabyte of an image."""
    if isinstance(rows, Objects):
        return rows.digests
    if isinstance(rows, Images):
        return _together(_of_images(rows))
    classes = rows.classes if len(rows.classes) else np.zeros(len(rows), np.int64)

    def content(row: int) -> bytes:
        at = slice(row, row + 1)
        parts: tuple[NDArray[Any], ...] = (rows.row(row), rows.prompts[at].astype(np.int64), classes[at])
        return b"".join(part.tobytes() for part in parts) + _mask(rows, row)

    return _of_each(rows, content)


def inputs(rows: AnyRows) -> NDArray[np.uint8]:
    """A digest of each row's input, without answer or class: the tokens of the prompt or classified text, or pixels;
    uint8 (rows, 16)."""
    if isinstance(rows, Objects):
        return rows.digests
    if isinstance(rows, Images):
        return _together(_short(pixels.tobytes()) for pixels in rows.pixels)
    prompts = rows.prompts
    if len(rows.types):
        return _of_each(rows, lambda row: rows.row(row).tobytes() + rows.types_of(row).tobytes())
    return _of_each(rows, lambda row: rows.row(row)[: prompts[row]].tobytes())


def _together(digests: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def _sorted(hashes: NDArray[np.uint8]) -> bytes:
    """All digests, sorted by their bytes, one after the other."""
    high, low = np.ascontiguousarray(hashes).view(">u8").T
    return hashes[np.lexsort((low, high))].tobytes()


def _of_each(rows: Rows, content: Callable[[int], bytes]) -> NDArray[np.uint8]:
    """A digest of what `content` says of each row; few of the rows' tokens are in memory at a time."""
    parts = []
    for begin in range(0, len(rows), _AT_ONCE):
        parts.append(_together(_short(content(row)) for row in range(begin, min(begin + _AT_ONCE, len(rows)))))
        forget(rows.tokens)
    return np.concatenate([np.empty((0, 16), np.uint8), *parts])


def _mask(rows: Rows, row: int) -> bytes:
    """Which tokens of a chat are learned, and of which text a pair's are; nothing for other rows, whose prompt says
    it."""
    types = rows.types_of(row).tobytes() if len(rows.types) else b""
    return types + (rows.answered(row).tobytes() if len(rows.learned) else b"")


def _of_images(images: Images) -> Iterator[bytes]:
    return (
        _short(pixels.tobytes() + np.asarray(pixels.shape, np.int64).tobytes() + label.tobytes())
        for pixels, label in zip(images.pixels, images.classes, strict=True)
    )


def _settings(rows: AnyRows) -> list[bytes]:
    """The mean and standard deviation by which pixels become a model's inputs."""
    return [rows.mean.tobytes(), rows.std.tobytes()] if isinstance(rows, Images) else []


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _led(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Each part after its length, so that no two sequences of parts read the same."""
    for part in parts:
        yield len(part).to_bytes(8, "little")
        yield part


def _sum(led: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in led:
        digest.update(part)
    return digest.hexdigest()
