"""Memory of a worker above the bare process: the worker's own code, run on tensors without data (`allocations.py`).

What is counted: the round's base weights where a worker holds copies of them, the pack's tensors, moments and
gradients, activations saved for the backward pass, logits in chunks, a refresh's Grams, closed blocks, results, then
the held-out evaluation.  All rows of a pack are taken to be as long as the longest there is, whichever batches they
fall into.  On a processor the heap's holes come on top
(`heap.py`), and memory that the kernels keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.config.schema import Config
from rayfed_sub.core.devices import meta_as
from rayfed_sub.core.types import Change, ModelShape, Start
from rayfed_sub.data.batching import IGNORED
from rayfed_sub.data.dataset import Dataset
from rayfed_sub.data.images import Images
from rayfed_sub.data.rows import Rows
from rayfed_sub.models.architecture import Architecture, build
from rayfed_sub.models.flat_rows import pass_rule
from rayfed_sub.models.quantisation import reads_no_weight
from rayfed_sub.models.text_to_text import KIND
from rayfed_sub.models.weights import all_tensors, ruled, without_data
from rayfed_sub.planning.allocations import Allocations, Event, FusedAttention
from rayfed_sub.planning.heap import PRODUCT_KERNELS, Heap
from rayfed_sub.planning.traffic import closed_blocks
from rayfed_sub.privacy.examples import row_privacy
from rayfed_sub.training.executor import ClientWork, train_pack
from rayfed_sub.training.inference import global_model
from rayfed_sub.training.layers import PackLinear, based_on
from rayfed_sub.training.losses import predicted
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.pack_step import LocalRule

KERNELS = 40_000_000
"""Bytes that torch's kernels and their code keep in a process once they have run; measured on x86."""
_PRODUCTS = PRODUCT_KERNELS * 660_000
"""Bytes of the kernels that oneDNN writes for a worker's products and keeps."""
_PERIODS = 4  # closed blocks beyond these are counted, not walked


@dataclass(frozen=True)
class Memory:
    """Bytes of a worker: tensors alive at once, and memory of the process for them, with the heap's holes."""

    tensors: int
    process: int


@dataclass(frozen=True)
class Lengths:
    """The longest rows of a data set, in tokens: a row, its labels, and a question.  side: of its images, in pixels,
    where it has any."""

    tokens: int
    labels: int
    prompt: int
    side: int = 0


def lengths(dataset: Dataset, config: Config) -> Lengths:
    """The longest rows of both parts."""
    if isinstance(dataset.train, Images):
        return Lengths(1, 1, 1, dataset.train.pixels.shape[-1])
    longest, labels, prompt = 1, 1, 1
    for rows in (dataset.train, dataset.held_out):
        if not isinstance(rows, Rows) or not len(rows):
            continue
        sizes = rows.lengths
        learned = rows.labels if config.task.mask_prompt else sizes
        longest, labels = max(longest, int(sizes.max())), max(labels, int(learned.max()))
        prompt = max(prompt, int(rows.prompts.max()))
    return Lengths(longest, labels, prompt)


def backbone_bytes(architecture: Architecture) -> int:
    """Bytes of all frozen weights and buffers, as `load_weights` gives them."""
    sizes = {name: x.numel() * x.element_size() for name, x in all_tensors(built(architecture)[0])}
    return sum(size for name, size in sizes.items() if name.partition("/")[0] not in architecture.tied)


def dense_bytes(architecture: Architecture) -> int:
    """Bytes of the same with nothing quantised."""
    return backbone_bytes(replace(architecture, quantised={}))


def worker(
    config: Config,
    architecture: Architecture,
    start: Start,
    steps: int,
    size: Lengths,
    pack: int,
    held: int,
    base: bool,
    *,
    recompute: bool = False,
) -> Memory:
    """A worker that trains packs of `pack` clients and evaluates.

    start: a client's, on the meta device, the one with the most tensors; steps: its local steps.  held: bytes that each
    client keeps besides what training makes (see `ClientTraffic`).  base: whether the round's broadcast holds dense
    weights of the targets, which take the backbone's place.  recompute: whether blocks keep no activations.
    """
    model, layers = built(architecture)
    shape = architecture.shape
    kinds = {f"{t.name}/weight": torch.empty(t.m, t.n, device="meta") for t in shape.targets}
    known = [*(x for _, x in all_tensors(model)), *kinds.values(), *start.tensors.values(), *start.memory.values()]
    heads = {name: start.tensors.get(name, torch.empty(0)) for name in shape.head_names}
    bases = {t.name: kinds[f"{t.name}/weight"] for t in shape.targets} if base else {}
    seen = Allocations([*known, *heads.values()])
    with _meta_model(config), reads_no_weight(config.model.quantize, architecture.hf_config), seen:
        results = _train(config, architecture, model, layers, start, steps, size, pack, bases, recompute=recompute)
        _evaluate(config, architecture, model, layers, bases, heads, size)
    del results
    rest = pack * (held + _closed_beyond(config, shape, start, steps))
    return Memory(seen.peak + rest, _heap_peak(seen.events) + rest + KERNELS + _PRODUCTS)


def activations(config: Config, architecture: Architecture, size: Lengths, pack: int) -> int:
    """Bytes that no pass of a pack exceeds besides its clients' own tensors, found at a tenth of the cost of `worker`:
    four times all that one forward pass ever allocates, and a chunk of logits."""
    model, _ = built(architecture)
    batch = _batch(architecture, max(pack * _rows(config), config.evaluation.batch_size), size)
    labels = batch.pop("labels")
    if architecture.kind == KIND:
        batch["decoder_input_ids"] = labels
    seen = Allocations(x for _, x in all_tensors(model))
    reads = reads_no_weight(config.model.quantize, architecture.hf_config)
    with torch.no_grad(), FusedAttention(), reads, seen:
        # A decoder's tokens are the whole model's affair.
        both = getattr(architecture.hf_config, "is_encoder_decoder", False)
        (model if both else getattr(model, "base_model", model))(**batch)
    # SigLIP has a vocabulary though its classifier, as any other, has none.
    vocabulary = 0 if architecture.shape.head else _vocabulary(architecture)
    dense = sum(4 * layer.m * layer.n for layer in architecture.shape.targets)
    return 4 * (sum(made for _, made in seen.events if made > 0) + 128 * 4 * vocabulary) + dense


def _vocabulary(architecture: Architecture) -> int:
    text = architecture.hf_config.get_text_config(decoder=True if architecture.kind == KIND else None)
    return int(getattr(text, "vocab_size", None) or 0)


def _train(
    config: Config,
    architecture: Architecture,
    model: nn.Module,
    layers: Mapping[str, PackLinear],
    start: Start,
    steps: int,
    size: Lengths,
    pack: int,
    bases: Mapping[str, Tensor],
    *,
    recompute: bool,
) -> Any:
    """Runs a local step with GaLore's refresh, and further ones until the round's blocks are closed."""
    closings = min(closed_blocks(start, steps), _PERIODS)
    if closings and start.subspace is not None:
        start = replace(start, subspace=replace(start.subspace, refresh_every=1))
    rows, part = _rows(config), config.resources.micro_batch
    if part is not None and not closings:  # more parts than two take no more memory, but for a refresh
        rows = min(rows, 2 * part)
    batch = _batch(architecture, rows, size)
    works = [ClientWork(client, start, [batch] * (closings + 1)) for client in range(pack)]
    how = (config.federation.proximal, config.resources.micro_batch, recompute)
    rule = LocalRule(config.optimizer, 1.0, 0, 0, *how, privacy=row_privacy(config.privacy, noise=1.0))
    with based_on(layers, bases):
        return train_pack(model, layers, architecture.shape, works, rule)


def _rows(config: Config) -> int:
    """Rows of a client's batch; of those that are drawn one by one four deviations more than on average."""
    rows = config.federation.batch_size
    return rows + math.ceil(4 * rows**0.5) if config.privacy.of_examples else rows


def _evaluate(
    config: Config,
    architecture: Architecture,
    model: Any,
    layers: Mapping[str, PackLinear],
    bases: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    size: Lengths,
) -> None:
    """Evaluates a shard of held-out rows, and of questions to answer if the configuration has any."""
    evaluation = config.evaluation
    changes = {name: Change(dense=weight) for name, weight in bases.items()}
    with global_model(layers, architecture.shape, changes, heads):
        predicted(model, _batch(architecture, evaluation.batch_size, size))
        if evaluation.generate_rows:
            rule, rows = pass_rule(model), min(evaluation.batch_size, evaluation.generate_rows)
            rows, new = -(-rows // rule.rows) * rule.rows, evaluation.max_new_tokens
            width = rule.of_sources().canonical(size.prompt) if rule.apart else rule.canonical(size.prompt) + new
            ids = torch.zeros(rows, width, dtype=torch.int64)
            written = {"decoder_input_ids": torch.zeros(rows, new, dtype=torch.int64)} if rule.apart else {}
            with torch.inference_mode():
                model.base_model(input_ids=ids, **written, use_cache=True)


def _batch(architecture: Architecture, rows: int, size: Lengths) -> dict[str, Tensor]:
    """Rows as long as the longest, with as many labels as any has; or images.  One text of a classifier is a token
    shorter: where all are as long as attention sees them, a flat row need not be spread out for it."""
    if size.side:
        pixels = torch.zeros(rows, 3, size.side, size.side)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.int64)}
    if architecture.kind == KIND:
        ids = torch.zeros(rows, size.prompt, dtype=torch.int64)
        labels = torch.zeros(rows, size.labels, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids + 1, "labels": labels}
    ids = torch.zeros(rows, size.tokens, dtype=torch.int64)
    if architecture.shape.head:
        real = ids + 1
        real[0, 1:][-1:] = 0
        return {"input_ids": ids, "attention_mask": real, "labels": torch.zeros(rows, dtype=torch.int64)}
    labels = torch.full_like(ids, IGNORED)
    labels[:, -size.labels :] = 0
    return {"input_ids": ids, "labels": labels}


def _closed_beyond(config: Config, shape: ModelShape, start: Start, steps: int) -> int:
    """Bytes of the closed blocks of one client that were not walked."""
    closings = closed_blocks(start, steps)
    if start.subspace is None or closings <= _PERIODS:
        return 0
    ranks = ((min(t.m, t.n, k * start.subspace.rank) for k in (closings, _PERIODS)) for t in shape.targets)
    return sum(4 * (t.m + t.n) * (all_ - walked) for t, (all_, walked) in zip(shape.targets, ranks, strict=True))


def _heap_peak(events: Sequence[Event]) -> int:
    """The heap's largest size over three rounds of the same; a round's results live until the next one has its own."""
    heap, left = Heap(), set[tuple[int, int]]()
    for turn in range(3):
        before = left.copy()
        for number, size in events:
            if size < 0:
                heap.give((turn, number))
                left.discard((turn, number))
            else:
                heap.take((turn, number), size)
                left.add((turn, number))
        for key in before:
            heap.give(key)
        left -= before
    return heap.peak


def built(architecture: Architecture) -> tuple[nn.Module, dict[str, PackLinear]]:
    """The model on the meta device as a worker has it, and its target layers: tied, frozen, ready for packs."""
    model = ruled(build(architecture.hf_config, architecture.kind), architecture).requires_grad_(False)
    model = without_data(model, architecture)
    return model, install(model, architecture.shape)


@contextmanager
def _meta_model(config: Config) -> Iterator[None]:
    resources = config.resources
    plain = resources.deterministic and resources.gpus_per_worker
    with meta_as("cuda" if resources.gpus_per_worker else "cpu"), nullcontext() if plain else FusedAttention():
        yield
