"""GGUF files of tiny models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


def write_gguf(path: Path, tensors: Mapping[str, torch.Tensor], kind: str = "F32", others: str = "F32") -> None:
    """A Llama of two blocks of width 32, two heads and an inner size of 48 as llama.cpp writes it, with a byte-level
    vocabulary of 259 tokens; its matrices of whole GGUF blocks in the type `kind`, the embedding in `others`."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(259)
    # transformers adds the first where there is none, and wants what merges make among the tokens.
    tokens = ["<|endoftext|>", "<s>", "</s>", *sorted(ByteLevel.alphabet())[:-1], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    short = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for block in range(2):
        for long, brief in short.items():
            names[f"model.layers.{block}.{long}.weight"] = f"blk.{block}.{brief}.weight"
    heads = {"attn_q": 2, "attn_k": 1}
    for long, brief in names.items():
        values = tensors[long]
        count = heads.get(brief.split(".")[-2])
        if count:  # llama.cpp interleaves the two halves that rotary embedding pairs
            values = values.view(count, 2, 8, 32).transpose(1, 2).reshape(values.shape)
        own = others if brief == "token_embd.weight" else kind
        if own == "F32" or values.ndim == 1 or values.shape[1] % 32:
            writer.add_tensor(brief, values.numpy())
        else:
            form = gguf.GGMLQuantizationType[own]
            writer.add_tensor(brief, gguf.quants.quantize(values.numpy(), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
