"""The client of each row of a table where the partition says it row by row: by file, by lists of row numbers, or by
one of flwr-datasets' partitioners.

All refer to the source's own rows in the source's own order, before any row is dropped or reordered, so that a split
that somebody published is dealt out again as it was.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayfed_sub.config.schema import Partition
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.split_names import SPLITS
from rayfed_sub.data.tables import Table, whole_numbers

log = logging.getLogger(__name__)

_VERTICAL = ("VerticalEvenPartitioner", "VerticalSizePartitioner")  # these deal out columns
_ROW, _PREFIX = "row", "federation.partition"


def clients_of(
    table: Table, partition: Partition, clients: int, splits: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """Each row's client, "" for nobody's, and its split, which a list of row numbers may change.

    Raises UserError (federation.partition.file, .partitioner, .args).
    """
    if partition.kind == "files":
        return table.of_parts(lambda part: part.client), splits
    if partition.kind == "rows":
        return _by_numbers(str(partition.file), splits)
    return _by_partitioner(table, partition, clients, splits), splits


def _by_numbers(file: str, splits: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """The file holds a mapping of clients to lists of row numbers, or one list for each client; numbers count the
    training rows from 0.  In place of a list, {"train": [...], "test": [...]}: numbers of test rows count those of the
    official test split or, where there is none, training rows, which so become test rows.  Rows of a split that has
    lists are left out where no list has them."""
    rows_of = {split: np.flatnonzero([row_split == split for row_split in splits]) for split in SPLITS}
    own, keys, with_lists = list(splits), [""] * len(splits), {"train"}
    for client, numbers in _lists(file).items():
        for split, listed in (numbers if isinstance(numbers, dict) else {"train": numbers}).items():
            if split not in rows_of or not isinstance(listed, list):
                allowed = f"a list of row numbers for each client, or lists of train, validation and test; {client} has"
                raise _refused(file, f"{allowed} {split!r}")
            rows = rows_of[split] if len(rows_of[split]) else rows_of["train"]
            with_lists.add(split)
            for number in listed:
                if type(number) is not int or not 0 <= number < len(rows):
                    raise _refused(file, f"row numbers from 0 to {len(rows) - 1}; {client} has {number!r}")
                row = int(rows[number])
                if keys[row]:
                    raise _refused(file, f"each row once; {keys[row]} and {client} have {number}")
                keys[row], own[row] = client, split
    unlisted = [row for row, key in enumerate(keys) if not key and own[row] in with_lists]
    for row in unlisted:
        own[row] = ""
    if unlisted:
        log.warning("federation.partition.file: %s rows are in no client's list; left out", f"{len(unlisted):,}")
    return keys, own


def _lists(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(os.path.expanduser(file)).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _refused(file, f"a readable JSON file: {error}") from None
    if isinstance(content, list):
        content = {f"client {client}": numbers for client, numbers in enumerate(content)}
    if not isinstance(content, dict) or not content:
        raise _refused(file, "a list of row numbers for each client, in a list or by client")
    return content


def _refused(file: str, allowed: str) -> UserError:
    return UserError(f"{_PREFIX}.file", file, allowed, "correct the file")


def partitioned_by(partition: Partition) -> str | None:
    """The column that flwr-datasets' partitioner deals out by, where it has one."""
    column = partition.args.get("partition_by")
    return None if column is None else str(column)


def _by_partitioner(table: Table, partition: Partition, clients: int, splits: Sequence[str]) -> list[str]:
    import datasets

    rows = np.flatnonzero([split == "train" for split in splits])
    columns: dict[str, Any] = {_ROW: rows}
    if (column := partitioned_by(partition)) is not None:
        cells = whole_numbers(table, f"{_PREFIX}.args.partition_by", column)
        columns[column] = [cells[row] for row in rows.tolist()]
    partitioner = _partitioner(partition, clients)
    keys = [""] * len(splits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every draw that it refuses; the error says it
            partitioner.dataset = datasets.Dataset.from_dict(columns)
            for client in range(partitioner.num_partitions):
                for row in partitioner.load_partition(client)[_ROW]:
                    keys[row] = f"client {client}"
    except (ValueError, TypeError, KeyError, IndexError) as error:
        cause = str(error).partition("\n")[0][:200]
        if "max number of attempts" in cause:
            cause += (
                f" It wants min_partition_size={partition.args.get('min_partition_size', 10)} rows for every client, "
                f"which Dirichlet({partition.args.get('alpha')}) seldom gives {clients} clients of {len(rows):,} rows; "
                "set min_partition_size=1 in args, or federation.partition.kind=dirichlet"
            )
        allowed = f"arguments with which {partition.partitioner} deals out {len(rows):,} rows"
        raise UserError(f"{_PREFIX}.args", partition.args, allowed, cause) from None
    return keys


def _partitioner(partition: Partition, clients: int) -> Any:
    """flwr-datasets' partitioner of that name, with the number of clients where it takes one."""
    from flwr_datasets import partitioner as known

    names = [name for name in known.__all__ if name not in ("Partitioner", "IdToSizeFncPartitioner", *_VERTICAL)]
    name = partition.partitioner
    if name is None or name not in names:
        raise UserError(f"{_PREFIX}.partitioner", name, f"one of flwr-datasets': {', '.join(names)}", "name one")
    kind = getattr(known, name)
    args: Mapping[str, Any] = dict(partition.args)
    if "num_partitions" in inspect.signature(kind).parameters:
        if args.get("num_partitions", clients) != clients:
            allowed = f"federation.clients={clients} as num_partitions"
            raise UserError(f"{_PREFIX}.args", partition.args, allowed, "remove num_partitions")
        args = {**args, "num_partitions": clients}
    try:
        return kind(**args)
    except (TypeError, ValueError) as error:
        allowed = f"arguments of {name}: {', '.join(inspect.signature(kind).parameters)}"
        raise UserError(f"{_PREFIX}.args", partition.args, allowed, str(error).partition("\n")[0]) from None


def topped_up(parts: Sequence[Ints]) -> list[Ints]:
    """The parts with one row for each that is empty, the last of the largest part, the first of equals.

    >>> [part.tolist() for part in topped_up([np.arange(3), np.arange(0), np.arange(3, 5)])]
    [[0, 1], [2], [3, 4]]
    """
    filled = [np.asarray(part) for part in parts]
    for empty in [number for number, part in enumerate(filled) if not len(part)]:
        largest = max(range(len(filled)), key=lambda number: len(filled[number]))
        filled[empty], filled[largest] = filled[largest][-1:], filled[largest][:-1]
    return filled
