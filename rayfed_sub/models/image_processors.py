"""Images to pixels: the square that a model reads, and how its values are normalised."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.images import Pixels, decoded
from rayfed_sub.models.architecture import bare_config, reason
from rayfed_sub.models.hub import RANDOM, locate, reading
from rayfed_sub.models.presets import ANY_PATCHES

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

_Colours = tuple[float, float, float]
PROCESSOR = "preprocessor_config.json"
_WHOLE = "processor_config.json"  # of a model that reads texts too, its part for images under `image_processor`
_PLAIN = (0.5, 0.5, 0.5)  # default mean and standard deviation: values from -1 to 1
_AS_THEY_ARE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_VALUES = (
    *("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor", "rescale_offset"),
    "do_flip_channel_order",
)
"""Keys of a processor that say which values a model reads."""
_SIDE = 224  # default size of models that read any size


@dataclass(frozen=True)
class HubImageProcessor:
    """side: pixels of the square that an image becomes; mean, std: of the model's inputs, for values from 0 to 1, red,
    green, blue; flipped: the model reads blue, green, red, as they are.  vocabulary: there is none; pad, eos, ends:
    nothing is filled up, closed or generated."""

    side: int
    mean: tuple[float, float, float] = _PLAIN
    std: tuple[float, float, float] = _PLAIN
    flipped: bool = False
    vocabulary: int | None = None
    pad: int = 0
    eos: int = 0
    ends: tuple[int, ...] = ()

    def pixels(self, content: bytes) -> Pixels:
        """The whole image as a square, resized bicubically and not cut, uint8 (1, side, side) where it is gray, else
        (3, side, side).  Raises ValueError where Pillow cannot read it."""
        from PIL import Image

        image = np.asarray(decoded(content).resize((self.side, self.side), Image.Resampling.BICUBIC))
        if image.ndim == 2:
            return image[None]
        return np.ascontiguousarray(image.transpose(2, 0, 1)[:: -1 if self.flipped else 1])

    def save(self, folder: str | Path) -> None:
        """Writes the processor with which transformers prepares images as the run did."""
        square = {"height": self.side, "width": self.side}
        kind: dict[str, object] = {"image_processor_type": "ViTImageProcessor"}
        if self.flipped:
            own = {"do_center_crop": False, "do_flip_channel_order": True}
            kind = {"image_processor_type": "MobileViTImageProcessor", **own}
        processor = {
            **kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square,
            "resample": 3,  # Pillow's number for bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (Path(folder) / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def load_image_processor(model: Model, image_size: int | None = None) -> HubImageProcessor:
    """The processor of the model's own processor configuration, or of plain values where it has none.

    image_size: task.image_size; without it the side comes from the processor or the model.
    Raises UserError on model.path, model.random or one of its keys, or task.image_size.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    hf_config = bare_config(model, "image-classification")
    if type(hf_config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        type_of = ("model.random.type", hf_config.model_type)
        field, value = type_of if model.path == RANDOM else ("model.path", model.path)
        allowed = f"an architecture that transformers has for image-classification; {hf_config.model_type} is not one"
        raise UserError(field, value, allowed, "take another model or task")
    hf_config = getattr(hf_config, "vision_config", hf_config)
    if getattr(hf_config, "num_channels", 3) != 3:
        channels = f"a model that reads images of 3 channels; it reads {hf_config.num_channels}"
        raise UserError("model.path", model.path, channels, "take another model")
    processor = {} if model.path == RANDOM else _processor(model)
    said = {**_defaults(processor), **processor}
    try:
        mean, std = _normalised(said)
    except (TypeError, ValueError):
        allowed = "a model whose image_mean and image_std are numbers, one or three"
        raise UserError("model.path", model.path, allowed, "take another model") from None
    flipped = bool(said.get("do_flip_channel_order"))
    if said.get("rescale_offset") or (flipped and (mean, std) != _AS_THEY_ARE):
        allowed = "a model whose images have no rescale_offset, and do_flip_channel_order only without do_normalize"
        raise UserError("model.path", model.path, allowed, "take another model")
    return HubImageProcessor(_side(image_size, hf_config, processor), mean, std, flipped)


def _processor(model: Model) -> dict[str, Any]:
    """The keys of the model's processor configuration that are set; empty where it has none."""
    from transformers.utils import cached_file

    source = locate(model.path)
    content: dict[str, Any] = {}
    for name in (_WHOLE, PROCESSOR):  # in transformers' order
        try:
            with reading(source):
                file = cached_file(source.name, name, _raise_exceptions_for_missing_entries=False)
            found = dict(json.loads(Path(file).read_text(encoding="utf-8"))) if file else {}
            content = dict(found.get("image_processor") or {} if name == _WHOLE else found)
        except Exception as error:  # the hub's errors, and whatever a stranger's file holds
            raise UserError("model.path", model.path, f"a model whose {name} can be read", reason(error)) from error
        if content:
            break
    return {key: value for key, value in content.items() if value is not None}


def _defaults(processor: dict[str, Any]) -> dict[str, Any]:
    """transformers' values for keys that the configuration lacks, by the processor's class, where it names one."""
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    old = str(processor.get("feature_extractor_type", "")).replace("FeatureExtractor", "ImageProcessor")
    name = str(processor.get("image_processor_type", old)).removesuffix("Fast").removesuffix("Pil")
    found = get_image_processor_class_from_name(f"{name}Pil")  # the form that needs no torchvision
    return {} if found is None else {key: getattr(found, key, None) for key in _VALUES}


def _normalised(said: dict[str, Any]) -> tuple[_Colours, _Colours]:
    """Mean and standard deviation for values from 0 to 1, whatever range the processor normalises."""
    mean, std = _AS_THEY_ARE
    if said.get("do_normalize", True):
        mean, std = (_colours(said.get(key)) for key in ("image_mean", "image_std"))
    scale = 255 * (said.get("rescale_factor") or 1 / 255) if said.get("do_rescale", True) else 255
    if math.isclose(scale, 1, rel_tol=1e-3):  # 1 / 255 as files write it
        return mean, std
    return _colours([value / scale for value in mean]), _colours([value / scale for value in std])


def _colours(given: Any) -> _Colours:
    if given is None:
        return _PLAIN
    values = given if isinstance(given, list | tuple) else [given]
    red, green, blue = map(float, values * 3 if len(values) == 1 else values)
    return red, green, blue


def _side(asked: int | None, hf_config: Any, processor: dict[str, Any]) -> int:
    """The side that was asked for or the model's own; UserError where the model cannot read squares of that side."""
    fixed, patch = _one(getattr(hf_config, "image_size", None)), _one(getattr(hf_config, "patch_size", None))
    usual = _one(processor.get("crop_size")) or _one(processor.get("size")) or fixed or _SIDE
    if hf_config.model_type in ANY_PATCHES and patch:
        side = asked or max(patch, usual - usual % patch)
        if side % patch:
            near = max(patch, round(side / patch) * patch)
            allowed = f"a multiple of {patch}, the pixels of a patch of this model"
            raise UserError("task.image_size", side, allowed, f"set task.image_size={near}")
        return side
    if asked is not None and fixed is not None and asked != fixed:
        allowed = f"{fixed}, the only size that this model reads"
        raise UserError("task.image_size", asked, allowed, "remove it or take a dinov2 model, which reads other sizes")
    return asked or fixed or usual


def _one(size: Any) -> int | None:
    """The side of a square as configurations write it: a number, a pair, or a mapping."""
    if isinstance(size, dict):
        size = [size.get(key) for key in ("height", "width", "shortest_edge") if size.get(key)]
    if isinstance(size, list | tuple):
        size = size[0] if size else None
    return None if size is None else int(size)
