"""Batches: their rows, their order, and their tensors."""

import numpy as np
import pytest
import torch

from rayfed_sub.config.schema import Batching, Config
from rayfed_sub.core.rng import stream
from rayfed_sub.data.batching import POOL, ClientBatches, batch_rows, collate
from rayfed_sub.data.rows import Ints, Rows

PAD = 9
SPOKEN = Rows.of([[1, 2, 3, 4], [5, 6], [7, 8, 1]], prompts=[2, 1, 0])
CLASSED = Rows.of([[1, 2, 3], [4]], prompts=[3, 1], classes=[1, 0])


# --- rows


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 4), (5, 1)])
def test_every_epoch_is_a_permutation(rows: int, batch_size: int) -> None:
    mine = np.arange(100, 100 + rows)
    size = min(batch_size, rows)
    steps = rows * 4 // size  # at least 4 * rows - size rows, of which 3 whole epochs are compared
    run = np.concatenate([batch_rows(0, 5, mine, batch_size, step) for step in range(steps)])
    assert len(run) == steps * size
    for epoch in range(3):
        assert sorted(run[epoch * rows : (epoch + 1) * rows]) == mine.tolist()


def test_order_differs_by_epoch_client_and_seed() -> None:
    mine = np.arange(50)

    def whole(seed: int, client: int, step: int) -> list[int]:
        return [int(row) for row in batch_rows(seed, client, mine, 50, step)]

    orders = [whole(0, 0, 0), whole(0, 0, 1), whole(0, 1, 0), whole(1, 0, 0), mine.tolist()]
    assert len(set(map(tuple, orders))) == 5


def test_batch_depends_only_on_its_number() -> None:
    mine = np.arange(10)
    forward = [batch_rows(3, 1, mine, 4, step).tolist() for step in range(40)]
    backward = [batch_rows(3, 1, mine, 4, step).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert len(batch_rows(3, 1, mine, 4, 10**12)) == 4


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (5, 1)])
def test_shuffled_batches_are_slices_of_the_permutations(rows: int, batch_size: int) -> None:
    """The permutations of three epochs end to end, cut into equal slices."""
    mine = np.arange(100, 100 + rows)
    run = [row for epoch in range(3) for row in stream(0, "batches", 5, epoch).permutation(mine).tolist()]
    size = min(batch_size, rows)
    cut = [run[t * size : (t + 1) * size] for t in range(len(run) // size)]
    assert [batch_rows(0, 5, mine, batch_size, step).tolist() for step in range(len(cut))] == cut


def test_bucketed_batches_are_pinned() -> None:
    """As in commit 6313489: an epoch of a pool of 8 batches and one of 2, and batches across an epoch's end."""
    forty, ten = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 0] * 4), np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 0])
    assert [batch_rows(3, 2, np.arange(40), 4, step, forty).tolist() for step in (0, 1, 2, 9, 10)] == [
        [9, 19, 39, 11],
        [28, 38, 34, 14],
        [31, 1, 21, 5],
        [16, 6, 12, 22],
        [16, 26, 6, 36],
    ]
    assert [batch_rows(3, 2, np.arange(10), 3, step, ten).tolist() for step in range(7)] == [
        [9, 1, 5],
        [8, 4, 2],
        [3, 7, 0],
        [6, 1, 9],
        [4, 6, 2],
        [3, 7, 0],
        [8, 5, 6],
    ]


# --- rows by length


def epochs_of(
    rows: int, batch_size: int, client: int = 5, seed: int = 0, epochs: int = 4
) -> tuple[Ints, list[list[int]]]:
    """Lengths of `rows` rows, numbered from 100, and the client's batches."""
    lengths = stream(0, "lengths").integers(1, 500, 100 + rows)
    steps = rows * epochs // min(batch_size, rows)
    mine = np.arange(100, 100 + rows)
    return lengths, [batch_rows(seed, client, mine, batch_size, step, lengths).tolist() for step in range(steps)]


def pools(rows: int, size: int, epoch: int) -> list[range]:
    """Numbers of the batches that lie inside one epoch, by pool: batch t covers places t * size to (t + 1) * size of
    the run, and the epoch covers the places from epoch * rows to (epoch + 1) * rows."""
    whole = [t for t in range((epoch + 1) * rows) if epoch * rows <= t * size and (t + 1) * size <= (epoch + 1) * rows]
    return [range(whole[i], whole[min(i + POOL, len(whole)) - 1] + 1) for i in range(0, len(whole), POOL)]


SIZES = [(12, 4), (10, 4), (7, 3), (3, 8), (1, 4), (5, 1), (100, 4), (64, 4), (101, 8), (37, 36)]


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_every_bucketed_epoch_is_a_permutation(rows: int, batch_size: int) -> None:
    """Each place of the run is filled once, though places change within a pool."""
    _, batches = epochs_of(rows, batch_size)
    size = min(batch_size, rows)
    assert {len(batch) for batch in batches} == {size}
    for epoch in range(3):
        inside = [row for pool in pools(rows, size, epoch) for t in pool for row in batches[t]]
        border = []  # (place in the run, row) of batches that touch the next or the last epoch
        for t, batch in enumerate(batches):
            if t * size // rows != ((t + 1) * size - 1) // rows:
                border += [(t * size + i, row) for i, row in enumerate(batch)]
        inside += [row for place, row in border if place // rows == epoch]
        assert sorted(inside) == list(range(100, 100 + rows))


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_pool_is_cut_from_its_sorted_rows(rows: int, batch_size: int) -> None:
    lengths, batches = epochs_of(rows, batch_size)
    for epoch in range(3):
        for pool in pools(rows, min(batch_size, rows), epoch):
            by_rank = sorted((batches[t] for t in pool), key=lambda batch: [int(lengths[row]) for row in batch])
            in_order = [int(lengths[row]) for batch in by_rank for row in batch]
            assert in_order == sorted(in_order)


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_pools_hold_the_same_rows_as_unsorted(rows: int, batch_size: int) -> None:
    _, batches = epochs_of(rows, batch_size)
    size, mine = min(batch_size, rows), np.arange(100, 100 + rows)
    plain = [batch_rows(0, 5, mine, batch_size, step).tolist() for step in range(len(batches))]
    pooled = [pool for epoch in range(3) for pool in pools(rows, size, epoch)]
    for pool in pooled:
        assert sorted(row for t in pool for row in batches[t]) == sorted(row for t in pool for row in plain[t])
    inside = {t for pool in pooled for t in pool}
    borders = [t for t in range(3 * rows // size) if t not in inside]
    assert [batches[t] for t in borders] == [plain[t] for t in borders]
    assert bool(borders) == bool(rows % size)


def test_equal_lengths_keep_their_order() -> None:
    mine, lengths = np.arange(32), np.arange(32) % 2
    pool = [row for step in range(8) for row in batch_rows(0, 5, mine, 4, step).tolist()]
    batches = [batch_rows(0, 5, mine, 4, step, lengths).tolist() for step in range(8)]
    pool.sort(key=lambda row: row % 2)  # Python's sort is stable
    assert sorted(batches) == sorted(pool[i : i + 4] for i in range(0, 32, 4))


def ranks(rows: int, client: int, pool: int = 0, seed: int = 0) -> list[int]:
    """By step of a pool: the rank of its batch among the pool's batches by length, where all lengths differ."""
    lengths = np.arange(rows)
    steps = range(pool * POOL, min((pool + 1) * POOL, rows // 4))
    longest = [int(batch_rows(seed, client, np.arange(rows), 4, step, lengths).max()) for step in steps]
    return [sorted(longest).index(one) for one in longest]


def test_clients_get_short_and_long_batches_at_the_same_time() -> None:
    """Pools of 8 batches of 4 rows; 72 rows are two whole pools and one of 2 batches."""
    assert sorted(ranks(72, client=0)) == list(range(8))
    assert ranks(72, client=0) == ranks(72, client=1) == ranks(32, client=2)
    assert ranks(72, client=0, pool=1) == ranks(72, client=3, pool=1) != ranks(72, client=0)
    assert ranks(72, client=0, seed=1) != ranks(72, client=0)
    assert sorted(ranks(72, client=0, pool=2)) == [0, 1]
    # A client of 20 rows has 5 batches, ordered like the first 5 of those with 8.
    first = ranks(72, client=0)[:5]
    assert ranks(20, client=4) == [sorted(first).index(rank) for rank in first]


def test_bucketed_pack_has_less_padding() -> None:
    """4 clients of 64 rows with lengths 1 to 64, a batch of 4 rows each.  The longest of 16 rows at random is about
    16/17 of 64, so 46 % of a pack is padding: 1 - 32.5 / 60.  Sorted, a batch holds an eighth of a pool's lengths,
    about 8 of 64, and were all clients' eighths the same, the mean longest would be 36: 1 - 32.5 / 36 = 10 %."""
    lengths = np.arange(1, 65)

    def padding(known: Ints | None) -> float:
        packs = [[lengths[batch_rows(0, k, np.arange(64), 4, t, known)] for k in range(4)] for t in range(16)]
        return 1 - sum(np.sum(pack) for pack in packs) / sum(16 * np.max(pack) for pack in packs)

    assert padding(None) > 0.4
    assert padding(lengths) < 0.2


def test_bucketed_batch_depends_only_on_its_number() -> None:
    lengths, mine = np.arange(10)[::-1] * 3, np.arange(10)
    forward = [batch_rows(3, 1, mine, 4, step, lengths).tolist() for step in range(40)]
    backward = [batch_rows(3, 1, mine, 4, step, lengths).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert len(batch_rows(3, 1, mine, 4, 10**12, lengths)) == 4


# --- tensors


def test_labels_exclude_padding_and_prompt() -> None:
    batch = collate(SPOKEN, np.array([1, 0]), mask_prompt=True, pad=PAD)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, PAD, PAD], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_labels_include_an_unmasked_prompt() -> None:
    batch = collate(SPOKEN, np.array([1, 0]), mask_prompt=False, pad=PAD)
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [1, 2, 3, 4]]


def test_token_equal_to_pad_is_still_a_label() -> None:
    rows = Rows.of([[1, PAD], [1, 2, 3]], prompts=[1, 1])
    batch = collate(rows, np.array([0, 1]), mask_prompt=True, pad=PAD)
    assert batch["labels"].tolist() == [[-100, PAD, -100], [-100, 2, 3]]


def test_classes_come_with_attention() -> None:
    batch = collate(CLASSED, np.array([1, 0]), mask_prompt=True, pad=PAD)
    assert batch["input_ids"].tolist() == [[4, PAD, PAD], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def client_batches(cursor: int, steps: int) -> ClientBatches:
    rows = Rows.of([[i] for i in range(20)], prompts=[0] * 20)
    mine = np.arange(3, 13)
    return ClientBatches(rows, mine, 0, 2, 4, cursor, steps, mask_prompt=True, pad=PAD, batching="shuffled")


def test_client_batches_continue_in_the_next_round() -> None:
    whole = [batch["input_ids"].flatten().tolist() for batch in client_batches(0, 6)]
    first, rest = client_batches(0, 4), client_batches(4, 2)
    assert (len(first), len(rest)) == (4, 2)
    assert whole == [batch["input_ids"].flatten().tolist() for part in (first, rest) for batch in part]
    expected = batch_rows(0, 2, np.arange(3, 13), 4, step=5)
    assert rest[1]["input_ids"].flatten().tolist() == expected.tolist()  # row i holds token i


def by_length(client: int, batching: Batching) -> list[list[int]]:
    """The batches of one epoch over rows of 1 to 16 tokens, as the lengths of their rows."""
    rows = Rows.of([[i] * (i + 1) for i in range(16)], prompts=[0] * 16)
    batches = ClientBatches(rows, np.arange(16), 0, client, 4, 0, 4, mask_prompt=True, pad=PAD, batching=batching)
    return [(batch["labels"] != -100).sum(dim=1).tolist() for batch in batches]


def test_bucketed_client_batches_use_the_lengths_of_their_rows() -> None:
    """One pool of 4 batches: sorted rows, and the same order of lengths for every client."""
    assert sorted(map(sorted, by_length(2, "bucketed"))) == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12],
        [13, 14, 15, 16],
    ]
    longest = [batch.index(max(batch, key=max)) for batch in (by_length(k, "bucketed") for k in range(20))]
    assert len(set(longest)) == 1


def test_shuffled_client_batches_do_not() -> None:
    """Row i has i + 1 tokens, so lengths identify a batch's rows.  Of 20 clients, each has its longest row in a
    different step: that it is the same one of 4 for all has a chance of one in 4 ** 19."""
    expected = [[int(row) + 1 for row in batch_rows(0, 2, np.arange(16), 4, step)] for step in range(4)]
    assert by_length(2, "shuffled") == expected
    longest = [batch.index(max(batch, key=max)) for batch in (by_length(k, "shuffled") for k in range(20))]
    assert set(longest) == {0, 1, 2, 3}


def test_batches_are_shuffled_by_default() -> None:
    assert Config().federation.batching == "shuffled"
    assert Config.model_validate({"federation": {"batching": "bucketed"}}).federation.batching == "bucketed"


@pytest.mark.parametrize("index", [-1, 2])
def test_client_batches_end(index: int) -> None:
    with pytest.raises(IndexError):
        client_batches(4, 2)[index]
