"""Encoder-decoders side by side: losses as the model's own, clients as alone, the reference, and answers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import Subspace
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.text_to_text import start_token
from rayfed_sub.models.weights import assemble, load_weights
from rayfed_sub.training import inference
from rayfed_sub.training.inference import answers
from rayfed_sub.training.losses import predicted
from rayfed_sub.training.passes import passes
from tests.helpers.model_types import built, judged
from tests.helpers.tiny_models import (
    PAD,
    Tiny,
    change,
    draw_batches,
    draw_pairs,
    galore_start,
    lora_start,
    run_pack,
    run_reference,
    worst,
)

END = 63
"""The token that ends answers."""


@cache
def tiny(name: str) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, bones = built(name, "seq2seq-lm", blocks=2)
        return Tiny(assemble(bones, load_weights(model, bones, seed=0)), bones.shape, draw_pairs)


def test_passes_group_rows_by_the_lengths_of_both() -> None:
    rule = pass_rule(tiny("t5").model)
    batch = {
        "input_ids": torch.tensor([[5] * 20, [6] * 3 + [PAD] * 17, [7] * 4 + [PAD] * 16]),
        "attention_mask": torch.tensor([[1] * 20, [1] * 3 + [0] * 17, [1] * 4 + [0] * 16]),
        "labels": torch.tensor([[8, 9, -100], [10, -100, -100], [11, 12, 13]]),
    }
    short, long = passes([batch], rule, PAD)
    assert short.inputs["input_ids"].tolist() == [[6] * 3 + [PAD] * 13, [7] * 4 + [PAD] * 12]
    assert short.inputs["attention_mask"].sum(1).tolist() == [3, 4]
    assert short.answers is not None
    assert short.answers[:, :4].tolist() == [[10, -100, -100, -100], [11, 12, 13, -100]]
    assert (short.seen.parts, short.seen.size, short.tokens) == ((2,), 2, (3 + 4 + 1 + 3, 2 * 32))
    assert (short.labels.tolist(), short.rows.tolist()) == ([10, 11, 12, 13], [1, 2, 2, 2])
    assert (long.counts, long.inputs["input_ids"].shape) == ((2,), (1, 32))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_loss_is_the_model_s_own(name: str) -> None:
    (batch,) = draw_batches(tiny(name), 0, 1, tokens=20)
    found = predicted(tiny(name).packed[0], batch, PAD)
    with torch.no_grad():
        theirs = tiny(name).model(**batch)
    assert float(found.loss_L.mean()) == pytest.approx(float(theirs.loss), rel=1e-5)
    labels = batch["labels"]
    assert found.label_L.tolist() == labels[labels != -100].tolist()
    assert found.best_L.tolist() == theirs.logits.argmax(-1)[labels != -100].tolist()


def test_targets_lie_in_both_sides_and_clients_train_as_alone() -> None:
    model = tiny("bart")
    sides = {side for side in ("encoder", "decoder") for x in model.shape.targets if side in x.name}
    assert sides == {"encoder", "decoder"}
    starts = [lora_start(model, rank) for rank in (1, 2, 2)]
    data = [draw_batches(model, k, 2, rows=1 + k, tokens=(16, 9, 21)[k]) for k in range(3)]
    for k, result in enumerate(run_pack(model, starts, data, Optimizer(), lr=1e-2)):
        (alone,) = run_pack(model, [starts[k]], [data[k]], Optimizer(), lr=1e-2, clients=[k])
        assert worst(change(model, starts[k], result), change(model, starts[k], alone)) <= 1e-5
        moved = [name for name in starts[k].trained if not torch.equal(result.tensors[name], starts[k].tensors[name])]
        assert moved == list(starts[k].trained)


def test_reference_has_the_same_change() -> None:
    model, batches = tiny("bart"), draw_batches(tiny("bart"), 5, 2, tokens=18)
    for start in (galore_start(model, Subspace(2, 2)), lora_start(model, 2)):
        (ours,) = run_pack(model, [start], [batches], Optimizer(), lr=1e-2)
        (theirs,) = run_reference(model, [start], [batches], Optimizer(), lr=1e-2)
        assert worst(change(model, start, ours), change(model, start, theirs)) <= 1e-4


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_answers_are_the_model_s_own_and_those_of_each_prompt_alone(name: str, monkeypatch: Any) -> None:
    model = tiny(name).model
    prompts = [[5, 6, 7], [8] * 20, [9, 10]]
    start = start_token(model, [END])
    found = answers(model, prompts, pad=PAD, ends=[END], limit=5, start=start)
    for prompt, answer in zip(prompts, found, strict=True):
        assert answers(model, [prompt], pad=PAD, ends=[END], limit=5, start=start) == [answer]
        said = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=END,
        )[0, 1:].tolist()
        assert answer == said[: len(answer)]
        assert said[len(answer) : len(answer) + 1] in ([], [END])
    assert any(found)
    monkeypatch.setattr(inference, "free_to_read", lambda device: False)  # as on a GPU
    assert answers(model, prompts, pad=PAD, ends=[END], limit=5, start=start) == found


@pytest.mark.parametrize("name", ["longt5", "marian"])
@pytest.mark.slow
def test_types_with_ways_of_their_own(name: str) -> None:
    """Windows over a global memory, and positions that are computed beside a bias of logits."""
    verdict = judged(name, "seq2seq-lm", blocks=2)
    assert verdict.works, verdict
