"""Predictions on held-out rows against the plain model's own logits and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn import functional

from rayfed_sub.config.loading import load_config
from rayfed_sub.core.devices import meta_as
from rayfed_sub.core.types import Block, Change
from rayfed_sub.data.batching import IGNORED
from rayfed_sub.models.presets import UNFILLED_PROMPTS
from rayfed_sub.models.weights import assemble, load_weights
from rayfed_sub.runtime.held_out import JudgedModel, _shards
from rayfed_sub.training import inference
from rayfed_sub.training.inference import answers, global_model, predictions
from tests.helpers.model_types import built
from tests.helpers.second_device import SecondDevice
from tests.helpers.tiny_models import (
    PAD,
    VOCABULARY,
    Tiny,
    bent,
    bert,
    dinov2,
    draw_batches,
    gpt2,
    installed,
    llama,
    lora_start,
)

LANGUAGE: list[Callable[[], Tiny]] = [llama, gpt2, *(lambda name=name: bent(name) for name in ("gemma2", "cohere"))]


@pytest.mark.parametrize("model", LANGUAGE, ids=["llama", "gpt2", "gemma2", "cohere"])
def test_token_is_predicted_from_the_logits_before_it(model: Callable[[], Tiny]) -> None:
    tiny = model()
    (batch,) = draw_batches(tiny, seed=3, steps=1, rows=4)
    batch["labels"][2] = IGNORED  # a row without labels
    with torch.no_grad():
        logits_RTV = tiny.model(input_ids=batch["input_ids"]).logits.float()
    for row, prediction in enumerate(predictions(tiny.model, batch, PAD)):
        places = (batch["labels"][row, 1:] != IGNORED).nonzero()[:, 0]
        true_L, logits_LV = batch["labels"][row, places + 1], logits_RTV[row, places]
        assert prediction.labels == tuple(true_L.tolist())
        assert prediction.predicted == tuple(logits_LV.argmax(dim=-1).tolist())
        assert prediction.loss == pytest.approx(functional.cross_entropy(logits_LV, true_L, reduction="sum").item())
        assert (len(prediction.labels) == 0) == (row == 2)


@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
def test_answers_are_the_likeliest_tokens_in_any_batch(model: Callable[[], Tiny]) -> None:
    """The reference: one prompt at a time and without padding, token after token; prompts of a batch are padded on the
    left."""
    net = model().model

    def greedy(prompt: list[int], limit: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(limit):
            with torch.no_grad():
                tokens.append(int(net(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    prompts = [[5, 9, 33], [7], [60, 61, 62, 63, 2, 3, 4]]
    wanted = [greedy(prompt, 6) for prompt in prompts]
    assert len({tuple(answer) for answer in wanted}) == 3
    eos = wanted[0][3]
    found = answers(net, prompts, pad=PAD, ends=[eos], limit=6)
    assert found == [answer[: answer.index(eos)] if eos in answer else answer for answer in wanted]
    assert len(found[0]) <= 3
    # Any of several end tokens stops generation, whichever comes first.
    assert answers(net, prompts[:1], pad=PAD, ends=[eos, wanted[0][1]], limit=6) == [
        wanted[0][: wanted[0].index(wanted[0][1])]
    ]


@pytest.mark.parametrize("model", [llama, gpt2], ids=["llama", "gpt2"])
def test_device_that_is_not_asked_answers_the_same(model: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of twenty tokens, of which some end early: the rows are asked for once, after sixteen, and once more."""
    net = model().model
    prompts = [[5, 9, 33], [7], [60, 61, 62, 63, 2, 3, 4]]
    (long,) = answers(net, prompts[:1], pad=PAD, ends=[VOCABULARY - 1], limit=20)
    for ends in ([long[5]], [long[0], long[1]], list(range(VOCABULARY))):
        soon = answers(net, prompts, pad=PAD, ends=ends, limit=20)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(inference, "free_to_read", lambda device: False)
            assert answers(net, prompts, pad=PAD, ends=ends, limit=20) == soon


@pytest.mark.parametrize("name", ["roberta", *sorted(UNFILLED_PROMPTS)])
def test_answers_of_models_that_see_what_fills_up_or_begin_behind_their_padding(name: str) -> None:
    """The reference as above: one prompt at a time, token after token."""
    model, bones = built(name, "causal-lm", 2)
    net: Any = assemble(bones, load_weights(model, bones, seed=0))
    rng, end = torch.Generator().manual_seed(0), VOCABULARY - 1
    prompts = [torch.randint(3, end, (tokens,), generator=rng).tolist() for tokens in (5, 9, 17)]
    for prompt, said in zip(prompts, answers(net, prompts, pad=PAD, ends=[end], limit=6), strict=True):
        row = list(prompt)
        while len(row) < len(prompt) + 6 and row[-1] != end:
            with torch.no_grad():
                row.append(int(net(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        assert said == [token for token in row[len(prompt) :] if token != end]


def test_answer_asks_the_device_once_in_sixteen_tokens() -> None:
    """What generation asks before its first token is transformers' own."""
    net = copy.deepcopy(llama().model).to("meta")
    with meta_as("cuda"), SecondDevice() as mode:
        answers(net, [[5, 9, 33]] * 2, pad=PAD, ends=[3], limit=40)
    ours = {where: times for where, times in mode.seen.reads.items() if where.startswith("training/inference.py")}
    # The loop ends at its first question, whose answer is yes; tokens are read at the end.
    assert sorted(ours.values()) == [1, 1]


@pytest.mark.parametrize("model", [bert, dinov2], ids=["bert", "dinov2"])
def test_row_is_scored_by_its_class(model: Callable[[], Tiny]) -> None:
    tiny = model()
    (batch,) = draw_batches(tiny, seed=3, steps=1, rows=4)
    batch["labels"][1] = IGNORED
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits_RC = tiny.model(**inputs).logits
    for row, (prediction, label) in enumerate(
        zip(predictions(tiny.model, batch, PAD), batch["labels"].tolist(), strict=True)
    ):
        if row == 1:
            assert (prediction.loss, prediction.predicted, prediction.labels) == (0.0, (), ())
            continue
        assert (prediction.predicted, prediction.labels) == ((int(logits_RC[row].argmax()),), (label,))
        assert prediction.loss == pytest.approx(functional.cross_entropy(logits_RC[row], torch.tensor(label)).item())


@pytest.mark.parametrize("model", [llama, bert, dinov2], ids=["llama", "bert", "dinov2"])
def test_row_has_the_same_scores_in_any_batch(model: Callable[[], Tiny]) -> None:
    """With a trained head and closed blocks, as the global model has them."""
    tiny = model()
    net, layers = installed(tiny)
    (batch,) = draw_batches(tiny, seed=3, steps=1, rows=16)
    start = lora_start(tiny, 2)
    blocks = {t.name: (start.tensors[f"{t.name}/left"], start.tensors[f"{t.name}/right"]) for t in tiny.shape.targets}
    changes = {name: Change(blocks=(Block(*pair),)) for name, pair in blocks.items()}
    prompts = [[3, 4, 5], [9], [7, 7, 2, 1], [60, 5]]
    with global_model(layers, tiny.shape, changes, start.tensors):
        whole = predictions(net, batch, PAD)
        for size in (1, 2, 3, 7):
            parts = [{name: x[i : i + size] for name, x in batch.items()} for i in range(0, 16, size)]
            assert [one for part in parts for one in predictions(net, part, PAD)] == whole
        if model is llama:
            said = answers(net, prompts, pad=PAD, ends=[1], limit=6)
            assert [answers(net, [prompt], pad=PAD, ends=[1], limit=6)[0] for prompt in prompts] == said


def test_evaluation_rows_follow_the_task_s_seed_and_not_the_run_s() -> None:
    held_out = cast(Any, SimpleNamespace(held_out=range(1000)))

    def judged(run: int, task: int, most: int = 64) -> list[int]:
        config = load_config({"seed": run, "task": {"seed": task}})
        return [row for _, rows in _shards(config, held_out, most, JudgedModel(None, None)) for row in rows]

    assert judged(0, 0) == judged(1, 0) != judged(0, 1)
    assert len(set(judged(1, 0))) == 64
    assert set(judged(0, 0, 16)) < set(judged(1, 0))  # rows with answers are a subset of those with a loss
