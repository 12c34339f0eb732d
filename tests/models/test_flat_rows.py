"""Rows side by side against the same rows alone, with transformers' own models of every type that may lie flat."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayfed_sub.data.batching import IGNORED
from rayfed_sub.models.flat_rows import PassRule, attending, is_flat, pass_rule
from rayfed_sub.models.presets import FLAT, FLAT_CLASSIFIERS, SAME_IN_ANY_PACK
from rayfed_sub.models.weights import answered
from rayfed_sub.training.losses import forwarded
from rayfed_sub.training.passes import passes

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "max_position_embeddings": 128},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_local_experts": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rotary_dim": 4},
    **{"shared_expert_intermediate_size": 16, "attention_chunk_size": 6, "sliding_window": 6, "max_window_layers": 0},
    **{"use_sliding_window": True, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "is_decoder": True},
    **{"floor_scale": 8, "ffn_dim": 48, "word_embed_proj_dim": 32, "d_model": 32, "num_layers": 2},
}
LEAVE_OUT = ((), ("sliding_window",), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"))
"""Sizes that some types do not take together."""
ROWS = [20, 9, 33, 16, 5, 60]
"""Lengths: most are longer than the window of 6 tokens, and together they are longer than the positions."""
OFTEN = ["cohere2", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "mistral", "opt", "qwen2_moe"]


def tiny(name: str) -> Any:
    """A small model of the type with windows where it has them."""
    config = AutoConfig.for_model(name)
    known = (set(config.to_dict()) | set(config.attribute_map)) & SIZES.keys()
    for left_out in LEAVE_OUT:
        try:
            with torch.random.fork_rng(), torch.device("cpu"):
                torch.manual_seed(0)
                sizes = {key: SIZES[key] for key in known if key not in left_out}
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
            model(input_ids=torch.arange(3, 9)[None])
        except Exception as error:  # each type's configuration and model have checks of their own
            last = error
            continue
        return model.requires_grad_(False)
    raise last


def drawn() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (length,), generator=rng) for length in ROWS]


def flat(model: Any, rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's logits (T, V) in a flat pass, and the gradient (T, h) of a sum over them by its embeddings."""
    batches = [{"input_ids": row[None], "labels": torch.full((1, len(row)), IGNORED)} for row in rows]
    (one,) = passes(batches, PassRule(flat=True), pad=0)
    assert one.flat is not None
    ids, rest = one.inputs["input_ids"], {k: x for k, x in one.inputs.items() if k != "input_ids"}
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with attending(model, one.flat):
        logits_SV = model(inputs_embeds=embedded, **rest, use_cache=False).logits[0]
    begins = torch.tensor([0, *one.seen.parts]).cumsum(0).tolist()
    own = [logits_SV[begin : begin + len(row)] for begin, row in zip(begins, rows, strict=False)]
    weight_V = torch.linspace(-1, 1, logits_SV.shape[1])
    (d_1Sh,) = torch.autograd.grad(sum((x * weight_V).square().sum() for x in own), [embedded])
    return [x.detach() for x in own], [d_1Sh[0, b : b + len(row)] for b, row in zip(begins, rows, strict=False)]


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(FLAT - {*OFTEN}))])
def test_row_is_the_row_alone(name: str) -> None:
    """To rounding, in float64, where no model is ill-conditioned; to the bit in float32, beside any other rows."""
    model, rows = tiny(name), drawn()
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # torch's grouped products know no float64
    for row, ours, gradient in zip(rows, *flat(exact, rows), strict=True):
        embedded = exact.get_input_embeddings()(row[None]).detach().requires_grad_()
        theirs = exact(inputs_embeds=embedded, use_cache=False).logits[0]
        (expected,) = torch.autograd.grad((theirs * torch.linspace(-1, 1, theirs.shape[1])).square().sum(), [embedded])
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
        assert float((gradient - expected[0]).norm()) < 1e-5 * float(expected.norm())
    logits, gradients = flat(model, rows)
    same = [
        torch.equal(whole[k], part)
        for chosen in ([0], [1], [2], [3], [4], [1, 0], [4, 2, 3], [3, 1, 0, 4])
        for whole, parts in zip((logits, gradients), flat(model, [rows[k] for k in chosen]), strict=True)
        for k, part in zip(chosen, parts, strict=True)
    ]
    assert all(same) or name not in SAME_IN_ANY_PACK
    assert model.config._attn_implementation in ("sdpa", "eager")  # as before


def test_window_counts_in_a_flat_row() -> None:
    """A change of the first token is not seen 6 and more tokens later in the same row, as in the row alone."""
    sizes = {key: SIZES[key] for key in SIZES if key not in ("num_experts", "d_model", "n_embd")}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **{**sizes, "num_hidden_layers": 1}))
    model.eval().requires_grad_(False)
    rows = drawn()[:2]
    before, _ = flat(model, rows)
    rows[0] = rows[0].clone()
    rows[0][0] += 1
    after, _ = flat(model, rows)
    assert not torch.equal(before[0][:6], after[0][:6])
    assert torch.equal(before[0][6:], after[0][6:])
    assert torch.equal(before[1], after[1])


def test_rows_whose_positions_follow_from_the_longest_do_not_lie_flat() -> None:
    llama = AutoConfig.for_model("llama", **{key: SIZES[key] for key in ("hidden_size", "vocab_size")})
    assert is_flat(llama)
    llama.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not is_flat(llama)


def test_row_is_as_long_as_the_model_has_positions() -> None:
    model = tiny("gpt2")
    rule = pass_rule(model)
    assert rule.longest == 128
    assert rule.canonical(127) == 128
    assert pass_rule(tiny("llama")).longest is None


def classifier(name: str) -> Any:
    """A small classifier of the type, for three classes, whose embeddings alone have gradients."""
    sizes = {**SIZES, "num_labels": 3, "embedding_size": 24, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
    sizes |= {"num_hidden_layers": 2, "is_decoder": False, "pad_token_id": 1, "max_position_embeddings": 64}
    known = AutoConfig.for_model(name)
    given = {key: value for key, value in sizes.items() if hasattr(known, key)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **given)).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    return model


@pytest.mark.parametrize("name", sorted(FLAT_CLASSIFIERS))
def test_classified_row_is_the_row_alone(name: str) -> None:
    """Logits and gradients of the flat row, which its head leaves, are those of transformers' model on each row."""
    model, texts = classifier(name).double(), [row.clamp_min(3) for row in drawn()]
    texts[0][[4, -1]] = 1  # RoBERTa's kin leave the padding token out where they count positions
    rule, pad = pass_rule(model), 1
    assert rule.pooled
    assert (rule.padding is None) == (name not in ("camembert", "roberta", "xlm-roberta"))
    batches = [labelled(texts[:4], pad), labelled(texts[4:], pad)]
    (one,) = passes(batches, rule, pad)
    assert one.seen.parts == (4, 2)
    assert one.before is not None
    assert one.before.size < 1.2 * sum(ROWS)
    ours = forwarded(model, one).logits[one.places]
    theirs = torch.cat(
        [
            answered(model, {"input_ids": row[None], "token_type_ids": second(row)[None]}, causal=False).logits
            for row in texts
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(ours.square().sum(), [weight])
    (expected,) = torch.autograd.grad(theirs.square().sum(), [weight])
    assert float((gradient - expected).norm()) < 1e-5 * float(expected.norm())
    assert model.config._attn_implementation in ("sdpa", "eager")  # as before


def labelled(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    """Rows of pairs, the second text from the middle on, with a class each."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    types = pad_sequence([second(row) for row in rows], batch_first=True)
    labels = torch.arange(len(rows)) % 3
    return {"input_ids": ids, "attention_mask": real, "token_type_ids": types, "labels": labels}


def second(row: Tensor) -> Tensor:
    return (torch.arange(len(row)) >= len(row) // 2).long()


def test_model_that_takes_tokens_in_chunks_does_not_lie_flat() -> None:
    """A chunk of a flat row would hold tokens of one client, or of some."""
    chunked = classifier("bert")
    chunked.config.chunk_size_feed_forward = 16
    assert not pass_rule(chunked).pooled
    assert is_flat(AutoConfig.for_model("bert"))
    assert not is_flat(AutoConfig.for_model("bert", chunk_size_feed_forward=16))
