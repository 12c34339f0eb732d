"""Batches of a client, by number: any step of its whole life can be asked for, and no state is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayfed_sub.core.rng import stream
from rayfed_sub.data.images import Images
from rayfed_sub.data.objects import Objects, OwnBatch
from rayfed_sub.data.rows import Ints, Rows

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Batching

IGNORED = -100
"""The label that no loss counts, as in torch and Hugging Face; among labels of floats it is NaN."""
POOL = 8
"""Bucketed batches among which rows are sorted by length: in a larger pool they are more alike, and less random."""

AnyRows = Rows | Images | Objects
Batch = Mapping[str, Tensor] | OwnBatch
"""Tensors (B, ...) by name, or what the caller's own function makes of B rows."""


class Batches(Protocol):
    """A client's batches of one round: as many as it takes local steps."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...

    def __iter__(self) -> Iterator[Batch]: ...


def batch_rows(
    seed: int,
    client: int,
    rows: Ints,
    batch_size: int,
    step: int,
    lengths: NDArray[np.int32] | None = None,
    order_of: Callable[[int], Ints] | None = None,
) -> Ints:
    """The rows of the client's batch number `step`, counted from 0 over its whole life: min(batch_size, len(rows)).

    Batches are cut, one after the other, from an endless run of permutations of `rows`, the epochs; each permutation
    has a stream of its own, so a resumed run needs only the number.  Without lengths batch `step` is the next slice of
    that run, whatever its rows' lengths.

    lengths (one for each row that there is, by row number): bucketed batches.  Those that lie in one epoch are made of
    rows of like length: in pools of POOL consecutive ones the rows are sorted by length and cut anew.  The seed, the
    epoch and the pool decide which of a pool's batches is short and which long, not the client, so that clients trained
    side by side meet them at the same time.  The price: all clients take their steps on long rows together, so the
    order of training depends on the rows' lengths.

    order_of: an epoch's permutation (`epoch_order`), from a caller that keeps it for several steps.

    >>> [batch_rows(0, 7, np.arange(4), 2, step).tolist() for step in (0, 1)]
    [[0, 1], [2, 3]]
    >>> sizes = np.array([1, 9, 1, 9])
    >>> sorted(sizes[batch_rows(0, 7, np.arange(4), 2, step, sizes)].tolist() for step in (0, 1))
    [[1, 1], [9, 9]]
    """
    count = len(rows)
    size = min(batch_size, count)
    epoch, begin = divmod(step * size, count)
    order_of = order_of or (lambda epoch: epoch_order(seed, client, rows, epoch))
    order = order_of(epoch)
    if begin + size > count:  # a batch is never longer than an epoch, so it touches two of them at most
        after = order_of(epoch + 1)
        return np.concatenate([order[begin:], after[: begin + size - count]])
    if lengths is None:
        return order[begin : begin + size]
    inside, lead = begin // size, begin % size  # `lead` rows of the epoch belong to the batch before its first own one
    pool, place = divmod(inside, POOL)
    low = lead + pool * POOL * size
    held = min(POOL, (count - low) // size)
    pooled = order[low : low + held * size]
    pooled = pooled[np.argsort(lengths[pooled], kind="stable")]
    # The ranks of the first `held` of POOL places: a client with a shorter pool follows the others as far as it goes.
    places = _bucket(seed, epoch, pool)[:held]
    rank = int((places < places[place]).sum())
    return pooled[rank * size : (rank + 1) * size]


def poisson_rows(seed: int, client: int, rows: Ints, batch_size: int, step: int) -> Ints:
    """The rows of the client's local step number `step` of its life, each drawn by itself with chance batch_size /
    len(rows), 1 at most: none, or all of them, may come.

    >>> poisson_rows(0, 7, np.arange(4), 4, 0).tolist()
    [0, 1, 2, 3]
    """
    return rows[stream(seed, "example batches", client, step).random(len(rows)) < batch_size / len(rows)]


def epoch_order(seed: int, client: int, rows: Ints, epoch: int) -> Ints:
    """The client's permutation of `rows` in one of its epochs, counted from 0."""
    return stream(seed, "batches", client, epoch).permutation(rows)


@lru_cache(maxsize=256)
def _bucket(seed: int, epoch: int, pool: int) -> Ints:
    """In which order the batches of a pool come, by length; all clients ask for the same."""
    return stream(seed, "buckets", epoch, pool).permutation(POOL)


def collate(
    rows: AnyRows,
    indices: Ints,
    *,
    mask_prompt: bool,
    pad: int,
    draw: tuple[int | str, ...] = (0,),
    apart: bool = False,
) -> Batch:
    """The rows at `indices` as one batch, padded on the right to its longest row.

    Language modelling: input_ids and labels int64 (B, T).  labels[b, t] is the token at t itself (the loss
    shifts), or -100 on padding and, with mask_prompt, on the prompt, of chats on all that the assistant does not say.
    Classification (rows with classes): labels int64 (B,); regression float32 (B, 1); several labels float32 (B, C), 0
    or 1 each.
    All: attention_mask int64 (B, T), 0 on padding; of pairs, where the model tells texts apart, token_type_ids (B, T).
    Encoder-decoders (apart): input_ids and attention_mask are the prompts alone, labels the answers, -100 on padding.
    Images: pixel_values float32 (B, 3, side, side), labels likewise.
    Rows of the caller's own: whatever the caller's function makes of them, which may raise anything.  draw: seed and
    purpose of what it draws.
    """
    if isinstance(rows, Objects):
        seed, *purpose = draw
        return rows.batch_of(indices, int(stream(int(seed), "own code", *purpose).integers(2**32)))
    if isinstance(rows, Images):
        return {
            "pixel_values": torch.from_numpy(rows.inputs(indices)),
            "labels": torch.from_numpy(rows.classes[indices]),
        }
    if apart:
        return _apart(rows, indices, pad)
    lengths = rows.lengths[indices]
    places = np.arange(int(lengths.max()))[None, :]
    filled = places < lengths[:, None]
    input_ids = np.full(filled.shape, pad, np.int64)
    input_ids[filled] = np.concatenate([rows.row(int(index)) for index in indices])
    if len(rows.classes):
        labels = rows.classes[indices]
    else:
        learned = filled
        if mask_prompt and len(rows.learned):
            learned = np.zeros_like(filled)
            learned[filled] = np.concatenate([rows.answered(int(index)) for index in indices])
        elif mask_prompt:
            learned = filled & (places >= rows.prompts[indices][:, None])
        labels = np.where(learned, input_ids, IGNORED)
    batch = {"input_ids": input_ids, "attention_mask": filled.astype(np.int64), "labels": labels}
    if len(rows.types):
        batch["token_type_ids"] = np.zeros(filled.shape, np.int64)
        batch["token_type_ids"][filled] = np.concatenate([rows.types_of(int(index)) for index in indices])
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _apart(rows: Rows, indices: Ints, pad: int) -> Batch:
    prompts = rows.prompts[indices]
    answers = rows.lengths[indices] - prompts
    filled, labelled = (np.arange(int(sizes.max()))[None, :] < sizes[:, None] for sizes in (prompts, answers))
    input_ids, labels = np.full(filled.shape, pad, np.int64), np.full(labelled.shape, IGNORED, np.int64)
    every = [np.split(rows.row(int(index)), [prompt]) for index, prompt in zip(indices, prompts, strict=True)]
    input_ids[filled] = np.concatenate([prompt for prompt, _ in every])
    labels[labelled] = np.concatenate([answer for _, answer in every])
    batch = {"input_ids": input_ids, "attention_mask": filled.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass(frozen=True, eq=False)
class ClientBatches:
    """`steps` batches of a client, the first being number `cursor` of its life; made when asked for.

    indices int64: the client's rows among `rows`.  batching: see `config.Federation`; images, which are of one size,
    have no buckets.  poisson: rows are drawn one by one (`poisson_rows`) in place of epochs; a batch may have none.
    """

    rows: AnyRows
    indices: Ints
    seed: int
    client: int
    batch_size: int
    cursor: int
    steps: int
    mask_prompt: bool
    pad: int
    batching: Batching
    apart: bool = False
    poisson: bool = False
    _orders: dict[int, Ints] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`, 0 <= index < steps, as `collate` gives it.  Raises IndexError outside."""
        if not 0 <= index < self.steps:
            raise IndexError(index)
        if self.poisson:
            return self._drawn(self.cursor + index)
        lengths = self.rows.lengths if self.batching == "bucketed" and isinstance(self.rows, Rows) else None
        step = self.cursor + index
        chosen = batch_rows(self.seed, self.client, self.indices, self.batch_size, step, lengths, self._order)
        return self._collated(chosen, step)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(self.steps))

    @property
    def expected(self) -> int:
        """Rows of a batch; drawn one by one, on average."""
        return min(self.batch_size, len(self.indices))

    def _drawn(self, step: int) -> Batch:
        chosen = poisson_rows(self.seed, self.client, self.indices, self.batch_size, step)
        batch = self._collated(chosen if len(chosen) else self.indices[:1], step)
        assert not isinstance(batch, OwnBatch)
        return {name: tensor[: len(chosen)] for name, tensor in batch.items()}

    def _collated(self, chosen: Ints, step: int) -> Batch:
        draw = (self.seed, self.client, step)
        return collate(self.rows, chosen, mask_prompt=self.mask_prompt, pad=self.pad, draw=draw, apart=self.apart)

    def _order(self, epoch: int) -> Ints:
        """`epoch_order`, drawn once for all steps that lie in it: of a million rows it takes 20 ms."""
        if epoch not in self._orders:
            for old in [old for old in self._orders if old < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = epoch_order(self.seed, self.client, self.indices, epoch)
        return self._orders[epoch]
