#!/usr/bin/env bash
# torch 2.13.0: under a TorchFunctionMode, activation checkpointing
# (use_reentrant=False) gives the gradient of another function, without a word.
#
# Behaviour: a TorchFunctionMode that changes an operation is on during the
# forward pass and during the backward pass. The mode is taken away while
# autograd runs, as it is while the mode's own handler runs, and the checkpoint
# computes its part again in there: without the mode. Where shapes and dtypes
# agree nothing is raised, and the gradient mixes both functions.
#
# Why one would not guess it: the documentation of checkpoint says that the
# forward pass is run again in the backward pass, and warns of global state that
# differs between the two. Here none differs: both lie inside the same `with`,
# and autocast and random numbers, which could differ, are taken care of. Without
# the checkpoint the gradient is right in the same two lines.
#
# Seen with Python 3.11, f(x) = cos(sin(x)) at x = 1 with sin doubled by the mode:
#   right -1.0738, without checkpoint -1.0738, with it -0.8057
set -euo pipefail
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import math
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

held = []


def check(what, yes):
    held.append(bool(yes))
    print("as described:" if yes else "CHANGED:", what)


class Doubled(TorchFunctionMode):
    """Doubles every sine."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.sin else out


def f(x):
    return torch.sin(x).cos()


def gradient(checkpointed):
    x = torch.ones(1, requires_grad=True)
    with Doubled():
        y = checkpoint(f, x, use_reentrant=False) if checkpointed else f(x)
        (found,) = torch.autograd.grad(y.sum(), x)
    return y.item(), found.item()


right = -math.sin(2 * math.sin(1)) * 2 * math.cos(1)
plain, with_checkpoint = gradient(False), gradient(True)
print(f"right {right:.4f}, without checkpoint {plain[1]:.4f}, with it {with_checkpoint[1]:.4f}")
check("both forward passes are cos(2 sin 1)",
      plain[0] == with_checkpoint[0] and abs(plain[0] - math.cos(2 * math.sin(1))) < 1e-6)
check("the gradient without checkpoint is right", abs(plain[1] - right) < 1e-5)
mixed = -math.sin(math.sin(1)) * 2 * math.cos(1)
check("with it, it is that of a sine computed once more without the mode", abs(with_checkpoint[1] - mixed) < 1e-5)

sys.exit(0 if held and all(held) else 1)
EOF
