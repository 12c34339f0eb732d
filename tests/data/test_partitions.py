"""Partitions: the rows of each client."""

from collections import Counter

import numpy as np
import pytest

from rayfed_sub.config.schema import Federation, Partition, Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.data.partitions import key_column, largest_keys, partitioned, power_law_sizes

NAMES = tuple(f"client {client}" for client in range(100))


def federation(kind: str, clients: int, **more: object) -> Federation:
    return Federation(clients=clients, partition=Partition.model_validate({"kind": kind, **more}))


def parts_of(kind: str, clients: int, keys: list[str], seed: int = 0, **more: object) -> list[list[int]]:
    shares = federation(kind, clients, **more)
    return [part.tolist() for part in partitioned(keys, NAMES[:clients], shares, seed)]


# --- clients


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "power-law"])
def test_every_row_has_one_client(kind: str) -> None:
    keys = ["a", "b", "c"] * 40
    parts = parts_of(kind, 5, keys)
    assert sorted(row for part in parts for row in part) == list(range(120))
    assert all(part == sorted(part) for part in parts)
    assert parts == parts_of(kind, 5, keys, seed=0) != parts_of(kind, 5, keys, seed=1)


def test_iid_shares_are_mixed_and_differ_by_at_most_one_row() -> None:
    keys = ["a"] * 50 + ["b"] * 52
    parts = parts_of("iid", 4, keys)
    assert sorted(map(len, parts)) == [25, 25, 26, 26]
    assert all({keys[row] for row in part} == {"a", "b"} for part in parts)


def test_small_alpha_concentrates_keys_and_large_alpha_spreads_them() -> None:
    keys = [str(i % 4) for i in range(400)]

    def largest_share(alpha: float) -> float:
        parts = parts_of("dirichlet", 4, keys, alpha=alpha)
        tops = [max(np.bincount([int(keys[row]) for row in part])) / len(part) for part in parts]
        return float(np.mean(tops))

    # Equal shares would give 0.25; Dirichlet(1000) is within a few per cent of that.
    assert largest_share(1000) < 0.3
    assert largest_share(0.1) > 0.6


def test_dirichlet_draws_again_before_it_fails() -> None:
    # With three clients and 12 rows a single draw often leaves a client empty.
    for seed in range(20):
        assert all(parts_of("dirichlet", 3, ["a", "b"] * 6, seed=seed))


@pytest.mark.parametrize("kind", ["iid", "shards", "power-law"])
@pytest.mark.parametrize("rows", [7, 10, 13])
def test_indivisible_numbers_leave_no_row_over(kind: str, rows: int) -> None:
    parts = parts_of(kind, 3, [str(i % 2) for i in range(rows)])
    assert sorted(row for part in parts for row in part) == list(range(rows))


@pytest.mark.parametrize(("kind", "more"), [("iid", {}), ("shards", {"shards_per_client": 1}), ("power-law", {})])
def test_clients_of_one_row(kind: str, more: dict[str, object]) -> None:
    assert sorted(parts_of(kind, 4, ["a", "b", "a", "c"], **more)) == [[0], [1], [2], [3]]


def test_shards_are_runs_of_the_sorted_rows() -> None:
    """24 rows, 8 of each of 3 keys, for 4 clients with 2 shards of 3 rows: sorted, aaa aaa aab bbb bbb bcc ccc ccc.
    For any seed, the clients' keys are those of such pairs of shards."""
    keys, shards = ["c", "a", "b"] * 8, ("aaa", "aaa", "aab", "bbb", "bbb", "bcc", "ccc", "ccc")
    ways = {tuple(sorted("".join(pair) for pair in deal)) for deal in _deals(shards)}
    seen = set()
    for seed in range(5):
        parts = parts_of("shards", 4, keys, seed=seed, shards_per_client=2)
        assert tuple(sorted("".join(sorted(keys[row] for row in part)) for part in parts)) in ways
        seen.add(tuple(map(tuple, parts)))
    assert len(seen) == 5


def _deals(shards: tuple[str, ...]) -> list[list[tuple[str, str]]]:
    """Every way to pair up the (sorted) shards."""
    if not shards:
        return [[]]
    first, rest = shards[0], shards[1:]
    return [[(first, rest[i]), *deal] for i in range(len(rest)) for deal in _deals(rest[:i] + rest[i + 1 :])]


def test_shards_that_divide_the_rows_match_flwr_datasets() -> None:
    """flwr_datasets' partitioner over sorted rows, with the seed that ours takes from the stream."""
    from datasets import Dataset
    from flwr_datasets.partitioner import ShardPartitioner

    keys = [str(i // 10) for i in range(60)]
    seed = int(stream(3, "partition", "shards").integers(2**63))
    theirs = ShardPartitioner(5, partition_by="key", num_shards_per_partition=3, shuffle=False, seed=seed)
    order = stream(3, "partition").permutation(60)
    order = np.asarray(sorted(order.tolist(), key=lambda row: keys[row]))  # Python's sort is stable
    theirs.dataset = Dataset.from_dict({"row": order, "key": [keys[row] for row in order]})
    expected = [sorted(theirs.load_partition(client)["row"][:]) for client in range(5)]
    assert parts_of("shards", 5, keys, seed=3, shards_per_client=3) == expected


@pytest.mark.parametrize(
    ("rows", "clients", "exponent", "sizes"),
    [
        (12, 3, 0.0, [4, 4, 4]),
        (11, 3, 0.0, [4, 4, 3]),  # equal remainders: the first ones
        (1100, 3, 1.0, [600, 300, 200]),  # 6/11, 3/11, 2/11
        (490, 3, 2.0, [360, 90, 40]),  # 36/49, 9/49, 4/49
        (6, 5, 3.0, [2, 1, 1, 1, 1]),
        (5, 5, 3.0, [1, 1, 1, 1, 1]),
        (9, 1, 1.0, [9]),
        (9, 3, 2000.0, [7, 1, 1]),  # 2 ** -2000 is 0 in float64
    ],
)
def test_power_law_sizes(rows: int, clients: int, exponent: float, sizes: list[int]) -> None:
    assert power_law_sizes(rows, clients, exponent) == sizes


def test_power_law_clients_have_the_computed_sizes_and_mixed_rows() -> None:
    keys = ["a"] * 550 + ["b"] * 550
    parts = parts_of("power-law", 3, keys, exponent=1.0)
    assert [len(part) for part in parts] == [600, 300, 200]
    # Of 200 rows at random 100 are "a", standard deviation sqrt(200 / 4 * 900 / 1099) = 6.4.
    assert abs(sum(keys[row] == "a" for row in parts[2]) - 100) < 5 * 6.4


def test_column_clients_have_their_value() -> None:
    """z has no client."""
    parts = partitioned(["y", "x", "z", "y", "x", "x"], ("x", "y"), federation("column", 2), seed=0)
    assert [part.tolist() for part in parts] == [[1, 4, 5], [0, 3]]


def test_pool_has_all_rows() -> None:
    assert parts_of("pool", 1, ["a", "b", "c"]) == [[0, 1, 2]]


def test_largest_keys_come_first_and_ties_by_name() -> None:
    assert largest_keys(["c", "b", "a", "c", "a", "b", "d", "e", "e", "e"], 3) == ("e", "a", "b")


def test_resampled_clients_draw_different_rows_by_seed() -> None:
    """More clients than rows; the chance that two of 100 draw the same 16 of 80 rows is 4,950 in 2.7e16."""
    parts = parts_of("resample", 100, ["a"] * 80, rows_per_client=16)
    assert all(len(part) == 16 and part == sorted(set(part)) and set(part) <= set(range(80)) for part in parts)
    assert len(set(map(tuple, parts))) == 100
    assert parts == parts_of("resample", 100, ["a"] * 80, seed=0, rows_per_client=16)
    assert parts != parts_of("resample", 100, ["a"] * 80, seed=1, rows_per_client=16)
    assert parts_of("resample", 2, ["a"] * 3, rows_per_client=3) == [[0, 1, 2]] * 2


def resampled(rows: int, clients: int, each: int) -> list[tuple[int, ...]]:
    shares = federation("resample", clients, rows_per_client=each)
    return [tuple(part.tolist()) for part in partitioned(["a"] * rows, [""] * clients, shares, seed=0)]


def test_every_subset_is_drawn_equally_often() -> None:
    """The 6 pairs of 4 rows among 6,000 clients: 1,000 each, standard deviation sqrt(6000 * 1/6 * 5/6) = 29."""
    counts = Counter(resampled(4, 6000, 2))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * 29 for count in counts.values())


def test_every_row_is_held_equally_often() -> None:
    """5,000 clients with 8 of 40 rows: 1,000 holders a row, standard deviation sqrt(5000 * 1/5 * 4/5) = 28."""
    counts = np.bincount([row for part in resampled(40, 5000, 8) for row in part], minlength=40)
    assert abs(counts - 1000).max() < 5 * 28


# --- errors


def test_more_rows_per_client_than_rows() -> None:
    with pytest.raises(UserError, match="got 3; allowed: 1 to 2, the number of training rows") as caught:
        parts_of("resample", 1, ["a", "a"], rows_per_client=3)
    assert caught.value.field == "federation.partition.rows_per_client"


@pytest.mark.parametrize("kind", ["iid", "shards", "power-law", "dirichlet"])
def test_more_clients_than_rows(kind: str) -> None:
    with pytest.raises(UserError, match="got 3; allowed: 1 to 2,") as caught:
        parts_of(kind, 3, ["a", "a"])
    assert caught.value.field == "federation.clients"


def test_more_shards_than_rows() -> None:
    with pytest.raises(UserError, match="got 4; allowed: 1 to 3: 10 training rows for 3 clients") as caught:
        parts_of("shards", 3, ["a"] * 10, shards_per_client=4)
    assert caught.value.field == "federation.partition.shards_per_client"


def test_more_clients_than_values() -> None:
    with pytest.raises(UserError, match="allowed: 1 to 2,") as caught:
        largest_keys(["a", "b", "a"], 3)
    assert caught.value.field == "federation.clients"


def test_clients_that_dirichlet_leaves_empty_get_a_row(caplog: pytest.LogCaptureFixture) -> None:
    # One key and alpha 1e-4: one client gets everything, in each of the draws.
    parts = parts_of("dirichlet", 4, ["a"] * 8, alpha=1e-4)
    assert sorted(map(len, parts)) == [1, 1, 1, 5]
    assert sorted(row for part in parts for row in part) == list(range(8))
    assert [record.getMessage() for record in caplog.records] == [
        "Dirichlet(0.0001) left 3 of 4 clients without rows; each has a row of the largest client"
    ]


def test_every_seed_deals_out_500_rows_of_two_classes_at_alpha_0_1() -> None:
    """flwr-datasets wants ten rows for every client, and refuses nearly every seed."""
    keys = ["a", "b"] * 250
    for seed in range(4):
        parts = parts_of("dirichlet", 10, keys, seed, alpha=0.1)
        assert sorted(row for part in parts for row in part) == list(range(500))
        assert all(parts)


def test_column_client_without_rows_is_named() -> None:
    with pytest.raises(UserError, match="y has none") as caught:
        partitioned(["x", "x"], ("x", "y"), federation("column", 2), seed=0)
    assert caught.value.field == "federation.clients"


# --- the column


TABLE = Task(name="table", path="rows.csv", prompt="{q}", answer="a")


@pytest.mark.parametrize(
    ("task", "shares", "column"),
    [
        (Task(), federation("column", 8), "module"),
        (Task(), federation("iid", 8), "module"),
        (TABLE, federation("column", 8, column="by"), "by"),
        (TABLE, federation("iid", 8), None),
        (TABLE, federation("power-law", 8), None),
        (TABLE.model_copy(update={"label": "mood"}), federation("shards", 8), "mood"),
        (TABLE, federation("resample", 8, rows_per_client=2), None),
        (TABLE.model_copy(update={"label": "mood"}), federation("resample", 8, rows_per_client=2), "mood"),
        (TABLE.model_copy(update={"label": "mood"}), federation("dirichlet", 8), "mood"),
        (TABLE.model_copy(update={"label": "mood"}), federation("dirichlet", 8, column="by"), "by"),
    ],
)
def test_key_column(task: Task, shares: Federation, column: str | None) -> None:
    assert key_column(task, shares) == column


@pytest.mark.parametrize(
    ("task", "shares"),
    [
        (TABLE, federation("column", 8)),
        (TABLE, federation("dirichlet", 8)),
        (TABLE, federation("shards", 8)),
        (Task(), federation("column", 8, column="package")),
    ],
)
def test_missing_or_unknown_column(task: Task, shares: Federation) -> None:
    with pytest.raises(UserError) as caught:
        key_column(task, shares)
    assert caught.value.field == "federation.partition.column"
