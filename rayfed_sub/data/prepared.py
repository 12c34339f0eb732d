"""Rows ready to be dealt out: what is left of a task's texts once they are chosen, cut and read by the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import BY_CLIENT, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.chats import beginnings
from rayfed_sub.data.columns import Labels, numbers_of
from rayfed_sub.data.fingerprint import hashes, inputs, of_rows
from rayfed_sub.data.pairs import OVER_WHITE, SCALED, Kind, Pairs, capped, digests, of_keys
from rayfed_sub.data.partitions import key_column, largest_keys
from rayfed_sub.data.processors import Processor
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.splits import questions_asked
from rayfed_sub.data.tokenization import Cuts, tokenised


@dataclass(frozen=True, eq=False)
class Prepared:
    """Units are the rows of a table, in canonical order; each is one row that a model reads, of plain text several.

    rows: of all units, one after the other; hashes uint8 (rows, 16), their digests; digest: of all of them; sizes int64
    (units,), rows of each;
    keys, splits: of each unit, splits empty where all are in train; questions, inputs int64 (units,): numbers that are
    equal for equal questions and inputs alone (`split_rows`); begun: those of `beginnings` for chats, else empty.
    client_names: of the partition's largest keys where those are the clients, else empty.
    read, wanted, chosen: units without repeats, those of them whose key is wanted, and those that task.max_rows left.
    transparent, deep: of those that are read, images that lie over white, and of 16 bits.
    """

    kind: Kind
    plain: bool
    rows: AnyRows
    hashes: NDArray[np.uint8]
    digest: str
    sizes: Ints
    keys: Labels
    splits: Labels
    class_names: tuple[str, ...]
    client_names: tuple[str, ...]
    questions: Ints
    inputs: Ints
    begun: Ints
    cuts: Cuts
    read: int
    wanted: int
    chosen: int
    transparent: int
    deep: int

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def asked(self) -> list[Ints]:
        """The numbers of which no two splits share one."""
        return [self.questions, self.inputs, *([self.begun] if len(self.begun) else [])]


def prepared(pairs: Pairs, task: Task, federation: Federation, processor: Processor) -> Prepared:
    """The rows of at most task.max_rows of `pairs`, of the largest keys where the partition says so.

    Raises UserError (federation.clients, federation.partition.largest, task.max_length, task.path, .validation, .test).
    """
    by_key, names = federation.partition.kind in BY_CLIENT, tuple[str, ...]()
    read, official, changes = len(pairs), Labels.of(pairs.splits).used, pairs.changes
    if (most := federation.clients if by_key else federation.partition.largest) is not None:
        field = "federation.clients" if by_key else "federation.partition.largest"
        trained = Labels.of(pairs.keys).take(np.flatnonzero(pairs.trained))
        largest = largest_keys(trained, most, field, key_column(task, federation))
        pairs = of_keys(pairs, largest)
        names = largest if by_key else ()
    wanted = len(pairs)
    pairs = capped(pairs, task.max_rows, task.seed)
    chosen = len(pairs)
    rows, kept, cuts = tokenised(pairs, processor, task.max_length)
    if not len(rows) and cuts.dropped:
        allowed = (
            f"{cuts.least} or more: of all {cuts.dropped:,} rows the template around the user's text and the answer, "
            "or half a row for it, leave no room for the text"
        )
        raise UserError("task.max_length", task.max_length, allowed, f"set task.max_length={2 * cuts.least} or more")
    if not len(rows):
        raise UserError("task.path", task.path, "a task with rows that have tokens", "check task.prompt")
    kept, sizes = np.unique(kept, return_counts=True)  # a plain text is several rows of tokens, all of one client
    pairs = pairs.take(kept)
    splits = Labels.of(pairs.splits).compact()
    _check_splits_left(task, set(official) - set(splits.names))
    whole = pairs.plain or bool(pairs.objects)  # questions are all that a model reads
    row_hashes = hashes(rows)
    return Prepared(
        kind=pairs.kind,
        plain=pairs.plain,
        rows=rows,
        hashes=row_hashes,
        digest=of_rows(rows, row_hashes, pairs.class_names),
        sizes=sizes,
        keys=Labels.of(pairs.keys).compact(),
        splits=splits,
        class_names=pairs.class_names,
        client_names=names,
        questions=questions_asked(pairs.questions),
        inputs=numbers_of(digests(pairs.questions) if whole else inputs(rows)),
        begun=beginnings(pairs.chats),
        cuts=cuts,
        read=read,
        wanted=wanted,
        chosen=chosen,
        transparent=changes.count(OVER_WHITE),
        deep=changes.count(SCALED),
    )


def _check_splits_left(task: Task, gone: set[str]) -> None:
    """UserError for an official split of which no row is left: a share of the training rows is another one."""
    for split in sorted(gone - {"train"}):
        allowed = "a split with rows of the clients that train, which have tokens"
        raise UserError(f"task.{split}", getattr(task, split), allowed, f"name another one, or set task.{split}=[]")
