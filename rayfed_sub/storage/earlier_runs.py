"""`model.start_from` read: an adapter, or the model that an earlier run has learned."""

from __future__ import annotations

from pathlib import Path

from rayfed_sub.config.loading import stored_config
from rayfed_sub.config.schema import GIVEN, Config
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.text import count
from rayfed_sub.core.types import ServerState
from rayfed_sub.methods import METHODS, build
from rayfed_sub.models.architecture import architecture
from rayfed_sub.models.hub import RANDOM
from rayfed_sub.models.start import FIELD, Origin, StartFrom, fitted, is_adapter, read_adapter
from rayfed_sub.models.text_to_text import LANGUAGE
from rayfed_sub.planning.job import model_kind, processor_of
from rayfed_sub.storage import checkpoints
from rayfed_sub.storage.landings import landed
from rayfed_sub.storage.remote import local_copy
from rayfed_sub.storage.same_run import backbone_sum, class_names, problem_of, start_digest


def read_start(config: Config) -> StartFrom | None:
    """What the run begins from besides the pretrained weights; None where it is nothing.

    Raises UserError where it cannot be read, or not be merged into the run's model."""
    place = config.model.start_from
    if place is None:
        return None
    if config.model.path == GIVEN:
        allowed = "nothing with a model of the caller's own: what run(model=...) gets may be merged before"
        raise UserError(FIELD, place, allowed, "remove it")
    if is_adapter(place):
        return read_adapter(place)
    with local_copy(place, FIELD) as folder:
        return _of_run(place, folder.expanduser(), config)


def _of_run(place: str, folder: Path, config: Config) -> StartFrom:
    """What the finished run in the folder has learned, relative to the model with which it began."""
    if not (folder / "summary.json").is_file() or (found := checkpoints.read(folder)) is None:
        allowed = "an adapter of peft's (folder or hub id), or the folder of a finished run (it has a summary.json)"
        raise UserError(FIELD, place, allowed, "check the path")
    then = stored_config(folder)
    name, here = str(then.method["name"]), config.model
    if name not in METHODS:
        allowed = f"a run with a method of `rayfed-sub list methods`; this one has {name}"
        raise UserError(FIELD, place, allowed, "export it, and set model.path to the exported model")
    same = (then.model.path, then.model.random) == (here.path, here.random)
    if not same or (here.path == RANDOM and then.seed != config.seed):
        allowed = f"a run of the same model; this one trained {then.model.path}"
        allowed += f" drawn by seed {then.seed}" if same else ""
        raise UserError(FIELD, place, allowed, "set model.path to the model that it trained")
    kind = model_kind(then)
    if kind not in LANGUAGE and then.seed != config.seed:
        allowed = f"a run of the same seed, by which parts of a classifier are drawn; this one has seed {then.seed}"
        raise UserError(FIELD, place, allowed, f"set seed={then.seed}")
    method = build(then.method)
    if method.personal:
        allowed = f"a run with one model for all; {name} has one for each client"
        advice = "export a client's model whole (--format hf), and set model.path to that"
        raise UserError(FIELD, place, allowed, advice)
    earlier = read_start(then)
    classes = class_names(folder)
    processor = processor_of(then, kind)
    labels = (kind, classes, processor.vocabulary, processor.pad)
    bones = architecture(then.model, *labels, problem=problem_of(folder))
    shape, earlier = bones.shape, None if earlier is None else fitted(earlier, bones, classes)
    if (known := start_digest(folder)) is not None and (earlier is None or earlier.info.digest != known):
        allowed = f"a run whose own start is as it was; {then.model.start_from} is another one now"
        raise UserError(FIELD, place, allowed, "restore that")
    server = ServerState(found.round, landed(found.server, None)[0])  # without what clients under way will bring
    changes = dict(earlier.changes) if earlier is not None else {}
    for layer, change in method.model(server, shape).items():
        changes[layer] = (*changes.get(layer, ()), change)
    head = {name: server.tensors[name] for name in shape.head_names}
    what, known = f"a run of {then.method_in_words}, {count('round', found.round)}", backbone_sum(folder)
    # The sum is of bytes of the earlier run's type.
    alike = (then.model.dtype, then.model.quantize) == (here.dtype, here.quantize)
    origin = Origin(known, earlier) if known is not None and alike else None
    return StartFrom(place, what, changes, head, classes, origin=origin)
