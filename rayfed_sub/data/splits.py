"""Training, validation and held-out rows: official splits, or shares that share no question; and whose data judged
rows are like.

Everything is an array of row numbers: no row is copied, and each draw has a stream of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.data.assignment import Assignment, row_dtype
from rayfed_sub.data.columns import Labels, numbers_of
from rayfed_sub.data.pairs import digests
from rayfed_sub.data.rows import Ints, RowNumbers

log = logging.getLogger(__name__)

Judged = Literal["held-out", "validation"]

Weights = tuple[Ints, Ints, Ints]
"""Group, client and weight, or what was made of it: arrays of equal length."""
_NONE: Weights = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
_AT_ONCE = 2**16  # entries that wait to be ranked

_DISTINGUISH = "or let task.prompt, and task.max_length or task.image_size, make rows differ"


@dataclass(frozen=True, eq=False)
class Splits:
    """Row numbers int64, each sorted.  repeated: rows that belong nowhere, because their question or their input
    stands in a drawn split that comes before theirs: held-out before validation before training.  shared: the number of
    rows of official validation and test splits whose question or input stands in another split, training first; they
    stay."""

    train: Ints
    validation: Ints
    held_out: Ints
    repeated: Ints
    shared: int = 0


def split_rows(
    asked: Sequence[Ints],
    keys: Sequence[str],
    task: Task,
    official: Sequence[str] = (),
) -> Splits:
    """The rows of each split.  official: each row's own, train, validation or test; a split that no row is in is drawn
    from train by task.seed, as are both without official splits.

    No row shares a question, but for case and spaces, or an input, with one of a split that is drawn: what stands in an
    official validation or test split is not drawn, and training gives way to what is.  Official splits stay as they
    are; rows that two of them share are counted.

    asked: int64 (rows,), numbers of the rows' questions, equal for equal ones alone, as `questions_asked` gives them,
    and of their inputs, what the model reads of them: two questions may have one input once they are cut to
    task.max_length, scaled to task.image_size, or tokenised; of chats also those of `beginnings`.  One warning gives
    the number of rows left out for this.

    Raises UserError (task.test_share, task.validation_share) where a split that is asked for would be empty.

    >>> task = Task(test_share=0.25, validation_share=0.25)
    >>> splits = split_rows([questions_asked(["a?", "b?", "c?", "d?"])], [""] * 4, task)
    >>> [len(part) for part in (splits.train, splits.validation, splits.held_out, splits.repeated)]
    [2, 1, 1, 0]
    """
    split = Labels.of(official) if len(official) else Labels.runs(["train"], [len(keys)])
    pool, held_out, validation = (np.flatnonzero(split.are(name)) for name in ("train", "test", "validation"))
    pool_keys = Labels.of(keys).take(pool)
    # Rows that ask what another official split asks stay in training, as they would without a share.
    fixed = np.flatnonzero(_shares(pool, np.concatenate([held_out, validation]), asked))
    drawn = np.empty(0, np.int64)
    if not len(held_out):
        drawn = drawn_rows(pool_keys, task.test_share, task.seed, taken=fixed)
        held_out = pool[drawn]
    kept_apart = pool[drawn]
    share = 0.0 if len(validation) else task.validation_share
    checked = validation
    if share:
        validation = pool[drawn_rows(pool_keys, share, task.seed, "validation", np.concatenate([drawn, fixed]))]
        checked = _apart(validation, kept_apart, asked)
        if not len(checked):
            allowed = f"a share that leaves questions which are not held out (of {len(validation):,} drawn, all are)"
            advice = f"raise it, lower task.test_share, {_DISTINGUISH}"
            raise UserError("task.validation_share", share, allowed, advice)
        kept_apart = np.concatenate([kept_apart, checked])
    train = _without(pool, pool[drawn], validation)
    kept = _apart(train, kept_apart, asked)
    if not len(kept):
        allowed = "a share that leaves questions to train on; every training row asks what is held out or validation"
        raise UserError("task.test_share", task.test_share, allowed, f"lower it, {_DISTINGUISH}")
    lost = {"training": len(train) - len(kept), "validation": len(validation) - len(checked)}
    if any(lost.values()):
        log.warning(
            "%s %s left out: the same question, but for case, spaces and what is cut, "
            "stands in a split that is kept apart",
            " and ".join(f"{count:,} {name}" for name, count in lost.items() if count),
            "row" if sum(lost.values()) == 1 else "rows",
        )
    repeated = _without(pool, kept, checked, held_out)
    return Splits(kept, checked, held_out, repeated, _shared(split, kept, checked, asked))


def _shared(split: Labels, train: Ints, validation: Ints, asked: Sequence[Ints]) -> int:
    """The rows of the official test split that ask what stands in training or validation, and those of the official
    validation split that ask what stands in training; said in a warning."""
    before = {"validation": train, "test": np.concatenate([train, validation])}
    counts = {}
    for name, others in before.items():
        rows = np.flatnonzero(split.are(name))
        counts[name] = (len(rows) - len(_apart(rows, others, asked)), len(rows))
    if any(count for count, _ in counts.values()):
        shown = " and ".join(f"{count:,} of {rows:,} {name} rows" for name, (count, rows) in counts.items() if count)
        log.warning("%s ask what stands in another official split too, but for case, spaces and what is cut", shown)
    return sum(count for count, _ in counts.values())


def drawn_rows(
    keys: Sequence[str], share: float, seed: int, purpose: Judged = "held-out", taken: Ints | None = None
) -> Ints:
    """The row numbers of a split, sorted: round(share * rows) of them, as far as there are so many to give, spread over
    the keys in proportion.

    Each key gives the whole part of its share of all its rows; what is missing then comes from the keys with the
    largest remainders.  No key gives its last row.  taken: rows that another split has, or asks too.
    Raises UserError (task.test_share or task.validation_share) where nothing would be drawn.

    >>> rows = drawn_rows(["a"] * 10 + ["b"] * 20, 0.2, seed=0)
    >>> len(rows), int((rows < 10).sum())
    (6, 2)
    """
    names, key_of = numbered(keys)
    sizes = np.bincount(key_of, minlength=len(names))
    free = np.ones(len(keys), bool)
    if taken is not None:
        free[taken] = False
    spare = np.bincount(key_of[free], minlength=len(names)) - 1
    quotas = share * sizes
    whole = np.floor(quotas).astype(np.int64)
    counts = np.clip(whole, 0, np.maximum(spare, 0))
    by_remainder = np.argsort(whole - quotas, kind="stable")
    while (missing := round(share * len(keys)) - int(counts.sum())) > 0:
        able = by_remainder[counts[by_remainder] < spare[by_remainder]]
        if not len(able):
            break
        counts[able[:missing]] += 1
    if not counts.sum():
        held_out = purpose == "held-out"
        field, what = f"task.{'test' if held_out else 'validation'}_share", "holds out" if held_out else "sets aside"
        rest = "each key keeps one for training, and what another split asks is not drawn"
        allowed = f"a share that {what} at least one of the {len(keys):,} rows ({rest})"
        raise UserError(field, share, allowed, f"raise {field} or use more rows")
    drawn = [
        stream(seed, purpose, name).permutation(rows)[:count]
        for name, rows, count in zip(names, _by_number(key_of, len(names), free), counts, strict=True)
        if count
    ]
    return np.sort(np.concatenate(drawn))


def judged_clients(
    judged_keys: NDArray[np.int32],
    train_keys: NDArray[np.int32],
    key_names: Sequence[str],
    dealt: Assignment,
    seed: int,
) -> Ints:
    """For each judged row the client whose data it resembles, int64 (judged rows,).

    The rows of each key are dealt out in proportion to the clients' shares of that key's training rows, by largest
    remainders, equals to the lower client; in which order is the seed's.  A key without training rows counts as all
    keys together.  judged_keys, train_keys: numbers into key_names; dealt: the clients' training rows.

    >>> keys = np.array([0, 0, 0, 0, 1, 1], np.int32)
    >>> dealt = Assignment.of([np.array([0, 1, 2]), np.array([3, 4, 5])])
    >>> judged_clients(np.array([1, 1, 0], np.int32), keys, ("x", "y"), dealt, seed=0).tolist()
    [1, 1, 0]
    """
    rows_K = np.bincount(judged_keys, minlength=len(key_names))
    held_K = np.zeros(len(key_names), np.int64)
    for block in dealt.blocks():
        held_K += np.bincount(train_keys[block.rows], minlength=len(key_names))
    own = apportioned(np.where(held_K > 0, rows_K, 0), held_K, _holdings(dealt, train_keys, len(key_names)))
    # Keys without training rows and with equally many judged ones are dealt out alike.
    bare, alike_K = np.unique(np.where(held_K > 0, 0, rows_K), return_inverse=True)
    every = apportioned(bare, np.full(len(bare), len(dealt.rows)), _sizes(dealt, np.flatnonzero(bare)))
    owners = np.empty(len(judged_keys), np.int64)
    for key, rows in enumerate(_by_number(judged_keys, len(key_names))):
        if not len(rows):
            continue
        clients = own[key] if held_K[key] else every[alike_K[key]]
        owners[stream(seed, "judged rows", key_names[key]).permutation(rows)] = clients
    return owners


def _holdings(dealt: Assignment, train_keys: NDArray[np.int32], keys: int) -> Iterator[Weights]:
    """Rows of each key that each client has, where it has any."""
    for block in dealt.blocks():
        # Pairs of client and key as one number each: a table of all of them would be large with many keys.
        clients = len(block.sizes)
        firsts = np.arange(0, clients * keys, keys, dtype=row_dtype(clients * keys))
        pairs: RowNumbers = np.repeat(firsts, block.sizes)
        pairs += train_keys[block.rows]
        pairs.sort()
        begins = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
        held: Ints = pairs[begins].astype(np.int64)
        clients_P = held // keys
        yield held - clients_P * keys, block.first + clients_P, np.diff(begins, append=len(pairs))


def _sizes(dealt: Assignment, groups: Ints) -> Iterator[Weights]:
    """All rows of each client, for each of the groups."""
    for block in dealt.blocks() if len(groups) else ():
        clients = np.arange(block.first, block.first + len(block.sizes))
        for group in groups:
            yield np.full(len(clients), group), clients, block.sizes


def apportioned(rows_G: Ints, total_G: Ints, weights: Iterable[Weights]) -> list[Ints]:
    """Each group's rows dealt out in proportion to whole weights, exactly: largest remainders, equals to the lower
    client.  For each group the clients of its rows, ascending.

    weights: group, client and weight, some at a time; of each group the clients ascend.  total_G: the sums of the
    groups' weights.  Memory: in proportion to the rows that are dealt out, whatever the number of clients.

    >>> weights = [(np.array([0, 0, 0]), np.array([4, 5, 7]), np.array([2, 1, 1]))]
    >>> [part.tolist() for part in apportioned(np.array([5]), np.array([4]), weights)]  # 2.5, 1.25 and 1.25
    [[4, 4, 4, 5, 7]]
    """
    # No group needs more remainders than it has rows; below the last of so many, none of a later client counts.
    beaten_G = np.where(rows_G > 0, np.int64(-1), np.iinfo(np.int64).max)
    best, found, waiting = _NONE, [_NONE], 0
    wholes = [_NONE]
    for groups, clients, weight in weights:
        product = rows_G[groups] * weight
        kept = np.flatnonzero(product > beaten_G[groups])
        own = groups[kept]
        shares, remainders = np.divmod(product[kept], total_G[own])
        whole = shares > 0
        wholes.append((own[whole], clients[kept][whole], shares[whole]))
        found.append((own, clients[kept], remainders))
        waiting += len(kept)
        if waiting > max(_AT_ONCE, len(best[0])):
            best, found, waiting = _largest([best, *found], rows_G), [], 0
            last = np.flatnonzero(_ranks(best[0]) == rows_G[best[0]] - 1)
            beaten_G[best[0][last]] = best[2][last]
    groups, clients, shares = _joined(wholes)
    missing_G = rows_G.copy()
    np.subtract.at(missing_G, groups, shares)
    more_groups, more_clients, _ = _largest([best, *found], missing_G)
    groups_R = np.concatenate([np.repeat(groups, shares), more_groups])
    clients_R = np.concatenate([np.repeat(clients, shares), more_clients])
    return np.split(clients_R[np.lexsort((clients_R, groups_R))], np.cumsum(rows_G)[:-1])


def _largest(parts: Sequence[Weights], most_G: Ints) -> Weights:
    """Of each group the largest remainders, as many as it may have, the first of equals the lower client."""
    groups, clients, remainders = _joined(parts)
    order = np.lexsort((clients, -remainders, groups))
    groups, clients, remainders = groups[order], clients[order], remainders[order]
    kept = _ranks(groups) < most_G[groups]
    return groups[kept], clients[kept], remainders[kept]


def _ranks(groups: Ints) -> Ints:
    """The place of each entry among those of its group, which lie side by side."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _joined(parts: Sequence[Weights]) -> Weights:
    groups, clients, figures = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return groups, clients, figures


def numbered(keys: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The different keys, sorted, and for each row the number of its key.

    >>> names, numbers = numbered(["b", "a", "b"])
    >>> names, numbers.tolist()
    (('a', 'b'), [1, 0, 1])
    """
    labels = Labels.of(keys).compact()
    return labels.names, labels.numbers


def _by_number(numbers: NDArray[np.int32], count: int, among: NDArray[np.bool_] | None = None) -> list[Ints]:
    """The row numbers, ascending, at which each of 0 .. count - 1 stands, among all rows or those marked."""
    rows = np.argsort(numbers, kind="stable")
    rows = rows if among is None else rows[among[rows]]
    return np.split(rows, np.searchsorted(numbers[rows], np.arange(1, count)))


def _apart(rows: Ints, others: Ints, asked: Sequence[Ints]) -> Ints:
    """The rows that share none of the numbers in `asked` with any of `others`."""
    own: Ints = rows[~_shares(rows, others, asked)]
    return own


def _shares(rows: Ints, others: Ints, asked: Sequence[Ints]) -> NDArray[np.bool_]:
    """Which of the rows share a number in `asked` with one of `others`, (rows,)."""
    shared = np.zeros(len(rows), bool)
    for numbers in asked if len(others) else ():
        met = np.zeros(int(numbers.max()) + 1, bool)
        met[numbers[others]] = True
        shared |= met[numbers[rows]]
    return shared


def _without(rows: Ints, *others: Ints) -> Ints:
    """Those of the sorted rows that are in none of the others."""
    left = np.zeros(int(rows.max(initial=-1)) + 1, bool)
    left[rows] = True
    for other in others:
        left[other[other < len(left)]] = False
    return np.flatnonzero(left)


def questions_asked(questions: Iterable[str]) -> Ints:
    """A number for each question, int64, equal for those alone that are equal but for case and spaces.

    >>> questions_asked(["Why  so?", "why so?", "so?"]).tolist() in ([0, 0, 1], [1, 1, 0])
    True
    """
    return numbers_of(digests(" ".join(question.casefold().split()) for question in questions))
