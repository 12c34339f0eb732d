"""Partition statistics: rows, tokens and classes of every client, and the skew of the partition.

Counted are the classes of the task's label or, in language modelling, which has none, the keys: the values of the
partition's column.  Legend: C clients, S classes or keys that are shown, G groups of clients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from logging.handlers import BufferingHandler
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Config
from rayfed_sub.data.assignment import Assignment
from rayfed_sub.data.dataset import Dataset, RowCounts, load_dataset
from rayfed_sub.data.labels import NOBODY, bins
from rayfed_sub.data.objects import Objects
from rayfed_sub.data.partitions import key_column
from rayfed_sub.data.processors import Processor
from rayfed_sub.data.rows import Ints, RowNumbers, Rows
from rayfed_sub.data.tasks import filled

SHOWN = 20
"""Classes or keys in a picture; of more, the largest and "other"."""


@dataclass(frozen=True, eq=False)
class PartitionStats:
    """name: of the run; kind and column: of the partition, column None without one.

    counted: what `values` are: classes, of a regression quantile bins, or keys; value_column: the column that they
    stand in, None where rows have neither a label nor a key; then there is one value, "all".  values: largest first;
    rows_C; tokens_C: the median of a client's rows, None for images; judged_C: held-out (or validation) rows that are
    like the client's, by its keys; distance_C and skew: of the values, see `skew`.
    dealt: the clients' rows; values_R: the numbers of each training row's values.
    split: the name of the judged split.  notes: messages logged while the rows were read.  problem: the kind of the
    data set.
    """

    name: str
    kind: str
    column: str | None
    counted: Literal["classes", "keys"]
    value_column: str | None
    judged: str
    clients: Sequence[str]
    values: tuple[str, ...]
    rows_C: Ints
    tokens_C: NDArray[np.float64] | None
    judged_C: Ints
    distance_C: NDArray[np.float64]
    skew: float
    dealt: Assignment
    values_R: Assignment
    row_counts: RowCounts
    notes: tuple[str, ...]
    split: str
    problem: str = "classification"

    def counts_of(self, client: int) -> dict[str, int]:
        """The client's rows of each value that it has, largest first."""
        _, numbers = _values(self.values_R, self.dealt[client])
        held, counts = np.unique(numbers, return_counts=True)
        return {self.values[held[i]]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}

    def shown(self) -> tuple[str, ...]:
        """The values of a picture: all, or the largest and "other"."""
        return self.values if len(self.values) <= SHOWN else (*self.values[: SHOWN - 1], "other")

    def table(self, groups: Sequence[Ints]) -> Ints:
        """Rows of each shown value in each group of clients, int64 (G, S)."""
        shown, group_C = len(self.shown()), np.empty(len(self.clients), np.int64)
        for number, group in enumerate(groups):
            group_C[group] = number
        table = np.zeros(len(groups) * shown, np.int64)
        for clients, numbers in _by_client(self.dealt, self.values_R):
            table += np.bincount(group_C[clients] * shown + np.minimum(numbers, shown - 1), minlength=len(table))
        return table.reshape(len(groups), shown)

    def distances(self, groups: Sequence[Ints]) -> list[float]:
        """The mean distance of each group's clients, weighted by their rows."""
        return [float(np.average(self.distance_C[group], weights=self.rows_C[group])) for group in groups]

    def by_size(self) -> Ints:
        """The clients, the largest first, equals by number."""
        return np.argsort(-self.rows_C, kind="stable")

    def groups(self, most: int) -> list[Ints]:
        """Every client by itself, or, of more than `most`, as many bands of clients of like size, the largest first."""
        if len(self.clients) <= most:
            return [np.asarray([client]) for client in range(len(self.clients))]
        return np.array_split(self.by_size(), most)


def read_partition_stats(config: Config, processor: Processor) -> PartitionStats:
    """The statistics that a run of `config` would begin with: its rows are read and dealt out, no weights are loaded.

    Raises UserError for whatever of task and federation does not fit.
    """
    heard = BufferingHandler(capacity=1 << 30)  # messages go into the tables, not to stderr
    log = logging.getLogger("rayfed_sub.data")
    log.addHandler(heard)
    before, log.propagate = log.propagate, False
    unheard = heard.buffer  # where no tables follow the messages may name the cause
    try:
        dataset = load_dataset(config.task, config.federation, processor, config.seed, config.evaluation.split)
        unheard = []
    finally:
        log.propagate = before
        log.removeHandler(heard)
        for record in unheard:
            log.handle(record)
    return stats_of(config, dataset, [record.getMessage() for record in heard.buffer])


def stats_of(config: Config, dataset: Dataset, notes: Sequence[str] = ()) -> PartitionStats:
    """The statistics of the data set that `config` asks for."""
    column, label = key_column(config.task, config.federation), filled(config.task).label_name
    dealt = Assignment(dataset.client_rows, dataset.client_offsets)
    if label is None:
        found, names = _one_each(dataset.train_keys), dataset.key_names
    else:
        assert not isinstance(dataset.train, Objects), "rows of the caller's own have no label that we know"
        found, names = _labels(dataset, dataset.train.classes)
    sizes = np.zeros(len(names), np.int64)
    for _, numbers in _by_client(dealt, found):
        sizes += np.bincount(numbers, minlength=len(names))
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    rank = np.zeros(len(sizes), np.int64)
    rank[order] = np.arange(len(order))
    values_R = Assignment(rank[found.rows], found.offsets)
    g = sizes[order] / sizes.sum()
    own = [_distances(clients, numbers, g) for clients, numbers in _by_client(dealt, values_R)]
    distance_C, counted_C = (np.concatenate(parts) for parts in zip(*own, strict=True))
    return PartitionStats(
        name=config.name,
        kind=config.federation.partition.kind,
        column=column,
        counted="keys" if label is None else "classes",
        value_column=column if label is None else label,
        judged=config.evaluation.split,
        clients=dataset.client_names,
        values=tuple(names[number] or "all" for number in order),
        rows_C=dealt.sizes,
        tokens_C=_medians(dealt, dataset.train.lengths) if isinstance(dataset.train, Rows) else None,
        judged_C=np.bincount(dataset.held_out_clients, minlength=len(dealt)),
        distance_C=distance_C,
        skew=float(np.average(distance_C, weights=counted_C)),
        dealt=dealt,
        values_R=values_R,
        row_counts=dataset.row_counts,
        notes=tuple(notes),
        split=dataset.split,
        problem=dataset.kind,
    )


def _labels(dataset: Dataset, labels: NDArray[Any]) -> tuple[Assignment, tuple[str, ...]]:
    """The classes of each training row, and their names.  Numbers count as the quantile bin that they are in; of
    several labels a row each counts, and "none" where it has none.

    labels: of all training rows, as of `Rows`.
    """
    if dataset.kind == "regression":
        listed = labels[:, 0].tolist()
        names, numbers = np.unique(bins(listed, listed), return_inverse=True)
        return _one_each(numbers), tuple(names.tolist())
    if dataset.kind == "multi-label":
        bare = np.concatenate([labels, ~labels.any(axis=1, keepdims=True)], axis=1)
        return Assignment(np.nonzero(bare)[1], _offsets(np.count_nonzero(bare, axis=1))), (*dataset.class_names, NOBODY)
    return _one_each(labels), dataset.class_names


def _one_each(numbers: NDArray[Any]) -> Assignment:
    return Assignment(numbers, np.arange(len(numbers) + 1))


def _offsets(sizes: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _by_client(dealt: Assignment, values_R: Assignment) -> Iterator[tuple[Ints, Ints]]:
    """The client and the value of everything that is counted, some clients at a time, in order."""
    for block in dealt.blocks():
        places, numbers = _values(values_R, block.rows)
        yield np.repeat(np.arange(block.first, block.first + len(block.sizes)), block.sizes)[places], numbers


def _values(values_R: Assignment, rows: RowNumbers) -> tuple[Ints, Ints]:
    """All values of `rows`: the place among these of the row that has it, and its number."""
    begins = values_R.offsets[rows]
    sizes = values_R.offsets[rows + 1] - begins
    places = np.repeat(np.arange(len(rows)), sizes)
    before = _offsets(sizes)[:-1]
    numbers: Ints = values_R.rows[np.arange(len(places)) + (begins - before)[places]].astype(np.int64)
    return places, numbers


def as_dict(stats: PartitionStats) -> dict[str, Any]:
    """All of it for JSON; clients in order, with their rows of each class or key."""
    tokens = [None] * len(stats.clients) if stats.tokens_C is None else stats.tokens_C.tolist()
    clients = zip(
        stats.clients,
        stats.rows_C.tolist(),
        tokens,
        stats.judged_C.tolist(),
        stats.distance_C.tolist(),
        strict=True,
    )
    return {
        "name": stats.name,
        "partition": stats.kind,
        "column": stats.column,
        "counted": stats.counted,
        "value_column": stats.value_column,
        "judged": stats.judged,
        "split": stats.split,
        "skew": stats.skew,
        "rows": asdict(stats.row_counts),
        "notes": list(stats.notes),
        "clients": [
            {
                "client": client,
                "name": name,
                "rows": rows,
                "median_tokens": median,
                "judged_rows": judged,
                "distance": distance,
                "counts": stats.counts_of(client),
            }
            for client, (name, rows, median, judged, distance) in enumerate(clients)
        ],
    }


def _medians(dealt: Assignment, lengths: NDArray[np.int32]) -> NDArray[np.float64]:
    """The median of each client's rows' lengths."""
    found = []
    for block in dealt.blocks():
        holders, own = np.repeat(np.arange(len(block.sizes)), block.sizes), lengths[block.rows]
        own_R = own[np.lexsort((own, holders))].astype(np.float64)
        begins = _offsets(block.sizes)[:-1]
        found.append((own_R[begins + (block.sizes - 1) // 2] + own_R[begins + block.sizes // 2]) / 2)
    return np.concatenate(found)


def distances(clients: Ints, classes: Ints) -> NDArray[np.float64]:
    """For each client the total-variation distance between the shares of the classes in its rows, p, and in all, g:
    half the sum of |p - g|, the share of its rows that would have to change class; float64 (clients,).

    clients, classes: the client and the class of each row, numbers from 0; every client has a row.

    >>> distances(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])).tolist()  # g = 3/4, 1/4
    [0.25, 0.25]
    """
    return _distances(clients, classes, np.bincount(classes) / len(classes))[0]


def _distances(clients: Ints, classes: Ints, g: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`distances` of clients next to each other, from the shares g of the classes in all rows, and the number of each
    client's entries, float64."""
    cells, counts = np.unique((clients - clients.min()) * len(g) + classes, return_counts=True)
    client, held = np.divmod(cells, len(g))
    rows = np.bincount(client, weights=counts).astype(np.float64, copy=False)
    # A class that a client lacks adds its g; so all of them would add 1, from which those that it has are taken back.
    differences = np.abs(counts / rows[client] - g[held]) - g[held]
    return (1 + np.bincount(client, weights=differences)) / 2, rows


def skew(clients: Ints, classes: Ints) -> float:
    """The mean of `distances`, weighted by the clients' rows: 0 where all clients are alike, towards 1 where each has
    few of many classes.

    >>> skew(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]))  # g = 3/4, 1/4; distances 1/4 and 3/4
    0.375
    >>> skew(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]))
    0.0
    """
    return float(distances(clients, classes)[clients].mean())
