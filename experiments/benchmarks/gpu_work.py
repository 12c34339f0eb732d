"""What `gpu.py` gives a device to do: models with random weights made there, a client's rows, and a round of clients in
three ways: in a pack, and one after the other with peft and with galore_torch.

Only torch, numpy and transformers are needed; peft and galore_torch where they are at hand.

Legend: G clients of a pack, B rows of a batch, T tokens of a row, m, n layer sizes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.benchmarks.cases import BETAS, EPS, LR, RANK, SCALE
from rayfed_sub.core.devices import meta_as
from rayfed_sub.core.lowrank import inner_core
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import (
    Broadcast,
    Client,
    ClientState,
    LocalResult,
    ModelShape,
    OptimizerRule,
    ServerState,
    Start,
    Tensors,
)
from rayfed_sub.methods.protocol import Method
from rayfed_sub.models.architecture import Architecture, build, layer_of, tied
from rayfed_sub.models.frozen_linear import quantise
from rayfed_sub.models.logits import logit_rule
from rayfed_sub.models.quantised import Quantised
from rayfed_sub.models.quantised import quantised as rounded
from rayfed_sub.models.targets import find_targets
from rayfed_sub.models.weights import all_tensors, ruled, tie
from rayfed_sub.planning.allocations import Allocations, FusedAttention
from rayfed_sub.training.executor import ClientWork, PackResult, train_pack
from rayfed_sub.training.layers import PackLinear, based_on
from rayfed_sub.training.pack_experts import install
from rayfed_sub.training.pack_step import LocalRule

SEED = 0
ALPHA = 16.0
_NEVER = 10**9  # steps between refreshes: each client's round begins with one
_GALORE = "galore_torch"

Batch = Mapping[str, Tensor]

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    },
    "TinyLlama-1.1B": {
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "vocab_size": 32_000, "tie_word_embeddings": False},
    },
    "Llama-3.2-1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    },
}
"""Llamas by their own sizes."""


@dataclass(frozen=True)
class AdamW:
    """The clients' optimizer, as a configuration has it."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = BETAS
    eps: float = EPS
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None


def llama(sizes: Mapping[str, Any], dtype: torch.dtype) -> Architecture:
    """A Llama of these sizes and type of weights, its targets those of `model.targets=lower-mlp`."""
    from transformers import LlamaConfig

    hf_config = LlamaConfig(**sizes, max_position_embeddings=2048)
    hf_config.dtype = dtype
    module = build(hf_config, "causal-lm")
    found = find_targets("lower-mlp", module, "causal-lm", ())
    shape = ModelShape(tuple(layer_of(name, layer) for name, layer in found.items()))
    return Architecture(hf_config, "causal-lm", shape, dict(tied(module)), logits=logit_rule(module))


@dataclass(frozen=True, eq=False)
class Engine:
    """A frozen model on a device, ready for packs."""

    architecture: Architecture
    model: nn.Module
    layers: Mapping[str, PackLinear]

    @property
    def shape(self) -> ModelShape:
        return self.architecture.shape

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """`<target>/weight` (m, n) float32, on the device."""
        return {f"{name}/weight": _dense(layer.weight) for name, layer in self.layers.items()}


def _dense(weight: Tensor | Quantised) -> Tensor:
    """A weight as float32."""
    return weight.float() if isinstance(weight, Tensor) else weight.dense(torch.float32)


def engine(architecture: Architecture, device: torch.device) -> Engine:
    """The model with random weights that are drawn on the device."""
    return installed(architecture, plain_model(architecture, device))


def plain_model(architecture: Architecture, device: torch.device) -> nn.Module:
    """transformers' model with random weights that are drawn on the device; no gradients."""
    torch.manual_seed(SEED)
    model = build(architecture.hf_config, architecture.kind, str(device)).requires_grad_(False)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def installed(architecture: Architecture, model: nn.Module) -> Engine:
    """The engine over a plain model, whose target layers it replaces."""
    ruled(model, architecture)
    return Engine(architecture, model, install(model, architecture.shape))


def quantised(architecture: Architecture, device: torch.device, form: str) -> Engine:
    """The engine over the same weights, all but embeddings rounded to `int8` or `nf4`.  ImportError where bitsandbytes,
    which knows nf4, is not at hand."""
    model: Any = plain_model(architecture, device)
    output = model.get_output_embeddings()
    linears = {name: part for name, part in model.named_modules() if type(part) is nn.Linear and part is not output}
    weights = {f"{name}.weight": _rounded(part.weight.detach(), form) for name, part in linears.items()}
    quantise(model, weights, {})
    return installed(architecture, model)


def _rounded(weight_mn: Tensor, form: str) -> Quantised:
    """A weight in a form; int8 without bitsandbytes, which dequantises nothing of it."""
    if form != "int8":
        return replace(rounded(weight_mn, form), dtype=weight_mn.dtype)
    scales_m1 = weight_mn.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    codes_mn = (weight_mn.float() * (127 / scales_m1)).round().to(torch.int8)
    return Quantised(form, {"codes": codes_mn, "scales": scales_m1}, weight_mn.dtype)


def backbone_bytes(one: Engine) -> int:
    """Bytes of all frozen tensors, each once."""
    tensors = {id(tensor): tensor for _, tensor in all_tensors(one.model)}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moved(own: Architecture, model: nn.Module, device: torch.device) -> Engine:
    """The engine over a copy of the model on a device."""
    return installed(own, copy.deepcopy(model).to(device))


def batches(vocabulary: int, client: int, steps: int, rows: int, tokens: int) -> list[Batch]:
    """A client's batches: rows (B, T) of random tokens, all of them learned; row b has b tokens less, padded right."""
    rng, found = stream(SEED, "gpu rows", client), list[Batch]()
    for _ in range(steps):
        ids = torch.from_numpy(rng.integers(1, vocabulary, (rows, tokens)))
        length_B1 = torch.tensor([max(2, tokens - b) for b in range(rows)])[:, None]
        real = torch.arange(tokens)[None] < length_B1
        mask, labels = real.long(), ids.masked_fill(~real, -100)
        found.append({"input_ids": ids.masked_fill(~real, 0), "attention_mask": mask, "labels": labels})
    return found


def rule_of(optimizer: OptimizerRule | None = None, lr: float = LR) -> LocalRule:
    """A round's rule; AdamW where none is given."""
    return LocalRule(AdamW() if optimizer is None else optimizer, lr, SEED, 0)


def begun(one: Engine, method: Method, server: ServerState | None = None) -> Broadcast:
    """The broadcast of a server on the engine's device; of a new one without."""
    state = method.init_server(one.weights, one.shape, SEED) if server is None else server
    sent = method.broadcast(state).tensors
    return Broadcast(state.round, {name: tensor.to(one.device) for name, tensor in sent.items()})


def works_of(
    one: Engine,
    method: Method,
    received: Broadcast,
    given: Mapping[int, Sequence[Batch]],
    states: Mapping[int, ClientState] | None = None,
) -> list[ClientWork]:
    """The work of clients with these batches; states: of those that come back."""
    known = states or {}
    return [
        ClientWork(k, method.start_client(received, known.get(k), Client(k, SEED), one.shape), list(own))
        for k, own in given.items()
    ]


def trained(one: Engine, received: Broadcast, works: Sequence[ClientWork], rule: LocalRule) -> PackResult:
    """A round of a pack, as a worker trains it."""
    bases = {
        layer.name: received.tensors[f"{layer.name}/weight"]
        for layer in one.shape.targets
        if f"{layer.name}/weight" in received.tensors
    }
    with based_on(one.layers, bases):
        return train_pack(one.model, one.layers, one.shape, works, rule)


def changes(shape: ModelShape, start: Start, result: LocalResult) -> dict[str, Tensor]:
    """The change (m, n) of every target's weight in a client's round, float64, on the CPU."""
    begin, end = ({name: x.double().cpu() for name, x in of.items()} for of in (start.tensors, result.tensors))
    found = {}
    for layer in shape.targets:
        weight = f"{layer.name}/weight"
        if layer.name in result.blocks:
            left, right = (x.double() for x in result.blocks[layer.name])
            found[layer.name] = left @ right
        elif weight in begin:
            found[layer.name] = end[weight] - begin[weight]
        else:
            scale = start.scale_of(layer.name)
            found[layer.name] = scale * (_product(end, layer.name) - _product(begin, layer.name))
    return found


def _product(tensors: Tensors, layer: str) -> Tensor:
    left, right, core = tensors[f"{layer}/left"], tensors[f"{layer}/right"], inner_core(tensors, layer)
    return left @ right if core is None else left @ core @ right


def furthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest |ours - theirs| / |theirs| of a layer, Frobenius; 0 for two zeros."""
    gaps = [(float((ours[name] - theirs[name]).norm()), float(theirs[name].norm())) for name in theirs]
    return max((gap / whole if whole else math.inf for gap, whole in gaps if gap), default=0.0)


def planned(architecture: Architecture, method: Method, pack: int, given: Sequence[Batch]) -> int:
    """Bytes that a pack's round takes on a GPU besides backbone and broadcast, as a plan counts them: the training
    code itself, walked on tensors without data."""
    module = build(architecture.hf_config, architecture.kind).requires_grad_(False)
    tie(module, architecture.tied)
    one = installed(architecture, module)
    nothing = {name: x.to("meta") for name, x in _server_tensors(method, one).items()}
    received = Broadcast(0, nothing)
    starts = works_of(one, method, received, dict.fromkeys(range(pack), given))
    works = [replace(work, start=replace(work.start, tensors=_meta(work.start.tensors))) for work in starts]
    known = [x for _, x in all_tensors(one.model)] + list(nothing.values())
    known += [x for work in works for x in work.start.tensors.values()]
    with meta_as("cuda"), FusedAttention(), Allocations(known) as seen:
        results = trained(one, received, works, rule_of())
    del results
    return int(seen.peak)


def _server_tensors(method: Method, one: Engine) -> Tensors:
    shapes = {f"{layer.name}/weight": torch.empty(layer.m, layer.n, device="meta") for layer in one.shape.targets}
    return method.broadcast(method.init_server(shapes, one.shape, SEED)).tensors


def _meta(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.empty_like(x, dtype=torch.float32, device="meta") for name, x in tensors.items()}


def wheels_of(folder: Path | None) -> None:
    """Puts the wheels of a folder, pure Python all, where Python looks for packages."""
    sys.path[:0] = [str(wheel) for wheel in sorted((folder or Path()).glob("*.whl")) if folder is not None]


def galore_adamw() -> Any:
    """galore_torch's GaLoreAdamW, from its two files `adamw.py` and `galore_projector.py`: the package itself imports
    bitsandbytes for an optimizer that is not used here.  ImportError where it is not at hand."""
    found = find_spec(_GALORE)
    if found is None:
        raise ImportError(f"no {_GALORE}")
    own = f"{_GALORE}_files"
    if own not in sys.modules:
        spec = ModuleSpec(own, None, is_package=True)
        spec.submodule_search_locations = list(found.submodule_search_locations or ())
        sys.modules[own] = module_from_spec(spec)
    return import_module(f"{own}.adamw").AdamW


@dataclass(frozen=True, eq=False)
class OneByOne:
    """Clients in turn on one model, by a library's own training.  moving: the trained tensors; begun: as every client
    begins; optimizer: makes a client's own."""

    model: nn.Module
    moving: Sequence[nn.Parameter]
    begun: Sequence[Tensor]
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

    def train(self, given: Sequence[Batch]) -> list[Tensor]:
        """A client's round: its trained tensors, on the CPU."""
        with torch.no_grad():
            for parameter, begin in zip(self.moving, self.begun, strict=True):
                parameter.copy_(begin)
        optimizer, device = self.optimizer(self.moving), self.moving[0].device
        for batch in given:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            self.model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in self.moving]


def with_peft(architecture: Architecture, device: torch.device) -> OneByOne:
    """LoRA by peft, torch's AdamW."""
    from peft import LoraConfig, inject_adapter_in_model

    model = plain_model(architecture, device)
    names = [layer.name for layer in architecture.shape.targets]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0)
    model = inject_adapter_in_model(config, model).eval()
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _one_by_one(
        model, moving, lambda own: torch.optim.AdamW(own, lr=LR, betas=BETAS, eps=1e-6, weight_decay=0.0)
    )


def with_galore(architecture: Architecture, device: torch.device) -> OneByOne:
    """Dense weights by galore_torch's optimizer."""
    kind, model = galore_adamw(), plain_model(architecture, device)
    moving = [model.get_parameter(f"{layer.name}.weight") for layer in architecture.shape.targets]
    for parameter in moving:
        parameter.requires_grad_()
    projector = {"rank": RANK, "update_proj_gap": _NEVER, "scale": SCALE, "proj_type": "std"}

    def optimizer(own: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(
            [{"params": list(own), **projector}], lr=LR, betas=BETAS, eps=EPS, no_deprecation_warning=True
        )
        return made

    return _one_by_one(model, moving, optimizer)


def _one_by_one(
    model: nn.Module,
    moving: Sequence[nn.Parameter],
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
) -> OneByOne:
    return OneByOne(model, moving, [parameter.detach().clone() for parameter in moving], optimizer)
