#!/usr/bin/env bash
# peft 0.21.2: AutoPeftModelForCausalLM gives another model than PeftModel for
# the same adapter folder, if a tokenizer lies beside the adapter.
#
# Behaviour: if the folder holds a tokenizer with more tokens than the base has
# embeddings, AutoPeftModel... resizes the base to it before it puts the adapter
# on. The new rows are made up (from the mean of the others), also in lm_head,
# and take their share of every softmax. PeftModel.from_pretrained(base, folder)
# leaves the base as it is.
#
# Why one would not guess it: the adapter's own config says nothing about
# embeddings, loading an adapter is not expected to touch the base's shape, and
# saving the tokenizer beside the model is what trainers do on their own. One
# <pad> token that was added for batching and never trained is enough: logits
# get wider, the loss of the same rows changes, and a comparison of weights or
# merging with another adapter's model fails on the shape. No warning is given.
#
# Seen with Python 3.11, base of 40 tokens, tokenizer of 41:
#   as trained         40 logits, loss 3.6569
#   PeftModel          40 logits, loss 3.6569
#   AutoPeft, no tokenizer in the folder  40 logits, loss 3.6569
#   AutoPeft, tokenizer in the folder     41 logits, loss 3.6815
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2)).save_pretrained("base")


def base():
    return AutoModelForCausalLM.from_pretrained("base")


@torch.no_grad()
def look(name, model):
    row = torch.arange(8)[None]
    out = model.eval()(input_ids=row, labels=row)
    print(f"{name}: {out.logits.shape[-1]} logits, loss {out.loss:.4f}")
    return out.logits.shape[-1], round(out.loss.item(), 4)


trained = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
trained.save_pretrained("adapter")
seen = {"as trained": look("as trained", trained)}
seen["auto, bare"] = look("AutoPeft, no tokenizer in the folder", AutoPeftModelForCausalLM.from_pretrained("adapter"))

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="<pad>")
check("the tokenizer has one token more than the base", len(tokenizer) == 41)
tokenizer.save_pretrained("adapter")
seen["auto"] = look("AutoPeft, tokenizer in the folder", AutoPeftModelForCausalLM.from_pretrained("adapter"))
seen["peft"] = look("PeftModel, tokenizer in the folder", PeftModel.from_pretrained(base(), "adapter"))

check("without a tokenizer AutoPeft gives what was trained", seen["auto, bare"] == seen["as trained"])
check("with one PeftModel still does", seen["peft"] == seen["as trained"])
check("with one AutoPeft's model has 41 logits, not 40", (seen["as trained"][0], seen["auto"][0]) == (40, 41))
check("and another loss for the same row", seen["auto"][1] > seen["as trained"][1] + 0.01)

sys.exit(0 if held and all(held) else 1)
EOF
