"""The way from a causal model's output layer to its logits, found by evidence: `cap * tanh(factor * z / cap)`.

Most models give out z = h W^T + b as it is.  Some multiply it (Cohere, Granite), some cap it softly (Gemma 2, xLSTM),
under names of their own.  Nothing is read from names: the output layer's result is replaced by known numbers, and the
logits are compared with them.  A model on the meta device serves as well, since only what follows the output layer
computes with those numbers.

Legend: T tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rayfed_sub.core.rng import stream
from rayfed_sub.models.text_to_text import text_to_text

_BIAS = "final_logits_bias"
_TOKENS = 3
_SCALES = (1.0, 30.0, 1000.0)  # a cap hardly shows in the small logits of a fresh model
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LogitRule:
    """Logits as a function of the output layer's result z: factor * z, then soft-capped where there is a cap.

    >>> LogitRule(cap=30.0).logits(torch.tensor([0.0, 1e9]))
    tensor([ 0., 30.])
    """

    factor: float = 1.0
    cap: float | None = None

    def logits(self, z: Tensor) -> Tensor:
        """The logits of z, of any shape."""
        scaled = z if self.factor == 1.0 else z * self.factor
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Their derivative by z, of the logits' shape where there is a cap."""
        return self.factor if self.cap is None else self.factor * (1 - (logits / self.cap).square())

    def __str__(self) -> str:
        scaled = "output layer" + ("" if self.factor == 1.0 else f" x {self.factor:.6g}")
        return scaled if self.cap is None else f"{scaled}, soft cap {self.cap:.6g}"


def logit_rule(model: nn.Module) -> LogitRule | None:
    """The rule of a causal language model, on any device; None where it is another function of the output layer's
    result, or of more than that, or where the output layer is not one linear layer that is called once.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    >>> config = AutoConfig.for_model("granite", **sizes, logits_scaling=4.0)
    >>> with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    >>> print(logit_rule(model))
    output layer x 0.25
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
        return None
    # What follows the output layer asks nothing of the blocks, which take nearly all of the time, and mixtures of
    # experts ask where their tokens go, which no meta tensor knows: the blocks are passed over where the model allows.
    with _without_bias(model):
        rule = _found(model, head, skipped=True) or _found(model, head, skipped=False)
    return rule if added_bias(model) is None or rule == LogitRule() else None


def added_bias(model: nn.Module) -> Tensor | None:
    """What the model adds to the result of its output layer, (V,): BART and its kin have it as a buffer."""
    found = getattr(model, _BIAS, None)
    return found[0] if isinstance(found, Tensor) else None


@contextmanager
def _without_bias(model: nn.Module) -> Iterator[None]:
    """The model with zeros in place of the bias, which on the meta device nobody could look through."""
    kept = model._buffers.get(_BIAS)
    if kept is not None:
        model._buffers[_BIAS] = torch.zeros(kept.shape)
    try:
        yield
    finally:
        if kept is not None:
            model._buffers[_BIAS] = kept


def _found(model: nn.Module, head: Any, *, skipped: bool) -> LogitRule | None:
    z_TV = torch.from_numpy(stream(0, "logits").standard_normal((_TOKENS, len(head.weight)))).float()
    given = [(scale * z_TV).to(head.weight.dtype).float() for scale in _SCALES]  # as the output layer rounds
    try:
        with _without_blocks(model) if skipped else nullcontext():
            seen = [_logits_of(model, head, z_TV) for z_TV in given]
            with hidden_states(head):  # as losses are computed
                _run(model)
    except Exception:  # a model may fail on foreign numbers: its own logits are always right
        return None
    known = [logits_TV for logits_TV in seen if logits_TV is not None]
    return _fitted(given, known) if len(known) == len(seen) else None


@contextmanager
def _without_blocks(model: nn.Module) -> Iterator[None]:
    """The model with the outermost blocks of its lists giving back their input."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
    blocks = [block for name in inside for block in model.get_submodule(name).children()]
    for block in blocks:
        block.forward = lambda hidden, *args, **kwargs: hidden
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def hidden_states(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output layer's inputs, (..., T, h), and spares it the product: it gets none of their tokens."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _logits_of(model: nn.Module, head: nn.Module, z_TV: Tensor) -> Tensor | None:
    """The logits (T, V) that the model makes of the output layer's result; None where they are none of its tokens'."""
    calls = []

    def replaced(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        calls.append(args[0].shape[:-1] == (1, _TOKENS) and result.shape == (1, *z_TV.shape))
        return z_TV[None]

    handle = head.register_forward_hook(replaced)
    try:
        logits: Tensor = _run(model)
    finally:
        handle.remove()
    return None if calls != [True] or logits.is_meta or logits.shape != (1, *z_TV.shape) else logits[0].float()


@torch.no_grad()
def _run(model: Any) -> Tensor:
    ids_1T = torch.arange(3, 3 + _TOKENS, device=next(model.parameters()).device)[None]
    with Affirming():
        answer = {"decoder_input_ids": ids_1T} if text_to_text(model.config) else {}
        logits: Tensor = model(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **answer, use_cache=False
        ).logits
    return logits


def _picked(x: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Places in place of a mask over rows, which is true for all, or over rows and tokens, for one token of each row;
    None for any other index."""
    mask = indices[0] if len(indices) else None
    if not x.is_meta or mask is None or mask.dtype != torch.bool or mask.ndim > 2 or x.ndim != 3:
        return None
    rows = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
    return [rows] * mask.ndim + list(indices[1:])


class Affirming(TorchDispatchMode):
    """Answers true, or 1, where a model asks a meta tensor for a value: whether all tokens count, for instance; none
    where it asks for the places of values: no token goes to an expert; takes a mask for one of all places, or, where it
    picks rows or tokens by it, of all rows, or of one token of each, as encoder-decoders that classify pick the last.
    yes: False answers false instead of true: whether any token attends to all, for instance."""

    def __init__(self, *, yes: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.yes = yes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.yes if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty(0, args[0].ndim, dtype=torch.int64, device="meta")
        if func is torch.ops.aten.unique_consecutive.default and args[0].is_meta:
            return tuple(torch.empty(1, dtype=args[0].dtype, device="meta") for _ in range(3))
        if func is torch.ops.aten.index.Tensor and (places := _picked(*args[:2])) is not None:
            args = (args[0], places)
        elif func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and args[0].is_meta:
            args = (args[0], [x for index in args[1] for x in _everywhere(index)], *args[2:])
        return func(*args, **(kwargs or {}))


def _everywhere(index: Tensor | None) -> list[Tensor | None]:
    """All places in the place of a mask, (n,) along each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta") for _ in index.shape]


def _fitted(given: Sequence[Tensor], seen: Sequence[Tensor]) -> LogitRule | None:
    """The rule by which all logits follow from what the output layer gave, both (T, V) and growing."""
    z_TV, highest, largest = given[0], float(seen[-1].abs().max()), float(given[-1].abs().max())
    linear = LogitRule(_rounded(float((seen[0] * z_TV).sum() / z_TV.square().sum())))
    cap = _rounded(highest)
    rules = [linear]
    if 0 < highest < largest:
        steep_TV = torch.atanh((seen[0] / cap).clamp(-0.999, 0.999)) * cap
        rules.append(LogitRule(_rounded(float((steep_TV * z_TV).sum() / z_TV.square().sum())), cap))
    for rule in rules:
        expected = [rule.logits(z_TV) for z_TV in given]
        if all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in zip(seen, expected, strict=True)):
            return rule
    return None


def _rounded(number: float) -> float:
    """The number with the six digits that float32 leaves sure: 0.0625 and not 0.06250001."""
    return float(f"{number:.6g}")
