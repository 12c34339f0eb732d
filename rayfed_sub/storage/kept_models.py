"""A model that a Python call handed over, kept in the run folder so that the run can be exported: model.safetensors has
its state dict as the run began, model.json which layers are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import Layer, ModelShape
from rayfed_sub.storage import atomic_files
from rayfed_sub.storage.checkpoints import safetensors_parts


@dataclass(frozen=True, eq=False)
class KeptModel:
    """tensors: the state dict, tied ones once; tied: alias -> the name that stays; shape, transposed: as in
    `Architecture`."""

    shape: ModelShape
    transposed: frozenset[str]
    tied: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def keep(folder: Path, model: KeptModel) -> None:
    """Writes the model where it is not kept yet.  Raises RunError where the disk is full."""
    if (folder / "model.json").exists():
        return
    about = {
        "targets": [asdict(layer) for layer in model.shape.targets],
        "head": [asdict(layer) for layer in model.shape.head],
        "transposed": sorted(model.transposed),
        "tied": dict(model.tied),
    }
    atomic_files.write(folder / "model.safetensors", *safetensors_parts(model.tensors))
    atomic_files.write(folder / "model.json", (json.dumps(about, indent=2) + "\n").encode())


def kept(folder: Path) -> KeptModel:
    """The model of the run in the folder.  Raises UserError where it is gone."""
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        allowed = f"a run folder with the model that it began with: {error}"
        raise UserError("RUN", str(folder), allowed, "restore model.json and model.safetensors") from None
    shape = ModelShape(*(tuple(Layer(**layer) for layer in about[name]) for name in ("targets", "head")))
    return KeptModel(shape, frozenset(about["transposed"]), about["tied"], tensors)
