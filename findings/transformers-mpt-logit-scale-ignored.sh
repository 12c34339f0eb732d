#!/usr/bin/env bash
# transformers 5.23.0: MptConfig's logit_scale changes nothing.
#
# Behaviour: the config has logit_scale, documented as "If not None, scale the
# logits by this value", keeps it through saving and loading, and the model
# never reads it. Cohere's key of the very same name is applied.
#
# Why one would not guess it: an unknown key might be ignored, but this one is a
# declared and documented field. A checkpoint trained elsewhere with a scale
# loads without a word, and its logits, its loss and the sharpness of what it
# samples are those of another model. Greedy output is the same, so a look at
# the text does not show it.
#
# Seen with Python 3.11: mpt with logit_scale 5 and without: equal logits;
# cohere with logit_scale 5 and 1: 5 x.
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
MPT = {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 1, "expansion_ratio": 1}
COHERE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}


@torch.no_grad()
def logits(kind, values, scale):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, logit_scale=scale, **values)
    model = AutoModelForCausalLM.from_config(config).eval()
    print(kind, "logit_scale", model.config.logit_scale, end=": ")
    out = model(torch.arange(3, 11)[None]).logits
    print(f"largest logit {out.abs().max():.4f}")
    check(f"{kind} keeps the key as it was given", model.config.to_dict()["logit_scale"] == scale)
    return out


plain, scaled = logits("mpt", MPT, None), logits("mpt", MPT, 5.0)
check("mpt: logit_scale=5 gives the very logits of none", torch.equal(plain, scaled))
plain, scaled = logits("cohere", COHERE, 1.0), logits("cohere", COHERE, 5.0)
check("cohere: logit_scale=5 gives 5 x those of 1", torch.allclose(plain * 5, scaled))

sys.exit(0 if held and all(held) else 1)
EOF
