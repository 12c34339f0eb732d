"""The arithmetic floor: the time that a round's matrix products would take at the rate of a large one.

Counted are those that nobody can leave out: of real tokens, the forward pass, and the gradients of the layers' inputs
down to the lowest trained layer.  Not counted is what serves the subspaces, softmax, norms, and whatever is no matrix
product.  The rate is that of the kernel that the engine itself multiplies with.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rayfed_sub.data.batching import IGNORED
from rayfed_sub.models.frozen_linear import product

_SIDE = 1024
_SECONDS = 1.0


def flops(work: Path) -> int:
    """Floating-point operations of one client's local step on its real tokens, the mean over all batches.

    They are a L + b L^2 in the tokens L of its rows, so that two lengths give a and b."""
    model: Any = AutoModelForCausalLM.from_pretrained(work / "model").eval().requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith("up_proj"):  # a bias needs the gradient of its output, but no product of its own
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    labels = np.load(work / "batches.npz")["labels"]
    lengths = (labels != IGNORED).sum(axis=-1)  # all tokens are learned
    ends = np.array([lengths.max() // 2, lengths.max()])
    counted = [_flops(model, labels.shape[-2], int(length)) for length in ends]
    a, b = np.linalg.solve(np.stack([ends, ends**2], axis=1).astype(float), counted)
    return round(float(a * lengths.mean() + b * (lengths**2).mean()))


def _flops(model: Any, rows: int, tokens: int) -> int:
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return int(counted.get_total_flops())


def rate(processes: int) -> float:
    """Operations a second of the engine's float32 products of 1024 x 1024 matrices, one thread in each of so many
    processes at once, all together."""
    command, pipe = [sys.executable, "-m", "experiments.benchmarks.arithmetic"], subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:  # together, or the first would be done before the last has imported torch
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def _own_rate() -> float:
    torch.set_num_threads(1)
    a = torch.randn(_SIDE, _SIDE)
    for _ in range(5):
        product(a, a)
    print("ready", flush=True)
    sys.stdin.readline()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        product(a, a)
        done += 1
    return done * 2 * _SIDE**3 / (time.perf_counter() - began)


if __name__ == "__main__":
    print(_own_rate())
