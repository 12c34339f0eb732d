"""A client inside the real libraries: `peft` holds LoRA's factors, `galore_torch` projects and steps, torch does SGD.
An inner factor (`core`, of one head or several), which neither library knows, is plain autograd: left, core and right
multiplied out.

Legend: m, n layer sizes, r rank, k = size of the projected side (n on the right, m on the left), l = the other side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayfed_sub.core.lowrank import sides, signed
from rayfed_sub.core.rng import stream
from rayfed_sub.core.types import Layer, ModelShape, OptimizerRule, Start, Tensors
from rayfed_sub.models.quantised import mute_bitsandbytes
from rayfed_sub.training.dropout import GivenDropout
from rayfed_sub.training.expert_libraries import FACTORS, expert_parameters, low_rank
from rayfed_sub.training.projectors import basis
from rayfed_sub.training.stacks import expert_step

_SINGULAR_CUT = 1e-7  # singular values below this share of the largest are float32 rounding: rank(G) < r
_STATE = {"adamw": {"m1": "exp_avg", "m2": "exp_avg_sq"}, "sgd": {"m1": "momentum_buffer"}}


@dataclass
class Moving:
    """A trained tensor: its name, the parameter that autograd differentiates, and the one the optimiser steps; taken:
    steps before the round.

    They are the same, except for GaLore under SGD: galore_torch has no such optimiser, so torch's SGD steps a zero
    matrix of the projected shape, which is then projected back onto the weight.
    """

    name: str
    parameter: nn.Parameter
    stepped: nn.Parameter
    taken: int
    projector: Any = None  # galore_torch.galore_projector.GaLoreProjector

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.name.rpartition("/")[0]


def moving_tensors(
    model: nn.Module,
    shape: ModelShape,
    begun: Tensors,
    start: Start,
    names: tuple[int, int],
    optimizer: OptimizerRule,
) -> list[Moving]:
    """Puts the client's tensors into `model` and returns those that are trained, in the Start's order."""
    parameters: dict[str, Any] = {}
    layers: dict[str, Layer] = {}
    linear_shape = ModelShape(tuple(layer for layer in shape.targets if not layer.expert), shape.head)
    for layer in linear_shape.targets:
        weight, left, core = (f"{layer.name}/{role}" for role in ("weight", "left", "core"))
        if core in begun:
            parameters |= _cored(model, layer, begun, start, names)
            continue
        if start.subspace is None and left in begun:
            _load(model.get_submodule(layer.name), begun[weight])
            continue
        linear = _linear(model, layer, begun[weight], None)
        trained = weight if start.subspace is None else sides(layer)[1]
        parameters[trained], layers[trained] = linear.weight, layer
    parameters |= expert_parameters(model, shape, begun, start)
    layers |= {sides(layer)[1]: layer for layer in shape.experts}
    for layer in shape.head:
        weight, bias = f"{layer.name}/weight", f"{layer.name}/bias"
        linear = _linear(model, layer, begun[weight], begun.get(bias))
        parameters[weight], parameters[bias] = linear.weight, linear.bias
    has = {name.rpartition("/")[2] for name in start.tensors}
    if start.subspace is None and "left" in has and "core" not in has:
        parameters |= _lora(model, linear_shape, start, names) if linear_shape.targets else {}
    moving, experts = [], {layer.name: layer for layer in shape.experts}
    for name in start.trained:
        parameter = stepped = parameters[name]
        parameter.requires_grad_(True)
        projector, taken = None, start.step
        if name.rpartition("/")[0] in experts:
            taken = expert_step(start, experts[name.rpartition("/")[0]])
        if start.subspace is not None and name in layers:
            projector = _projector(layers[name], start, names, parameter.device)
            if optimizer.name == "sgd":
                stepped = nn.Parameter(torch.zeros_like(start.tensors[name], device=parameter.device))
        moving.append(Moving(name, parameter, stepped, taken, projector))
    return moving


def _load(module: nn.Module, W_mn: Tensor) -> None:
    """Writes a canonical weight into a layer in place; GPT-2's Conv1D stores it transposed."""
    stored = module.weight
    assert isinstance(stored, Tensor)
    stored.data.copy_(W_mn if isinstance(module, nn.Linear) else W_mn.T)


def _linear(model: nn.Module, layer: Layer, W_mn: Tensor, bias_m: Tensor | None) -> nn.Linear:
    """Replaces a layer by a plain nn.Linear: galore_torch chooses its side by the stored shape: it must be (m, n)."""
    old = model.get_submodule(layer.name)
    bias: Any = old.bias if bias_m is None else bias_m
    stored = old.weight
    assert isinstance(stored, Tensor)
    linear = nn.Linear(layer.n, layer.m, bias=bias is not None, device=stored.device).requires_grad_(False)
    linear.weight.data.copy_(W_mn)
    if bias is not None:
        linear.bias.data.copy_(bias)
    model.set_submodule(layer.name, linear)
    return linear


class _Cored(nn.Module):
    """A linear layer plus `scale * left @ core @ right`; the product is formed (m, n), as one reads it."""

    def __init__(
        self, linear: nn.Linear, factors: Mapping[str, nn.Parameter], scale: float, dropout: nn.Module | None
    ) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, dropout or nn.Identity()
        self.factors = factors  # by name

    def forward(self, x: Tensor) -> Tensor:
        change_mn = low_rank(self.factors, self.scale)
        y: Tensor = self.linear(x) + functional.linear(self.dropout(x), change_mn)
        return y


def _cored(
    model: nn.Module, layer: Layer, begun: Tensors, start: Start, whose: tuple[int, int]
) -> dict[str, nn.Parameter]:
    """Puts the client's three factors around a layer, as parameters."""
    linear = _linear(model, layer, begun[f"{layer.name}/weight"], None)
    names = [name for role in FACTORS if (name := f"{layer.name}/{role}") in begun]
    device = linear.weight.device
    factors = {n: nn.Parameter(begun[n].to(device, copy=True), requires_grad=False) for n in names}
    dropout = _dropout(layer, start, whose)
    model.set_submodule(layer.name, _Cored(linear, factors, start.scale_of(layer.name), dropout))
    return factors


def _dropout(layer: Layer, start: Start, whose: tuple[int, int]) -> GivenDropout | None:
    seed, client = whose
    return GivenDropout(seed, client, layer.name, start.dropout) if start.dropout else None


def _lora(model: nn.Module, shape: ModelShape, start: Start, whose: tuple[int, int]) -> dict[str, nn.Parameter]:
    """Injects peft's LoRA with the client's factors; every target has its own rank r and alpha = scale * r."""
    mute_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model

    own = {layer.name: start.tensors[f"{layer.name}/left"].shape[1] for layer in shape.targets}
    first = model.get_submodule(shape.targets[0].name)
    config = LoraConfig(
        target_modules=[f"0.{layer.name}" for layer in shape.targets],
        rank_pattern={re.escape(name): rank for name, rank in own.items()},
        alpha_pattern={re.escape(name): start.scale_of(name) * rank for name, rank in own.items()},
        lora_dropout=start.dropout,
        fan_in_fan_out=not isinstance(first, nn.Linear),
    )
    # Within another module: where peft sees a model's configuration it takes shared experts for parts of the experts.
    inject_adapter_in_model(config, nn.Sequential(model))
    model.eval().requires_grad_(False)
    parameters = {}
    for layer in shape.targets:
        adapted: Any = model.get_submodule(layer.name)
        for role, part in (("left", adapted.lora_B["default"]), ("right", adapted.lora_A["default"])):
            part.weight.data.copy_(start.tensors[f"{layer.name}/{role}"])
            parameters[f"{layer.name}/{role}"] = part.weight
        if (dropout := _dropout(layer, start, whose)) is not None:
            # peft's own draws from torch's generator, in the order of the forward pass: other numbers in every pack.
            adapted.lora_dropout["default"] = dropout
    return parameters


def _projector(layer: Layer, start: Start, names: tuple[int, int], device: torch.device) -> Any:
    """A galore_torch projector that goes on from the client's basis; other kinds than `svd` bring their own rule."""
    from galore_torch.galore_projector import GaLoreProjector

    subspace = start.subspace
    assert subspace is not None
    # galore_torch knows no "never": it then renews at every step, and gets the same basis each time.
    projector = GaLoreProjector(subspace.rank, update_proj_gap=subspace.refresh_every or 1, scale=start.scale)
    projector.ortho_matrix = start.tensors[sides(layer)[0]].to(device)
    projector.taken = 0  # steps of the client's life, kept up to date by the executor

    def orthogonal(G_mn: Tensor, rank: int, type: str) -> Tensor:
        kept: Tensor = projector.ortho_matrix
        if not subspace.refresh_every:
            return kept
        G_lk, old = (G_mn, projector.ortho_matrix) if type == "right" else (G_mn.T, projector.ortho_matrix.T)
        old_rk = old if old.any() else None
        if subspace.projector == "exact":
            _, s_q, V_qk = torch.linalg.svd(G_lk.double(), full_matrices=False)
            kept_r = s_q[:rank] > _SINGULAR_CUT * s_q[0]
            new_rk = signed(V_qk[:rank].float() * kept_r[:, None], old_rk)
        else:
            seed, client = names
            rng = stream(seed, "projector", layer.name, client, projector.taken)
            new_rk = basis(subspace.projector, G_lk, torch.eye(len(G_lk), device=device), rank, old_rk, rng)
        return new_rk if type == "right" else new_rk.T

    if subspace.projector != "svd" or not subspace.refresh_every:
        projector.get_orthogonal_matrix = orthogonal
    return projector


def stepper_of(moving: Sequence[Moving], start: Start, optimizer: OptimizerRule, lr: float) -> torch.optim.Optimizer:
    """The library's optimiser with the client's moments and step count put back."""
    from galore_torch import GaLoreAdamW

    groups: list[dict[str, Any]] = []
    for x in moving:
        p = x.projector
        galore = {} if p is None else {"rank": p.rank, "update_proj_gap": p.update_proj_gap, "scale": p.scale}
        groups.append({"params": [x.stepped], **galore, "proj_type": "std"})
    stepper: torch.optim.Optimizer
    if optimizer.name == "adamw":
        decay, eps = optimizer.weight_decay, optimizer.eps
        stepper = GaLoreAdamW(
            groups, lr=lr, betas=optimizer.betas, eps=eps, weight_decay=decay, no_deprecation_warning=True
        )
    else:
        stepper = torch.optim.SGD(groups, lr=lr, momentum=optimizer.momentum)
    for x in moving:
        state = stepper.state[x.stepped]
        for role, key in roles(optimizer).items():
            moment = start.moments.get(f"{x.name}/{role}", torch.zeros_like(start.tensors[x.name]))
            state[key] = moment.to(x.parameter.device, copy=True)
        if optimizer.name == "adamw":
            state["step"] = x.taken
            if x.projector is not None:
                state["projector"] = x.projector
                if start.subspace is not None and start.subspace.moments == "reset" and start.subspace.refresh_every:
                    state["step"] = x.taken % start.subspace.refresh_every
    return stepper


def roles(optimizer: OptimizerRule) -> dict[str, str]:
    """Moment role -> the key under which the library's optimiser keeps it."""
    return _STATE[optimizer.name] if optimizer.name == "adamw" or optimizer.momentum else {}
