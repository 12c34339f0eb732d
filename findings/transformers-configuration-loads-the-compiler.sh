#!/usr/bin/env bash
# transformers 5.23.0: importing a model's configuration class alone imports
# torch, torch's compiler and torch's distributed tensors.
#
# Behaviour: configuration_llama imports transformers.utils.type_validators,
# which imports transformers.activations for its list of names; that imports the
# hub's kernels, the attention functions and the weight loading, and these
# import torch._dynamo, torch.distributed.tensor and sympy. So reading a
# config.json, or unpickling a configuration in another process, costs what
# loading a model's code costs, more than 2,000 modules in all.
#
# Why one would not guess it: configurations are plain records that work without
# torch, and transformers loads its submodules lazily so that looking at one does
# not load models. A process that only handles configurations (a scheduler, a
# server of metadata) seems to be light, and is as slow to start and as large as
# one that trains.
#
# Seen with Python 3.11 and torch 2.13.0 for processors: modeling_llama is not
# loaded, torch._dynamo, torch.distributed.tensor and sympy are; four seconds of
# CPU, of which torch itself takes one and a half.
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys
import time

began = time.process_time()
import transformers.models.llama.configuration_llama  # noqa: E402, F401

print(f"{time.process_time() - began:.1f} s of CPU, {len(sys.modules)} modules")
held = []
for name, expected in (
    ("transformers.models.llama.modeling_llama", False),
    ("torch", True),
    ("torch._dynamo", True),
    ("torch.distributed.tensor", True),
    ("sympy", True),
):
    yes = (name in sys.modules) == expected
    held.append(yes)
    print("as described:" if yes else "CHANGED:", name, "loaded" if name in sys.modules else "not loaded")
sys.exit(0 if all(held) else 1)
EOF
