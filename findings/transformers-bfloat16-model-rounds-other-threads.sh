#!/usr/bin/env bash
# transformers 5.23.0: while one thread builds a model in bfloat16, tensors that
# other threads make without a dtype are bfloat16; after two overlapping builds
# all later ones are, for the rest of the process.
#
# Behaviour: from_config sets torch's default dtype to the model's and sets it
# back afterwards. The default belongs to the process, not to the thread. A loss
# that another thread computes meanwhile with torch.zeros or torch.tensor is
# rounded to three digits. Of two builds that overlap the one that ends last sets
# back what it found, which may be the other's bfloat16.
#
# Why one would not guess it: the function behind it is called local_torch_dtype,
# torch.no_grad and torch.set_num_threads are each thread's own, and nothing
# fails: a model built aside, to measure or to plan, changes the digits of a
# training in some runs and not in others.
#
# Seen with Python 3.11, torch 2.13.0 on a processor: bfloat16 in the second
# thread during the first one's build; bfloat16 left behind by two builds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'END'
import sys
import threading

import torch
from transformers import PretrainedConfig, PreTrainedModel

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


class Config(PretrainedConfig):
    model_type = "slow"


class Slow(PreTrainedModel):
    """Takes as long to build as the test wants."""

    config_class = Config

    def __init__(self, config, begun, go_on):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(2))
        begun.set()
        go_on.wait()


def building(dtype):
    begun, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: Slow._from_config(Config(), dtype=dtype, begun=begun, go_on=go_on))
    thread.start()
    begun.wait()
    return thread, go_on


def end(thread, go_on):
    go_on.set()
    thread.join()


one = building(torch.bfloat16)
check("a tensor of another thread is bfloat16 meanwhile", torch.tensor([1.2345]).dtype == torch.bfloat16)
end(*one)
check("and float32 afterwards", torch.tensor([1.2345]).dtype == torch.float32)
first, second = building(torch.bfloat16), building(torch.float32)
end(*first)
end(*second)
check("after two overlapping builds it stays bfloat16", torch.tensor([1.2345]).dtype == torch.bfloat16)
sys.exit(not all(held))
END
