#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0: the tokenizer of a GGUF file may have a token
# that the file has not, whose number lies beyond the model's embedding.
#
# Behaviour: of a file with a byte-level vocabulary (tokenizer.ggml.model "gpt2", as
# Llama 3 has) without the text <|endoftext|>, AutoTokenizer has that token all the
# same, as a special one with the next free number: 261 tokens for the file's 260.
# AutoModelForCausalLM, of the same file, has 260 rows. A text that contains
# <|endoftext|> then raises IndexError in the embedding. With the token among the
# file's own, as two files alike but for this one show, nothing is added.
#
# Why one would not guess it: a GGUF file holds its whole vocabulary with types and
# the numbers of its special tokens, and llama.cpp uses no other. The name is that of
# GPT-2's unknown token, a default of the class that reads the file.
#
# Seen with Python 3.11, torch 2.13.0:
#   without <|endoftext|>: 261 tokens, 260 rows, "ab<|endoftext|>" is [259, 260]
#   with it as token 0:    260 tokens, 260 rows, "ab<|endoftext|>" is [259, 0]
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import sys

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


BLOCK = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32), "ffn_gate": (48, 32),
         "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}


def write(path, first):
    tokens = [first, "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    file = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 32), ("head_count", 2),
                        ("feed_forward_length", 48), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6),
                        ("rope_freq_base", 10000.0), ("vocab_size", len(tokens)), ("tokenizer_model", "gpt2"),
                        ("tokenizer_pre", "llama-bpe"), ("token_list", tokens), ("token_merges", ["a b"]),
                        ("token_types", [3, 3, 3] + [1] * 257), ("bos_token_id", 1), ("eos_token_id", 2)):
        getattr(file, f"add_{name}")(value)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), **{f"blk.0.{n}": s for n, s in BLOCK.items()}}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


found = {}
for path, first in ("without.gguf", "<unk>"), ("with.gguf", "<|endoftext|>"):
    write(path, first)
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=path)
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=path)
    ids = tokenizer("ab<|endoftext|>", return_tensors="pt").input_ids
    rows = model.get_input_embeddings().weight.shape[0]
    try:
        model(ids)
        ran = True
    except IndexError:
        ran = False
    found[path] = (len(tokenizer), rows, ids[0].tolist(), ran)
    print(path, found[path])

check("a token more than the file has, beyond the embedding", found["without.gguf"] == (261, 260, [259, 260], False))
check("none where the file has <|endoftext|>", found["with.gguf"] == (260, 260, [259, 0], True))
sys.exit(not all(held))
PY
