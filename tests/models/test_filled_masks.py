"""transformers is told whether rows are filled up, and computes what it would have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, masking_utils

from rayfed_sub.models.filled_masks import told

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def model_of(kind: str) -> nn.Module:
    own = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2} if kind == "distilbert" else {}
    local = {"local_attention": 4, "global_attn_every_n_layers": 2} if kind == "modernbert" else {}
    config = AutoConfig.for_model(kind, **SIZES, **own, **local, pad_token_id=0, num_labels=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "llama", "falcon"])
@pytest.mark.parametrize("filled", [False, True])
def test_logits_have_the_same_bits(kind: str, filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders, one with windows that are shorter than the rows, a decoder, and one whose attention is its own
    affair."""
    model, ids = model_of(kind), torch.arange(1, 25).view(3, 8)
    mask = torch.ones_like(ids)
    if filled:
        ids[1:, 6:], mask[1:, 6:] = 0, 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        asked = list[str]()
        for name in ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa"):
            own = getattr(masking_utils, name)
            monkeypatch.setattr(
                masking_utils, name, lambda padding, *a, own=own, **k: asked.append(padding) or own(padding, *a, **k)
            )
        with told(model, filled=filled):
            logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits, expected)
    assert all(padding is None for padding in asked) or kind == "falcon"
    assert model.config._attn_implementation == "sdpa"
