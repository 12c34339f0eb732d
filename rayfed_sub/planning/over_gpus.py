"""A model that is wider than one GPU: its blocks, in their order, over the fewest GPUs that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rayfed_sub.models.weights import all_tensors
from rayfed_sub.planning.needs import CUDA, HOLES, Need
from rayfed_sub.planning.worker_memory import built
from rayfed_sub.training.recompute import blocks_of

_MOST = 16  # GPUs of a machine


@dataclass(frozen=True)
class GpuShare:
    """Blocks `first` to `last`, counted from 1, on one of several GPUs, and the bytes that a worker takes there."""

    first: int
    last: int
    taken: int


def over_gpus(needed: Need, tensors: int, gpu: int) -> tuple[GpuShare, ...]:
    """The blocks of the model over the fewest GPUs of so many bytes, loaded as evenly as whole blocks allow; empty
    where one GPU holds it, and where no number of them does.

    tensors: bytes of training, see `Need.worker`; every block has its part of them, and of the broadcast that of its
    targets.  What comes before the blocks lies on the first GPU, what follows them on the last; embeddings to which the
    output layer is tied lie on both.
    """
    costs = _costs(needed, tensors)
    if not costs or needed.on_gpu(tensors) <= gpu:
        return ()
    ends = _cut(costs, gpu - CUDA)
    if ends is None or len(ends) > _MOST:
        return ()
    low, high = max(costs), gpu - CUDA  # the smallest load of the fullest GPU, for as many of them
    while low < high:
        middle = (low + high) // 2
        found = _cut(costs, middle)
        if found is not None and len(found) <= len(ends):
            high, ends = middle, found
        else:
            low = middle + 1
    begins = [0, *ends[:-1]]
    return tuple(
        GpuShare(first + 1, last, CUDA + sum(costs[first:last])) for first, last in zip(begins, ends, strict=True)
    )


def _cut(costs: Sequence[int], most: int) -> list[int] | None:
    """The ends of runs of blocks that cost at most so much, each as long as it may be; None where a block costs more.

    >>> _cut([3, 1, 2, 2], 4), _cut([3, 1, 2, 2], 2)
    ([2, 4], None)
    """
    ends, taken = list[int](), 0
    for at, cost in enumerate(costs):
        if cost > most:
            return None
        if taken + cost > most:
            ends.append(at)
            taken = 0
        taken += cost
    return [*ends, len(costs)]


def _costs(needed: Need, tensors: int) -> list[int]:
    """Bytes of every block, those before and after them with the first and the last; empty without blocks."""
    architecture = needed.architecture
    model, _ = built(architecture)
    blocks = blocks_of(model, architecture.shape)
    if not blocks:
        return []
    owner = {id(tensor): at for at, block in enumerate(blocks) for _, tensor in all_tensors(block)}
    costs, seen = [0 for _ in blocks], set[int]()
    for _, tensor in all_tensors(model):
        if id(tensor) in owner:
            costs[owner[id(tensor)]] += _bytes(tensor)
            seen.add(owner[id(tensor)])
        else:
            costs[-1 if len(seen) == len(blocks) else 0] += _bytes(tensor)
    places = {id(block): at for at, block in enumerate(blocks)}
    names = {name: places[id(part)] for name, part in model.named_modules() if id(part) in places}
    whole = sum(layer.m * layer.n for layer in architecture.shape.targets)
    for layer in architecture.shape.targets:
        at = next((at for name, at in names.items() if layer.name.startswith(f"{name}.")), 0)
        costs[at] += needed.traffic.broadcast * layer.m * layer.n // whole
    each = round(HOLES * tensors) // len(blocks)
    return [cost + each for cost in costs]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
