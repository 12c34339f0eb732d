"""A model's weights by name: loaded or drawn, put into a module without a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import ModelShape, Tensors
from rayfed_sub.models.architecture import Architecture, auto_class, build, kept_exact, reason, skeleton
from rayfed_sub.models.experts import matrix_of, place
from rayfed_sub.models.frozen_linear import quantise
from rayfed_sub.models.hub import RANDOM, locate, quiet, reading
from rayfed_sub.models.positions import forget_rows
from rayfed_sub.models.quantisation import (
    FIELD,
    bitsandbytes_config,
    gguf_weights,
    loading_config,
    of_bitsandbytes,
    quantised_heads,
    turned,
)
from rayfed_sub.models.quantised import Quantised, empty, parts_of, quantised, quantised_in
from rayfed_sub.models.targets import layer_size, linear_layers
from rayfed_sub.models.text_to_text import KIND, LANGUAGE, text_to_text

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

_SEEN = 8  # tokens of the rows for the test of causality
_LEAK = 3e-4  # allowed change of earlier logits, as a share of the changed tokens' own


def load_weights(model: Model, architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model by its dotted name, contiguous, on the CPU; a quantised parameter by its parts
    (`models/quantised.py`).

    Other parameters in model.dtype, but for those that transformers keeps in float32; tied ones once; buffers, those
    that files leave out included, in their own dtype.  What no file holds is drawn: matrices, embeddings and a new
    classification head N(0, std) with the configuration's initializer_range as std (0.02 without one) from stream(seed,
    "weights", name), new biases 0; other vectors begin as transformers has them, norms' weights at 1.
    Raises UserError on model.path for a checkpoint that cannot be read or lacks weights, and for a causal language
    model whose tokens see later ones.
    """
    loaded, drawn = _random(architecture) if model.path == RANDOM else _pretrained(model, architecture)
    if architecture.kind in LANGUAGE:
        check_causal(model, loaded)
    tensors = dict(_collected(loaded, model, architecture))
    del loaded  # what is drawn or quantised from here on is freed tensor by tensor
    std = float(getattr(architecture.hf_config, "initializer_range", None) or 0.02)
    for name in sorted(drawn):
        old = tensors[name]
        if old.ndim > 1:
            tensors[name] = _normal(seed, name, tuple(old.shape), std).to(old.dtype)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros_like(old)
    return _quantised(tensors, model, architecture)


def assemble(architecture: Architecture, tensors: Tensors) -> nn.Module:
    """The module whose parameters and buffers are `tensors` themselves (read-only memory will do).

    Eval mode, no gradients, tied weights tied.  Raises ValueError where a tensor is missing, or of another shape.
    """
    module, packed = skeleton(architecture), quantised_in(tensors)
    quantise(module, packed, architecture.tied)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if "/" in name:
            continue
        if name in parameters and parameters[name].shape != tensor.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but {tuple(parameters[name].shape)} is needed")
        _place(module, name, tensor)
    tie(module, {alias: name for alias, name in architecture.tied.items() if name not in packed})
    given = {*tensors, *architecture.tied}  # which may be without data themselves
    found = ((name, name.partition("/")[0]) for name, tensor in all_tensors(module) if tensor.is_meta)
    empty = [name for name, parameter in found if name not in given and parameter not in architecture.tied]
    if empty:
        raise ValueError(f"no tensor for {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}")
    return ruled(module, architecture).requires_grad_(False).eval()


def without_data(module: nn.Module, architecture: Architecture) -> nn.Module:
    """The architecture's module on the meta device, tied, with quantised weights where it has some."""
    other, packed = turned(module, architecture.shape) if architecture.quantised else set(), {}
    for name, form in architecture.quantised.items():
        stored = module.get_parameter(name).shape
        m, n = reversed(stored) if name in other else stored
        packed[name] = empty(form, m, n, architecture.hf_config.dtype)
    quantise(module, packed, architecture.tied)
    tie(module, {alias: name for alias, name in architecture.tied.items() if name not in packed})
    return module


def tie(module: nn.Module, tied: Mapping[str, str]) -> None:
    """Gives the parameter of a name to each of its aliases (alias -> name)."""
    for alias, name in tied.items():
        owner, leaf = _owner(module, alias)
        owner.register_parameter(leaf, module.get_parameter(name))


def ruled(module: nn.Module, architecture: Architecture) -> nn.Module:
    """The module with the architecture's `logit_rule`, `own_loss` and `own_measure`, which losses go by; as_it_is: True
    for a module that transformers does not build, whatever it looks like; text_to_text: True for one whose encoder
    reads the source and whose decoder writes the answer; one_at_a_time: as the architecture's `alone`."""
    # Past nn.Module, which would take a loss that is a module for a part of this one.
    vars(module).update(
        logit_rule=architecture.logits,
        own_loss=architecture.loss,
        own_measure=architecture.measure,
        as_it_is=architecture.module is not None,
        text_to_text=architecture.kind == KIND,
        one_at_a_time=architecture.alone,
    )
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.register_forward_pre_hook(_as_rows)
    forget_rows(module)
    return module


def _as_rows(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs with each channel's numbers together: where tokens (1, T, C) of a single row are viewed as an image,
    batch normalization in eval mode gives wrong gradients (torch 2.13 on a processor)."""
    return tuple(x.contiguous() for x in args)


@contextmanager
def through_modules() -> Iterator[None]:
    """Within it torch's Transformer layers call their linear layers.  Frozen and in eval mode they would multiply the
    layers' weights themselves, past whatever stands in the layers' places."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def answered(module: Any, inputs: Mapping[str, Tensor], *, causal: bool) -> Any:
    """A module's answer, whose `logits` are its logits; causal: of a language model, whose tokens look to the left, so
    that a module of the caller's own needs no mask."""
    if "token_type_ids" in inputs and not _tells_apart(module):
        inputs = {name: x for name, x in inputs.items() if name != "token_type_ids"}
    if hasattr(module, "get_output_embeddings"):
        return module(**inputs, **({"use_cache": False} if causal else {}))
    given = {name: x for name, x in inputs.items() if name != "attention_mask" or not causal}
    with through_modules():
        answer = module(**given)
    return SimpleNamespace(logits=answer) if isinstance(answer, Tensor) else answer


def _tells_apart(module: Any) -> bool:
    """True where the model takes the types of a pair's tokens, and has more than one."""
    types = getattr(getattr(module, "config", None), "type_vocab_size", 2)
    return "token_type_ids" in signature(module.forward).parameters and types != 1


def target_weights(shape: ModelShape, transposed: frozenset[str], tensors: Tensors) -> dict[str, Tensor]:
    """Tensors that methods start from: `<layer>/weight` (m, n) of targets and head, `<layer>/bias` (m,) of the head;
    float32. transposed: the architecture's.

    A float32 nn.Linear weight is the given tensor itself, an expert's a view; the others are copies.
    """
    weights, packed = {}, quantised_in(tensors)
    for layer in shape.targets:
        if (own := packed.get(f"{layer.name}.weight")) is not None:
            weights[f"{layer.name}/weight"] = own.dense(torch.float32)
            continue
        weight = matrix_of(tensors, layer, transposed=layer.name in transposed)
        if layer.name in transposed:
            weight = weight.T.contiguous()
        weights[f"{layer.name}/weight"] = weight.float()
    for name in shape.head_names:
        weights[name] = tensors[name.replace("/", ".")].float()
    return weights


def dense(architecture: Architecture, tensors: Tensors) -> dict[str, Tensor]:
    """The model's tensors with each quantised parameter as one tensor of the model's type."""
    packed = quantised_in(tensors)
    if not packed:
        return dict(tensors)
    stored = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    other = turned(skeleton(architecture), architecture.shape)
    for name, weight in packed.items():
        stored[name] = weight.dense().T.contiguous() if name in other else weight.dense()
    return stored


def with_targets(
    shape: ModelShape,
    transposed: frozenset[str],
    tensors: Tensors,
    targets: Tensors,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The model's tensors with `targets`, canonical `<layer>/weight` and `<layer>/bias`, in place of its own.

    dtype of what takes them, a parameter of several experts as a whole: None keeps each tensor's own."""
    stored, experts = dict(tensors), {layer.name: layer for layer in shape.experts}
    written = {name.rpartition("/")[0] for name in targets}
    for parameter in {place(layer)[0] for name, layer in experts.items() if name in written}:  # matrix by matrix
        stored[parameter] = tensors[parameter].to(dtype or tensors[parameter].dtype, copy=True)
    for name, tensor in targets.items():
        layer, _, role = name.rpartition("/")
        plain = f"{layer}.{role}"
        turned = tensor.T if role == "weight" and layer in transposed else tensor
        if layer in experts:
            matrix_of(stored, experts[layer], transposed=layer in transposed).copy_(turned)
        else:
            stored[plain] = turned.to(dtype or tensors[plain].dtype).contiguous()
    return stored


def _random(architecture: Architecture) -> tuple[nn.Module, set[str]]:
    # transformers knows which vectors begin at one and which at zero, and computes the buffers; its normal
    # draws come from torch's generator, whose state we hand back untouched, and are replaced.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build(architecture.hf_config, architecture.kind, device="cpu")
    computed = set(getattr(module, "_keys_to_ignore_on_save", None) or ())  # Marian's positions, which no file holds
    return module, {name for name, x in module.named_parameters() if x.ndim > 1 and name not in computed}


def _pretrained(model: Model, architecture: Architecture) -> tuple[nn.Module, set[str]]:
    import transformers

    source, hf_config, how = locate(model.path), copy.deepcopy(architecture.hf_config), {}
    auto = getattr(transformers, auto_class(architecture.hf_config, architecture.kind))
    given = {
        "gguf_file": source.gguf,
        "dtype": getattr(torch, model.dtype),
        "output_loading_info": True,
        # A head for another number of classes is drawn anew; every other mismatch is refused below.
        "ignore_mismatched_sizes": True,
        "trust_remote_code": False,
    }
    stored = bitsandbytes_config(model)
    try:
        with reading(source):
            if stored is not None:
                heads = set[str]()
                if architecture.shape.head:  # which not every file has, and those that have it not all quantised
                    _, info = auto.from_pretrained(source.name, config=hf_config, device_map="meta", **given)
                    heads = quantised_heads(stored, architecture.shape, info)
                skeletal = skeleton(architecture)
                hf_config.quantization_config = loading_config(stored, skeletal, architecture.shape, heads)
                how = {"device_map": {"": "cpu"}}  # or transformers takes a GPU where there is one
            # The configuration, or transformers reads a GGUF file once more for it.
            module, info = auto.from_pretrained(source.name, config=hf_config, **given, **how)
    except Exception as error:  # a stranger's file may cause any error in the libraries
        raise UserError(
            "model.path", model.path, "a model whose weights transformers can load", reason(error)
        ) from error
    lacking = set(info["missing_keys"]) | {mismatch[0] for mismatch in info["mismatched_keys"]}
    lacking -= architecture.tied.keys()
    head = {name.replace("/", ".") for name in architecture.shape.head_names}
    # Encoders trained without classification often lack the pooler that their classifiers read.
    foreign = sorted(name for name in lacking - head if not head or ".pooler." not in name)
    if foreign:
        some = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise UserError(
            "model.path",
            model.path,
            f"a checkpoint for {architecture.kind} with all its weights",
            f"it lacks {some}",
        )
    if stored is not None:
        lacking |= _without_bitsandbytes(module, model, architecture)
    return module, lacking | _without_other_classes(module, architecture, lacking)


def _without_other_classes(module: nn.Module, architecture: Architecture, lacking: set[str]) -> set[str]:
    """Puts the rows of the checkpoint's heads, if it has any, into the order of the classes (`class_rows`).  Gives the
    names of weights for other classes, of the layers that have a row for each."""
    rows = architecture.class_rows
    if rows == ():
        return set()
    base = f"{getattr(module, 'base_model_prefix', '')}."
    heads = {layer.name for layer in architecture.shape.head}
    outputs = dict[str, nn.Module]()  # the last layer of each head: a teacher's, as DeiT's and LeViT's, is another one
    for name, layer in linear_layers(module):
        fits = layer_size(layer)[0] == architecture.hf_config.num_labels
        if fits and (name in heads or not name.startswith(base)):
            outputs[name.partition(".")[0]] = layer
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parts = {names[id(parameter)]: parameter for layer in outputs.values() for parameter in layer.parameters()}
    if rows is None:
        return set(parts)
    for name, parameter in parts.items():
        if name not in lacking:
            parameter.data = parameter.data[list(rows)]
    return set()


def _without_bitsandbytes(module: nn.Module, model: Model, architecture: Architecture) -> set[str]:
    """Puts frozen layers of ours, or plain ones, in the places of bitsandbytes'.  Gives the names of a head's weights
    for another number of classes, which are zeros now."""
    bones, dtype, packed, other = skeleton(architecture), getattr(torch, model.dtype), {}, set()
    heads = {layer.name for layer in architecture.shape.head}
    try:
        for name, layer, weight in of_bitsandbytes(module):
            parent, _, child = name.rpartition(".")
            new: Any = bones.get_submodule(name)
            if layer.bias is not None:
                new.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
            module.get_submodule(parent).register_module(child, new)
            if f"{name}.weight" in architecture.quantised and isinstance(weight, Quantised):
                packed[f"{name}.weight"] = replace(weight, dtype=dtype)
                continue
            whole_mn = weight.dense(dtype) if isinstance(weight, Quantised) else weight.to(dtype)
            whole = whole_mn if isinstance(new, nn.Linear) else whole_mn.T.contiguous()
            if whole.shape != new.weight.shape:
                if name not in heads:
                    raise ValueError(f"{name} is {' x '.join(map(str, whole.shape))}")
                other.add(f"{name}.weight")
                whole = whole.new_zeros(new.weight.shape)
            new.weight = nn.Parameter(whole, requires_grad=False)
    except ValueError as error:
        allowed = "a checkpoint of bitsandbytes with all that its layers need"
        raise UserError("model.path", model.path, allowed, str(error)) from error
    quantise(module, packed, {})
    kept = kept_exact(module)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():  # transformers leaves some in the checkpoint's type
            parameter.data = parameter.data.to(torch.float32 if name in kept else dtype)
    return other


def _quantised(tensors: dict[str, Tensor], model: Model, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors with the parts of those that are to be quantised, or are so in a GGUF file, in their places."""
    todo = {name: form for name, form in architecture.quantised.items() if name in tensors}
    if not todo:
        return tensors
    module = skeleton(architecture)
    other, stored = turned(module, architecture.shape), dict[str, Quantised]()
    if model.quantize == "stored":
        stored = dict(gguf_weights(model, module, todo))
    for name, form in todo.items():
        tensor = tensors.pop(name)
        weight_mn = tensor.T if name in other else tensor
        own = replace(stored[name], dtype=tensor.dtype) if name in stored else quantised(weight_mn, form)
        if name in stored and not torch.equal(own.dense(), weight_mn):
            allowed = f"none, int8 or nf4 with {model.path}, whose {name} is another one once it is read"
            raise UserError(FIELD, model.quantize, allowed, "set model.quantize=none")
        tensors |= parts_of(name, own)
    return tensors


@torch.no_grad()
def check_causal(model: Model, module: Any, vocabulary: int | None = None) -> None:
    """UserError where logits change with later tokens: two rows that differ in their last two tokens are compared, of
    an encoder-decoder two answers.  vocabulary: number of tokens; None: of the model's embeddings.

    Where attention is causal, equal tokens have equal logits to the bit; mixtures of experts may round otherwise.  An
    encoder's differ by 3e-3 of what the changed tokens' own do at least, in fresh tiny models of all types.
    """
    vocabulary = vocabulary or module.get_input_embeddings().weight.shape[0]
    ids_2T = torch.arange(3, 3 + _SEEN).remainder(vocabulary).repeat(2, 1)
    ids_2T[1, -2:] = ids_2T[1, :2]
    inputs = {"input_ids": ids_2T, "attention_mask": torch.ones_like(ids_2T)}
    if text_to_text(getattr(module, "config", None)):
        inputs |= {"input_ids": ids_2T[:1].repeat(2, 1), "decoder_input_ids": ids_2T}
    with quiet():
        answer = answered(module, inputs, causal=True)
    logits_2TV: Tensor = answer.logits.float()
    apart_T = (logits_2TV[0] - logits_2TV[1]).abs().amax(dim=-1)
    if apart_T[:-2].max() > _LEAK * apart_T[-2:].max():
        value = module.config.model_type if model.path == RANDOM else model.path
        field = "model.random.type" if model.path == RANDOM else "model.path"
        allowed = "a causal language model; this one's tokens see later tokens, so it would read its own answers"
        if "decoder_input_ids" in inputs:
            raise UserError(field, value, allowed.replace("language model", "decoder"), "take another model")
        raise UserError(field, value, allowed, "take a decoder, or give the task a label to classify")


def _collected(module: nn.Module, model: Model, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for alias, name in architecture.tied.items():
        if parameters[alias] is not parameters[name] and not torch.equal(parameters[alias], parameters[name]):
            allowed = "a checkpoint whose tied weights are equal, as its configuration says"
            raise UserError("model.path", model.path, allowed, f"{alias} differs from {name}")
    dtype, kept = getattr(torch, model.dtype), kept_exact(module)
    for name, tensor in all_tensors(module):
        if name not in architecture.tied:
            rounded = name in parameters and name not in kept and tensor.is_floating_point()
            yield name, (tensor.to(dtype) if rounded else tensor).detach().contiguous()


def all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes by dotted name, a quantised weight's by its parts'; a shared one
    under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    for path, child in module.named_modules():
        for key, value in vars(child).items():
            name = f"{path}.{key}" if path else key
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, Quantised):
                yield from parts_of(name, value).items()


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, leaf = _owner(module, name)
    if leaf in dict(owner.named_parameters(recurse=False)):
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        # setattr puts a tensor among the buffers where there is one of the name.
        setattr(owner, leaf, tensor)


def _normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    values = stream(seed, "weights", name).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values * np.float32(std))
