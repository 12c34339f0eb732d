"""Partitions of the training rows over clients.

Everything is an array of row numbers: no row is copied, and each draw has a stream of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayfed_sub.config.schema import BY_CLIENT, BY_SOURCE, Federation, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.data import python_docs
from rayfed_sub.data.assignment import Assignment, row_dtype
from rayfed_sub.data.client_keys import topped_up
from rayfed_sub.data.columns import Labels
from rayfed_sub.data.readers import CLIENT
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.tasks import TASKS

log = logging.getLogger(__name__)

_AT_ONCE = 2**18  # drawn rows that are looked through at a time

DIRICHLET_DRAWS = 10
"""Dirichlet shares are drawn again, this many times at most, while they leave a client without rows."""


def key_column(task: Task, federation: Federation) -> str | None:
    """The column whose values deal out the rows, or by which held-out rows are spread; None: there is none.

    Raises UserError (federation.partition.column) where the partition needs a column and none is named.
    """
    column, kind = federation.partition.column, federation.partition.kind
    if kind in BY_SOURCE:
        if task.name == "python-docs":
            allowed = "another kind with task.name=python-docs, whose rows are in no file"
            raise UserError("federation.partition.kind", kind, allowed, "e.g. federation.partition.kind=column")
        return CLIENT
    if task.name == "python-docs":
        if column not in (None, python_docs.COLUMN):
            allowed = f"{python_docs.COLUMN} with task.name=python-docs"
            raise UserError("federation.partition.column", column, allowed, "remove it")
        return python_docs.COLUMN
    if task.name in TASKS:
        return column or TASKS[task.name].key
    if column is None and (kind == "column" or (kind in ("dirichlet", "shards") and task.label is None)):
        allowed = f"a column of the table with partition.kind={kind}"
        advice = "name one, or set federation.partition.kind=iid"
        raise UserError("federation.partition.column", column, allowed, advice)
    return column or task.label_name


def largest_keys(
    keys: Sequence[str], most: int, field: str = "federation.clients", column: str | None = None
) -> tuple[str, ...]:
    """The `most` values that occur most often, most frequent first, equals by name.

    Raises UserError (`field`) where there are fewer values; column: what it calls the column that they are from.

    >>> largest_keys(["b", "a", "c", "b"], 2)
    ('b', 'a')
    """
    counts = Labels.of(keys).counts
    if most > len(counts):
        where = "the partition's column" if column is None else f"the column {column}"
        allowed = f"1 to {len(counts)}, the number of values of {where}"
        raise UserError(field, most, allowed, f"set {field}={len(counts)}")
    return tuple(sorted(counts, key=lambda key: (-counts[key], key))[:most])


def partitioned(keys: Sequence[str], names: Sequence[str], federation: Federation, seed: int) -> Assignment:
    """Each client's row numbers.  keys: the training rows'; names: the clients' (kind=column: keys).

    Disjoint, except with `resample`, and complete.  `iid`, `dirichlet`, `shards` and `power-law` are flwr-datasets'
    partitioners over the shuffled rows; `column` and `pool` need one line of numpy each, and not the seconds of
    importing it.
    Raises UserError (federation.clients) for more clients than rows or a client without rows,
    (federation.partition.rows_per_client) where that is above the number of rows, and
    (federation.partition.shards_per_client) for more shards than rows.
    """
    clients, kind = federation.clients, federation.partition.kind
    if federation.partition.rows_per_client is not None:  # kind=resample
        return _resampled(len(keys), clients, federation.partition.rows_per_client, seed)
    if clients > len(keys):
        allowed = f"1 to {len(keys)}, the number of training rows"
        raise UserError("federation.clients", clients, allowed, "lower federation.clients or use more rows")
    if kind in BY_CLIENT:
        number, labels = {name: k for k, name in enumerate(names)}, Labels.of(keys)
        client_R = np.asarray([number.get(name, clients) for name in labels.names], np.int64)[labels.numbers]
        ends = np.cumsum(np.bincount(client_R, minlength=clients)[:clients])
        parts = np.split(np.argsort(client_R, kind="stable"), ends)[:clients]
    elif kind == "pool":
        parts = [np.arange(len(keys))]
    elif kind == "iid":
        parts = _iid(len(keys), clients, seed)
    elif kind == "shards":
        parts = _shards(keys, clients, federation.partition.shards_per_client, seed)
    elif kind == "power-law":
        parts = _sized(power_law_sizes(len(keys), clients, federation.partition.exponent), seed)
    else:
        parts = dirichlet(keys, clients, federation.partition.alpha, seed)
    dealt = Assignment.of(parts)
    if len(empty := np.flatnonzero(dealt.sizes == 0)):
        allowed = f"at least one row for every client ({names[int(empty[0])]} has none)"
        raise UserError("federation.clients", clients, allowed, "lower federation.clients or use more rows")
    return dealt


def _resampled(rows: int, clients: int, each: int, seed: int) -> Assignment:
    """`each` different rows for every client, every subset equally likely: Floyd's algorithm (Bentley and Floyd, CACM
    30(9), 1987).  Draw t, of all clients at a time, comes from the first rows - each + t + 1 rows; one that the client
    has already gives way to the last of them, which it cannot have."""
    if each > rows:
        field, allowed = "federation.partition.rows_per_client", f"1 to {rows}, the number of training rows"
        raise UserError(field, each, allowed, "lower it or use more rows")
    draws, dtype, last_t = stream(seed, "partition"), row_dtype(rows), range(rows - each, rows)
    drawn_ct = np.empty((clients, each), dtype)
    some = max(_AT_ONCE // each, 2**10)
    blocks = [drawn_ct[begin : begin + some] for begin in range(0, clients, some)]
    for t, last in enumerate(last_t):
        for own_ct in blocks:
            own_ct[:, t] = draws.integers(0, last, len(own_ct), dtype, endpoint=True)
    for own_ct in blocks:
        own_tc = own_ct.T.copy()
        for t, last in enumerate(last_t):
            own_tc[t][(own_tc[:t] == own_tc[t]).any(axis=0)] = last
        own_ct[:] = own_tc.T
        own_ct.sort(axis=1)
    return Assignment(drawn_ct.reshape(-1), np.arange(clients + 1, dtype=np.int64) * each)


def _iid(rows: int, clients: int, seed: int) -> list[Ints]:
    from flwr_datasets.partitioner import IidPartitioner

    return _dealt(IidPartitioner(clients), stream(seed, "partition").permutation(rows), None)


def _shards(keys: Sequence[str], clients: int, each: int, seed: int) -> list[Ints]:
    """The rows sorted by key, equals in seeded order, in clients * each shards that differ by one row at most.

    flwr-datasets deals out the shards, not the rows: from these it would make shards of equal size and leave the last
    rows, which are those of the last key, to nobody.  Where the shards divide the rows, the result is its own.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    shards = clients * each
    if shards > len(keys):
        allowed = f"1 to {len(keys) // clients}: {len(keys):,} training rows for {clients:,} clients"
        raise UserError("federation.partition.shards_per_client", each, allowed, "lower it or federation.clients")
    order = stream(seed, "partition").permutation(len(keys))
    ordered = order[np.argsort(Labels.of(keys).numbers[order], kind="stable")]
    partitioner = ShardPartitioner(
        num_partitions=clients,
        partition_by="key",
        num_shards_per_partition=each,
        shuffle=False,
        seed=int(stream(seed, "partition", "shards").integers(2**63)),
    )
    cut = np.array_split(ordered, shards)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specifying null_placement", FutureWarning)  # datasets' way of calling Arrow
        dealt = _dealt(partitioner, np.arange(shards), list(range(shards)))
    return [np.sort(np.concatenate([cut[shard] for shard in part])) for part in dealt]


def power_law_sizes(rows: int, clients: int, exponent: float) -> list[int]:
    """Rows of each client, of at least `clients` in all: in proportion to i ** -exponent for the i-th, i from 1, by
    largest remainders.  Clients whose share is below one row get one, and the others share the rest.

    >>> power_law_sizes(10, 3, exponent=1.0)  # shares 5.45, 2.73, 1.82
    [5, 3, 2]
    >>> power_law_sizes(10, 4, exponent=3.0)  # shares 8.49, 1.06, 0.31, 0.13; then 7.11 and 0.89; then 7
    [7, 1, 1, 1]
    """
    weights = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    # With the last clients - m at one row each, client m would have this many.
    smallest = (rows - np.arange(clients)[::-1]) * weights / np.cumsum(weights)
    large = int(np.flatnonzero(smallest >= 1)[-1]) + 1
    shares = (rows - clients + large) * weights[:large] / weights[:large].sum()
    sizes = np.floor(shares).astype(np.int64)
    left = rows - clients + large - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:left]] += 1
    return [*sizes.tolist(), *[1] * (clients - large)]


def _sized(sizes: list[int], seed: int) -> list[Ints]:
    from flwr_datasets.partitioner import SizePartitioner

    return _dealt(SizePartitioner(sizes), stream(seed, "partition").permutation(sum(sizes)), None)


def dirichlet(keys: Sequence[str], clients: int, alpha: float, seed: int) -> list[Ints]:
    """Each client's row numbers, int64 (rows of the client,), ascending: a row's key goes to clients by shares from
    Dirichlet(alpha), flwr-datasets' `DirichletPartitioner`.

    keys: of every row, at least as many as clients.  Drawn up to DIRICHLET_DRAWS times while a client is left empty; in
    the last draw those that still are get one row each, of the largest client.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    order = stream(seed, "partition").permutation(len(keys))
    parts: list[Ints] = []
    for draw in range(DIRICHLET_DRAWS):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="key",
            alpha=alpha,
            min_partition_size=0,  # its own retries warn each time and do not say which client stayed empty
            shuffle=False,
            seed=int(stream(seed, "partition", "dirichlet", draw).integers(2**63)),
        )
        parts = _dealt(partitioner, order, [keys[row] for row in order])
        if all(len(part) for part in parts):
            return parts
    if empty := sum(not len(part) for part in parts):
        which = f"{empty:,} of {clients:,} clients"
        log.warning("Dirichlet(%g) left %s without rows; each has a row of the largest client", alpha, which)
    return topped_up(parts)


def _dealt(partitioner: Any, order: Ints, keys: Sequence[str | int] | None) -> list[Ints]:
    """The row numbers `order` as flwr-datasets' partitioner deals them out."""
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict({"row": order, **({"key": keys} if keys else {})})
    parts = [partitioner.load_partition(client) for client in range(partitioner.num_partitions)]
    return [np.sort(np.asarray(part["row"][:], dtype=np.int64)) for part in parts]
