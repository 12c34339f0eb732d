"""Which weights of a model are quantised, and where they come from: rounded when they are loaded, or as a checkpoint of
bitsandbytes or a GGUF file has them.

Legend: m outputs, n inputs, b blocks of a row.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.hub import RANDOM, locate, reading
from rayfed_sub.models.quantised import BLOCK, GGUF_BLOCK, GGUF_FORMS, OUTER, Quantised, fits, mute_bitsandbytes

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

log = logging.getLogger(__name__)

FIELD = "model.quantize"


@dataclass(frozen=True)
class _Place:
    """A matrix that may be quantised.  turned: stored as (n, m); linear: of linear layers alone; output: the output
    layer's."""

    m: int
    n: int
    turned: bool
    linear: bool
    output: bool


def quantised_forms(model: Model, module: Any, shape: ModelShape) -> dict[str, str]:
    """By the name of a parameter the form in which it lies in memory, in the model's order.

    `int8` takes all linear layers and the embedding of tokens, `nf4` all linear layers but the output layer, `stored`
    what the file has quantised; never the head of a classification, experts' parameters, or subclasses of linear
    layers, which may do more than multiply.  module: the model on the meta device.
    Raises UserError on model.quantize where the model has no such weights.
    """
    if model.quantize == "none":
        return {}
    places = _places(module, shape)
    if model.quantize == "stored":
        return _stored(model, module, places)
    if model.path != RANDOM and bitsandbytes_config(model) is not None:
        allowed = f"none or stored, for {model.path} is quantised by bitsandbytes already"
        raise UserError(FIELD, model.quantize, allowed, "set model.quantize=stored")
    form: str = model.quantize
    nf4 = form == "nf4"
    found = {
        name: form
        for name, place in places.items()
        if fits(form, place.n) and not (nf4 and (place.output or not place.linear))
    }
    if len(found) == len(dict(module.named_parameters())):  # a model says by a parameter of which type it is
        found = {name: form for name, form in found.items() if places[name].linear}
    if not found:
        raise UserError(FIELD, model.quantize, "none for a model without plain linear layers", "remove it")
    if left := _stacked(module):
        log.warning("model.quantize: parameters of several matrices stay as they are (%s)", left)
    return found


def _places(module: Any, shape: ModelShape) -> dict[str, _Place]:
    """The matrices that may be quantised, by parameter: all that use one are plain linear layers, or look rows up."""
    from transformers.pytorch_utils import Conv1D

    parts = dict(module.named_modules(remove_duplicate=False))
    embedding, output = _weight(module.get_input_embeddings), _weight(module.get_output_embeddings)
    heads = {f"{layer.name}.weight" for layer in shape.head}
    owners: dict[int, list[tuple[str, Any]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append((name, parameter))
    found = {}
    for names in owners.values():
        (first, weight), kinds = names[0], set()
        for name, _ in names:
            path, _, leaf = name.rpartition(".")
            part = parts[path]
            looks_up = type(part) is nn.Embedding and weight is embedding and part.max_norm is None
            fit = leaf == "weight" and (type(part) in (nn.Linear, Conv1D) or looks_up) and name not in heads
            kinds.add(type(part) if fit else None)
        if None in kinds or (Conv1D in kinds and len(kinds) > 1):
            continue
        turned = Conv1D in kinds
        m, n = reversed(weight.shape) if turned else weight.shape
        found[first] = _Place(m, n, turned, nn.Embedding not in kinds, weight is output)
    return found


def _weight(part: Callable[[], Any]) -> Any:
    """The weight of the part; None where the model has no such part."""
    with suppress(NotImplementedError, AttributeError):  # which some types raise
        return getattr(part(), "weight", None)
    return None


def turned(module: Any, shape: ModelShape) -> set[str]:
    """The parameters that may be quantised and are stored as (n, m)."""
    return {name for name, place in _places(module, shape).items() if place.turned}


@contextmanager
def reads_no_weight(quantize: str, hf_config: Any) -> Iterator[None]:
    """Around what a model of this configuration computes: UserError on model.quantize where its code asks a quantised
    weight for what only a tensor has."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        if Quantised.__name__ not in str(error):
            raise
        allowed = f"none for models of type {hf_config.model_type}, whose code reads weights of linear layers itself"
        raise UserError(FIELD, quantize, allowed, "set model.quantize=none") from error


def _stacked(module: nn.Module) -> str:
    """A few of the parameters that hold several matrices each."""
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 3 and min(parameter.shape) > 3]
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _stored(model: Model, module: Any, places: Mapping[str, _Place]) -> dict[str, str]:
    """What the file has quantised."""
    source = locate(model.path) if model.path != RANDOM else None
    found: dict[str, str] = {}
    if source is not None and source.gguf is not None:
        found = _gguf_forms(Path(source.name) / source.gguf, module, places)
    elif source is not None and (config := bitsandbytes_config(model)) is not None:
        found = _bitsandbytes_forms(model, config, module, places)
    if not found:
        allowed = "none, int8 or nf4 where model.path is no checkpoint of bitsandbytes and no GGUF file of Q4_0, Q4_1"
        raise UserError(FIELD, "stored", f"{allowed} or Q8_0", "set model.quantize=none")
    return found


# bitsandbytes


def bitsandbytes_config(model: Model) -> Any:
    """transformers' BitsAndBytesConfig of the checkpoint in model.path; None for weights that are not quantised.

    Raises UserError on model.path for other quantisations, and for entries that mean nothing."""
    from transformers import AutoConfig

    source = locate(model.path)
    if source.gguf is not None:
        return None
    with reading(source):
        given = getattr(AutoConfig.from_pretrained(source.name), "quantization_config", None)
    return None if given is None else checked_config(model, given)


def checked_config(model: Model, given: Any) -> Any:
    """A checkpoint's quantization_config as a BitsAndBytesConfig.  Raises UserError for one that is none."""
    from transformers import BitsAndBytesConfig

    tree = given if isinstance(given, dict) else given.to_dict()
    eight, four = tree.get("load_in_8bit", False), tree.get("load_in_4bit", False)
    method = tree.get("quant_method", "bitsandbytes" if eight or four else "an unnamed method")
    if method != "bitsandbytes":
        allowed = f"unquantised weights, a GGUF file or a checkpoint of bitsandbytes; this one is quantised by {method}"
        raise UserError("model.path", model.path, allowed, "take the original model")
    kind, skipped = tree.get("bnb_4bit_quant_type", "fp4"), tree.get("llm_int8_skip_modules")
    wrong = None
    if bool(eight) == bool(four):
        wrong = f"load_in_8bit={eight} and load_in_4bit={four}, of which one must be true"
    elif four and kind not in ("nf4", "fp4"):
        wrong = f"bnb_4bit_quant_type={kind}, which is neither nf4 nor fp4"
    elif skipped is not None and not (isinstance(skipped, list) and all(map(_is_pattern, skipped))):
        wrong = f"llm_int8_skip_modules={skipped}, which is no list of names or regular expressions"
    else:
        try:
            return BitsAndBytesConfig.from_dict(dict(tree))
        except Exception as error:  # a stranger's file may hold anything
            wrong = f"entries that transformers refuses ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    allowed = f"a checkpoint whose quantization_config is whole; this one has {wrong}"
    raise UserError("model.path", model.path, allowed, "save the model again")


def _is_pattern(name: Any) -> bool:
    """True for what transformers can compare names with: a regular expression within another."""
    with suppress(re.error):
        return isinstance(name, str) and re.compile(f"(?:{name})") is not None
    return False


def loading_config(config: Any, module: Any, shape: ModelShape, quantised_heads: Collection[str]) -> dict[str, Any]:
    """The quantization_config with which transformers loads a checkpoint of bitsandbytes: a classification's head stays
    as it is, but for layers that the file has quantised."""
    from transformers.quantizers.base import get_keys_to_not_convert

    mute_bitsandbytes()  # transformers imports it where it loads the checkpoint
    if plain := [layer.name for layer in shape.head if layer.name not in quantised_heads]:
        skipped = config.llm_int8_skip_modules
        skipped = get_keys_to_not_convert(module) if skipped is None else skipped
        config.llm_int8_skip_modules = [*skipped, *plain]
    found: dict[str, Any] = config.to_dict()
    return found


def quantised_heads(config: Any, shape: ModelShape, info: Mapping[str, Any]) -> set[str]:
    """The layers of a classification's head that a checkpoint of bitsandbytes has quantised, for as many classes as far
    as it shows; info: what transformers reports where it loads the checkpoint as if nothing were quantised."""
    others = {name for name, *_ in info["mismatched_keys"]} if config.load_in_8bit else set()
    strange = [name.removesuffix(".SCB").partition(".weight.")[0] for name in info["unexpected_keys"]]
    return {layer.name for layer in shape.head if layer.name in strange and f"{layer.name}.weight" not in others}


def _bitsandbytes_forms(model: Model, config: Any, module: Any, places: Mapping[str, _Place]) -> dict[str, str]:
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = AutoHfQuantizer.from_config(config, pre_quantized=True).get_modules_to_not_convert(
        module, config.llm_int8_skip_modules, module._keep_in_fp32_modules
    )
    form = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
    if form != "int8" and config.bnb_4bit_use_double_quant:
        form = f"{form}-double"
    skipped = [*skipped, *get_keys_to_not_convert(module)] if config.llm_int8_skip_modules is None else skipped
    return {
        name: form
        for name, place in places.items()
        if place.linear and fits(form, place.n) and should_convert_module(name.removesuffix(".weight"), skipped)
    }


def of_bitsandbytes(module: nn.Module) -> Iterator[tuple[str, Any, Quantised | Tensor]]:
    """The layers of bitsandbytes in a loaded model: name, layer and weight (m, n); dense where it is not quantised.
    Raises ValueError for blocks of other sizes than usual."""
    import bitsandbytes

    for name, layer in list(module.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            yield name, layer, _four_bits(name, layer.weight)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            codes_mn: Any = layer.weight
            if codes_mn.dtype != torch.int8:  # llm_int8_has_fp16_weight
                yield name, layer, codes_mn.detach()
            else:
                scales_m = codes_mn.SCB if codes_mn.SCB is not None else layer.state.SCB
                yield name, layer, Quantised("int8", {"codes": codes_mn.data, "scales": scales_m.float()[:, None]})


def _four_bits(name: str, weight: Any) -> Quantised | Tensor:
    """The weight of bitsandbytes' Params4bit; dense where a row has an odd number of inputs."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(f"{name} has no quant_state")
    m, n = state.shape
    if state.blocksize != BLOCK or (state.nested and state.state2.blocksize != OUTER):
        raise ValueError(f"{name} has blocks of {state.blocksize}, where {BLOCK} are usual")
    if n % 2:
        dense: Tensor = dequantize_4bit(weight.data, state)
        return dense
    parts = {"codes": weight.data.contiguous().view(torch.uint8).view(m, n // 2), "scales": state.absmax[:, None]}
    if not state.nested:
        return Quantised(state.quant_type, parts)
    outer = {"outer": state.state2.absmax[:, None], "table": state.state2.code[:, None]}
    return Quantised(f"{state.quant_type}-double", {**parts, **outer, "offset": state.offset.float().view(1, 1)})


# GGUF


@lru_cache(maxsize=1)
def _reader(path: Path) -> Any:
    """A file's reader, which takes seconds for the vocabulary."""
    from gguf import GGUFReader

    return GGUFReader(path)


def _names(reader: Any, module: Any) -> tuple[dict[str, str], Any]:
    """The parameters by the file's names, and transformers' rule by which a type's tensors are changed on the way."""
    from transformers import modeling_gguf_pytorch_utils as gguf_of

    kind = gguf_of.read_field(reader, "general.architecture")[0]
    rule = gguf_of.TENSOR_PROCESSORS.get(kind, gguf_of.TensorProcessor)(config=module.config.to_dict())
    return gguf_of.get_gguf_hf_weights_map(module, rule), rule


def _form_of(tensor: Any) -> str | None:
    """The form of a GGUF tensor, None for those that are not read as they come."""
    name = tensor.tensor_type.name.lower()
    return name if name in GGUF_FORMS else None


def _gguf_forms(path: Path, module: Any, places: Mapping[str, _Place]) -> dict[str, str]:
    reader = _reader(path)
    names, _ = _names(reader, module)
    found, others = {}, Counter[str]()
    for tensor in reader.tensors:
        name, form = names.get(tensor.name), _form_of(tensor)
        place = places.get(name) if name is not None else None
        if place is None:
            continue
        if form is not None and (place.m, place.n) == tuple(reversed(tensor.shape.tolist())) and fits(form, place.n):
            found[name] = form
        elif not tensor.tensor_type.name.startswith(("F", "BF")):
            others[tensor.tensor_type.name] += 1
    if others and found:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(others.items()))
        log.warning("model.quantize: of the file's matrices %s are dequantised when they are loaded", kinds)
    return {name: found[name] for name in places if name in found}


def gguf_weights(model: Model, module: Any, forms: Mapping[str, str]) -> Iterator[tuple[str, Quantised]]:
    """The parameters of these forms as the file has them, rows in the model's order."""
    source = locate(model.path)
    assert source.gguf is not None, "a GGUF file"
    reader = _reader(Path(source.name) / source.gguf)
    names, rule = _names(reader, module)
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None or name not in forms:
            continue
        n, m = (int(size) for size in tensor.shape)
        data = tensor.data[row_order(rule, tensor.name, m, n)]
        yield name, _of_blocks(forms[name], torch.from_numpy(np.ascontiguousarray(data)))
    _reader.cache_clear()


def row_order(rule: Any, name: str, m: int, n: int) -> np.ndarray[Any, Any]:
    """Which row of a file's tensor (m, n) each output is: rotary positions want those of queries and keys in another
    order.  What transformers does to a weight, done to the numbers of its rows, says which; it may turn them too."""
    numbers = np.broadcast_to(np.arange(m)[:, None], (m, n))
    rest: dict[str, Any] = {"tensor_key_mapping": {}, "parsed_parameters": {"tensors": {}}}
    moved: np.ndarray[Any, Any] = rule.process(weights=numbers, name=name, **rest).weights
    return moved[:, 0] if moved.shape == (m, n) and (moved[:, 0] == moved[:, -1]).all() else moved[0]


def _of_blocks(form: str, data: Tensor) -> Quantised:
    """The weight of rows of GGUF blocks, (m, bytes) uint8: each block's scales, then its codes."""
    halves = {"q4_0": ("scales",), "q4_1": ("scales", "least"), "q8_0": ("scales",)}[form]
    size = 2 * len(halves) + (GGUF_BLOCK if form == "q8_0" else GGUF_BLOCK // 2)
    blocks = data.view(len(data), -1, size)
    parts = {
        part: blocks[:, :, 2 * i : 2 * i + 2].contiguous().view(torch.float16)[:, :, 0].contiguous()
        for i, part in enumerate(halves)
    }
    codes = blocks[:, :, 2 * len(halves) :]
    if form == "q8_0":
        return Quantised(form, {"codes": codes.contiguous().view(torch.int8).flatten(1), **parts})
    # In a block the low halves of its bytes are its first numbers, in a row here the first half of its numbers.
    number_mn = torch.cat([codes & 15, codes >> 4], dim=2).flatten(1)
    low, high = number_mn.chunk(2, dim=1)
    return Quantised(form, {"codes": low | (high << 4), **parts})
