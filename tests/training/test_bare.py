"""Local training asks for torch, numpy and transformers alone: it runs below Ray, on machines without this project's
other dependencies (`experiments/benchmarks/gpu.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.bare_site import bare_site

ROOT = Path(__file__).parents[2]

CODE = """
import sys, torch, transformers
from importlib.util import find_spec
from types import SimpleNamespace
from rayfed_sub.core.types import Broadcast, Client, ModelShape, Layer
from rayfed_sub.methods import METHODS, class_of
from rayfed_sub.models.logits import logit_rule
from rayfed_sub.models.weights import assemble
from rayfed_sub.planning.allocations import Allocations
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.pack_step import LocalRule
from rayfed_sub.training.inference import global_model, predictions
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.reference import train_reference

sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
model.logit_rule = logit_rule(model)
shape = ModelShape((Layer("model.layers.0.mlp.up_proj", 24, 16),))
layers = install(model, shape)
weights = {f"{name}/weight": layer.weight for name, layer in layers.items()}
optimizer = SimpleNamespace(name="adamw", betas=(0.9, 0.999), eps=1e-6, momentum=0.0, weight_decay=0.0, clip_norm=None)
rule, ids = LocalRule(optimizer, 1e-3, 0, 0), torch.arange(8).reshape(1, 8)
for name in METHODS:
    method = class_of(name)()
    server = method.init_server(weights, shape, 0)
    start = method.start_client(Broadcast(0, method.broadcast(server).tensors), None, Client(0, 0), shape)
    if name in ("fedftg", "fedit"):
        work = ClientWork(0, start, [{"input_ids": ids, "labels": ids}])
        (result,) = train_pack(model, layers, shape, [work], rule).results
        assert result.failure is None and result.metrics["loss"] > 0, result
print(*(name for name in sys.argv[1:] if find_spec(name)), "trained")
"""


def test_methods_and_training_need_nothing_but_torch_and_transformers(tmp_path: Path) -> None:
    site = bare_site(tmp_path / "site", "torch", "transformers")
    others = ["pydantic", "ray", "pandas", "pyarrow", "cloudpickle", "peft", "galore_torch", "bitsandbytes"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", CODE, *others]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["trained"]
