"""The longest row of models with a table of positions, against the models themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rayfed_sub.config.schema import Model
from rayfed_sub.core.arrays import Guard
from rayfed_sub.models.architecture import architecture, build
from rayfed_sub.models.positions import position_limit
from rayfed_sub.models.weights import assemble, load_weights
from rayfed_sub.training.inference import answers
from rayfed_sub.training.losses import predicted

TOKENS = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
BLOCK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LONG = {"max_position_embeddings": 20}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
# Type, sizes, the longest row of a model configured for 20 positions.  RoBERTa's kind begins at padding token 1 + 1.
MODELS: list[tuple[str, dict[str, Any], int | None]] = [
    ("gpt2", GPT, 20),
    ("gptj", {**GPT, "rotary_dim": 4}, 20),
    ("opt", {**BLOCK, **LONG, "ffn_dim": 24, "word_embed_proj_dim": 16}, 20),
    ("bert", {**BLOCK, **LONG}, 20),
    ("distilbert", {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, **LONG}, 20),
    ("nystromformer", {**BLOCK, **LONG, "num_landmarks": 4, "segment_means_seq_len": 4}, 20),
    ("roberta", {**BLOCK, **LONG}, 18),
    ("mpnet", {**BLOCK, **LONG}, 18),
    ("canine", {**BLOCK, **LONG, "num_hash_buckets": 32, "local_transformer_stride": 4, "downsampling_rate": 2}, 20),
    ("esm", {**BLOCK, **LONG, "position_embedding_type": "rotary"}, None),  # has position_ids and does not read them
    ("deberta", {**BLOCK, **LONG, "position_biased_input": False}, None),
    ("llama", {**BLOCK, **LONG}, None),
    ("modernbert", {**BLOCK, **LONG}, None),
    ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 20}, 20),
    ("whisper", {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "max_target_positions": 20}, 20),
    ("xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": 1, "attention_heads": 2, **LONG}, None),
]
CAUSAL = {"gpt2", "gptj", "opt", "llama", "bloom", "mpt", "whisper", "xglm"}


@pytest.mark.parametrize(("name", "sizes", "longest"), MODELS, ids=[name for name, _, _ in MODELS])
def test_row_of_the_limit_is_read_and_a_longer_one_is_not(
    name: str, sizes: dict[str, Any], longest: int | None
) -> None:
    config = AutoConfig.for_model(name, **TOKENS, **sizes)
    auto: Any = AutoModelForCausalLM if name in CAUSAL else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    with torch.device("meta"):
        assert position_limit(auto.from_config(config), config) == longest

    def read(tokens: int) -> None:
        with torch.no_grad():
            model(input_ids=torch.full((1, tokens), 5), attention_mask=torch.ones(1, tokens, dtype=torch.long))

    read(longest or 40)
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError)):
            read(longest + 1)


@pytest.mark.parametrize(("name", "kept"), [("roberta", 1), ("mpnet", 1), ("bert", 3), ("llama", 3)])
def test_tokenizer_without_padding_does_not_move_pretrained_positions(name: str, kept: int, tmp_path: Path) -> None:
    """Such a tokenizer fills rows up with its end, 3.  Models of RoBERTa's kind count from the padding token on."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **TOKENS, **BLOCK, **LONG, num_labels=2)
    theirs: Any = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model = Model(path=str(tmp_path))
    built = architecture(model, "text-classification", "ab", TOKENS["vocab_size"], pad=3)
    assert built.hf_config.pad_token_id == kept
    ours: Any = assemble(built, load_weights(model, built, seed=0))
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
# Types with 32 positions of their own, whose frequencies are others in longer rows.
TURNING: dict[str, dict[str, Any]] = {
    "phi3": {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "rope_parameters": {**LONG_ROPE, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    },
    "llama": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("name", TURNING)
def test_frequencies_follow_from_a_row_alone(name: str) -> None:
    """Losses and answers are transformers' own on a fresh model for each row, whatever the model has seen before and
    whatever stands beside the row, and shared memory is left as it is."""
    model = Model(path="random", random={"type": name, **TOKENS, **BLOCK, "initializer_range": 0.3, **TURNING[name]})
    bones = architecture(model, "causal-lm", vocabulary=TOKENS["vocab_size"], pad=1)
    tensors = load_weights(model, bones, seed=0)
    shared, ours = Guard(tensors.items()), assemble(bones, tensors)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 64, (tokens,), generator=rng) for tokens in (20, 30, 40, 60)]

    def fresh() -> Any:
        with torch.random.fork_rng():
            theirs: Any = build(bones.hf_config, bones.kind, device="cpu")
        theirs.load_state_dict(tensors, strict=False)
        return theirs

    def padded(numbers: list[int]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([rows[number] for number in numbers], batch_first=True, padding_value=1)
        real = torch.arange(ids.shape[1]) < torch.tensor([[len(rows[number])] for number in numbers])
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}

    together = predicted(ours, padded([0, 1, 2, 3]), pad=1)
    for number in (3, 2, 0, 1):
        alone = predicted(ours, padded([number]), pad=1)
        assert torch.equal(together.loss_L[together.row_L == number], alone.loss_L)
        expected = fresh()(input_ids=rows[number][None], labels=rows[number][None]).loss
        torch.testing.assert_close(alone.loss_L.mean(), expected, rtol=1e-5, atol=1e-5)
    said = answers(ours, [row[:-8].tolist() for row in rows], pad=1, ends=[3], limit=12)
    for row, answer in zip(rows, said, strict=True):
        assert answers(fresh(), [row[:-8].tolist()], pad=1, ends=[3], limit=12) == [answer]
    shared.check()
