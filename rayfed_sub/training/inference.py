"""The global model on held-out rows: loss and predictions, and greedy answers.  No gradient, no client terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.core.devices import free_to_read
from rayfed_sub.core.types import Change, ModelShape, Tensors
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.positions import positions_padding
from rayfed_sub.models.presets import UNFILLED_PROMPTS
from rayfed_sub.training.blocks import Closed
from rayfed_sub.training.layers import Bound, PackLinear, Terms, based_on, bound
from rayfed_sub.training.losses import predicted

_ASK_EVERY = 16
"""Tokens of an answer between two questions to a device whether all rows have ended."""


@contextmanager
def global_model(
    layers: Mapping[str, PackLinear], shape: ModelShape, changes: Mapping[str, Change], head: Tensors
) -> Iterator[None]:
    """Binds the global model to the layers: blocks as low-rank terms, dense changes in the weight's place.

    changes: per target its change to the layer's own weight; head: `<layer>/weight` (m, n), `<layer>/bias` (m,).
    """
    dense = {name: change.dense for name, change in changes.items() if change.dense is not None}
    terms = {name: _terms(change, layers[name].weight.device) for name, change in changes.items()}
    here = {name: Bound(0, (one,)) for name, one in terms.items() if one is not None}
    weights = {spec.name: head[f"{spec.name}/weight"] for spec in shape.head}
    biases = {spec.name: head[f"{spec.name}/bias"] for spec in shape.head if spec.bias}
    with based_on(layers, {**dense, **weights}, biases), bound(layers, here):
        yield


def _terms(change: Change, device: torch.device) -> Terms | None:
    if not change.blocks and change.base_scale == 1.0:
        return None
    closed = None
    if change.blocks:
        left_mR, right_Rn = change.factors()
        closed = Closed(left_mR[None].to(device), right_Rn[None].to(device), [len(right_Rn)])
    return Terms(
        closed=closed,
        base_scale_G=None if change.base_scale == 1.0 else torch.tensor([change.base_scale], device=device),
    )


@dataclass(frozen=True)
class Prediction:
    """Prediction for a held-out row: its summed loss, and by label the likeliest token or class and the true one;
    tokens are predicted given the true ones before them.  Of a regression the predicted number and the true one; of
    several labels 0 or 1 for each."""

    loss: float
    predicted: tuple[float, ...]
    labels: tuple[float, ...]


@dataclass(frozen=True)
class Generation:
    """Texts for a held-out question: itself, the greedy answer, and the reference, cut to `task.max_length` as in
    training; teacher_forced: the likeliest token at each label, given the true ones before it; labels: the labels
    themselves."""

    question: str
    answer: str
    reference: str
    teacher_forced: str
    labels: str


def predictions(model: nn.Module, batch: Mapping[str, Tensor], pad: int) -> list[Prediction]:
    """Predictions for the rows of a held-out batch, under the bound global model."""
    seen = predicted(model, batch, pad)
    rows = len(batch["labels"])
    loss_R = seen.loss_L.new_zeros(rows).index_add(0, seen.row_L, seen.loss_L)
    counts = torch.bincount(seen.row_L, minlength=rows).tolist()
    if seen.label_L.dim() == 2:  # numbers, one list a row
        both = zip(loss_R.tolist(), seen.best_L.tolist(), seen.label_L.tolist(), strict=True)
        return [Prediction(loss, tuple(best), tuple(label)) for loss, best, label in both]
    best, labels = (map(tuple, _split(column.tolist(), counts)) for column in (seen.best_L, seen.label_L))
    return [Prediction(*row) for row in zip(loss_R.tolist(), best, labels, strict=True)]


def _split(flat: list[int], counts: Sequence[int]) -> list[list[int]]:
    ends = list(accumulate(counts))
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]


@torch.inference_mode()
def answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    ends: Sequence[int],
    limit: int,
    start: int | None = None,
) -> list[list[int]]:
    """Greedy answers, at most `limit` tokens each, cut before the first of `ends`.  Prompts of equal canonical length
    are answered together, so that an answer does not depend on the others.  start: of an encoder-decoder the token with
    which an answer begins (`start_token`)."""
    rule = pass_rule(model)
    if rule.apart:
        rule = rule.of_sources()
    else:
        longest, exact = (None if most is None else most - limit for most in (rule.longest, rule.exact))
        unfilled = getattr(getattr(model, "config", None), "model_type", "") in UNFILLED_PROMPTS
        rule = replace(rule, longest=longest, exact=0 if unfilled else exact)
    by_width: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_width.setdefault(rule.canonical(len(prompt)), []).append(number)
    found: dict[int, list[int]] = {}
    for width, numbers in by_width.items():
        more = [prompts[numbers[-1]]] * (-len(numbers) % rule.rows)
        given = _padded([prompts[number] for number in numbers] + more, width, pad, left=not rule.apart)
        said = _generated(model, given, pad=pad, ends=ends, limit=limit, start=start)
        found |= dict(zip(numbers, said[: len(numbers)], strict=True))
    return [found[number] for number in range(len(prompts))]


def _padded(
    prompts: Sequence[Sequence[int]], width: int, pad: int, *, left: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts filled up, and their attention masks: on the left where answers follow them in the same row."""

    def filled(own: Sequence[int], with_: int) -> list[int]:
        more = [with_] * (width - len(own))
        return [*more, *own] if left else [*own, *more]

    return [filled(prompt, pad) for prompt in prompts], [filled([1] * len(prompt), 0) for prompt in prompts]


def _generated(
    model: Any,
    given: tuple[list[list[int]], list[list[int]]],
    *,
    pad: int,
    ends: Sequence[int],
    limit: int,
    start: int | None,
) -> list[list[int]]:
    """What the model says after each row, up to the first of `ends`."""
    device = next(iter(model.parameters())).device
    ids_BT, mask_BT = (torch.tensor(rows, device=device) for rows in given)
    apart = pass_rule(model).apart
    assert (start is not None) == apart, "an encoder-decoder's answers begin with a token, others' with none"
    # Of an encoder-decoder's configuration some have beams and a shortest answer.
    begun: dict[str, Any] = {"decoder_start_token_id": start, "num_beams": 1, "min_length": 0} if apart else {}
    if not apart and (padding := positions_padding(model)) is not None:
        counted_BT = mask_BT * (ids_BT != padding)  # transformers would count from 0
        begun = {"position_ids": counted_BT.cumsum(dim=1) * counted_BT + padding}
    out_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=list(ends),
        pad_token_id=pad,
        custom_generate=None if free_to_read(device) else _greedy,
        **begun,
    )
    width = 1 if apart else ids_BT.shape[1]  # an encoder-decoder's answer begins with its start
    return [list(takewhile(lambda token: token not in ends, row)) for row in out_BT[:, width:].tolist()]


def _greedy(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Callable[[Tensor, Any], Tensor],
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **given: Any,
) -> Tensor:
    """transformers' greedy loop, which asks the device once in `_ASK_EVERY` tokens whether all rows have ended, not
    after each; what a row says after its end is cut by the caller."""
    done_B, first = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device), input_ids.shape[1]
    for length in range(first, generation_config.max_length):
        begins = length == first
        how = {"next_sequence_length": None if begins else 1, "is_first_iteration": begins}
        outputs = model(**model.prepare_inputs_for_generation(input_ids, **how, **given), return_dict=True)
        given = model._update_model_kwargs_for_generation(
            outputs, given, is_encoder_decoder=model.config.is_encoder_decoder
        )
        scores_BV = logits_processor(input_ids, outputs.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores_BV.argmax(dim=-1)[:, None]], dim=1)
        done_B = done_B | stopping_criteria(input_ids, None)
        if (length - first) % _ASK_EVERY == _ASK_EVERY - 1 and done_B.all():
            break
    return input_ids
