"""Downloads and replies as records of Flower's messages: every tensor an array of its own, the rest one line of JSON.

What a message carries besides the tensors' bytes is framing: numpy's header of an array (128 bytes), its name, type and
shape, and that line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from rayfed_sub.core.arrays import settled
from rayfed_sub.core.types import Accumulator, Tensors, Update
from rayfed_sub.deployment.deltas import Download, Round
from rayfed_sub.deployment.server import Reply

_ARRAYS, _ABOUT, _METRICS = "arrays", "about", "metrics"


def download_record(got: Download) -> RecordDict:
    """The content of a message that asks a node to train."""
    arrays = _under("tensors", got.tensors)
    rounds = []
    for i, one in enumerate(got.rounds):
        arrays |= _under(f"rounds/{i}/total", one.total.tensors)
        for k, update in enumerate(one.updates):
            arrays |= _under(f"rounds/{i}/updates/{k}", update.tensors)
        sent = [[update.client, update.weight] for update in one.updates]
        total = [one.total.weight, dict(one.total.counts)]
        how = {"number": one.number, "factor": one.factor, "added": one.added}
        rounds.append({**how, "updates": sent, "total": total})
    about = {"round": got.round, "since": got.since, "repeated": got.repeated, "rounds": rounds}
    return RecordDict({_ARRAYS: ArrayRecord(arrays), _ABOUT: ConfigRecord({"json": json.dumps(about)})})


def download_of(record: RecordDict) -> Download:
    """The download that a message's content holds."""
    about, tensors = _about(record), _tensors(record)
    rounds = []
    for i, one in enumerate(about["rounds"]):
        updates = tuple(
            Update(client, weight, _part(tensors, f"rounds/{i}/updates/{k}"))
            for k, (client, weight) in enumerate(one["updates"])
        )
        weight, counts = one["total"]
        total = Accumulator(weight, _part(tensors, f"rounds/{i}/total"), counts)
        rounds.append(Round(one["number"], updates, tuple(one["added"]), total, one["factor"]))
    repeated = tuple(about["repeated"])
    return Download(about["round"], about["since"], _part(tensors, "tensors"), tuple(rounds), repeated)


def reply_record(reply: Reply) -> RecordDict:
    """The content of a node's answer."""
    update = reply.update
    about = {"client": update.client, "place": reply.place, "holds": reply.holds, "failure": update.failure}
    metrics = MetricRecord({"num-examples": update.weight, **update.metrics})
    arrays = ArrayRecord({name: _array(tensor) for name, tensor in update.tensors.items()})
    return RecordDict({_ARRAYS: arrays, _METRICS: metrics, _ABOUT: ConfigRecord({"json": json.dumps(about)})})


def reply_of(record: RecordDict) -> Reply:
    """The reply that a message's content holds."""
    about, metrics = _about(record), dict(record[_METRICS])
    weight = float(metrics.pop("num-examples"))
    update = Update(about["client"], weight, _tensors(record), metrics, about["failure"])
    return Reply(update, tuple(about["place"]), about["holds"])


def tensor_bytes(record: RecordDict) -> int:
    """Bytes of the tensors themselves in a message's content, which is what methods count."""
    return sum(array.numpy().nbytes for array in record[_ARRAYS].values())


def payload_bytes(record: RecordDict) -> int:
    """Bytes of the content with its framing: arrays with numpy's headers, metrics, names and JSON."""
    return sum(part.count_bytes() for part in record.values())


def _about(record: RecordDict) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(record[_ABOUT]["json"])
    return about


def _tensors(record: RecordDict) -> Tensors:
    return settled({name: torch.from_numpy(array.numpy()) for name, array in record[_ARRAYS].items()})


def _under(prefix: str, tensors: Tensors) -> dict[str, Array]:
    return {f"{prefix}/{name}": _array(tensor) for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return dict(_named(tensors, f"{prefix}/"))


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name.removeprefix(prefix), x) for name, x in tensors.items() if name.startswith(prefix))


def _array(tensor: torch.Tensor) -> Array:
    return Array(tensor.detach().cpu().contiguous().numpy())
