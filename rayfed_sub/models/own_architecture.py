"""A module of the caller's own as an architecture and its tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from rayfed_sub.core.errors import UserError
from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.architecture import Architecture, architecture, layer_of, reason, skeleton, tied
from rayfed_sub.models.own_model import OwnModel
from rayfed_sub.models.targets import own_targets
from rayfed_sub.models.text_to_text import KIND, LANGUAGE
from rayfed_sub.models.tokenizers import HubTokenizer, end_tokens, hub_codec
from rayfed_sub.models.weights import all_tensors, assemble, check_causal

if TYPE_CHECKING:
    from rayfed_sub.config.schema import Model

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """A module's tensors by dotted name, tied ones once, where the module has them.  state: those in its state dict."""

    tensors: Mapping[str, Tensor]
    state: tuple[str, ...]


def own_processor(own: OwnModel, kind: str) -> HubTokenizer:
    """The tokenizer that the caller hands over, a copy, since its chat template may be edited.

    Raises UserError (model) where it is none of transformers', or the task has images."""
    if kind == "image-classification":
        allowed = "a task of texts with tokenizer, or loss and batch, which read images of any form"
        raise UserError("model", "OwnModel(tokenizer=...)", allowed, "give a loss, or name the model in model.path")
    try:
        return hub_codec(copy.deepcopy(own.tokenizer), end_tokens(own.module), apart=kind == KIND)
    except Exception as error:  # anybody's object raises anything
        allowed = "a tokenizer of transformers with a token that ends an answer"
        raise UserError("model", _name(own.tokenizer), allowed, reason(error)) from error


def own_dtype(own: OwnModel) -> str:
    """The name of the type of the module's weights: float32 or bfloat16.

    Raises UserError (model) where it is no module with weights of one such type.
    """
    if not isinstance(own.module, nn.Module):
        raise UserError("model", _name(own.module), "OwnModel(module=...) with a torch.nn.Module", "give one")
    parameters = list(own.module.parameters())
    held = [*parameters, *own.module.buffers()]
    if any(isinstance(one, UninitializedParameter | UninitializedBuffer) for one in held):
        raise UserError("model", _name(own.module), "a module with initialised parameters", "run it once before")
    found = {one.dtype for one in parameters if one.is_floating_point()}
    if len(found) != 1 or not found <= set(_DTYPES):
        shown = ", ".join(sorted(map(str, found))) or "no parameters"
        raise UserError("model", _name(own.module), f"float32 or bfloat16 parameters; it has {shown}", "convert it")
    return str(found.pop()).removeprefix("torch.")


def own_architecture(
    own: OwnModel,
    model: Model,
    kind: str,
    class_names: Sequence[str] = (),
    vocabulary: int | None = None,
    pad: int | None = None,
    problem: str = "classification",
) -> tuple[Architecture, OwnWeights]:
    """The architecture of the caller's module, and its weights.

    A transformers model without a loss and head of its own becomes what `architecture` makes of its configuration, if
    that is the same class with the same tensors; any other module stays itself.  kind and what follows: as for
    `architecture`; kind is `own` with a loss.  Raises UserError (model, model.path, model.targets).
    """
    module = own.module
    aliases = dict(tied(module))
    tensors = {name: tensor.detach() for name, tensor in all_tensors(module) if name not in aliases}
    found = None
    if own.loss is None and not own.head and hasattr(module, "get_output_embeddings"):
        found = _as_transformers_builds(module, model, kind, class_names, vocabulary, pad, problem)
    if found is None:
        found = _as_it_is(own, model, kind, aliases)
    if kind in LANGUAGE:
        assert vocabulary is not None
        try:
            check_causal(model, assemble(found, tensors), vocabulary)
        except UserError:
            raise
        except Exception as error:  # a module of the caller's own raises anything
            allowed = "a module that takes input_ids (B, T) and returns logits (B, T, vocabulary)"
            raise UserError("model", _name(module), allowed, reason(error)) from error
    return found, OwnWeights(tensors, tuple(name for name in module.state_dict() if name in tensors))


def _as_transformers_builds(
    module: Any,
    model: Model,
    kind: str,
    class_names: Sequence[str],
    vocabulary: int | None,
    pad: int | None,
    problem: str,
) -> Architecture | None:
    """The architecture of the module's own configuration; None where that builds another module."""
    found = architecture(model, kind, class_names, vocabulary, pad, given=module.config, problem=problem)
    built = skeleton(found)
    if type(built) is not type(module):
        return None
    shapes, own = ({name: tuple(x.shape) for name, x in all_tensors(one)} for one in (built, module))
    if own != shapes:
        other = next(name for name in {**own, **shapes} if own.get(name) != shapes.get(name))
        allowed = f"a model with the tensors that its configuration says; {other} is {own.get(other, 'missing')}"
        classes = f", and {len(class_names)} classes as task.label has" if class_names else ""
        raise UserError("model", _name(module), f"{allowed}, not {shapes.get(other)}{classes}", "build it anew")
    return found


def _as_it_is(own: OwnModel, model: Model, kind: str, aliases: Mapping[str, str]) -> Architecture:
    from transformers.pytorch_utils import Conv1D

    if kind == KIND:
        allowed = "an encoder-decoder as its configuration builds it, without a head or loss of its own"
        raise UserError("model", _name(own.module), allowed, "give loss and batch for a module of your own")
    module, head = own.module, (own.head,) if isinstance(own.head, str) else tuple(own.head)
    # A subclass of linear layers may do more than multiply, or have its weight read past it, as attention's output has.
    linears = {name: child for name, child in module.named_modules() if name and type(child) in (nn.Linear, Conv1D)}
    if strange := [name for name in head if name not in linears]:
        allowed = f"head with names of linear layers: {', '.join(list(linears)[:8])}"
        raise UserError("model", strange[0], allowed, "correct head")
    others = {name: child for name, child in linears.items() if name not in head}
    targets = own_targets(model.targets, module, others)
    _check_apart(model, module, {**targets, **{name: linears[name] for name in head}}, aliases)
    return Architecture(
        hf_config=None,
        kind=kind,
        shape=ModelShape(
            tuple(layer_of(name, layer) for name, layer in targets.items()),
            tuple(layer_of(name, linears[name]) for name in head),
        ),
        tied=aliases,
        transposed=frozenset(name for name, layer in targets.items() if not isinstance(layer, nn.Linear)),
        module=without_data(module),
        loss=own.loss,
        measure=own.measure,
    )


def _check_apart(model: Model, module: nn.Module, trained: Mapping[str, nn.Module], aliases: Mapping[str, str]) -> None:
    """UserError for a trained layer that has two names, or shares its weight: only one of them would change."""
    names = {id(layer): name for name, layer in trained.items()}
    for name, child in module.named_modules(remove_duplicate=False):
        if id(child) in names and names[id(child)] != name:
            allowed = f"layers with one name each; {names[id(child)]} is {name} as well"
            raise UserError("model.targets", model.targets, allowed, "leave it out, or make two layers of it")
    shared = {**aliases, **{name: alias for alias, name in aliases.items()}}
    for layer in trained:
        if (weight := f"{layer}.weight") in shared:
            allowed = f"layers with weights of their own; {weight} is {shared[weight]} as well"
            raise UserError("model.targets", model.targets, allowed, "leave it out, or untie them")


def without_data(module: nn.Module) -> nn.Module:
    """A copy of the module on the meta device; no tensor's data are copied on the way."""
    memo: dict[int, Any] = {}
    for _, tensor in all_tensors(module):
        empty = torch.empty_like(tensor, device="meta").detach()
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # objects raise anything when they are copied
        allowed = "a module that copy.deepcopy copies"
        raise UserError("model", _name(module), allowed, reason(error)) from error


def _name(value: Any) -> str:
    return type(value).__qualname__
