"""The experts of a mixture as linear layers: which parameters hold their matrices, and how these lie there.

transformers keeps one matrix of every expert of a block in one parameter, (E, m, n) or (E, n, m), and calls the experts
through one interface (`transformers.integrations.moe`), whose classes say how the parameters lie; a few types have
classes of their own, which are known by their names.  Here every expert's matrix is a layer by itself, named
`<parameter>.<number>`.

Legend: E experts, m, n size of a matrix, (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rayfed_sub.core.types import Layer


@dataclass(frozen=True)
class Matrix:
    """One matrix of each expert of a place.

    parameter: dotted name of the tensor in which they lie one after the other; count: of experts.  bias: whether there
    is a vector of each beside it, `<parameter>_bias`.  transposed: a matrix is stored as (n, m).  up: projects to the
    inner size past the activation, alone or together with the gate.
    """

    parameter: str
    count: int
    m: int
    n: int
    bias: bool
    transposed: bool
    up: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(f"{self.parameter}.{number}" for number in range(self.count))


@dataclass(frozen=True)
class Experts:
    """The experts of one place.  module: its dotted name; form: `interface`, or the name of a class of its own;
    matrices: in the order in which a token passes them, a gate of its own first."""

    module: str
    form: str
    matrices: tuple[Matrix, ...]


_OWN = {
    "Llama4TextExperts": (("gate_up_proj", True, True), ("down_proj", True, False)),
    "LongcatFlashExperts": (("gate_up_proj", False, True), ("down_proj", False, False)),
    "DbrxExperts": (("mlp.w1", False, False), ("mlp.v1", False, True), ("mlp.w2", True, False)),
    "JetMoeMoE": (("input_linear.weight", False, True), ("output_linear.weight", False, False)),
}
"""Classes that are not called through the interface: their parameters, whether these are stored transposed, and which
one projects up."""
_COUNTS = ("num_routed_experts", "num_experts")


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """The experts of a transformers model by their module's name, in the model's order."""
    found = {}
    for name, part in module.named_modules():
        form = type(part).__name__ if type(part).__name__ in _OWN else "interface"
        if form == "interface" and not all(hasattr(part, key) for key in ("has_gate", "is_transposed", "_apply_gate")):
            continue
        found[name] = Experts(name, form, tuple(_matrices(name, part, form)))
    return found


def _matrices(name: str, part: Any, form: str) -> Iterator[Matrix]:
    first = "gate_up_proj" if form != "interface" or part.has_gate else "up_proj"
    turned = form == "interface" and part.is_transposed
    count = next((getattr(part, key) for key in _COUNTS if hasattr(part, key)), 0)
    for key, transposed, up in _OWN.get(form, ((first, turned, True), ("down_proj", turned, False))):
        owner = part.get_submodule(key.rpartition(".")[0])
        stored = getattr(owner, key.rpartition(".")[2])
        # Some of a type's matrices may belong to experts that compute nothing.
        one = count or len(stored)
        rows, columns = stored.shape[-2] if stored.ndim == 3 else len(stored) // one, stored.shape[-1]
        m, n = (columns, rows) if transposed else (rows, columns)
        yield Matrix(f"{name}.{key}", one, m, n, hasattr(owner, f"{key}_bias"), transposed, up)


def place(layer: Layer) -> tuple[str, int]:
    """The parameter that holds an expert's matrix, and the expert's number.

    >>> place(Layer("h.0.mlp.experts.down_proj.3", 4, 8, expert=True))
    ('h.0.mlp.experts.down_proj', 3)
    """
    parameter, _, number = layer.name.rpartition(".")
    return parameter, int(number)


def matrix_of(tensors: Mapping[str, Tensor], layer: Layer, *, transposed: bool) -> Tensor:
    """A target's weight as it is stored among the model's tensors, a view: (m, n), or (n, m) where transposed."""
    if not layer.expert:
        return tensors[f"{layer.name}.weight"]
    parameter, number = place(layer)
    return matrices_in(tensors[parameter], layer.n if transposed else layer.m)[number]


def matrices_in(stored: Tensor, rows: int) -> Tensor:
    """The matrices (E, rows, columns) of a parameter that may hold them one below the other, (E * rows, columns)."""
    return stored.view(-1, rows, stored.shape[-1])
