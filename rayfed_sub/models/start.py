"""What training begins from besides the pretrained weights: an adapter of peft's, or what an earlier run has learned.

The changes are merged into the weights before anything else happens (`merged`), so to all methods the result is the
pretrained model.  An adapter that cannot be merged exactly is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.core.arrays import matrices_checksum, packed
from rayfed_sub.core.errors import UserError
from rayfed_sub.core.patterns import pattern_key
from rayfed_sub.core.types import Block, Change, ModelShape, Tensors
from rayfed_sub.data.hub_client import hub_or_cache, is_hub_id
from rayfed_sub.models.architecture import Architecture, layer_of, skeleton
from rayfed_sub.models.experts import experts_of, matrices_in
from rayfed_sub.models.hub import quiet
from rayfed_sub.models.quantised import nbytes, quantised_in, without

log = logging.getLogger(__name__)

FIELD = "model.start_from"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type"),
        *("task_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("modules_to_save", "megatron_core", "qalora_group_size", "eva_config", "runtime_config", "init_lora_weights"),
    }
)
"""Entries of an adapter's configuration that say nothing against W + B A, or are looked at here."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Ways of drawing the first factors that leave the base as it is."""


@dataclass(frozen=True)
class StartInfo:
    """What the run's records say of the start.  wire_bytes: what a client receives before its first round; digest: of
    its tensors; numbers: of the parameters that it changes, which are float32 then; replaced: their bytes before."""

    place: str
    what: str
    wire_bytes: int
    digest: str
    numbers: int
    replaced: int = 0


@dataclass(frozen=True, eq=False)
class Origin:
    """With what an earlier run began: its own start, and the checksum of all matrices with it, as its log has it."""

    backbone: str
    start: StartFrom | None


@dataclass(frozen=True, eq=False)
class StartFrom:
    """place: `model.start_from`.  what: in words.  changes: by layer, relative to the pretrained weight (m, n) and to
    those before; head: `<layer>/weight` and `<layer>/bias`, of a classification into `classes` (None: not known).
    base: of an adapter, the model that it names as its own.
    copied: tensors of the pretrained model, by dotted name, that peft stores beside an adapter of its output layer.
    numbers: of the parameters that are float32 with the changes, once the start is `fitted` to a model; replaced: their
    bytes before.  origin: of a run's changes, the weights to which they belong."""

    place: str
    what: str
    changes: Mapping[str, tuple[Change, ...]]
    head: Tensors = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    base: str = ""
    copied: Tensors = field(default_factory=dict)
    numbers: int = 0
    replaced: int = 0
    origin: Origin | None = None

    @cached_property
    def info(self) -> StartInfo:
        """See `StartInfo`; worked out once."""
        sha, size = hashlib.sha256(), sum(4 * tensor.numel() for tensor in self.head.values())
        for name in sorted(self.changes):
            for change in self.changes[name]:
                sha.update(f"{name}:{change.base_scale}".encode())
                _add(sha, *_tensors(change))
            size += _wire_bytes(self.changes[name])
        for name in sorted(self.head):
            sha.update(name.encode())
            _add(sha, self.head[name])
        return StartInfo(self.place, self.what, size, sha.hexdigest(), self.numbers, self.replaced)


def _tensors(change: Change) -> list[Tensor]:
    dense = [] if change.dense is None else [change.dense]
    return [*dense, *(side for block in change.blocks for side in Change(blocks=(block,)).factors())]


def _add(sha: Any, *tensors: Tensor) -> None:
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)}".encode() + tensor.float().contiguous().numpy().tobytes())


def _wire_bytes(changes: Sequence[Change]) -> int:
    """Bytes of a layer's changes as factors, or as its weight where that is smaller."""
    (m, n), factors = _size(changes[0]), sum(_rank(change) for change in changes)
    dense = any(change.dense is not None or change.base_scale != 1.0 for change in changes)
    return 4 * (m * n if dense else min(m * n, factors * (m + n)))


def _size(change: Change) -> tuple[int, int]:
    if change.dense is not None:
        return change.dense.shape[0], change.dense.shape[1]
    return change.blocks[0].left.shape[0], change.blocks[0].right.shape[1]


def _rank(change: Change) -> int:
    return sum(block.left.shape[1] for block in change.blocks)


def is_adapter(place: str) -> bool:
    """True for a folder with an adapter, and for a hub id."""
    folder = Path(place).expanduser()
    return (folder / CONFIG).is_file() if folder.exists() else is_hub_id(place)


def read_adapter(place: str) -> StartFrom:
    """The adapter in a folder, or of a hub id.

    Raises UserError for one that cannot be read, or not be merged exactly."""
    with quiet():
        config, tensors = _files(place)
    _check_config(place, config)
    alphas = _alphas(place, config)
    sides: dict[str, dict[str, Tensor]] = {}
    head, copied = {}, {}
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise _damaged(place, f"{key} holds numbers that are not finite")
        name, _, role = key.removeprefix("base_model.model.").rpartition(".")
        layer, dot, side = name.rpartition(".")
        if dot and role == "weight" and side in ("lora_A", "lora_B"):
            sides.setdefault(layer, {})[side] = tensor.float()
        elif side == "base_layer":
            copied[f"{layer}.{role}"] = tensor
        elif "lora_" in key or role not in ("weight", "bias"):
            raise _unmerged(place, key)
        else:
            head[f"{name}/{role}"] = tensor.float()
    changes = {}
    for layer, pair in sides.items():
        if len(pair) < 2 or any(side.ndim != 2 for side in pair.values()):
            raise _unmerged(place, f"{layer}.{next(iter(pair))}")
        rank, own = len(pair["lora_A"]), pattern_key(alphas, layer)
        if pair["lora_B"].shape[1] != rank or not rank:
            sizes = " and ".join(f"{side} {' x '.join(map(str, x.shape))}" for side, x in sorted(pair.items()))
            raise _damaged(place, f"{layer} has {sizes}")
        alpha = config.get("lora_alpha", 8) if own is None else alphas[own]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[layer] = (Change(blocks=(Block(pair["lora_B"], pair["lora_A"], scale),)),)
    if not changes:
        raise UserError(FIELD, place, "an adapter with factors of LoRA's; this one has none", "check the path")
    base = str(config.get("base_model_name_or_path") or "")
    return StartFrom(place, "an adapter of peft's", changes, head, base=base, copied=copied)


def _files(place: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    folder = Path(place).expanduser()

    def path(name: str) -> Path:
        return folder / name if folder.is_dir() else Path(hf_hub_download(place, name))

    try:
        with hub_or_cache():
            config = json.loads(path(CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{CONFIG} is no mapping")
            return config, load_file(path(WEIGHTS))
    except Exception as error:  # a stranger's file, or the hub, may cause any error
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        allowed = f"an adapter of peft's with {CONFIG} and {WEIGHTS}, here or on the hub, or a finished run"
        raise UserError(FIELD, place, allowed, cause) from None


def _check_config(place: str, config: Mapping[str, Any]) -> None:
    """UserError for an adapter that is not W + scale B A."""
    kind, init, bias = config.get("peft_type"), config.get("init_lora_weights", True), config.get("bias", "none")
    others = [key for key, value in config.items() if value and key not in (*_NEUTRAL, "bias")]
    if kind != "LORA":
        raise _unmerged(place, f"peft_type={kind}")
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise _unmerged(place, f"init_lora_weights={init}, which changes the base itself")
    if bias != "none":
        raise _unmerged(place, f"bias={bias}")
    if others:
        raise _unmerged(place, f"{others[0]}={config[others[0]]}")


def _alphas(place: str, config: Mapping[str, Any]) -> Mapping[str, float]:
    """alpha_pattern.  Raises UserError where it or lora_alpha is damaged."""
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, Mapping):
        raise _damaged(place, f"alpha_pattern is {alphas}")
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **alphas}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise _damaged(place, f"{name} is {alpha!r}")
        try:
            pattern_key([name], "")
        except re.error as error:
            raise _damaged(place, f"alpha_pattern's {name} is no regular expression: {error}") from None
    return alphas


def _damaged(place: str, what: str) -> UserError:
    allowed = f"a whole adapter; in this one {what}"
    return UserError(FIELD, place, allowed, "write it again")


def _unmerged(place: str, what: str) -> UserError:
    allowed = f"an adapter that can be merged exactly, LoRA's factors of linear layers; this one has {what}"
    return UserError(FIELD, place, allowed, "merge it with peft, and set model.path to the merged model")


def fitted(start: StartFrom, architecture: Architecture, classes: Sequence[str]) -> StartFrom:
    """The start for this model: without a head of other classes.  Raises UserError for layers that the model has not,
    and for tensors besides a classification's head."""
    if architecture.module is not None:
        allowed = "nothing with a model of the caller's own: what run(model=...) gets may be merged before"
        raise UserError(FIELD, start.place, allowed, "remove it")
    from transformers.pytorch_utils import Conv1D

    module = skeleton(architecture)
    parts, experts = dict(module.named_modules(remove_duplicate=False)), _expert_places(module)
    for name, changes in start.changes.items():
        here, size = parts.get(name), _size(changes[0])
        if name in experts and (experts[name].m, experts[name].n) == size:
            continue
        if name not in parts or f"{name}.weight" in {*architecture.tied, *architecture.tied.values()}:
            what = "shares its weight with another layer" if name in parts else "is not in it"
            allowed = f"one for this model; {name} {what}"
            raise UserError(FIELD, start.place, allowed, "take the model that it was trained on")
        if not isinstance(here, nn.Linear | Conv1D) or (layer_of(name, here).m, layer_of(name, here).n) != size:
            allowed = f"one for this model, whose {name} is no linear layer of {size[0]} x {size[1]}"
            raise UserError(FIELD, start.place, allowed, "take the model that it was trained on")
    sizes = _head_sizes(architecture.shape)
    if start.classes is None:  # of an adapter: whatever else it keeps must be a head
        owners = {name.split(".")[0] for name in sizes}
        if strange := next((name for name in start.head if name.split(".")[0] not in owners and sizes), None):
            raise _unmerged(start.place, f"{strange.replace('/', '.')} in modules_to_save")
        if start.head and not sizes:
            raise _unmerged(start.place, f"{next(iter(start.head)).replace('/', '.')} in modules_to_save")
    changed = {f"{name}.weight": math.prod(_size(start.changes[name][0])) for name in start.changes.keys() - experts}
    for parameter in {experts[name].parameter for name in start.changes if name in experts}:  # of all experts
        changed[parameter] = module.get_parameter(parameter).numel()
    wide = architecture.hf_config.dtype.itemsize
    before = {
        name: nbytes(form, *_size(start.changes[name.removesuffix(".weight")][0]))
        for name, form in architecture.quantised.items()
        if name in changed
    }
    replaced = sum(before.get(name, wide * count) for name, count in changed.items())
    start = replace(start, numbers=sum(changed.values()), replaced=replaced)
    same = {name: tuple(x.shape) for name, x in start.head.items()} == sizes
    if same and start.classes in (None, tuple(classes)):
        return _in_order(start, architecture, classes) if start.classes is None and start.head else start
    # A head of other classes was another one before training too.
    what = f"{start.what}, without its head, which is for other classes"
    return replace(start, head={}, what=what if sizes and start.head else start.what, origin=None)


def _in_order(start: StartFrom, architecture: Architecture, classes: Sequence[str]) -> StartFrom:
    """The adapter with its head's rows in the order of the classes, as the checkpoint's are put (`class_rows`): peft
    numbers them as the model does on which it trains, and names none.  One of another model counts as in order."""
    rows = architecture.class_rows
    if rows == ():
        return start
    if rows is None or not _is(start.base, architecture.hf_config.name_or_path):
        theirs = ", ".join(classes[rows.index(number)] for number in range(len(rows))) if rows else ""
        here = f"; the head of model.path itself has {theirs}" if rows else ""
        told = "%s: its head is taken by number, for %s in this order: adapters name no classes%s"
        log.warning(told, FIELD, ", ".join(classes), here)
        return start
    last = {layer.name.partition(".")[0]: layer.name for layer in architecture.shape.head if layer.m == len(rows)}
    turned = {f"{name}/{role}" for name in last.values() for role in ("weight", "bias")}
    head = {name: tensor[list(rows)] if name in turned else tensor for name, tensor in start.head.items()}
    return replace(start, head=head)


def _is(one: str, other: str) -> bool:
    """True where two names, hub ids or folders, are of one model."""
    here, there = Path(one).expanduser(), Path(other).expanduser()
    return one == other or (here.is_dir() and there.is_dir() and here.resolve() == there.resolve())


def _head_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {f"{t.name}/weight": (t.m, t.n) for t in shape.head} | {
        f"{t.name}/bias": (t.m,) for t in shape.head if t.bias
    }


def merged(tensors: Tensors, start: StartFrom | None, architecture: Architecture) -> Tensors:
    """The model's tensors with the start in them, float32 where it changes them, whatever the backbone's type.

    Raises UserError for a start that was made of another model, as far as it shows."""
    if start is None:
        return tensors
    if (origin := start.origin) is not None:
        known = matrices_checksum(packed(merged(tensors, origin.start, architecture)))
        if known != origin.backbone:
            allowed = "a run of the same model; the weights of model.path are others than those with which it began"
            advice = "set model.path to the model that it trained"
            if architecture.class_rows != ():
                advice += ", or its exported folder if it is of a version that did not sort a checkpoint's classes"
            raise UserError(FIELD, start.place, allowed, advice)
    found, module = dict(tensors), skeleton(architecture)
    experts, turned = _expert_places(module), _turned(start, module)
    rounded = quantised_in(tensors)
    for name, copy in start.copied.items():
        if name in rounded:  # its numbers are near the copy's, no more
            same = copy.shape == (rounded[name].mT if name.removesuffix(".weight") in turned else rounded[name]).shape
        else:
            same = name in tensors and torch.equal(copy.to(tensors[name].dtype), tensors[name])
        if not same:
            allowed = f"an adapter of this model; the {name} beside its factors is another one"
            raise UserError(FIELD, start.place, allowed, "set model.path to the model that it was trained on")
    for name in {experts[name].parameter for name in start.changes if name in experts}:
        found[name] = tensors[name].float().clone()
    for name, W_mn in changed_weights(start, tensors, architecture).items():
        after_mn = applied(start.changes[name], W_mn)
        found = without(found, f"{name}.weight")  # as it was quantised
        stored = after_mn.T if name in turned else after_mn
        if name in experts:
            experts[name].inside(found).copy_(stored)
        else:
            found[f"{name}.weight"] = stored.contiguous()
    return {**found, **{name.replace("/", "."): tensor for name, tensor in start.head.items()}}


def changed_weights(start: StartFrom, tensors: Tensors, architecture: Architecture) -> dict[str, Tensor]:
    """The weights (m, n) of the layers that the start changes, as they are in the model's tensors, views; dense ones of
    those that are quantised."""
    module = skeleton(architecture)
    experts, turned = _expert_places(module), _turned(start, module)
    packed, weights = quantised_in(tensors), {}
    for name in start.changes:
        if (own := packed.get(f"{name}.weight")) is not None:
            weights[name] = own.dense()
            continue
        stored = experts[name].inside(tensors) if name in experts else tensors[f"{name}.weight"]
        weights[name] = stored.T if name in turned else stored
    return weights


@dataclass(frozen=True)
class _Place:
    """Where an expert's matrix (m, n) lies."""

    parameter: str
    number: int
    m: int
    n: int
    transposed: bool

    def inside(self, tensors: Tensors) -> Tensor:
        """The matrix as it is stored, a view."""
        return matrices_in(tensors[self.parameter], self.n if self.transposed else self.m)[self.number]


def _expert_places(module: nn.Module) -> dict[str, _Place]:
    return {
        name: _Place(matrix.parameter, number, matrix.m, matrix.n, matrix.transposed)
        for experts in experts_of(module).values()
        for matrix in experts.matrices
        for number, name in enumerate(matrix.names)
    }


def _turned(start: StartFrom, module: nn.Module) -> set[str]:
    """The layers whose stored weight is (n, m)."""
    experts = _expert_places(module)
    return {
        name
        for name in start.changes
        if (experts[name].transposed if name in experts else not isinstance(module.get_submodule(name), nn.Linear))
    }


def applied(changes: Sequence[Change], W_mn: Tensor) -> Tensor:
    """The weight after one change after the other, float32."""
    for change in changes:
        W_mn = change.apply(W_mn)
    return W_mn
