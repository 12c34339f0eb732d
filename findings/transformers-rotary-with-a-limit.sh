#!/usr/bin/env bash
# transformers 5.23.0: whether a model takes rows longer than its config's
# positions does not follow from its kind of position embedding.
#
# Behaviour: GPT-J and CodeGen have rotary positions, yet look them up in a
# table of n_positions rows: one token more raises an index error. Llama and
# GPT-NeoX, rotary too, take any length. OPT and GPT-2 (learned tables) raise;
# XGLM, with a table as well, quietly makes a longer one (sinusoids).
#
# Why one would not guess it: rotary embeddings are the standard example of
# positions without a table, and max_position_embeddings the standard example of
# a limit that is a hint. So neither "rotary, hence no limit" nor "the config
# gives a limit, hence an error beyond it" is a safe rule for cutting rows; and
# a model's error arrives only with the first row that is too long.
#
# Seen with Python 3.11, 16 positions in each config, 16 and then 17 tokens:
#   gptj, codegen (rotary): 17 raises "index 16 is out of bounds ..."
#   llama, gpt_neox (rotary): taken
#   xglm (table): taken; opt, gpt2 (table): raises IndexError
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
         "max_position_embeddings": 16}
KINDS = {
    "gptj": ({**GPT, "rotary_dim": 8}, False),
    "codegen": ({**GPT, "n_ctx": 16, "rotary_dim": 8}, False),
    "llama": (LLAMA, True),
    "gpt_neox": (LLAMA, True),
    "gpt2": (GPT, False),
    "opt": ({"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4, "max_position_embeddings": 16}, False),
    "xglm": ({"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 32,
              "max_position_embeddings": 16}, True),
}


@torch.no_grad()
def takes(model, count):
    try:
        return model(torch.arange(3, 3 + count)[None]).logits.shape[1] == count
    except (IndexError, RuntimeError) as error:
        print(f"{model.config.model_type}, {count} tokens: {type(error).__name__} {error}")
        return False


for kind, (values, longer) in KINDS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **values)).eval()
    check(f"{kind} says max_position_embeddings 16", model.config.max_position_embeddings == 16)
    check(f"{kind} takes 16 tokens", takes(model, 16))
    check(f"{kind} {'takes' if longer else 'does not take'} 17 tokens", takes(model, 17) == longer)

sys.exit(0 if held and all(held) else 1)
EOF
