"""Rows and names of very many clients: as arrays they are what lists of them were."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest

from rayfed_sub.config.schema import Federation, Partition
from rayfed_sub.core.rng import stream
from rayfed_sub.data import assignment, splits
from rayfed_sub.data.assignment import Assignment, NumberedClients, coded_names
from rayfed_sub.data.fingerprint import fingerprint
from rayfed_sub.data.partitions import partitioned
from rayfed_sub.data.rows import Ints
from rayfed_sub.data.splits import Splits, judged_clients


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over all clients take several blocks, and ranked remainders several rounds."""
    monkeypatch.setattr(assignment, "_AT_ONCE", 7)
    monkeypatch.setattr(splits, "_AT_ONCE", 5)


def some_parts(seed: int, clients: int, rows: int, most: int) -> list[Ints]:
    """1 to `most` of the rows for each client, sorted."""
    draw = stream(seed, "parts")
    return [np.sort(draw.permutation(rows)[: draw.integers(1, most, endpoint=True)]) for _ in range(clients)]


# --- rows


def test_clients_are_views_of_one_array() -> None:
    dealt = Assignment.of([np.array([0, 2]), np.array([5]), np.array([1, 3, 4])])
    assert dealt.rows.tolist() == [0, 2, 5, 1, 3, 4]
    assert dealt.offsets.tolist() == [0, 2, 3, 6]
    assert [part.tolist() for part in dealt] == [[0, 2], [5], [1, 3, 4]]
    assert dealt[-1].base is dealt.rows
    assert (dealt.rows.dtype, dealt.offsets.dtype) == (np.int32, np.int64)
    with pytest.raises(IndexError):
        dealt[3]


def test_large_row_numbers_take_eight_bytes() -> None:
    assert Assignment.of([np.array([2**31 - 1])]).rows.dtype == np.int32
    assert Assignment.of([np.array([2**31])])[0].tolist() == [2**31]


@pytest.mark.usefixtures("few_at_once")
def test_blocks_have_every_client_once() -> None:
    parts = some_parts(0, 40, 30, 9)  # some with more rows than a block
    blocks = list(Assignment.of(parts).blocks())
    assert len(blocks) > 20
    assert [block.first for block in blocks] == np.cumsum([0, *(len(block.sizes) for block in blocks[:-1])]).tolist()
    assert np.concatenate([block.sizes for block in blocks]).tolist() == [len(part) for part in parts]
    assert np.concatenate([block.rows for block in blocks]).tolist() == np.concatenate(parts).tolist()
    assert all(len(block.rows) <= 7 or len(block.sizes) == 1 for block in blocks)


@pytest.mark.parametrize(("rows", "clients", "each"), [(5, 3, 5), (9, 400, 4), (70_000, 50, 30), (12, 30_000, 11)])
def test_resampled_rows_are_floyd_s_of_all_clients_at_once(rows: int, clients: int, each: int) -> None:
    last_k = np.arange(rows - each, rows)
    drawn_kc = stream(3, "partition").integers(0, last_k[:, None], (each, clients), endpoint=True)
    for t in range(each):
        drawn_kc[t][(drawn_kc[:t] == drawn_kc[t]).any(axis=0)] = last_k[t]
    partition = Partition(kind="resample", rows_per_client=each)
    federation = Federation(clients=clients, partition=partition, rounds=1)
    dealt = partitioned(["a"] * rows, NumberedClients(clients), federation, 3)
    assert np.array_equal(dealt.rows.reshape(clients, each), np.sort(drawn_kc.T, axis=1))
    assert np.array_equal(dealt.offsets, np.arange(clients + 1) * each)


# --- names


def test_numbered_clients_are_the_names_that_they_stand_for() -> None:
    names = NumberedClients(12)
    assert list(names) == [f"client {number}" for number in range(12)]
    assert (names[11], names[-1], list(names[9:])) == ("client 11", "client 11", ["client 9", "client 10", "client 11"])
    assert names != NumberedClients(11)
    assert names != tuple(names)[::-1]
    with pytest.raises(IndexError):
        names[12]


@pytest.mark.parametrize("clients", [1, 10, 1001, 100_000, 100_001, 1_000_123])
def test_names_are_coded_as_one_by_one(clients: int) -> None:
    naive = hashlib.sha256()
    for number in range(clients):
        name = f"client {number}".encode()
        naive.update(len(name).to_bytes(8, "little") + name)
    coded = hashlib.sha256()
    for part in coded_names(NumberedClients(clients)):
        coded.update(part)
    assert coded.hexdigest() == naive.hexdigest()


# --- fingerprint


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("names", [NumberedClients(30), tuple(f"ø{number}" for number in range(30))])
def test_owners_are_the_digest_of_names_and_int64_rows_with_their_lengths(names: Sequence[str]) -> None:
    parts, judged = some_parts(1, 30, 25, 8), np.array([2, 0, 1])
    digest = hashlib.sha256()
    contents = [name.encode() for name in names] + [np.asarray(part, "<i8").tobytes() for part in parts]
    for content in (*contents, judged.astype("<i8").tobytes()):
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    nothing = np.empty(0, np.int64)
    found = fingerprint("", np.empty((0, 16), np.uint8), Splits(*[nothing] * 4), names, Assignment.of(parts), judged)
    assert found.owners == digest.hexdigest()


# --- whose data judged rows are like


def naive_judged(judged: Ints, train: Ints, names: Sequence[str], parts: Sequence[Ints], seed: int) -> Ints:
    """Key by key, with the weights of all clients."""
    owners = np.empty(len(judged), np.int64)
    for key, name in enumerate(names):
        weights = np.array([(train[part] == key).sum() for part in parts])
        if not weights.any():
            weights = np.array([len(part) for part in parts])
        rows = np.flatnonzero(judged == key)
        if len(rows):
            shares, remainders = np.divmod(len(rows) * weights, weights.sum())
            shares[np.argsort(-remainders, kind="stable")[: len(rows) - shares.sum()]] += 1
            dealt = np.repeat(np.arange(len(parts)), shares)
            owners[stream(seed, "judged rows", name).permutation(rows)] = dealt
    return owners


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("case", range(40))
def test_judged_rows_go_to_the_clients_that_all_weights_at_once_give(case: int) -> None:
    """Few and many rows, clients and keys, with keys that no client has."""
    draw = stream(case, "case")
    clients, rows, keys, judged = (int(draw.integers(1, most)) for most in (60, 40, 9, 80))
    parts = some_parts(case, clients, rows, min(rows, 12))
    of_train = draw.integers(0, max(1, keys - 2), rows).astype(np.int32)
    of_judged = draw.integers(0, keys, judged).astype(np.int32)
    names = tuple(f"key {key}" for key in range(keys))
    found = judged_clients(of_judged, of_train, names, Assignment.of(parts), case)
    assert found.tolist() == naive_judged(of_judged, of_train, names, parts, case).tolist()
