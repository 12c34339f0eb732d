"""Batches: which rows, in which order, and as which tensors."""

import numpy as np
import pytest
import torch

from rayfed_sub.data.batches import ClientBatches, batch_rows, collate, merge
from rayfed_sub.data.rows import Rows

PAD = 9
SPOKEN = Rows.of([[1, 2, 3, 4], [5, 6], [7, 8, 1]], prompts=[2, 1, 0])
CLASSED = Rows.of([[1, 2, 3], [4]], prompts=[3, 1], classes=[1, 0])


# --- which rows


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 4), (5, 1)])
def test_every_epoch_is_a_permutation(rows: int, batch_size: int) -> None:
    mine = np.arange(100, 100 + rows)
    size = min(batch_size, rows)
    steps = rows * 4 // size  # at least 4 * rows - size rows, of which 3 whole epochs are looked at
    run = np.concatenate([batch_rows(0, 5, mine, batch_size, step) for step in range(steps)])
    assert len(run) == steps * size
    for epoch in range(3):
        assert sorted(run[epoch * rows : (epoch + 1) * rows]) == mine.tolist()


def test_epochs_and_clients_and_seeds_differ() -> None:
    mine = np.arange(50)

    def whole(seed: int, client: int, step: int) -> list[int]:
        return [int(row) for row in batch_rows(seed, client, mine, 50, step)]

    orders = [whole(0, 0, 0), whole(0, 0, 1), whole(0, 1, 0), whole(1, 0, 0), mine.tolist()]
    assert len(set(map(tuple, orders))) == 5


def test_a_batch_needs_only_its_number() -> None:
    mine = np.arange(10)
    forward = [batch_rows(3, 1, mine, 4, step).tolist() for step in range(40)]
    backward = [batch_rows(3, 1, mine, 4, step).tolist() for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert len(batch_rows(3, 1, mine, 4, 10**12)) == 4


# --- as tensors


def test_labels_leave_out_padding_and_prompt() -> None:
    batch = collate(SPOKEN, np.array([1, 0]), mask_prompt=True, pad=PAD)
    assert sorted(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].tolist() == [[5, 6, PAD, PAD], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 3, 4]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_labels_hold_the_prompt_where_it_is_not_masked() -> None:
    batch = collate(SPOKEN, np.array([1, 0]), mask_prompt=False, pad=PAD)
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [1, 2, 3, 4]]


def test_a_token_that_equals_pad_is_still_learned() -> None:
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
    return ClientBatches(rows, mine, 0, 2, 4, cursor, steps, mask_prompt=True, pad=PAD)


def test_client_batches_go_on_where_they_stopped() -> None:
    whole = [batch["input_ids"].flatten().tolist() for batch in client_batches(0, 6)]
    first, rest = client_batches(0, 4), client_batches(4, 2)
    assert (len(first), len(rest)) == (4, 2)
    assert whole == [batch["input_ids"].flatten().tolist() for part in (first, rest) for batch in part]
    expected = batch_rows(0, 2, np.arange(3, 13), 4, step=5)
    assert rest[1]["input_ids"].flatten().tolist() == expected.tolist()  # row i holds token i


@pytest.mark.parametrize("index", [-1, 2])
def test_client_batches_end(index: int) -> None:
    with pytest.raises(IndexError):
        client_batches(4, 2)[index]


# --- several clients


def test_merged_tokens_fill_rows_and_columns() -> None:
    one = collate(SPOKEN, np.array([1]), mask_prompt=True, pad=PAD)  # (1, 2)
    two = collate(SPOKEN, np.array([2, 1]), mask_prompt=True, pad=PAD)  # (2, 3)
    both = merge([one, two], pad=PAD)
    assert both["input_ids"].tolist() == [[5, 6, PAD], [PAD, PAD, PAD], [7, 8, 1], [5, 6, PAD]]
    assert both["labels"].tolist() == [[-100, 6, -100], [-100] * 3, [7, 8, 1], [-100, 6, -100]]


def test_merged_classes_attend_to_something_in_every_row() -> None:
    one = collate(CLASSED, np.array([1]), mask_prompt=True, pad=PAD)
    two = collate(CLASSED, np.array([1, 0]), mask_prompt=True, pad=PAD)
    both = merge([one, two], pad=PAD)
    assert both["labels"].tolist() == [0, -100, 0, 1]
    assert both["attention_mask"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert one["attention_mask"].tolist() == [[1]]  # the clients' own batches are not written to


def test_merged_pixels_are_zero_where_a_row_is_missing() -> None:
    one = {"pixel_values": torch.ones(1, 3, 2, 2), "labels": torch.tensor([1])}
    two = {"pixel_values": torch.full((2, 3, 2, 2), 2.0), "labels": torch.tensor([0, 1])}
    both = merge([one, two], pad=PAD)
    assert both["pixel_values"].shape == (4, 3, 2, 2)
    assert both["pixel_values"].dtype == torch.float32
    assert both["pixel_values"].sum(dim=(1, 2, 3)).tolist() == [12, 0, 24, 24]  # 3 * 2 * 2 = 12 numbers
    assert both["labels"].tolist() == [1, -100, 0, 1]


def test_one_client_is_left_as_it_is() -> None:
    batch = collate(SPOKEN, np.array([0, 1]), mask_prompt=True, pad=PAD)
    merged = merge([batch], pad=PAD)
    assert all(torch.equal(merged[name], batch[name]) for name in batch)
