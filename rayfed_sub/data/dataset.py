"""A task ready to train on: rows of tokens or pixels, held-out rows, and the clients' rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.checks import no_validation, not_given
from rayfed_sub.config.schema import GIVEN, Federation, Partition, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.assignment import Assignment, NumberedClients, row_dtype
from rayfed_sub.data.batching import AnyRows
from rayfed_sub.data.fingerprint import Fingerprint, fingerprint
from rayfed_sub.data.given import GivenRows, check_left, given_table, own_pairs
from rayfed_sub.data.kept import kept
from rayfed_sub.data.objects import AsTheyAre, Objects
from rayfed_sub.data.pairs import Kind, Pairs, canonical, distinct, ordered
from rayfed_sub.data.partitions import key_column, partitioned
from rayfed_sub.data.prepared import Prepared, prepared
from rayfed_sub.data.processors import Processor
from rayfed_sub.data.python_docs import python_docs
from rayfed_sub.data.readers import Wanted
from rayfed_sub.data.rows import Ints, RowNumbers, Rows
from rayfed_sub.data.sources import listed
from rayfed_sub.data.splits import Judged, Splits, judged_clients, numbered, split_rows
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.data.tables import canonical_classes, load_table
from rayfed_sub.data.tasks import filled
from rayfed_sub.data.tokenization import in_words


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows: `read`, the rows without repeats, is the sum of those left out and those in a split.

    strange: of values of the column that are not wanted; capped: left out by task.max_rows; silent: without tokens;
    dropped: longer than task.max_length and without room for the user's text; repeated: left out so that no question
    stands in two splits, neither whole nor as it was cut.  shared: of the rows of official validation and test splits,
    those whose question stands in another one; they stay.  transparent, deep: of those that are read, images that lie
    over white, and of 16 bits.  cut: of the rows that are neither silent nor dropped, those that were longer than
    task.max_length; cut_prompts, cut_answers and cut_turns: of these, with a shorter text of the user's, with a shorter
    answer, and chats with fewer turns.  chunks: of plain text the rows of tokens that all texts make, which clients and
    evaluations count; the other numbers count texts.
    """

    read: int
    strange: int
    capped: int
    silent: int
    dropped: int
    repeated: int
    train: int
    validation: int
    held_out: int
    cut: int
    cut_prompts: int
    cut_answers: int
    cut_turns: int = 0
    chunks: int = 0
    shared: int = 0
    transparent: int = 0
    deep: int = 0


def changed_images(rows: Mapping[str, int]) -> str:
    """Images that were changed on reading in words, of a stored `RowCounts`; "" where there are none.

    >>> changed_images({"transparent": 2, "deep": 1200})
    '2 transparent, over white; 1,200 of 16 bits, scaled'
    """
    words = {"transparent": "transparent, over white", "deep": "of 16 bits, scaled"}
    return "; ".join(f"{rows[name]:,} {what}" for name, what in words.items() if rows.get(name))


def too_long(rows: Mapping[str, int]) -> str:
    """Cut and dropped rows in words, of a stored `RowCounts`; "" where no row was longer than task.max_length."""
    return in_words(*(rows.get(name, 0) for name in ("cut", "cut_prompts", "cut_answers", "dropped", "cut_turns")))


@dataclass(frozen=True, eq=False)
class Dataset:
    """train and held_out share no question, but for case and spaces, and no input of the model (`split_rows`), unless
    their splits are official.

    held_out: the rows that are judged, which may be those of validation; split: the name of their split.

    class_names: in the order of the class numbers, empty for language modelling; client_names: the value of the
    partition's column, or "client 3"; held_out_clients int64: the client whose data a held-out row resembles
    (`judged_clients`); train_keys int32: key_names[train_keys[i]] is the value of the partition's column in training
    row i, "" without one; client_rows, client_offsets: indices into train, as `Assignment` has them.
    """

    kind: Kind
    train: AnyRows
    held_out: AnyRows
    class_names: tuple[str, ...]
    client_names: Sequence[str]
    held_out_clients: Ints
    train_keys: NDArray[np.int32]
    key_names: tuple[str, ...]
    client_rows: RowNumbers
    client_offsets: Ints
    row_counts: RowCounts
    fingerprint: Fingerprint
    split: str

    def rows_of(self, client: int) -> Ints:
        """The client's indices into train, int64, sorted."""
        begin, end = self.client_offsets[client : client + 2]
        return self.client_rows[begin:end].astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in memory."""
        held = (self.client_rows, self.client_offsets, self.train_keys, self.held_out_clients)
        arrays = {id(array): array for array in (*self.train.arrays, *self.held_out.arrays, *held)}
        return sum(array.nbytes for array in arrays.values())

    def in_memory(self) -> Dataset:
        """The data set for machines that do not have the file in which its tokens lie."""
        if not isinstance(self.train, Rows) or not isinstance(self.held_out, Rows):
            return self
        return replace(self, train=self.train.in_memory(), held_out=self.held_out.in_memory())


def load_dataset(
    task: Task,
    federation: Federation,
    processor: Processor,
    seed: int,
    judged: Judged = "held-out",
    given: GivenRows | None = None,
) -> Dataset:
    """Reads, cuts, holds out and deals out the rows of `task`; equal arguments give equal rows everywhere.
    judged: the split that `held_out` holds; given: the rows of a Python call.

    Raises UserError naming the field of `task` or `federation` that does not fit.
    """

    def make() -> Prepared:
        pairs = load_pairs(task, federation, given, own=isinstance(processor, AsTheyAre))
        if given is not None:
            check_left(given, pairs)
        return prepared(pairs, task, federation, processor)

    if given is None:
        return dealt_out(kept(task, federation, processor, make), task, federation, seed, judged)
    try:
        return dealt_out(make(), task, federation, seed, judged)
    except UserError as error:
        if error.field != "federation.clients":
            raise
        advice = "leave that client out, or give it more rows"  # their number follows from the mapping
        raise UserError("data", f"{federation.clients} clients", error.allowed, advice) from None


def own_rows(
    task: Task, federation: Federation, processor: Processor, problem: str, classes: Sequence[str], client: int
) -> Dataset:
    """The rows of `task` as those of one client of the federation, all of them to train on, of a table or folder with
    splits those of training: no share is held out.

    problem, classes: of the federation's rows, in whose order the classes are numbered; the client's may lack some.
    Raises UserError as `load_dataset`, and (task.label) for other classes.
    """
    changes: dict[str, object] = {"validation": (), "test": (), "max_rows": None}
    changes |= {"train": None} if task.split_column is None else {}
    changes |= {"problem": problem} if filled(task).label is not None else {}
    task = task.model_copy(update=changes)
    alone = federation.model_copy(update={"clients": 1, "partition": Partition(kind="iid")})

    def make() -> Prepared:
        own = task
        if task.split_column is not None and task.split_column not in load_table(task, Wanted({}, {})).names:
            own = task.model_copy(update={"train": None, "split_column": None})
        return prepared(load_pairs(own, alone), own, alone, processor)

    found = _named_as(kept(task, alone, processor, make), classes)
    if strange := [name for name in found.class_names if name not in classes]:
        allowed = f"rows of the classes {', '.join(classes) or '(none)'}; these have {', '.join(strange)}"
        raise UserError("task.label", task.label, allowed, "leave these rows out, or name their classes as the others")
    if found.kind == "multi-label" and found.class_names != tuple(classes) and all(map(str.isdecimal, classes)):
        allowed = (
            f"rows with all of the labels {', '.join(classes)}; what a list of numbers stands for follows from them"
        )
        raise UserError("task.label", task.label, allowed, "give labels names, in all rows of the federation")
    found = _numbered_as(found, classes)
    every, none = np.arange(len(found)), np.empty(0, np.int64)
    dataset = _of_splits(found, Splits(every, none, none, none), none, NumberedClients(1), alone, 0, "")
    begins = np.arange(federation.clients + 1) > client
    return replace(dataset, client_offsets=begins * dataset.client_offsets[-1])


def _named_as(found: Prepared, classes: Sequence[str]) -> Prepared:
    """The rows with the names of `classes` where theirs are the same in the spelling of `canonical_classes`, which
    follows from all names of a column: 1.0 and true alone are 1 and True, beside others they stay."""
    spelled = {canonical_classes([name])[0]: name for name in classes}
    names = (name if name in classes else spelled.get(name, name) for name in found.class_names)
    return replace(found, class_names=tuple(names))


def _numbered_as(found: Prepared, classes: Sequence[str]) -> Prepared:
    """The rows with their classes numbered in the order of `classes`, which has all of theirs."""
    if not found.class_names or isinstance(found.rows, Objects):
        return found
    places, told = np.array([classes.index(name) for name in found.class_names]), found.rows.classes
    if found.kind == "multi-label":
        targets = np.zeros((len(told), len(classes)), told.dtype)
        targets[:, places] = told
    else:
        targets = places[told]
    return replace(found, rows=replace(found.rows, classes=targets), class_names=tuple(classes))


def load_pairs(task: Task, federation: Federation, given: GivenRows | None = None, *, own: bool = False) -> Pairs:
    """The task's rows as text, with the keys by which `federation` deals them out, in canonical order; repeats are
    dropped.  own: the given rows are read by nobody but the caller's own functions."""
    if task.name == GIVEN and given is None:
        raise not_given("task.name")
    if given is not None and own:
        return ordered(own_pairs(given))
    column, task = key_column(task, federation), filled(task)
    reader = None if given is None else partial(given_table, given)
    return (
        distinct(python_docs())
        if task.name == "python-docs"
        else canonical(table_pairs(task, column, federation, reader))
    )


def build_dataset(
    pairs: Pairs, task: Task, federation: Federation, processor: Processor, seed: int, judged: Judged = "held-out"
) -> Dataset:
    """The data set of at most task.max_rows of `pairs`, of the largest keys where the partition says so.

    seed: deals out the rows; task.seed draws them and their splits.
    """
    return dealt_out(prepared(pairs, task, federation, processor), task, federation, seed, judged)


def dealt_out(found: Prepared, task: Task, federation: Federation, seed: int, judged: Judged = "held-out") -> Dataset:
    """The data set of prepared rows: their splits, and the clients' shares."""
    names = found.client_names or NumberedClients(federation.clients)
    split = split_rows(found.asked, found.keys, task, found.splits)
    chosen = split.held_out if judged == "held-out" else split.validation
    if not len(chosen):
        raise no_validation()
    return _of_splits(found, split, chosen, names, federation, seed, _split_name(task, judged, found.splits.names))


def _of_splits(
    found: Prepared,
    split: Splits,
    chosen: Ints,
    names: Sequence[str],
    federation: Federation,
    seed: int,
    split_name: str,
) -> Dataset:
    """chosen: the units that are judged; names: of the clients."""
    rows, sizes, cuts = found.rows, found.sizes, found.cuts
    key_names, keys = numbered(found.keys)
    dealt = partitioned(found.keys.take(split.train), names, federation, seed)
    judged_by = judged_clients(keys[chosen], keys[split.train], key_names, dealt, seed)
    # From here on in rows of tokens.
    trained, every = _Places(sizes[split.train]), _Places(sizes)
    dealt = trained.of_each(dealt)
    judged_by, keys = np.repeat(judged_by, sizes[chosen]), np.repeat(keys, sizes)
    chosen = every.of(chosen)
    splits = Splits(
        train=every.of(split.train),
        validation=every.of(split.validation),
        held_out=every.of(split.held_out),
        repeated=every.of(split.repeated),
    )
    return Dataset(
        kind=found.kind,
        train=rows.take(splits.train),
        held_out=rows.take(chosen),
        class_names=found.class_names,
        client_names=names,
        held_out_clients=judged_by,
        train_keys=keys[splits.train],
        key_names=key_names,
        client_rows=dealt.rows,
        client_offsets=dealt.offsets,
        row_counts=RowCounts(
            read=found.read,
            strange=found.read - found.wanted,
            capped=found.wanted - found.chosen,
            silent=found.chosen - len(found) - cuts.dropped,
            dropped=cuts.dropped,
            repeated=len(split.repeated),
            train=len(split.train),
            validation=len(split.validation),
            held_out=len(split.held_out),
            cut=cuts.cut,
            cut_prompts=cuts.prompts,
            cut_answers=cuts.answers,
            cut_turns=cuts.turns,
            chunks=len(rows) if found.plain else 0,
            shared=split.shared,
            transparent=found.transparent,
            deep=found.deep,
        ),
        fingerprint=fingerprint(found.digest, found.hashes, splits, names, dealt, judged_by),
        split=split_name,
    )


class _Places:
    """Places of the rows of tokens of each row of a table, in the same order.

    >>> _Places(np.array([1, 2, 3])).of(np.array([0, 2])).tolist()
    [0, 3, 4, 5]
    """

    def __init__(self, sizes: Ints) -> None:
        """sizes: rows of tokens of each row of the table."""
        self._sizes, self._begins = sizes, _begins(sizes)
        self._one_each = bool((sizes == 1).all())

    def of(self, units: Ints) -> Ints:
        """The rows of tokens of these rows of the table, in order."""
        if self._one_each:
            return units
        own, begins = self._sizes[units], self._begins[units]
        rows: Ints = np.arange(own.sum()) + np.repeat(begins - _begins(own), own)
        return rows

    def of_each(self, units: Assignment) -> Assignment:
        """The rows of tokens of each client's rows of the table."""
        if self._one_each:
            return units
        counts = [np.add.reduceat(self._sizes[block.rows], _begins(block.sizes)) for block in units.blocks()]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        rows, end = np.empty(offsets[-1], row_dtype(int(self._sizes.sum()))), 0
        for block in units.blocks():
            own = self.of(block.rows.astype(np.int64))
            rows[end : end + len(own)] = own
            end += len(own)
        return Assignment(rows, offsets)


def _begins(sizes: Ints) -> Ints:
    begins: Ints = np.cumsum(sizes) - sizes
    return begins


def _split_name(task: Task, judged: Judged, official: Sequence[str]) -> str:
    """The name of the judged split.

    >>> _split_name(Task(), "held-out", ()), _split_name(Task(test="data/dev.csv"), "held-out", ("train", "test"))
    ('held-out share', 'test (dev.csv)')
    """
    split = "test" if judged == "held-out" else judged
    if split not in official:
        return f"{judged} share"
    names = ", ".join(Path(name).name for name in listed(getattr(task, split)))
    return split if names in ("", split) else f"{split} ({names})"
