"""The trial of a module of the caller's own before the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayfed_sub import OwnModel, UserError, load_config
from rayfed_sub.planning.call import given, named
from rayfed_sub.planning.job import Job, prepare
from tests.helpers.word_tokenizers import numbers


class Reader(nn.Module):
    """A bag of tokens with so many outputs; squeezed: without a dimension of one."""

    def __init__(self, outputs: int, squeezed: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.top = nn.Embedding(259, 8), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.squeezed = squeezed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.top(torch.tanh(self.mix(self.embed(input_ids))).mean(1))
        return logits.squeeze(-1) if self.squeezed else logits


def prepared(module: nn.Module, labels: list[Any]) -> Job:
    rows = [{"a": f"{4 + i} {5 + i % 9}", "y": labels[i % len(labels)]} for i in range(12)]
    objects = given(
        data={"north": rows[:6], "south": rows[6:]}, model=OwnModel(module, tokenizer=numbers(), head=("top",))
    )
    keys = {
        "task": {"prompt": "{a}", "label": "y"},
        "model": {"targets": "all-linear"},
        "federation": {"rounds": 1, "batch_size": 4},
        "method": {"name": "fedit", "rank": 2},
        "resources": {"workers": 0},
    }
    return prepare(named(load_config(keys), objects), objects)


NUMBERS, NAMES, SETS = [0.25, 1.5, -3.0], ["no", "yes"], [["a"], ["a", "b"], ["c"]]


@pytest.mark.parametrize(("labels", "outputs", "kind"), [(NUMBERS, 1, "regression"), (NAMES, 2, "classification")])
def test_module_with_an_output_for_each_label_is_taken(labels: list[Any], outputs: int, kind: str) -> None:
    assert prepared(Reader(outputs), labels).dataset.kind == kind


@pytest.mark.parametrize(
    ("labels", "module", "found"),
    [
        (NUMBERS, Reader(2), r"\(rows, 1\) for a regression.*returns \(\d+, 2\); give its last layer 1 output, "),
        (NUMBERS, Reader(1, squeezed=True), r"\(rows, 1\) for a regression.*returns \(\d+,\); "),
        (NAMES, Reader(3), r"\(rows, 2\) for a classification.*returns \(\d+, 3\); "),
        (SETS, Reader(2), r"\(rows, 3\) for several labels a row.*returns \(\d+, 2\); "),
    ],
)
def test_logits_of_another_shape_end_the_run_before_it(labels: list[Any], module: nn.Module, found: str) -> None:
    with pytest.raises(UserError, match=rf"^model: got 'Reader'; allowed: a module with logits of shape {found}"):
        prepared(module, labels)
