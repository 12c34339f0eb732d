#!/usr/bin/env bash
# torch 2.13.0: a convolution on a processor keeps memory for every input length
# that it has ever seen, a third of a megabyte each, up to 1,024 of them.
#
# Behaviour: torch hands float32 convolutions to oneDNN, which writes machine
# code for each shape of input and keeps it in a cache of 1,024 entries. Inputs
# of a length seen before add nothing; nothing is freed when the tensors and the
# weights are. ONEDNN_PRIMITIVE_CACHE_CAPACITY in the environment, read at the
# first call, bounds it; torch has no call for it.
#
# Why one would not guess it: inputs of many lengths are the rule with text and
# audio, and the growth looks like a leak of Python objects: tracemalloc and
# torch's own profiler see nothing, gc.collect() changes nothing, and every
# process of a pool has a cache of its own.
#
# Seen with Python 3.11 on x86-64 (AVX2), 256 channels, kernels of 3, 300
# lengths from 100 on: 97 MB more private memory, none more in a second pass over
# the same lengths; 5 MB with a capacity of 16.
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
cat > lengths.py <<'END'
import re

import torch

torch.set_num_threads(1)


def private():
    """Private memory of this process in MB."""
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"Private_Dirty:\s+(\d+)", file.read())[1]) / 1024


def convolve(weight, lengths):
    with torch.inference_mode():
        for length in lengths:
            torch.nn.functional.conv1d(torch.ones(1, 256, length), weight)


weight = torch.ones(256, 256, 3)
convolve(weight, range(1000, 1003))
before = private()
convolve(weight, range(100, 400))
first = private()
convolve(weight, range(100, 400))
print(first - before, private() - first)
END
unbounded=$("$work/venv/bin/python" -W ignore lengths.py)
bounded=$(ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 "$work/venv/bin/python" -W ignore lengths.py)
"$work/venv/bin/python" - $unbounded $bounded <<'END'
import sys

grown, again, bounded, _ = map(float, sys.argv[1:])
print(f"300 lengths: {grown:.1f} MB, the same once more: {again:.1f} MB, with 16 kernels kept: {bounded:.1f} MB")
held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


check("more than 50 MB for 300 lengths", grown > 50)
check("less than 5 MB for lengths that were there before", again < 5)
check("less than a quarter with a bound", bounded < grown / 4)

sys.exit(0 if held and all(held) else 1)
END
