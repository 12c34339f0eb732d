"""The trained model of a finished run, written for other tools."""

from __future__ import annotations

from pathlib import Path

import torch

from rayfed_sub.engine import checkpoints
from rayfed_sub.engine.folder import finished, make
from rayfed_sub.engine.job import prepare
from rayfed_sub.errors import UserError
from rayfed_sub.models.weights import load_weights, target_weights, write_folder


def export_hf(run_dir: Path, to: Path) -> None:
    """Writes a folder that transformers' from_pretrained loads, with the run's target weights merged in, as float32.

    Raises UserError where run_dir holds no finished run or `to` is not empty.
    """
    config, _ = finished(run_dir)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError("--to", str(to), "a new or empty folder", "choose another folder")
    make(to, "--to")
    job = prepare(config)
    server, _ = checkpoints.read(run_dir)
    tensors = load_weights(config.model, job.skeleton, config.seed)
    pretrained = target_weights(job.skeleton.shape, job.skeleton.transposed, tensors)
    shape = job.skeleton.shape
    changes = job.method.model(server, shape)
    merged = {f"{t.name}/weight": changes[t.name].apply(pretrained[f"{t.name}/weight"]) for t in shape.targets}
    head = {name: server.tensors[name] for name in shape.head_names}
    write_folder(job.skeleton, tensors, merged | head, to, job.codec, dtype=torch.float32)
