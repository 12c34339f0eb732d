"""A trained model as a folder that transformers loads: configuration, weights, tokenizer or image processor."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayfed_sub.core.types import Tensors
from rayfed_sub.data.processors import Processor, Tokenizer
from rayfed_sub.models.architecture import Architecture, auto_class, sees_or_hears, skeleton
from rayfed_sub.models.hub import RANDOM, locate, quiet, reading, stored_file
from rayfed_sub.models.image_processors import HubImageProcessor
from rayfed_sub.models.text_to_text import KIND, LANGUAGE, start_token
from rayfed_sub.models.tokenizers import HubTokenizer
from rayfed_sub.models.weights import assemble, with_targets

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

_COMPANIONS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_folder(
    architecture: Architecture,
    tensors: Tensors,
    targets: Tensors,
    folder: str | Path,
    processor: Processor | None = None,
    dtype: torch.dtype | None = None,
    generation: Any = None,
) -> None:
    """Writes a folder that transformers' from_pretrained loads: config, safetensors, the tokenizer or image processor.

    targets: canonical `<layer>/weight` and `<layer>/bias` that take the place of the model's own; may be some.
    dtype of all weights in the files: None keeps the backbone's, to which float32 targets are then rounded.
    generation: the generation configuration to write in place of the one that follows from the model's own.
    """
    stored = with_targets(architecture.shape, architecture.transposed, tensors, targets, dtype)
    module: Any = assemble(architecture, stored)
    if dtype is not None:
        module = module.to(dtype)
        module.config.dtype = dtype
    if generation is not None:
        module.generation_config = generation
    with quiet():
        module.save_pretrained(folder)
        if sees_or_hears(architecture.hf_config) and _unread(architecture, folder):
            # transformers turns the names of some types (ShieldGemma 2) into others than it reads.
            for file in Path(folder).glob("*.safetensors*"):
                file.unlink()
            module.save_pretrained(folder, save_original_format=False)
            unread = _unread(architecture, folder)
            assert not unread, f"transformers does not read what it writes: {unread[:3]}"
    write_codec(processor, folder)


def _unread(architecture: Architecture, folder: str | Path) -> list[str]:
    """Weights that transformers does not find in the folder's files; they are not read for it."""
    import transformers

    auto: Any = getattr(transformers, auto_class(architecture.hf_config, architecture.kind))
    _, found = auto.from_pretrained(folder, device_map="meta", output_loading_info=True)
    return sorted(set(found["missing_keys"]) - architecture.tied.keys())


def write_companions(model: Model, architecture: Architecture, folder: str | Path) -> None:
    """Copies the files by which the pretrained model's processor reads images and sound, where it has any."""
    if not sees_or_hears(architecture.hf_config) or model.path == RANDOM:
        return
    source = locate(model.path)
    for name in _COMPANIONS:
        found = stored_file(source, name)
        if found is not None and not (Path(folder) / name).exists():
            shutil.copyfile(found, Path(folder) / name)


def write_codec(processor: Processor | None, folder: str | Path) -> None:
    """Writes the tokenizer, with the chat template that the run trained with, or the image processor; bytes need
    neither."""
    if isinstance(processor, HubTokenizer):
        with quiet():
            processor.tokenizer.save_pretrained(folder)
    if isinstance(processor, HubImageProcessor):
        processor.save(folder)


def generation_config(model: Model, architecture: Architecture, processor: Processor) -> Any:
    """transformers' generation configuration of a trained language model; None for other kinds.

    The pretrained model's own where it has one that can be saved, else what follows from its configuration.  Either
    way generation stops at every token of `processor.ends`: what answers were trained to end with and the model's own,
    and an encoder-decoder's answers begin with what they were trained to begin with.
    """
    from transformers import GenerationConfig

    if architecture.kind not in LANGUAGE:
        return None
    found = GenerationConfig.from_model_config(architecture.hf_config)
    if model.path != RANDOM and (source := locate(model.path)).gguf is None:
        # Not every model has one, and not every one passes the check with which transformers saves it.
        with reading(source), suppress(OSError, ValueError):
            stored = GenerationConfig.from_pretrained(source.name)
            stored.validate(strict=True)
            found = stored
    found.eos_token_id, found.pad_token_id = list(processor.ends), processor.pad
    if architecture.kind == KIND:
        assert isinstance(processor, Tokenizer), "a model that writes has a tokenizer"
        found.decoder_start_token_id = start_token(skeleton(architecture), processor.answers(["?"])[0])
    return found
