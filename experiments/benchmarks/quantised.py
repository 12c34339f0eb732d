"""Quantised frozen weights: bytes, loss before training, and the time of a local step in a pack of four, way by way.

    python -m experiments.benchmarks.quantised [WAY ...] [--model PATH] [--rows 64] [--turns 3] [--out JSON]

The quick start's rows and settings with FedIT, so that targets are dequantised as well, in one process without Ray.  A
way is a value of model.quantize over a bfloat16 backbone; `none` is held against the others, and `float32` is none over
float32.  Steps are timed in turns, each way once a turn, by the seconds that this process computed; on a machine that
does other work only bytes and losses count.  The dense weights of every layer of nf4 are compared with bitsandbytes'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.benchmarks.harness import ROOT, machine
from rayfed_sub.cli.run_view import print_table, size
from rayfed_sub.config.loading import load_config
from rayfed_sub.config.schema import Config
from rayfed_sub.core.arrays import packed
from rayfed_sub.core.types import Tensors, wire_bytes
from rayfed_sub.models.architecture import architecture
from rayfed_sub.models.quantised import BLOCK, Quantised, quantised_in
from rayfed_sub.models.tokenizers import HubTokenizer
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import JobInputs, job_on, load_inputs
from rayfed_sub.planning.sampling import pack_work
from rayfed_sub.runtime.worker import Spec, Worker, broadcast_of

WAYS = ("none", "int8", "stored", "nf4", "float32")
PACK = 4
_SETTINGS = (
    "method={name: fedit, rank: 8}",
    "resources.workers=0",
    "federation.local_steps=2",
    "evaluation.generate_rows=0",
    "diagnostics.every=0",
)


@dataclass(frozen=True)
class Row:
    """bytes: of the backbone; loss: nats a token of held-out rows before training; step: seconds of a local step of the
    pack, the median over turns; exact: of nf4 beside `none`, whether it has the bits of bitsandbytes."""

    way: str
    bytes: int
    loss: float
    step: float
    exact: bool | None


class Way:
    """One way: a worker over its backbone, with the pack's broadcast."""

    def __init__(self, inputs: JobInputs, config: Config, rows: int) -> None:
        assert isinstance(inputs.processor, HubTokenizer), "a language model"
        known = ("causal-lm", (), inputs.processor.vocabulary, inputs.processor.pad)
        job = job_on(replace(inputs, architecture=architecture(config.model, *known)), config)
        config, bones = job.config, job.architecture
        self.tensors = load_weights(config.model, bones, config.seed)
        weights = target_weights(bones.shape, bones.transposed, self.tensors)
        server = job.method.init_server(weights, bones.shape, config.seed)
        self.worker = Worker(Spec(config, job.method, bones, job.processor), packed(self.tensors), job.dataset)
        self.broadcast = broadcast_of(config, job.method, server)
        self.work = pack_work(config, job.dataset, 0, list(range(PACK)))
        judged = range(min(rows, len(job.dataset.held_out)))
        found = self.worker.evaluate(judged, self.broadcast, None, None)
        self.loss = sum(one.loss for one in found) / sum(len(one.labels) for one in found)
        self.steps: list[float] = []

    def step(self) -> None:
        """Trains the pack once."""
        outcome = self.worker.train(self.work, [None] * PACK, self.broadcast)
        self.steps.append(outcome.seconds[1] / max(self.work.steps))


def _config(name: str, model: str) -> Config:
    dtype, quantize = ("float32", "none") if name == "float32" else ("bfloat16", name)
    asked = (f"model.path={model}", f"model.dtype={dtype}", f"model.quantize={quantize}")
    return load_config(ROOT / "experiments" / "quickstart.yaml", [*asked, *_SETTINGS])


def exact(weights: Mapping[str, Quantised], plain: Tensors) -> bool:
    """Whether nf4's dense weights have the bits of what bitsandbytes makes of the plain bfloat16 ones."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = (
        (weight, dequantize_4bit(*quantize_4bit(plain[name], blocksize=BLOCK, quant_type="nf4")))
        for name, weight in weights.items()
    )
    return all(torch.equal(weight.dense(torch.bfloat16), theirs_mn) for weight, theirs_mn in made)


def rows_of(names: Sequence[str], model: str, rows: int, turns: int) -> list[Row]:
    """The rows of these ways; of models that store their layers as (n, m) nf4 is not compared."""
    configs = {name: _config(name, model) for name in names}
    inputs = load_inputs(configs[names[0]])
    ways = {name: Way(inputs, config, rows) for name, config in configs.items()}
    for _ in range(turns + 1):  # the first makes kernels
        for way in ways.values():
            way.step()
    plain = ways["none"].tensors if "none" in ways else None
    found = []
    for name, way in ways.items():
        weights = quantised_in(way.tensors)
        same = exact(weights, plain) if name == "nf4" and plain is not None else None
        found.append(Row(name, wire_bytes(way.tensors), way.loss, statistics.median(way.steps[1:]), same))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the rows, and writes them with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--model", default="smollm2-135m", help="as model.path; without a GGUF file leave out `stored`")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows that are judged")
    parser.add_argument("--turns", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = rows_of(asked.ways, asked.model, asked.rows, asked.turns)
    first = found[0]
    shown = [
        (
            *(row.way, size(row.bytes), f"{row.bytes / first.bytes:.3f}", f"{row.loss:.4f}"),
            *(f"{row.loss - first.loss:+.4f}", f"{row.step:.2f} s", f"{row.step / first.step:.2f}"),
            "" if row.exact is None else row.exact,
        )
        for row in found
    ]
    against = f"of {first.way}'s"
    print_table(["way", "bytes", against, "loss", f"less {first.way}'s", "step", against, "bitsandbytes' bits"], shown)
    if asked.out is not None:
        record = {"machine": machine(), "model": asked.model, "rows": [asdict(row) for row in found]}
        asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
