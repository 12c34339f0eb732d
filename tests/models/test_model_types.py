"""What works with which type of model: some types in quick tests, all in slow ones, and the table of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rayfed_sub.models.architecture import skeleton
from rayfed_sub.models.weights import ruled
from tests.helpers.model_types import MAPPINGS, PAGE, Verdict, anywhere, built, judged, page, stored, types_of

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


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("bart", "an encoder-decoder that looks for the end in each row"),
        ("convbert", "convolutions past the attention mask"),
        ("xlnet", "tokens before rows, a last token at the row's end"),
    ],
)
def test_all_of_it_works_with_classified_texts(name: str, feature: str) -> None:
    verdict = judged(name, "text-classification", blocks=2)
    assert verdict.works, (feature, verdict.reason)
    assert (verdict.pack == "one at a time") == (name == "xlnet")


def test_batch_normalization_of_tokens_as_an_image_has_each_row_s_own_gradient() -> None:
    """torch's own gradient, in eval mode, is a wrong one for a single row whose tokens (1, T, C) are viewed as an image
    (1, C, h, w); a model that is put together here has the same for a row alone and beside others."""
    _, bones = built("cvt", "image-classification")
    norm = next(part for part in ruled(skeleton(bones), bones).modules() if isinstance(part, nn.BatchNorm2d))
    norm = norm.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            tensor.fill_(1) if name != "running_mean" else tensor.fill_(0)
    C = norm.num_features
    x_BTC, weight_Chw = torch.randn(3, 16, C, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 16 * C)

    def gradient(x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC.clone().requires_grad_()
        y_BChw = norm(x_BTC.permute(0, 2, 1).view(-1, C, 4, 4))
        (y_BChw * weight_Chw.view(C, 4, 4)).sum().backward()
        assert x_BTC.grad is not None
        return x_BTC.grad

    torch.testing.assert_close(gradient(x_BTC), torch.cat([gradient(row[None]) for row in x_BTC]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_type_is_as_the_table_says(name: str, kind: str) -> None:
    """Where this fails after a change, `make models` makes the table anew."""
    assert anywhere(judged(name, kind)) == anywhere(STORED[name, kind])


def test_table_has_all_types_and_the_page_is_made_of_it() -> None:
    assert [(verdict.type, verdict.kind) for verdict in stored()] == CASES
    assert page(stored()) == PAGE.read_text(encoding="utf-8")


def test_differences_near_their_limit_are_the_processor_s() -> None:
    near = Verdict("a", "b", pack="no, 2e-05", fedftg="yes", reason="differs: pack")
    assert anywhere(near) == anywhere(replace(near, pack="same bits", reason=""))
    assert anywhere(near) != anywhere(replace(near, pack="no, 4e-05"))
    assert anywhere(replace(near, type="llama", pack="yes")) != anywhere(replace(near, type="llama", pack="same bits"))
    assert anywhere(replace(near, reason="no target")).reason == "no target"


def test_page_counts_what_works() -> None:
    good = Verdict("llama", "causal-lm", True, "h.0.up", "yes", "yes", "yes", "same bits", "yes", "yes", "yes")
    bad = replace(good, type="other", export="no, 2e-01", reason="differs: export")
    text = page([good, bad, Verdict("third", "causal-lm", reason="a | b")])
    assert "| language models | 3 | 2 | 1 |" in text
    assert "| `other` | `h.0.up` | yes | yes | yes | same bits | yes | yes | no, 2e-01 | differs: export |" in text
    assert text.endswith("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
