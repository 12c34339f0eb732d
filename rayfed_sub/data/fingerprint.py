"""Digests of a data set, by which a resumed run compares its rows with those that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.images import Images
from rayfed_sub.data.objects import Objects
from rayfed_sub.data.rows import Ints, Rows
from rayfed_sub.data.splits import Splits


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
    rows: AnyRows,
    class_names: Sequence[str],
    splits: Splits,
    client_names: Sequence[str],
    parts: Sequence[Ints],
    judged_clients: Ints,
) -> Fingerprint:
    """The fingerprint of all rows, of which `splits` holds the numbers.  parts: the clients' numbers of training rows.

    Each row is hashed once, about a microsecond for a row of tokens; an image costs a millisecond a megabyte.
    """
    hashes = _hashes(rows)
    split = [[hashes[row] for row in part] for part in (splits.train, splits.validation, splits.held_out)]
    return Fingerprint(
        count=len(rows),
        rows=_sum([*_encoded(class_names), *_settings(rows), b"".join(sorted(hashes))]),
        splits=_sum([b"".join(part) for part in split]),
        owners=_sum([*_encoded(client_names), *(part.tobytes() for part in parts), judged_clients.tobytes()]),
    )


def _hashes(rows: AnyRows) -> list[bytes]:
    if isinstance(rows, Objects):
        return [own.tobytes() for own in rows.digests]
    return _of_images(rows) if isinstance(rows, Images) else _of_tokens(rows)


def inputs(rows: AnyRows) -> list[bytes]:
    """A digest of each row's input, without answer or class: the tokens of the prompt or classified text, or pixels."""
    if isinstance(rows, Objects):
        return _hashes(rows)
    if isinstance(rows, Images):
        return [_short(pixels.tobytes()) for pixels in rows.pixels]
    return [_short(rows.row(row)[:prompt].tobytes()) for row, prompt in enumerate(rows.prompts.tolist())]


def _of_tokens(rows: Rows) -> list[bytes]:
    classes = rows.classes if len(rows.classes) else np.zeros(len(rows), np.int64)
    return [
        _short(rows.row(row).tobytes() + np.asarray([prompt, number], np.int64).tobytes() + _mask(rows, row))
        for row, (prompt, number) in enumerate(zip(rows.prompts.tolist(), classes.tolist(), strict=True))
    ]


def _mask(rows: Rows, row: int) -> bytes:
    """Which tokens of a chat are learned; nothing for other rows, whose prompt says it."""
    return rows.answered(row).tobytes() if len(rows.learned) else b""


def _of_images(images: Images) -> list[bytes]:
    return [
        _short(pixels.tobytes() + np.asarray([*pixels.shape, number], np.int64).tobytes())
        for pixels, number in zip(images.pixels, images.classes.tolist(), strict=True)
    ]


def _settings(rows: AnyRows) -> list[bytes]:
    """The mean and standard deviation by which pixels become a model's inputs."""
    return [rows.mean.tobytes(), rows.std.tobytes()] if isinstance(rows, Images) else []


def _encoded(names: Sequence[str]) -> list[bytes]:
    return [name.encode("utf-8", errors="surrogatepass") for name in names]  # JSON can bring in lone surrogates


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _sum(parts: Sequence[bytes]) -> str:
    """Each part with its length before it, so that no two sequences of parts read the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
