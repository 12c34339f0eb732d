"""What works with which type of model: some types in quick tests, all in slow ones, and the table of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.model_types import MAPPINGS, PAGE, Verdict, judged, page, stored, types_of

STORED = {(verdict.type, verdict.kind): verdict for verdict in stored()}
CASES = [(name, kind) for kind in MAPPINGS for name in types_of(kind)]


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("bloom", "biases of attention by distance, an activation with a backward pass of its own"),
        ("cohere2", "windows in some blocks, attention and MLP side by side"),
        ("deepseek_v3", "low-rank attention, experts beside shared ones"),
        ("gemma2", "soft caps and windows"),
        ("gpt2", "Conv1D, a table of positions"),
        ("jamba", "blocks of attention and of state spaces"),
        ("nemotron", "an MLP without a gate"),
        ("phi3", "gate and projection as one matrix"),
        ("qwen2_moe", "a shared expert with a gate of its own"),
        ("roberta", "an encoder made causal"),
        ("rwkv", "recurrent"),
    ],
)
def test_all_of_it_works(name: str, feature: str) -> None:
    verdict = judged(name, "causal-lm", blocks=2)
    assert verdict.works, feature
    assert all(vars(verdict)[key] for key in ("targets", "causal", "loss", "gradient", "pack", "fedftg", "export"))


@pytest.mark.parametrize(("name", "kind"), [("t5", "seq2seq-lm"), ("qwen2_5_vl", "image-text-to-text")])
def test_models_of_more_than_one_part_work(name: str, kind: str) -> None:
    verdict = judged(name, kind, blocks=2)
    assert verdict.works, verdict
    assert name not in types_of("causal-lm")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_type_is_as_the_table_says(name: str, kind: str) -> None:
    """Where this fails after a change, `make models` makes the table anew."""
    assert judged(name, kind) == STORED[name, kind]


def test_table_has_all_types_and_the_page_is_made_of_it() -> None:
    assert [(verdict.type, verdict.kind) for verdict in stored()] == CASES
    assert page(stored()) == PAGE.read_text(encoding="utf-8")


def test_page_counts_what_works() -> None:
    good = Verdict("llama", "causal-lm", True, "h.0.up", "yes", "yes", "yes", "same bits", "yes", "yes", "yes")
    bad = replace(good, type="other", export="no, 2e-01", reason="differs: export")
    text = page([good, bad, Verdict("third", "causal-lm", reason="a | b")])
    assert "| language models | 3 | 2 | 1 |" in text
    assert "| `other` | `h.0.up` | yes | yes | yes | same bits | yes | yes | no, 2e-01 | differs: export |" in text
    assert text.endswith("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
