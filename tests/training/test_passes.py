"""A step's batches as forward passes."""

from __future__ import annotations

import numpy as np
import torch

from rayfed_sub.data.batching import collate
from rayfed_sub.data.rows import Rows
from rayfed_sub.models.flat_rows import PassRule
from rayfed_sub.training.passes import passes

PAD = 9
SPOKEN = Rows.of([[1, 2, 3, 4], [5, 6], [7, 8, 1]], prompts=[2, 1, 0])
CLASSED = Rows.of([[1, 2, 3], [4]], prompts=[0, 0], classes=[1, 0])


def spoken(*rows: int) -> dict[str, torch.Tensor]:
    return collate(SPOKEN, np.array(rows), mask_prompt=True, pad=PAD)


def test_flat_row_has_each_client_s_tokens_and_what_fills_them_up() -> None:
    (one,) = passes([spoken(0, 1), spoken(2)], PassRule(flat=True), PAD)
    assert one.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, PAD, PAD, 7, 8, 1, *[PAD] * 5]]
    assert one.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0, 0, 1, 2, *[0] * 5]]
    assert (one.labels.tolist(), one.places.tolist()) == ([3, 4, 6, 8, 1], [1, 2, 4, 8, 9])
    assert (one.seen.parts, one.seen.size, one.tokens) == ((8, 8), 16, (9, 16))
    assert (one.rows.tolist(), one.clients.tolist()) == ([0, 0, 1, 2, 2], [0, 0, 0, 1, 1])
    assert one.counts == (3, 2)
    assert one.flat is not None
    assert one.flat.groups == ((3, 16),)


def test_other_models_take_rows_of_one_length_at_a_time() -> None:
    long = Rows.of([[5] * 20, [6] * 3], prompts=[0, 0])
    batch = collate(long, np.array([0, 1]), mask_prompt=True, pad=PAD)
    short, tall = passes([batch, spoken(1)], PassRule(), PAD)
    assert short.inputs["input_ids"].tolist() == [[6, 6, 6, *[PAD] * 13], [5, 6, *[PAD] * 14]]
    assert (short.seen.parts, short.tokens, short.counts) == ((1, 1), (5, 32), (2, 1))
    assert tall.inputs["input_ids"].shape == (1, 32)
    assert (tall.seen.parts, tall.counts) == ((1, 0), (19, 0))
    assert tall.rows.unique().tolist() == [0]


def test_rows_that_fill_up_a_classifier_s_pass_have_attention_and_no_label() -> None:
    batch = collate(CLASSED, np.array([0, 1, 0]), mask_prompt=True, pad=PAD)
    (one,) = passes([batch], PassRule(rows=4), PAD)
    assert (one.labels.tolist(), one.places.tolist()) == ([1, 0, 1], [0, 1, 2])
    assert one.inputs["attention_mask"][:, :3].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert (one.seen.parts, one.seen.size, one.counts) == ((3,), 4, (3,))


def test_images_lie_side_by_side() -> None:
    batches = [{"pixel_values": torch.full((b, 3, 2, 2), float(b)), "labels": torch.arange(b)} for b in (1, 2)]
    (one,) = passes(batches, PassRule(rows=2), PAD)
    assert one.inputs["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 2, 0]
    assert (one.labels.tolist(), one.places.tolist()) == ([0, 0, 1], [0, 1, 2])
    assert (one.seen.parts, one.seen.size, one.clients.tolist()) == ((1, 2), 4, [0, 1, 1])
