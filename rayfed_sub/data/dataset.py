"""A task ready to train on: token rows, held-out rows, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayfed_sub.config import Federation, Task
from rayfed_sub.data.codec import Codec
from rayfed_sub.data.pairs import Kind, Pairs, capped, distinct, of_keys
from rayfed_sub.data.partitions import held_out_rows, key_column, largest_keys, offsets_of, partitioned
from rayfed_sub.data.python_docs import python_docs
from rayfed_sub.data.rows import Ints, Rows
from rayfed_sub.data.table_pairs import table_pairs
from rayfed_sub.data.tokens import tokenised
from rayfed_sub.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """train and held_out share no (question, answer).

    questions, references: the held-out rows as text, empty for classification; class_names: in the order of
    the class numbers, empty for language modelling; client_names: the value of the partition's column,
    or "client 3"; held_out_clients int64: the client whose key a held-out row carries, -1 where keys name no client;
    client_rows int64: indices into train, all clients one after the other;
    client_offsets int64 (clients + 1,).
    """

    kind: Kind
    train: Rows
    held_out: Rows
    questions: tuple[str, ...]
    references: tuple[str, ...]
    class_names: tuple[str, ...]
    client_names: tuple[str, ...]
    held_out_clients: Ints
    client_rows: Ints
    client_offsets: Ints

    def rows_of(self, client: int) -> Ints:
        """The client's indices into train, int64, sorted, a view."""
        return self.client_rows[self.client_offsets[client] : self.client_offsets[client + 1]]


def load_dataset(task: Task, federation: Federation, codec: Codec, seed: int) -> Dataset:
    """Reads, cuts, holds out and deals out the rows of `task`; equal arguments give equal rows everywhere.

    Raises UserError naming the field of `task` or `federation` that does not fit.
    """
    return build_dataset(load_pairs(task, federation), task, federation, codec, seed)


def load_pairs(task: Task, federation: Federation) -> Pairs:
    """The task's rows as text, with the keys by which `federation` deals them out; repeats are dropped."""
    column = key_column(task, federation)
    if task.name == "table":
        return distinct(table_pairs(task, column))
    for name in ("path", "prompt", "answer", "label"):
        if getattr(task, name) is not None:
            advice = f"set task.name=table or remove task.{name}"
            raise UserError("task.name", task.name, f"table where task.{name} is set", advice)
    return distinct(python_docs())


def build_dataset(pairs: Pairs, task: Task, federation: Federation, codec: Codec, seed: int) -> Dataset:
    """The data set of at most task.max_rows of `pairs`; with kind=column, those of the largest keys."""
    pairs = capped(pairs, task.max_rows, seed)
    names = tuple(f"client {client}" for client in range(federation.clients))
    if federation.partition.kind == "column":
        names = largest_keys(pairs.keys, federation.clients)
        pairs = of_keys(pairs, names)
    rows, kept = tokenised(pairs, codec, task.max_length)
    if not len(rows):
        raise UserError("task.path", task.path, "a task with rows that have tokens", "check task.prompt")
    pairs = pairs.take(kept)

    held_out = held_out_rows(pairs.keys, task.held_out, seed)
    trained = np.setdiff1d(np.arange(len(rows)), held_out)
    parts = partitioned(pairs.take(trained).keys, names, federation, seed)
    shown = pairs.take(held_out) if pairs.kind == "causal-lm" else None
    return Dataset(
        kind=pairs.kind,
        train=rows.take(trained),
        held_out=rows.take(held_out),
        questions=shown.questions if shown else (),
        references=shown.answers if shown else (),
        class_names=pairs.class_names,
        client_names=names,
        held_out_clients=_owners(pairs.take(held_out).keys, names),
        client_rows=np.concatenate(parts),
        client_offsets=offsets_of(parts),
    )


def _owners(keys: Sequence[str], names: Sequence[str]) -> Ints:
    """For each key the client of that name, or -1."""
    number = {name: client for client, name in enumerate(names)}
    return np.asarray([number.get(key, -1) for key in keys], dtype=np.int64)
