"""Experts inside the real libraries, for the reference executor: every expert's tensors are parameters of their own, of
which the stacked ones, transformers' or those of peft's `target_parameters`, are made anew before each forward pass.

Legend: E experts, m, n size of a matrix, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rayfed_sub.core.lowrank import inner_core, sides
from rayfed_sub.core.types import Layer, ModelShape, Start, Tensors
from rayfed_sub.models.experts import Matrix, experts_of, matrices_in, place
from rayfed_sub.models.quantised import mute_bitsandbytes

Parameters = dict[str, nn.Parameter]
FACTORS = ("left", "core", "heads", "right")
"""Roles of the tensors that make up a layer's low-rank change."""


def expert_parameters(model: nn.Module, shape: ModelShape, begun: Tensors, start: Start) -> Parameters:
    """Puts the client's tensors of experts' matrices into `model`; the parameters by name, those of GaLore's whole
    weights by the name of the trained factor.  `begun` has a weight (m, n) of every target."""
    targets = {layer.name: layer for layer in shape.experts}
    if not targets:
        return {}
    found: Parameters = {}
    setters: list[Callable[[], None]] = []
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]
    matrices = [matrix for one in experts_of(model).values() for matrix in one.matrices]
    owners = {x.parameter: model.get_submodule(x.parameter.rpartition(".")[0]) for x in matrices}  # peft moves them
    for matrix in matrices:
        own, owner = [targets[name] for name in matrix.names if name in targets], owners[matrix.parameter]
        if not own:
            continue
        stored = owner.get_parameter(matrix.parameter.rpartition(".")[2])
        for layer in own:
            W_mn = begun[f"{layer.name}/weight"]
            _slices(stored.data, matrix)[place(layer)[1]].copy_(W_mn.T if matrix.transposed else W_mn)
        roles = {name.rpartition("/")[2] for name in start.tensors if name.startswith(f"{own[0].name}/")}
        low_rank = start.subspace is None and "left" in roles
        if low_rank and "core" not in roles and stored.ndim == 3:
            setters.append(_in_peft(model, owner, matrix, own, start, found))
        else:
            setters.append(_in_model(owner, matrix, own, begun, start, found, low_rank=low_rank))

    def renew(*_: Any) -> None:
        for setter in setters:
            setter()

    model.register_forward_pre_hook(renew)
    return found


def _slices(stored: Tensor, matrix: Matrix) -> Tensor:
    """Every expert's matrix as it is stored."""
    return matrices_in(stored, matrix.n if matrix.transposed else matrix.m)


def _parameter(start: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(start.to(device, copy=True).float(), requires_grad=False)


def _in_model(
    owner: nn.Module,
    matrix: Matrix,
    own: Sequence[Layer],
    begun: Tensors,
    start: Start,
    found: Parameters,
    *,
    low_rank: bool,
) -> Callable[[], None]:
    """A function that puts the stack of all matrices in the stored parameter's place: of these layers the client's own
    weights, or theirs plus `scale * left @ core @ right`, multiplied out."""
    key = matrix.parameter.rpartition(".")[2]
    stored = owner._parameters.pop(key)
    assert stored is not None
    made: dict[int, Callable[[], Tensor]] = {}
    for layer in own:
        W_mn = begun[f"{layer.name}/weight"].to(stored.device)
        if low_rank:
            names = [name for role in FACTORS if (name := f"{layer.name}/{role}") in start.tensors]
            factors = {name: _parameter(start.tensors[name], stored.device) for name in names}
            found |= factors
            made[place(layer)[1]] = partial(_with_change, W_mn, factors, start.scale_of(layer.name))
        else:
            trained = f"{layer.name}/weight" if start.subspace is None else sides(layer)[1]
            found[trained] = _parameter(W_mn, stored.device)
            made[place(layer)[1]] = partial(_itself, found[trained])

    def put() -> None:
        parts = list(_slices(stored.detach(), matrix))
        for number, weight in made.items():
            parts[number] = weight().T if matrix.transposed else weight()
        setattr(owner, key, torch.stack(parts).view(stored.shape))

    return put


def _itself(weight_mn: Tensor) -> Tensor:
    return weight_mn


def _with_change(W_mn: Tensor, factors: Tensors, scale: float) -> Tensor:
    return W_mn + low_rank(factors, scale)


def low_rank(factors: Tensors, scale: float) -> Tensor:
    """A layer's `scale * left @ core @ right`, multiplied out as one reads it; factors: of one layer, by name."""
    layer = next(iter(factors)).rpartition("/")[0]
    left_mr, core_rr, right_rn = factors[f"{layer}/left"], inner_core(factors, layer), factors[f"{layer}/right"]
    return scale * (left_mr @ right_rn if core_rr is None else left_mr @ core_rr @ right_rn)


def _in_peft(
    model: nn.Module, owner: nn.Module, matrix: Matrix, own: Sequence[Layer], start: Start, found: Parameters
) -> Callable[[], None]:
    """Wraps the stored parameter by peft; a function that puts the experts' factors side by side in peft's own.

    peft has one rank and one scale for all experts of a parameter: the largest rank, up to which the others' factors
    are filled up with zeros, and 1, with every expert's own scale in its B.
    """
    mute_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    key = matrix.parameter.rpartition(".")[2]
    rank = max(start.tensors[f"{layer.name}/left"].shape[1] for layer in own)
    config = LoraConfig(target_modules=[], target_parameters=[f"0.{matrix.parameter}"], r=rank, lora_alpha=rank)
    inject_adapter_in_model(config, nn.Sequential(model))
    model.eval().requires_grad_(False)
    wrappers = (part for part in model.modules() if isinstance(part, ParamWrapper))
    (wrapper,) = (part for part in wrappers if part.get_base_layer() is owner and part.parameter_name == key)
    device = wrapper.get_param().device
    factors: dict[int, tuple[float, nn.Parameter, nn.Parameter]] = {}
    for layer in own:
        names = [f"{layer.name}/{role}" for role in ("left", "right")]
        left, right = (_parameter(start.tensors[name], device) for name in names)
        factors[place(layer)[1]] = start.scale_of(layer.name), left, right
        found |= dict(zip(names, (left, right), strict=True))
    linears = [wrapper.lora_A["default"], wrapper.lora_B["default"]]
    shapes = [linear._parameters.pop("weight").shape for linear in linears]
    # peft looks itself whether a class stores (n, m); where it does not know, what it takes for B is A, transposed.
    turned = matrix.transposed and bool(wrapper._did_swap_in_out_features)

    def put() -> None:
        A_Eri = torch.zeros(len(wrapper.get_param()), rank, shapes[0][1], device=device)
        B_Eor = torch.zeros(len(wrapper.get_param()), shapes[1][0], rank, device=device)
        A, B = list(A_Eri), list(B_Eor)
        for number, (scale, left, right) in factors.items():
            A_ri, B_or = (left.T, right.T) if turned else (right, left)
            A[number], B[number] = pad(A_ri, (0, 0, 0, rank - len(A_ri))), pad(scale * B_or, (0, rank - B_or.shape[1]))
        linears[0].weight = torch.cat(A)
        linears[1].weight = torch.stack(B, dim=2).flatten(1)

    return put
