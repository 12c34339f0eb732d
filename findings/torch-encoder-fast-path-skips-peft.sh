#!/usr/bin/env bash
# torch 2.13.0, peft 0.21.2: LoRA in torch's TransformerEncoderLayer trains, and has
# no effect in evaluation.
#
# Behaviour: peft puts LoRA on linear1 or linear2 of a TransformerEncoderLayer with
# batch_first=True. In train mode it works. In eval mode torch takes its fast path
# (torch.backends.mha), which reads linear1.weight past linear1's forward; peft's
# layer gives the base's weight there. The outputs are those of the model without
# LoRA, to rounding, under no_grad and, since torch asks only the weights that it
# reads, which peft has frozen, also where LoRA's own parameters need gradients:
# then the output has none.
#
# Why one would not guess it: the fast path is documented as a speed-up that steps
# aside where a gradient is needed, and a replaced submodule is expected to be
# called. Nothing warns; the training loss falls while every evaluation shows the
# pretrained model, which looks like a model that does not learn. Merging LoRA into
# the weights, or torch.backends.mha.set_fastpath_enabled(False), puts it right.
#
# Seen with Python 3.11, largest difference of outputs from the model without LoRA:
#             train   eval    under no_grad  without the fast path  merged
#   linear1  0.8286  0.0000         0.0000                 0.8286  0.8286
#   linear2  0.7019  0.0000         0.0000                 0.7019  0.7019
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


torch.set_num_threads(1)
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
base = torch.nn.TransformerEncoder(layer, 2).eval()
x = torch.randn(2, 5, 16)
with torch.no_grad():
    pretrained = base(x)


def away(out):
    return (out.detach() - pretrained).abs().max().item()


for target in "linear1", "linear2":
    config = LoraConfig(target_modules=[target], r=4, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    trained = model.train()(x)
    in_eval = model.eval()(x)
    with torch.no_grad():
        without_grad = model(x)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        slow = model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload().eval()(x)
    print(f"{target}: train {away(trained):.4f}, eval {away(in_eval):.7f}, under no_grad {away(without_grad):.7f}, "
          f"without the fast path {away(slow):.4f}, merged {away(merged):.4f}")
    check(f"{target}: LoRA changes the output in train mode", away(trained) > 0.01 and trained.requires_grad)
    check("in eval mode it does not", away(without_grad) < 1e-5)
    check("nor where gradients are asked for, and there is none", away(in_eval) < 1e-5 and not in_eval.requires_grad)
    check("without the fast path it does", torch.allclose(slow, trained, atol=1e-5))
    check("as merged weights do", torch.allclose(merged, trained, atol=1e-4))

sys.exit(0 if held and all(held) else 1)
EOF
