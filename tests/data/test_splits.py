"""Training, validation and held-out rows: shares, seeds, disjoint questions, and the client of an evaluation row."""

import logging
from collections import Counter

import numpy as np
import pytest

from rayfed_sub.config.schema import Task
from rayfed_sub.core.errors import UserError
from rayfed_sub.data.assignment import Assignment
from rayfed_sub.data.splits import Splits, drawn_rows, judged_clients, questions_asked, split_rows

# --- held-out rows


def test_held_out_rows_come_from_every_key_in_proportion() -> None:
    keys = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    held_out = drawn_rows(keys, 0.1, seed=0)
    assert [sum(keys[row] == key for row in held_out) for key in "abc"] == [5, 3, 2]
    assert held_out.tolist() == sorted(set(held_out.tolist()))


def test_remaining_rows_go_to_the_largest_remainders() -> None:
    keys = ["a"] * 14 + ["b"] * 18 + ["c"] * 11
    # Shares 1.4, 1.8 and 1.1 of round(4.3) = 4 rows: one each, and the fourth from "b".
    assert [sum(keys[row] == key for row in drawn_rows(keys, 0.1, 0)) for key in "abc"] == [1, 2, 1]


def test_every_key_keeps_a_training_row() -> None:
    keys = ["a", "b", "c", "c"]
    # Shares 0.9, 0.9 and 1.8 of round(3.6) = 4 rows, but only "c" has a row to spare.
    assert [keys[row] for row in drawn_rows(keys, 0.9, seed=0)] == ["c"]


def test_held_out_rows_follow_the_seed() -> None:
    keys = ["a"] * 100
    assert drawn_rows(keys, 0.1, 0).tolist() == drawn_rows(keys, 0.1, 0).tolist()
    assert drawn_rows(keys, 0.1, 0).tolist() != drawn_rows(keys, 0.1, 1).tolist()


@pytest.mark.parametrize(("keys", "share"), [(["a"] * 4, 0.1), (["a", "b", "c"], 0.5)])
def test_empty_held_out_set_is_refused(keys: list[str], share: float) -> None:
    with pytest.raises(UserError) as caught:
        drawn_rows(keys, share, seed=0)
    assert caught.value.field == "task.test_share"


def test_validation_rows_are_a_share_of_all_rows() -> None:
    keys = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    held_out = drawn_rows(keys, 0.1, seed=0)
    validation = drawn_rows(keys, 0.2, 0, "validation", held_out)
    # 0.2 of 50, 30 and 20 rows, not of the 45, 27 and 18 that are left.
    assert [sum(keys[row] == key for row in validation) for key in "abc"] == [10, 6, 4]
    assert not set(validation.tolist()) & set(held_out.tolist())


def test_validation_leaves_each_key_a_training_row() -> None:
    keys = ["a"] * 4 + ["b"] * 10
    held_out = drawn_rows(keys, 0.5, seed=0)  # 2 and 5
    validation = drawn_rows(keys, 0.49, 0, "validation", held_out)
    # Shares 1.96 and 4.9 of round(6.86) = 7 rows; "a" has 2 rows left and gives 1, "b" has 5 and gives 4.
    assert [sum(keys[row] == key for row in validation) for key in "ab"] == [1, 4]


def test_empty_validation_set_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"got 0\.1; allowed: a share that sets aside at least one of the 4 rows"
    ) as caught:
        drawn_rows(["a"] * 4, 0.1, 0, "validation")
    assert caught.value.field == "task.validation_share"


def test_large_federation_is_split_fast() -> None:
    """50,000 rows of 10,000 keys: some tenths of a second, where a pass over all rows for each key takes many
    seconds."""
    held_out = drawn_rows([str(i % 10_000) for i in range(50_000)], 0.2, seed=0)
    assert np.array_equal(np.bincount(held_out % 10_000), np.ones(10_000))


# --- no question in two splits

KEYS = [str(i % 3) for i in range(300)]
TASK = Task(test_share=0.1, validation_share=0.1)


def spelt(number: int, row: int) -> str:
    """Question `number` in one of the equivalent spellings."""
    return (f"What is {number}?", f" what  IS\t{number}?", f"WHAT\nis {number}? ")[row % 3]


def split(questions: list[str], keys: list[str], task: Task) -> Splits:
    """The splits of questions whose tokens are the questions themselves."""
    return split_rows([questions_asked(questions)], keys, task)


def every(splits: Splits) -> list[int]:
    return [int(row) for part in (splits.train, splits.validation, splits.held_out, splits.repeated) for row in part]


def test_distinct_questions_are_split_without_loss(caplog: pytest.LogCaptureFixture) -> None:
    splits = split([f"q{i}" for i in range(300)], KEYS, TASK)
    assert [len(splits.train), len(splits.validation), len(splits.held_out), len(splits.repeated)] == [240, 30, 30, 0]
    assert sorted(every(splits)) == list(range(300))
    assert caplog.records == []


def test_splits_follow_the_seed() -> None:
    def content(seed: int, task: Task = TASK) -> list[list[int]]:
        splits = split([f"q{i}" for i in range(300)], KEYS, task.model_copy(update={"seed": seed}))
        return [splits.train.tolist(), splits.validation.tolist(), splits.held_out.tolist()]

    assert content(0) == content(0)
    assert all(one != other for one, other in zip(content(0), content(1), strict=True))
    # Setting rows aside for validation does not move the held-out ones.
    assert content(0)[2] == content(0, Task(test_share=0.1))[2]


@pytest.mark.parametrize("seed", range(3))
def test_no_question_is_in_two_splits(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    numbers = [i % 100 for i in range(300)]  # each question three times, once in each spelling
    with caplog.at_level(logging.WARNING):
        task = TASK.model_copy(update={"seed": seed})
        splits = split([spelt(number, row) for row, number in enumerate(numbers)], KEYS, task)
    asked = [{numbers[row] for row in part} for part in (splits.train, splits.validation, splits.held_out)]
    assert all(asked)
    assert not asked[0] & asked[1]
    assert not asked[0] & asked[2]
    assert not asked[1] & asked[2]
    assert sorted(every(splits)) == list(range(300))
    # The held-out rows are as drawn; the others give way.
    assert len(splits.held_out) == 30
    lost = [240 - len(splits.train), 30 - len(splits.validation)]
    assert sum(lost) == len(splits.repeated)
    assert all(lost)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{lost[0]} training and {lost[1]} validation rows left out")


def test_one_question_for_all_rows_leaves_no_training_rows() -> None:
    with pytest.raises(UserError) as caught:
        split(["Continue."] * 20, [""] * 20, Task(test_share=0.1))
    assert caught.value.field == "task.test_share"
    with pytest.raises(UserError, match=r"got 0\.3") as caught:
        split(["Continue."] * 20, [""] * 20, Task(test_share=0.1, validation_share=0.3))
    assert caught.value.field == "task.validation_share"


def test_questions_with_equal_tokens_are_in_one_split() -> None:
    """300 distinct questions; each two neighbours have the same tokens."""
    inputs = [str(i // 2).encode() for i in range(300)]
    asked = [questions_asked(f"q{i}" for i in range(300)), questions_asked(one.decode() for one in inputs)]
    splits = split_rows(asked, KEYS, TASK)
    read = [{inputs[row] for row in part} for part in (splits.train, splits.validation, splits.held_out)]
    assert all(read)
    assert not read[0] & read[1]
    assert not read[0] & read[2]
    assert not read[1] & read[2]
    assert len(splits.held_out) == 30
    assert sorted(every(splits)) == list(range(300))


# --- evaluation rows


def owners(judged: list[int], train: list[int], parts: list[list[int]], seed: int = 0) -> list[int]:
    names = tuple(f"key {i}" for i in range(max(judged + train) + 1))
    dealt = Assignment.of([np.asarray(part, np.int64) for part in parts])
    return judged_clients(np.asarray(judged, np.int32), np.asarray(train, np.int32), names, dealt, seed).tolist()


def test_key_of_one_client_goes_to_that_client() -> None:
    assert owners([1, 0, 1], train=[0, 0, 1], parts=[[2], [0, 1]]) == [0, 1, 0]


def test_shared_keys_are_assigned_in_proportion() -> None:
    # Key 0: the clients have 6, 3 and 1 of its 10 rows; of 10 evaluation rows they get as many.
    train = [0] * 10 + [1] * 2
    parts = [list(range(6)), [6, 7, 8, 10], [9, 11]]
    assert Counter(owners([0] * 10, train, parts)) == {0: 6, 1: 3, 2: 1}
    # Of 5: shares 3, 1.5 and 0.5; the remaining one goes to the lower of two equal remainders.
    assert Counter(owners([0] * 5, train, parts)) == {0: 3, 1: 2}
    # Key 1 is half client 1's and half client 2's; with 1 evaluation row the lower gets it.
    assert owners([1], train, parts) == [1]


def test_rows_follow_client_sizes_without_a_column() -> None:
    assert Counter(owners([0] * 8, train=[0] * 4, parts=[[0, 1, 2], [3]])) == {0: 6, 1: 2}


def test_key_without_training_rows_counts_as_all_keys() -> None:
    assert Counter(owners([2] * 4, train=[0, 0, 0, 1], parts=[[0, 1, 2], [3]])) == {0: 3, 1: 1}


def test_overlapping_clients_count_their_own_rows() -> None:
    assert Counter(owners([0] * 4, train=[0, 0, 0], parts=[[0, 1, 2], [1]])) == {0: 3, 1: 1}


def test_assignment_follows_the_seed() -> None:
    def dealt(seed: int) -> list[int]:
        return owners([0] * 40, train=[0, 0], parts=[[0], [1]], seed=seed)

    assert dealt(0) == dealt(0) != dealt(1)
    assert Counter(dealt(0)) == Counter(dealt(1)) == {0: 20, 1: 20}
    assert dealt(0) != sorted(dealt(0))


def test_keys_of_one_row_leave_the_share_to_the_others() -> None:
    """A fifth of 100 rows are 20; 50 keys must keep their only row, so that all come from the other one."""
    keys = [*(f"single {i}" for i in range(50)), *["big"] * 50]
    drawn = drawn_rows(keys, 0.2, seed=0)
    assert (len(drawn), int(drawn.min()) >= 50) == (20, True)
