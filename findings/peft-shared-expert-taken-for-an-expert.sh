#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: LoRA asked for on DeepSeek's shared expert is put
# on the routed experts, and on nothing else.
#
# Behaviour: transformers 5 holds a layer's routed experts as stacked parameters, and
# DeepSeek-V3's shared expert beside them as plain linear layers (gate_proj, up_proj,
# down_proj). target_modules with the full name model.layers.1.mlp.shared_experts.
# down_proj gives an adapter on model.layers.1.mlp.experts: the shared expert gets
# none. gate_proj and up_proj together do the same. up_proj alone raises a
# ValueError that asks for gate_proj, also for model.layers.0.mlp.up_proj, whose
# layer is dense and has no experts at all. Attention's layers are adapted as named.
#
# Why one would not guess it: peft rewrites names that end like the routed experts'
# old ones for the stacked parameters, whatever stands before that end; a full name
# is its most exact way of saying what to adapt. Training runs and the loss falls,
# with other weights than those that were asked for.
#
# Seen with Python 3.11, torch 2.13.0, two layers of which the first is dense:
#   shared_experts.down_proj            -> LoRA on layers.1.mlp.experts alone
#   shared_experts.gate_proj, up_proj   -> LoRA on layers.1.mlp.experts alone
#   shared_experts.up_proj              -> ValueError: ... without also targeting gate_proj
#   layers.0.mlp.up_proj (dense)        -> the same ValueError
#   layers.1.self_attn.o_proj           -> LoRA on it
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
from transformers import AutoConfig, AutoModelForCausalLM

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


torch.manual_seed(0)
config = AutoConfig.for_model(
    "deepseek_v3", vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
    first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=8,
)
model = AutoModelForCausalLM.from_config(config)
linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
shared, dense = "model.layers.1.mlp.shared_experts", "model.layers.0.mlp.up_proj"


def adapted(*names):
    """The modules that get an adapter, or the error's text."""
    try:
        made = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=list(names)))
    except ValueError as error:
        return str(error)
    found = {name.partition(".lora_A")[0] for name, _ in made.named_parameters() if ".lora_A" in name}
    return {name.removeprefix("base_model.model.") for name in found}


check("the shared expert's layers are plain linear ones", {f"{shared}.{p}_proj" for p in ("gate", "up", "down")} < linears)
for names in ([f"{shared}.down_proj"], [f"{shared}.gate_proj", f"{shared}.up_proj"]):
    found = adapted(*names)
    print(names, "->", found)
    check("the adapter is on the routed experts alone", found == {"model.layers.1.mlp.experts"})
for name in f"{shared}.up_proj", dense:
    found = adapted(name)
    print(name, "->", found)
    check("it is refused", isinstance(found, str) and "without also targeting gate_proj" in found)
check("attention's layer is adapted as named", adapted("model.layers.1.self_attn.o_proj") == {"model.layers.1.self_attn.o_proj"})

sys.exit(0 if held and all(held) else 1)
EOF
