#!/usr/bin/env bash
# transformers 5.23.0: caps and scales after lm_head go by a name of their own
# in each model type, and a fresh tiny model does not show the caps.
#
# Behaviour: three types cap their logits at 30 by a tanh and call the key
# final_logit_softcapping (gemma2), logits_soft_cap (recurrent_gemma) and
# output_logit_soft_cap (xlstm). Of the scales, logit_scale (cohere) multiplies
# and logits_scaling (granite) divides.
#
# Why one would not guess it: code that computes logits or a loss from the last
# hidden states and lm_head (a fused or chunked loss, a pipeline's last stage, a
# sharded head) looks the cap up by the one name it knows, and its test on a
# fresh model from a config passes: at such small logits the cap changes them by
# at most 2 parts in 1000. With the weights of a trained model, or the head
# scaled up, the results are far off.
#
# Seen with Python 3.11: largest logit of lm_head and of the model, the largest
# difference as a share, then both with the head's weight times 1000:
#   gemma2           final_logit_softcapping  0.30  3e-05   673 -> 30.0
#   recurrent_gemma  logits_soft_cap          0.98  4e-04  1885 -> 30.0
#   xlstm            output_logit_soft_cap    2.01  1e-03  2012 -> 30.0
#   cohere, logit_scale=8: model's logits are 8 x lm_head's
#   granite, logits_scaling=8: model's logits are lm_head's / 8
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
SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2}


def build(kind, values):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SPECIAL, **values)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, times=1):
    """What lm_head gives, and what the model gives."""
    head, raw = model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda module, args, out: raw.append(out.clone()))
    head.weight.mul_(times)
    out = model(torch.arange(3, 11)[None]).logits
    hook.remove()
    return raw[0], out


NAMES = {"gemma2": "final_logit_softcapping", "recurrent_gemma": "logits_soft_cap",
         "xlstm": "output_logit_soft_cap"}
VALUES = {"gemma2": {**SMALL, "head_dim": 16},
          "recurrent_gemma": {**SMALL, "lru_width": 32, "block_types": ["attention"], "attention_window_size": 16},
          "xlstm": {"hidden_size": 128, "num_hidden_layers": 1, "num_blocks": 1, "num_heads": 2}}
for kind, name in NAMES.items():
    model = build(kind, VALUES[kind])
    raw, out = logits(model)
    share = ((raw - out).abs().max() / raw.abs().max()).item()
    big, capped = (value.abs().max().item() for value in logits(model, 1000))
    print(f"{kind} {name}: {raw.abs().max():.2f}, share {share:.0e}; times 1000: {big:.0f} -> {capped:.1f}")
    keys = model.config.to_dict()
    check(f"{kind} has {name}=30 and none of the other names",
          keys.get(name) == 30 and not [n for n in NAMES.values() if n != name and n in keys])
    check(f"{kind}: a fresh model hides the cap", share < 3e-3)
    check(f"{kind}: at large logits the cap is 30", big > 300 and 29.9 < capped < 30.01)

for kind, name, factor in ("cohere", "logit_scale", 8.0), ("granite", "logits_scaling", 1 / 8):
    raw, out = logits(build(kind, {**SMALL, name: 8.0}))
    check(f"{kind}, {name}=8: the model's logits are {factor:g} x lm_head's", torch.allclose(raw * factor, out))

sys.exit(0 if held and all(held) else 1)
EOF
