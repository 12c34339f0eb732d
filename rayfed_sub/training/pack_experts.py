"""Experts for many clients at once: every expert's matrix is a `PackLinear` that sees the tokens sent to it, sorted by
expert and client.

What a router decides stays as it is.  A token goes to k experts; their outputs are added in the order in which the
router named them, as transformers adds them.  An expert that is sent no token is not called.

Legend: N tokens of a pass, k experts of a token, S = N k pairs of a token and an expert, E experts, C clients of a
pass, of all stacks, n, m in- and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rayfed_sub.core.types import ModelShape
from rayfed_sub.models.experts import Experts, Matrix, experts_of, matrices_in
from rayfed_sub.training import layers
from rayfed_sub.training.layers import Bound, PackLinear, Terms
from rayfed_sub.training.pass_rows import Run, runs, token_runs


def install(module: nn.Module, shape: ModelShape) -> dict[str, PackLinear]:
    """Replaces the target and head layers of `module` by PackLinear over the same weights (no copy), and experts that
    are targets by `PackExperts`, also those whose matrices alone are float32, since a start changed them; by layer
    name.  All other plain linear layers are frozen."""
    found = layers.install(module, shape)
    targets = {layer.name for layer in shape.experts}
    narrow = any(parameter.dtype != torch.float32 for parameter in module.parameters())
    for experts in experts_of(module).values():
        wide = narrow and any(module.get_parameter(m.parameter).dtype == torch.float32 for m in experts.matrices)
        if not wide and not any(name in targets for matrix in experts.matrices for name in matrix.names):
            continue
        packed = PackExperts(module.get_submodule(experts.module), experts)
        parent, _, child = experts.module.rpartition(".")
        module.get_submodule(parent).register_module(child, packed)
        for matrix, own in zip(experts.matrices, packed.matrices, strict=True):
            found |= {name: layer for name, layer in zip(matrix.names, own, strict=True) if name in targets}
    return found


class PackExperts(nn.Module):
    """The experts of one place, as transformers calls them, with what clients add to their matrices.

    matrices: for each `Matrix` the layer of every expert.
    """

    def __init__(self, inner: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.inner, self.form = inner, experts.form  # inner: its gate and norm, never its own forward
        self.matrices = [_layers(inner, experts.module, matrix) for matrix in experts.matrices]

    def forward(self, hidden: Tensor, *routes: Tensor) -> Tensor:
        x_Nn = hidden.reshape(-1, hidden.shape[-1])
        inner: Any = self.inner
        expert = _COMPUTE.get(self.form, _gated)
        if self.form == "Llama4TextExperts":
            return self._by_weight(x_Nn)
        if self.form == "JetMoeMoE":
            routes = _routes(inner, x_Nn)
        index_Nk, weight_Nk = (route.reshape(len(x_Nn), -1) for route in routes)
        y_Nm = self._mixed(x_Nn, index_Nk, weight_Nk, expert).to(hidden.dtype)
        if self.form == "JetMoeMoE":
            y_Nm = y_Nm + inner.bias
        return y_Nm.view(hidden.shape)

    def _mixed(self, x_Nn: Tensor, index_Nk: Tensor, weight_Nk: Tensor, expert: Callable[..., Tensor]) -> Tensor:
        """Every token's outputs of its experts, weighted and added."""
        N, k = index_Nk.shape
        if index_Nk.is_meta:  # a plan: the first experts take all tokens
            index_Nk = torch.arange(k).expand(N, k)
        E, clients = len(self.matrices[0]), self._clients(N)
        expert_S = index_Nk.reshape(-1)
        order_S = torch.argsort(expert_S, stable=True)  # a client's tokens of an expert stay together
        token_S = order_S // k
        x_Sn, parts, begin = x_Nn[token_S], list[Tensor](), 0
        for number, count_C in enumerate(clients.counts(expert_S[order_S], token_S, E)):
            end = begin + sum(count_C)
            if end > begin:
                parts.append(expert(self, number, x_Sn[begin:end], _Sent(clients, count_C)))
            begin = end
        if begin < len(x_Sn):
            parts.append(self._beyond(x_Sn[begin:]))
        y_Sm = torch.cat(parts) * weight_Nk.reshape(-1)[order_S][:, None]
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return y_Sm[back_S].view(N, k, -1).sum(1)

    def _beyond(self, x_Sn: Tensor) -> Tensor:
        """Outputs for numbers beyond the experts': LongCat's leave the token as it is, others give nothing."""
        return x_Sn if self.form == "LongcatFlashExperts" else torch.zeros_like(x_Sn)

    def _by_weight(self, x_Pn: Tensor) -> Tensor:
        """Llama 4 gives every expert all tokens, (E * N, n), already weighted: zeros for those that are not its own."""
        E = len(self.matrices[0])
        x_ENn = x_Pn.view(E, -1, x_Pn.shape[-1])
        clients = self._clients(x_ENn.shape[1])
        sent_EN = torch.ones(x_ENn.shape[:2], dtype=torch.bool) if x_Pn.is_meta else (x_ENn != 0).any(-1)
        outputs = []
        for number, (x_Nn, sent_N) in enumerate(zip(x_ENn, sent_EN, strict=True)):
            (token_s,) = sent_N.nonzero(as_tuple=True)
            y_Nm = torch.zeros_like(x_Nn)
            if len(token_s):
                (count_C,) = clients.counts(torch.zeros_like(token_s), token_s, 1)
                y_sm = _gated(self, number, x_Nn[token_s], _Sent(clients, count_C))
                y_Nm = y_Nm.index_put((token_s,), y_sm)
            outputs.append(y_Nm)
        return torch.cat(outputs)

    def _clients(self, tokens: int) -> _Clients:
        bound = next((layer.bound for own in self.matrices for layer in own if layer.bound is not None), None)
        return _Clients((0,), (), tokens) if bound is None else _clients(bound, tokens)


@dataclass(frozen=True)
class _Clients:
    """Whose the tokens of a pass are.  first: the number of each stack's first client, and of all clients at the end;
    runs: of each stack, in tokens; tokens: of the pass, those included that only fill it up."""

    first: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    tokens: int

    def counts(self, expert_S: Tensor, token_S: Tensor, experts: int) -> list[list[int]]:
        """By expert the number of each client's tokens, and of those that belong to nobody at the end."""
        C = self.first[-1]
        client_N = torch.full((self.tokens,), C, device=expert_S.device)
        for first, own in zip(self.first, self.runs, strict=False):
            for run in own:
                numbers = torch.arange(first + run.first, first + run.last, device=expert_S.device)
                end = run.begin + (run.last - run.first) * run.count
                client_N[run.begin : end] = numbers.repeat_interleave(run.count)
        key_S = expert_S.clamp(max=experts) * (C + 1) + client_N[token_S]
        counts: list[list[int]] = torch.bincount(key_S, minlength=(experts + 1) * (C + 1)).view(-1, C + 1).tolist()
        return counts[:experts]


def _clients(bound: Bound, tokens: int) -> _Clients:
    own = tuple(token_runs(terms.rows, tokens, bound.rows) for terms in bound.stacks)
    sizes = (max((run.last for run in some), default=0) for some in own)
    return _Clients(tuple(accumulate(sizes, initial=0)), own, tokens)


@dataclass(frozen=True)
class _Sent:
    """The tokens of one expert: how many of each client, and of nobody."""

    clients: _Clients
    count_C: Sequence[int]

    def through(self, layer: PackLinear, x_sn: Tensor) -> Tensor:
        """The layer's outputs for them."""
        if layer.bound is None:
            y_sm: Tensor = layer(x_sn)
            return y_sm
        return layer.summed(x_sn, tuple(self._runs(*stack) for stack in enumerate(layer.bound.stacks)))

    def _runs(self, stack: int, terms: Terms) -> tuple[Run, ...]:
        first, last = self.clients.first[stack : stack + 2]
        kinds = terms.closed.used_G if terms.closed is not None and terms.closed.used_G else None
        return runs(self.count_C[first:last], sum(self.count_C[:first]), kinds)


def _gated(experts: PackExperts, number: int, x_sn: Tensor, sent: _Sent) -> Tensor:
    """An expert of transformers' interface; Llama 4's and LongCat's are such with the usual gate."""
    up, down = (own[number] for own in experts.matrices)
    inner: Any = experts.inner
    y_sm = sent.through(up, x_sn)
    if hasattr(inner, "_apply_gate"):
        y_sm = inner._apply_gate(y_sm) if inner.has_gate else inner.act_fn(y_sm)
    else:
        gate_sm, y_sm = y_sm.chunk(2, dim=-1)
        y_sm = inner.act_fn(gate_sm) * y_sm
    y_sn = sent.through(down, y_sm)
    return inner.post_expert_norm(y_sn) if getattr(inner, "has_post_expert_norm", False) else y_sn


def _three(experts: PackExperts, number: int, x_sn: Tensor, sent: _Sent) -> Tensor:
    """An expert of DBRX, whose gate is a matrix by itself."""
    gate, up, down = (own[number] for own in experts.matrices)
    inner: Any = experts.inner
    return sent.through(down, inner.mlp.activation_fn(sent.through(gate, x_sn)) * sent.through(up, x_sn))


def _jet(experts: PackExperts, number: int, x_sn: Tensor, sent: _Sent) -> Tensor:
    """An expert of JetMoE."""
    up, down = (own[number] for own in experts.matrices)
    inner: Any = experts.inner
    gate_sm, y_sm = sent.through(up, x_sn).chunk(2, dim=-1)
    return sent.through(down, inner.activation(gate_sm) * y_sm)


_COMPUTE = {"DbrxExperts": _three, "JetMoeMoE": _jet}


def _routes(jet: Any, x_Nn: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of JetMoE's tokens and their weights, both (N, k), as its router takes them."""
    logits_Nk, index_Nk = jet.router.layer(x_Nn).float().topk(jet.router.top_k, dim=1)
    return index_Nk, torch.softmax(logits_Nk, dim=1).type_as(x_Nn)


def _layers(inner: nn.Module, module: str, matrix: Matrix) -> list[PackLinear]:
    """Every expert's matrix as a layer over the stored tensor."""
    key = matrix.parameter.removeprefix(f"{module}.")
    owner = inner.get_submodule(key.rpartition(".")[0])
    stored: Any = getattr(owner, key.rpartition(".")[2])
    biases: Any = getattr(owner, f"{key}_bias").detach() if matrix.bias else [None] * matrix.count
    own = matrices_in(stored.detach(), matrix.n if matrix.transposed else matrix.m)[: matrix.count]
    weights = own.mT if matrix.transposed else own
    return [PackLinear(weight_mn, bias_m) for weight_mn, bias_m in zip(weights, biases, strict=False)]
