#!/usr/bin/env bash
# transformers 5.23.0: its own `sdpa` attention registered under a second name
# gives a model with a sliding window other logits, silently.
#
# Behaviour: `AttentionInterface.register(name, function)` is all that a model
# asks for to take the function. Masks are made by another table,
# `AttentionMaskInterface`; a name that is not in it gets no mask at all, and
# `sdpa`'s function then attends causally to everything: the window of Mistral,
# Qwen 2 or Gemma 3 is gone. The function is handed `sliding_window` as an
# argument, and does not read it. No warning is given, and rows shorter than the
# window are equal to the bit.
#
# Why one would not guess it: the registered function is the library's own, the
# configuration still says `sliding_window`, and a plain causal model under the
# same second name is right.
#
# Seen with Python 3.11: Mistral with a window of 6 on a row of 20 tokens, logits
# after the sixth token differ; registering the library's own mask function under
# the same name makes them equal to the bit.
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
config = MistralConfig(vocab_size=64, num_key_value_heads=1, initializer_range=0.3, sliding_window=6, **sizes)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
row = torch.arange(3, 23)[None]


@torch.no_grad()
def logits(implementation):
    model.set_attn_implementation(implementation)
    return model(input_ids=row, use_cache=False).logits[0]


AttentionInterface.register("twin", sdpa_attention_forward)
own, twin = logits("sdpa"), logits("twin")
AttentionMaskInterface.register("twin", sdpa_mask)
masked = logits("twin")
held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


check("the first six tokens' logits are equal", torch.allclose(own[:6], twin[:6], atol=1e-5))
check("the others' are not", not torch.allclose(own[6:], twin[6:], atol=1e-2))
check("with a mask function of the same name all are equal", torch.equal(own, masked))

sys.exit(0 if held and all(held) else 1)
END
