"""The linear layers that a run trains: found by their place in the model, or by a pattern."""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rayfed_sub.core.errors import UserError
from rayfed_sub.models.dataflow import Dataflow, Link, dataflow
from rayfed_sub.models.experts import Experts, Matrix, experts_of
from rayfed_sub.models.quantised import mute_bitsandbytes
from rayfed_sub.models.text_to_text import LANGUAGE

log = logging.getLogger(__name__)

NAMED = ("lower-mlp", "all-linear", "attention", "peft")
"""Values of model.targets that are no regular expression."""
_NOT_BY_ROW = "not seen row by row"
_BLOCK = re.compile(r"^(.*?\.\d+)\.")
"""A layer's block: its name up to the first number."""
_ROUTERS = ("router", "gate", "gating", "wg", "classifier")
"""Names, beside experts or within them, of what sends tokens to them."""

_TO_OTHERS = re.compile(r"encoder_?attn|enc_?dec_?att|cross_?att", re.IGNORECASE)
"""Names of a decoder's attention to what another part has read."""


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All linear layers by name, GPT-2's Conv1D among them, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    return ((name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D))


def find_targets(targets: str, module: Any, kind: str, head: Iterable[str]) -> dict[str, nn.Module | Matrix]:
    """The trained layers of a transformers model on the meta device, by name, in the model's order; of experts one for
    each matrix of each expert.

    targets: `lower-mlp`, `all-linear`, `attention`, `peft` or a regular expression over names of modules and of
    experts' parameters.  head: layers of a classification, which are trained whatever the targets.  What is asked for
    and cannot be trained is named in a warning.  Raises UserError on model.targets where no layer is left, or the
    expression is none.
    """
    pattern = _pattern(targets, module.config.model_type)
    linears, places = dict(linear_layers(module)), experts_of(module)
    flow = dataflow(module, linears, places, kind)
    experts = {name: one for name, one in places.items() if flow.failed is not None or name in flow.reached}
    output = module.get_output_embeddings()
    # The output layer is as large as the vocabulary.
    outside = {name: "the output layer" for name, layer in linears.items() if layer is output}
    outside |= dict.fromkeys(head, "the head")
    outside |= dict.fromkeys(_routers(linears, places), "a router")
    unfit = _unfit(linears, flow) | outside
    matrices = _matrices(targets, pattern, experts)
    if pattern is not None:
        asked = [name for name in linears if pattern.search(name)]
    elif targets == "all-linear":
        asked = [name for name in linears if name not in outside]
    elif flow.failed is None:
        by_place = _mixers(linears, flow) if targets == "attention" else _mlps(linears, flow)
        lacking = targets == "lower-mlp" and not matrices and (by_place or not _stacked(module, experts))
        if lacking and kind not in LANGUAGE:
            by_place = _others_for(by_place, linears, flow, unfit)
        elif lacking and by_place <= unfit.keys():
            by_place |= _inner(linears, flow)  # no MLP, or one for several blocks
        asked = [name for name in linears if name in by_place]
    elif matrices and "meta tensor" in flow.failed:  # JetMoE's attention asks how many tokens an expert is sent
        asked = []
    else:
        allowed = "a regular expression, for this model's layers are not found without its weights"
        raise UserError("model.targets", targets, allowed, f"{flow.failed}; linear layers: {some(linears)}")
    left_out = {name: unfit[name] for name in asked if name in unfit}
    if pattern is not None:
        others = (name for name in _others(module, linears) if name not in experts)
        left_out |= {name: "not linear" for name in others if pattern.search(name)}
    fit = {name: linears[name] for name in asked if name not in unfit}
    found = _in_order(module, fit, matrices)
    if not found and kind not in LANGUAGE:
        # One client at a time can be trained whatever a layer sees: all of it is the client's.
        found = {name: linears[name] for name in asked if unfit[name] == _NOT_BY_ROW}
        left_out = {name: why for name, why in left_out.items() if name not in found}
        vars(module)["one_at_a_time"] = bool(found)
    if not found:
        raise _nothing(targets, module, [name for name in linears if name not in unfit], left_out, pattern)
    if targets in ("lower-mlp", "all-linear"):
        left_out |= dict.fromkeys(_stacked(module, experts), "several matrices in one parameter")
    if left_out:
        log.warning("model.targets: %s leaves out %s", targets, _with_reasons(left_out))
    if kind == "causal-lm" and flow.failed is None:
        _warn_of_idle([name for name in linears if name not in flow.reached | left_out.keys()])
    if flow.failed is not None:
        log.warning("model.targets: layers without a gradient are not found without weights (%s)", flow.failed)
    return found


def _warn_of_idle(unreached: Iterable[str]) -> None:
    """Says which layers without a gradient wait for what another part has read."""
    if idle := [name for name in unreached if _TO_OTHERS.search(name)]:
        what = "a decoder's attention to an encoder or to images, of which there is none here, stays untrained"
        log.warning("model.path: %s: %s", what, some(idle, 1))


def _matrices(
    targets: str, pattern: re.Pattern[str] | None, experts: Mapping[str, Experts]
) -> dict[str, dict[str, Matrix]]:
    """By place the matrices of experts that are asked for, by the layers' names."""
    found: dict[str, dict[str, Matrix]] = {}
    for place, one in experts.items():
        for matrix in one.matrices:
            if pattern is not None:
                whole = pattern.search(matrix.parameter) is not None
                names = [name for name in matrix.names if whole or pattern.search(name)]
            else:
                asked = targets == "all-linear" or (targets == "lower-mlp" and matrix.up)
                names = list(matrix.names) if asked else []
            if names:
                found.setdefault(place, {}).update(dict.fromkeys(names, matrix))
    return found


def _in_order(
    module: nn.Module, linears: Mapping[str, nn.Module], matrices: Mapping[str, Mapping[str, Matrix]]
) -> dict[str, nn.Module | Matrix]:
    """Linear layers and experts' matrices in the model's order."""
    found: dict[str, nn.Module | Matrix] = {}
    for name, _ in module.named_modules():
        if name in linears:
            found[name] = linears[name]
        found.update(matrices.get(name, {}))
    return found


def _routers(linears: Mapping[str, nn.Module], experts: Iterable[str]) -> list[str]:
    """Layers that send tokens to experts."""
    around = {f"{place}.{own}" for name in experts for place in (name, _parent(name)) for own in _ROUTERS}
    return [name for name in linears if name in around or not around.isdisjoint(_around(name))]


def _others_for(
    found: set[str], linears: Mapping[str, nn.Module], flow: Dataflow, unfit: Mapping[str, str]
) -> set[str]:
    """The layers of `lower-mlp`, or what stands for them where a classifier's blocks have no such layer that can be
    trained (their MLPs are convolutions, say): the projections into a state space, those of attention, or all."""
    usable = {name for name in linears if unfit.get(name) in (None, _NOT_BY_ROW)}
    if found & usable:
        return found
    blocks = {name for name in usable if _BLOCK.match(name)}
    choices = {
        "the projections into the blocks' inner size": _inner(linears, flow),
        "the layers of attention": _mixers(linears, flow),
        "all linear layers of the blocks": blocks,
    }
    for what, other in choices.items():
        if other & usable:
            log.warning("model.targets: the blocks' MLPs have no linear layer to train; trained are %s", what)
            return other & usable
    return found


def own_targets(targets: str, module: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the linear layers of a module of the caller's own, by name, that are asked for: all, or those that a
    regular expression finds.  Raises UserError where there is none."""
    kind = type(module).__name__
    if targets in NAMED and targets != "all-linear":
        allowed = f"all-linear or a regular expression, for models of type {kind}"
        raise UserError("model.targets", targets, allowed, f"e.g. one that matches some of {some(linears)}")
    pattern = None if targets == "all-linear" else _pattern(targets, kind)
    found = {name: layer for name, layer in linears.items() if pattern is None or pattern.search(name)}
    if not found:
        matched = [name for name, _ in module.named_modules() if name and pattern is not None and pattern.search(name)]
        only = f"it matches only {some(matched)}" if matched else "it matches no module"
        allowed = "all-linear or a regular expression that matches linear layers besides the head"
        raise UserError("model.targets", targets, allowed, f"{only}; linear layers: {some(linears) or 'none'}")
    return found


def some(names: Iterable[str], most: int = 8) -> str:
    """A few of many dotted names, one for each kind of layer.

    >>> some(["h.0.mlp.up", "h.1.mlp.up", "h.1.mlp.down"])
    'h.0.mlp.up, h.0.mlp.down'
    """
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".0", name) for name in names))
    return ", ".join(kinds[:most]) + (", ..." if len(kinds) > most else "")


def _with_reasons(left_out: Mapping[str, str]) -> str:
    """Names by the reason why they are left out."""
    reasons = dict.fromkeys(left_out.values())
    return "; ".join(
        f"{some([name for name, why in left_out.items() if why == reason], 4)} ({reason})" for reason in reasons
    )


def _others(module: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """Modules that have parameters of their own and are no linear layers."""
    own = (name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False)))
    return [name for name in own if name not in linears]


def _nothing(
    targets: str, module: Any, fit: list[str], left_out: Mapping[str, str], pattern: re.Pattern[str] | None
) -> UserError:
    """The error where no layer is left to train."""
    if not fit and not left_out and pattern is None and not _stacked(module, {}):
        allowed = f"a model with linear layers besides its head; {module.config.model_type} has convolutions, or others"
        return UserError("model.targets", targets, allowed, "take a transformer, or a model of your own with a loss")
    ways, layers = "lower-mlp, all-linear, attention, peft", f"linear layers: {some(fit) or 'none'}"
    if pattern is not None:
        matched = [name for name, _ in module.named_modules() if name and pattern.search(name)]
        only = _with_reasons(left_out) or some(matched)
        allowed = f"{ways} or a regular expression that matches linear layers besides the head"
        found = f"it matches only {only}" if matched else "it matches no module"
        return UserError("model.targets", targets, allowed, f"{found}; {layers}")
    if targets == "lower-mlp" and not left_out and (stacked := _stacked(module, {})):
        allowed = "another choice: this model's MLPs lie in parameters of a form that is not known, and are not trained"
        return UserError("model.targets", targets, allowed, f"e.g. model.targets=attention leaves {some(stacked, 2)}")
    found = f"it finds only {_with_reasons(left_out)}" if left_out else "it finds none"
    allowed = f"one of {ways} that finds linear layers in the blocks of type {module.config.model_type}, or a regular"
    return UserError("model.targets", targets, f"{allowed} expression", f"{found}; {layers}")


def _pattern(targets: str, model_type: str) -> re.Pattern[str] | None:
    """The expression that names are searched for; None where layers are found by their place."""
    if targets == "peft":
        return re.compile(_of_peft(model_type))
    if targets in NAMED:
        return None
    try:
        return re.compile(targets)
    except re.error as error:
        raise UserError("model.targets", targets, "a regular expression", str(error)) from None


def _of_peft(model_type: str) -> str:
    """peft's default layers of LoRA as an expression."""
    mute_bitsandbytes()
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if model_type not in KNOWN:
        allowed = f"lower-mlp, all-linear, attention or a regular expression; peft has no default for {model_type}"
        raise UserError("model.targets", "peft", allowed, "e.g. model.targets=attention")
    names = KNOWN[model_type]
    return f"^(?:{names})$" if isinstance(names, str) else rf"(?:^|\.)(?:{'|'.join(map(re.escape, names))})$"


def _unfit(linears: Mapping[str, nn.Module], flow: Dataflow) -> dict[str, str]:
    """Layers that cannot be trained client by client, and why."""
    found = {name: "more than a product" for name, layer in linears.items() if not multiplies(layer)}
    uses = Counter(id(layer.weight) for layer in linears.values())
    found |= {name: "a weight of several layers" for name, layer in linears.items() if uses[id(layer.weight)] > 1}
    if flow.failed is None:
        found |= {name: _NOT_BY_ROW for name in linears if name not in flow.by_row}
        found |= {name: "not called, or without a gradient" for name in linears if name not in flow.reached}
    return found


def multiplies(layer: nn.Module) -> bool:
    """True where the layer computes x W^T + bias and nothing else, tried out where its class has a forward of its
    own."""
    from transformers.pytorch_utils import Conv1D

    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    small: Any = copy.copy(layer)
    weight_53 = torch.linspace(-1, 1, 15, device="cpu").cos().view(5, 3)
    bias_5 = None if getattr(layer, "bias", None) is None else torch.linspace(0, 1, 5, device="cpu")
    small._parameters = {"weight": nn.Parameter(weight_53), "bias": None if bias_5 is None else nn.Parameter(bias_5)}
    small.in_features, small.out_features = 3, 5
    x_23 = torch.linspace(1, 2, 6, device="cpu").sin().view(2, 3)
    try:
        with torch.no_grad():
            y_25 = type(layer).forward(small, x_23)
    except Exception:  # a layer that takes more than its input
        return False
    return isinstance(y_25, torch.Tensor) and torch.allclose(y_25, functional.linear(x_23, weight_53, bias_5))


def _mlps(linears: Mapping[str, nn.Module], flow: Dataflow) -> set[str]:
    """In every block the projections from the hidden size to an MLP's inner size that do not go through the activation;
    a gate goes through it and is left out, a matrix of gate and projection is both."""
    found = set()
    for down, links in flow.links.items():
        own = [link for link in links if _together(link.source, down)]
        if any(link.across for link in links) or not any(link.activations for link in own):
            continue
        if _returns(down, linears, flow):
            reads = [link.source for link in own if layer_size(linears[link.source])[1] == layer_size(linears[down])[0]]
            found |= {source for source in reads if not _gates(source, links)}
    return found


def _gates(source: str, links: Iterable[Link]) -> bool:
    """True where what the layer gives goes through an activation and is multiplied by what does not."""
    own = [link.activations for link in links if link.source == source]
    return any(link.activations < activations for activations in own for link in links)


def _inner(linears: Mapping[str, nn.Module], flow: Dataflow) -> set[str]:
    """In every block of a state-space model, which has no MLP, the projection into its inner size."""
    found = set()
    for out, links in flow.links.items():
        if any(link.across for link in links):
            sizes = {x.source: layer_size(linears[x.source]) for x in links if _together(x.source, out)}
            found |= {name for name, (m, n) in sizes.items() if m > n == layer_size(linears[out])[0]}
    return found


def _returns(down: str, linears: Mapping[str, nn.Module], flow: Dataflow) -> bool:
    """True where the layer's output has the size of the block's tokens and is added to them: what goes through an
    activation is a gate's, or an inner layer's."""
    width = next((flow.widths[block] for block in _around(down) if block in flow.widths), None)
    if width not in (None, layer_size(linears[down])[0]):
        return False
    readers = (links for name, links in flow.links.items() if _together(name, down))
    return not any(link.source == down and link.activations for links in readers for link in links)


def _around(name: str) -> Iterator[str]:
    """The modules around a layer, from the inside out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _mixers(linears: Mapping[str, nn.Module], flow: Dataflow) -> set[str]:
    """In every block the projections into and out of what mixes tokens: query, key, value and output of attention."""
    found = set()
    for out, links in flow.links.items():
        if any(link.across and _together(link.source, out) for link in links):
            waiting = [out, *(link.source for link in links if _together(link.source, out))]
            while waiting:
                name = waiting.pop()
                found.add(name)
                # Low-rank projections are two layers.
                around = (link.source for link in flow.links.get(name, ()) if _parent(link.source) == _parent(out))
                waiting += [source for source in around if source not in found]
    return found


def _together(one: str, other: str) -> bool:
    """True for two layers of one block."""
    block, same = _BLOCK.match(one), _BLOCK.match(other)
    return block is not None and same is not None and block[1] == same[1]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """(m, n): outputs and inputs."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def _stacked(module: nn.Module, experts: Mapping[str, Experts]) -> list[str]:
    """Parameters that hold several matrices each, but for those of these experts."""
    known = {matrix.parameter for one in experts.values() for matrix in one.matrices}
    found = []
    for name, part in module.named_modules():
        if _BLOCK.match(f"{name}.") and not isinstance(part, nn.modules.conv._ConvNd):
            own = part.named_parameters(name, recurse=False)
            found += [full for full, x in own if x.ndim == 3 and min(x.shape) > 1 and full not in known]
    return found
