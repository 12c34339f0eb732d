"""Dropout of what adapters read: the masks themselves, in any pack, and peft's layers given the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayfed_sub import UserError, load_config
from rayfed_sub.config.schema import Optimizer
from rayfed_sub.core.types import ModelShape, Start
from rayfed_sub.planning.job import prepare
from rayfed_sub.training.dropout import Dropout, TokenWords, column_words, dropouts, kept
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.pack_step import LocalRule
from rayfed_sub.training.pass_rows import Seen
from tests.helpers.tiny_models import (
    PAD,
    Tiny,
    albert,
    bert,
    convbert,
    core_start,
    draw_batches,
    gpt2,
    llama,
    lora_start,
    own,
    run_pack,
    vit,
)
from tests.training.test_any_pack import batches, differing
from tests.training.test_reference import compare

RATE = 0.3


def masks(clients: list[tuple[int, int]], rows: int, tokens: int, columns: int = 32, layer: str = "up") -> torch.Tensor:
    """(clients, rows, tokens, columns) of one layer's first use."""
    where = torch.tensor([(g, b, 0) for g in range(len(clients)) for b in range(rows)])
    words = TokenWords(where, torch.tensor([hash((client, step)) % 2**32 for client, step in clients]))
    found = kept(words.of(tokens), column_words(0, layer, 0, columns), RATE)
    return found.reshape(len(clients), rows, tokens, columns)


def test_masks_drop_the_share_in_every_row_column_and_pair() -> None:
    """Of 2^21 numbers 0.3 are dropped, within five deviations sqrt(0.21 / n), and so in each row and each column; two
    tokens, or two columns, drop the same number in 0.3^2 of all cases."""
    whole = masks([(0, 0)], 16, 256, 512)[0].flatten(0, 1).double()

    def near(value: torch.Tensor, expected: float, numbers: int) -> bool:
        return bool((value - expected).abs().max() < 5 * (expected * (1 - expected) / numbers) ** 0.5)

    assert near(1 - whole.mean(), RATE, whole.numel())
    assert near(1 - whole.mean(0), RATE, len(whole))
    assert near(1 - whole.mean(1), RATE, whole.shape[1])
    gone = 1 - whole
    assert near((gone[1:] * gone[:-1]).mean(), RATE**2, gone.numel())
    assert near((gone[:, 1:] * gone[:, :-1]).mean(), RATE**2, gone.numel())
    rank = torch.linalg.svdvals(whole[:512] - whole[:512].mean())  # a sum of words, unmixed, would have low rank
    assert rank[-1] > 1e-3
    assert rank[0] < 3 * (RATE * (1 - RATE) * 512) ** 0.5


def test_masks_are_the_same_on_every_machine() -> None:
    """Their bits are part of a run's."""
    seen = Seen((1,), 1, torch.zeros(1, 3, dtype=torch.int64))
    drawn = dropouts(ModelShape(()), lambda _: seen, [(3, 11)], 5, RATE)
    assert drawn == {}
    words = TokenWords(torch.tensor([[0, 2, 40]]), torch.tensor([2**32 - 5]))
    found = Dropout(5, "model.layers.0.mlp.up_proj", RATE, words, 1).kept(torch.zeros(64, 48))
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
    assert digest[:16] == "576ef4ca2b0cd7a8"


def test_masks_differ_by_client_step_row_token_layer_and_use() -> None:
    first = masks([(0, 0), (0, 1), (1, 0)], 2, 4)
    parts = [first[0, 0, 0], first[1, 0, 0], first[2, 0, 0], first[0, 1, 0], first[0, 0, 1]]
    parts.append(masks([(0, 0)], 2, 4, layer="down")[0, 0, 0])
    words = TokenWords(torch.tensor([[0, 0, 0]]), torch.tensor([0]))
    one = Dropout(0, "up", RATE, words, 1)
    parts += [one.kept(torch.zeros(4, 32))[0] for _ in range(2)]
    agree = torch.tensor([float((a == b).double().mean()) for i, a in enumerate(parts) for b in parts[:i]])
    assert agree.max() < 1
    assert abs(float(agree.mean()) - (RATE**2 + (1 - RATE) ** 2)) < 0.1  # 0.58 of independent numbers agree


def test_more_tokens_or_rows_leave_the_first_ones_as_they_were() -> None:
    few, many = masks([(4, 2)], 2, 9), masks([(4, 2)], 5, 40)
    assert torch.equal(few, many[:, :2, :9])


def dropped(starts: list[Start]) -> list[Start]:
    return [replace(start, dropout=RATE) for start in starts]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama, "core"),
        (bert, "lora"),
        *(pytest.param(make, "lora", marks=pytest.mark.slow) for make in (llama, gpt2, vit)),
    ],
)
def test_client_has_the_same_bits_in_any_pack(make: Callable[[], Tiny], kind: str) -> None:
    tiny, start = make(), {"lora": lora_start, "core": core_start}[kind]
    given = dropped([start(tiny, rank, scale=0.2 * rank) for rank in (1, 2, 3, 2, 1, 3, 2, 4)])
    assert not differing(tiny, given, batches(tiny), None)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama, "lora"),
        (llama, "core"),
        (gpt2, "lora"),
        (bert, "lora"),
        (albert, "lora"),
        (convbert, "lora"),
        (vit, "lora"),
        (own, "lora"),
    ],
)
def test_pack_matches_peft_with_the_same_masks(make: Callable[[], Tiny], kind: str) -> None:
    """albert uses a layer twice, each time with other masks; convbert's rows go through one by one in the reference;
    rows of texts have unequal lengths.  eps: see tests/methods/test_protocol.py."""
    tiny = make()
    start = {"lora": lora_start, "core": core_start}[kind](tiny, 3)
    compare(tiny, replace(start, dropout=RATE), Optimizer(eps=1e-4), 1e-2)


def test_dropout_is_refused_where_layers_do_not_see_row_after_row(tmp_path: Path) -> None:
    """XLNet's have tokens before rows: a token would have the word of another row's."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"a": f"text {n}", "y": "pq"[n % 2]}) + "\n" for n in range(12)))
    random = {"type": "xlnet", "d_model": 16, "n_head": 2, "n_layer": 1, "d_inner": 24}
    keys = {
        "task": {"name": "table", "path": str(file), "prompt": "{a}", "label": "y"},
        "model": {"path": "random", "random": random, "targets": "layer_1$"},
        "federation": {"clients": 2, "rounds": 1, "partition": {"kind": "iid"}},
        "method": {"name": "fedit", "rank": 2},
        "resources": {"workers": 0},
    }
    assert prepare(load_config(keys)).architecture.alone
    with pytest.raises(UserError, match=r"^method\.dropout: got 0\.2; allowed: 0 with xlnet, whose layers see "):
        prepare(load_config(keys, ["method.dropout=0.2"]))


def test_without_a_rate_nothing_changes_and_with_one_the_step_counts() -> None:
    """Masks follow from the steps of a client's life: a later round has others, a repeated one the same."""
    tiny = llama()
    start = lora_start(tiny, 2)
    model, layers = tiny.packed

    def loss(rate: float, taken: int) -> float:
        works = [ClientWork(0, replace(start, dropout=rate), draw_batches(tiny, 0, 1), taken)]
        (result,) = train_pack(model, layers, tiny.shape, works, LocalRule(Optimizer(), 1e-2, 0, PAD)).results
        return result.metrics["loss"]

    (plain,) = run_pack(tiny, [start], [draw_batches(tiny, 0, 1)], Optimizer(), lr=1e-2)
    assert loss(0.0, 0) == loss(0.0, 5) == plain.metrics["loss"]
    assert loss(RATE, 5) == loss(RATE, 5)
    assert len({loss(0.0, 0), loss(RATE, 0), loss(RATE, 5)}) == 3
