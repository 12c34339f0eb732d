"""A worker in a separate process, with its private memory measured.

The process starts like one of Ray's: its inputs are made elsewhere (`prepared`), and backbone and broadcast are in
mapped files whose pages have been read, as they are in shared memory in a run.
`python -m tests.helpers.measured_worker FOLDER` prints the largest growth of its memory in bytes over two rounds, each
with an evaluation; mapped pages were there before, so that all growth is private."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers.modeling_utils  # noqa: F401  what a worker imports, before the first look

from rayfed_sub.core.arrays import Packed, packed, unpacked
from rayfed_sub.core.types import Broadcast
from rayfed_sub.models.weights import load_weights, target_weights
from rayfed_sub.planning.job import Job
from rayfed_sub.planning.sampling import pack_work
from rayfed_sub.runtime.worker import Spec, Worker

Layout = dict[str, tuple[str, str, tuple[int, ...], int]]
"""Name -> torch's type, numpy's, shape, first byte."""


def prepared(job: Job, folder: Path) -> None:
    """Write the inputs of a worker."""
    tensors = load_weights(job.config.model, job.architecture, job.config.seed)
    pretrained = target_weights(job.architecture.shape, job.architecture.transposed, tensors)
    server = job.method.init_server(pretrained, job.architecture.shape, job.config.seed)
    broadcast = job.method.broadcast(server).tensors
    layouts = [written(packed(tensors), folder / "backbone"), written(packed(broadcast), folder / "broadcast")]
    spec = Spec(job.config, job.method, job.architecture, job.processor)
    (folder / "given").write_bytes(pickle.dumps((spec, job.dataset, layouts)))


def written(arrays: Packed, path: Path) -> Layout:
    """Each array at a multiple of 64 bytes."""
    layout, end = {}, 0
    with path.open("wb") as file:
        for name, (kind, array) in arrays.items():
            begin = file.seek(-(-end // 64) * 64)
            end = begin + file.write(array.tobytes())
            layout[name] = (kind, array.dtype.str, array.shape, begin)
    return layout


def mapped(layout: Layout, path: Path) -> Packed:
    """The arrays over the mapped file, every page touched."""
    whole: Any = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(whole[::4096].max()) >= 0

    def array(kind: str, shape: tuple[int, ...], begin: int) -> Any:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        return whole[begin : begin + size].view(kind).reshape(shape)

    return {name: (torch_kind, array(*rest)) for name, (torch_kind, *rest) in layout.items()}


def growth(folder: Path) -> int:
    spec, dataset, layouts = pickle.loads((folder / "given").read_bytes())
    backbone, broadcast = (mapped(x, folder / n) for x, n in zip(layouts, ("backbone", "broadcast"), strict=True))
    received = Broadcast(0, unpacked(broadcast))
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark of resident memory
    before = high_water()
    worker = Worker(spec, backbone, dataset)
    clients = range(spec.config.resources.pack_size)
    for _ in range(2):
        worker.train(pack_work(spec.config, dataset, 0, clients), [None] * len(clients), received)
        worker.evaluate(range(spec.config.evaluation.batch_size), received, None, None)
    return high_water() - before


def high_water() -> int:
    """The largest resident memory since the mark was set, bytes; unlike with sampling, no peak is missed."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(growth(Path(sys.argv[1])))
