#!/usr/bin/env bash
# transformers 5.23.0: AutoModelForCausalLM gives models that look ahead.
#
# Behaviour: encoder types are registered as causal language models too (bert,
# roberta, electra, rembert, roformer, xlm and more). Unless the config says
# is_decoder=True (for xlm: causal=True), their attention goes both ways, while
# the loss of the bert-like types is still that of the next token. The model
# then learns to read the answer off the next position.
#
# Why one would not guess it: the class is called ForCausalLM, its loss takes
# labels=input_ids like every other, and training works better than ever. A
# line in the log, of some of the types, is the only sign. The test below trains
# on uniformly random tokens, whose next token nobody can foretell: no honest
# model gets below ln(29) = 3.367, yet the loss falls to 0.02 and every next
# token of fresh random rows is "predicted".
#
# Seen with Python 3.11, 300 steps on random tokens, loss and share of right
# next tokens on fresh rows:
#   gpt2                  3.372  0.04
#   bert                  0.020  1.00
#   roberta               0.020  1.00
#   bert, is_decoder      3.372  0.04
#   earlier logits move with the last token: bert, roberta, electra, rembert,
#   roformer, xlm; not with is_decoder=True (xlm: causal=True)
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


import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
VOCAB, FIRST = 32, 3
FLOOR = math.log(VOCAB - FIRST)
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}


def build(kind, values):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **values))


def rows(count):
    return torch.randint(FIRST, VOCAB, (count, 12))


@torch.no_grad()
def looks_ahead(kind, values):
    model = build(kind, values).eval()
    one = rows(1)
    other = one.clone()
    other[0, -1] = FIRST + (one[0, -1] - FIRST + 1) % (VOCAB - FIRST)
    return bool((model(one).logits[0, :-1] != model(other).logits[0, :-1]).any())


def train(kind, values, steps=300):
    model = build(kind, values).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        batch = rows(32)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fresh = rows(64)
    with torch.no_grad():
        guessed = model.eval()(fresh).logits[:, :-1].argmax(-1)
    return sum(losses[-20:]) / 20, (guessed == fresh[:, 1:]).float().mean().item()


check("gpt2 does not look ahead", not looks_ahead("gpt2", GPT2))
for kind in "bert", "roberta", "electra", "rembert", "roformer":
    check(f"{kind} looks ahead", looks_ahead(kind, BERT))
    check(f"{kind} with is_decoder=True does not", not looks_ahead(kind, {**BERT, "is_decoder": True}))
check("xlm looks ahead", looks_ahead("xlm", XLM))
check("xlm with causal=True does not", not looks_ahead("xlm", {**XLM, "causal": True}))

for name, kind, values, honest in (("gpt2", "gpt2", GPT2, True), ("bert", "bert", BERT, False),
                                   ("roberta", "roberta", BERT, False),
                                   ("bert, is_decoder=True", "bert", {**BERT, "is_decoder": True}, True)):
    loss, right = train(kind, values)
    print(f"{name}: loss {loss:.3f} (floor {FLOOR:.3f}), right next tokens {right:.2f}")
    if honest:
        check(f"{name} stays at the floor", abs(loss - FLOOR) < 0.1 and right < 0.15)
    else:
        check(f"{name} foretells random tokens", loss < 0.2 and right > 0.95)

sys.exit(0 if held and all(held) else 1)
EOF
