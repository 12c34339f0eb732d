"""Rows of a pack side by side as one flat row, without filling: attention alone sees where a row begins and ends.

Linear layers, norms, embeddings and activations treat every token by itself, so they take the tokens of all rows one
after the other.  Attention takes each row alone, filled up to a canonical length that follows from its own length; rows
of equal canonical length share a call.  So a row meets the same kernels, with the same bits, whatever stands beside it.

transformers lets a caller register an attention function and a mask function under a name; the ones here hand each
group of rows to the model's own (`sdpa` or eager), which know windows, soft caps, sinks and scaling.

Legend: S tokens of the flat row, P those of all rows at their canonical lengths, R rows of a group, L their canonical
length, H heads, d size of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rayfed_sub.models.frozen_linear import FrozenEmbedding
from rayfed_sub.models.positions import changing, position_limit, positions_padding, unchanged_positions
from rayfed_sub.models.presets import FLAT, FLAT_CLASSIFIERS, UNFILLED
from rayfed_sub.models.quantised import Quantised

_VECTOR = 32
"""Numbers that torch's kernels take at a time.  Of a tensor's last ones, if fewer are left, SiLU, GELU and sigmoid are
computed by other code, with other bits."""
_ALIGNED = 8
"""Tokens of a client are filled up to a multiple of this, so that its part of the flat row begins where memory is
aligned: matrix products may have other bits at another offset."""
_SHORTEST = 16
"""The shortest canonical length."""
_NAME = "rayfed-flat"
"""The attention implementation that transformers knows the functions here by."""


@dataclass(frozen=True)
class PassRule:
    """Rule by which rows go through a model.

    flat: those of a language model as one flat row; pooled: those of a classifier that reads the first token of each,
    and the module behind which the others are no longer needed; up to there all are one flat row.  Else rows are
    grouped by canonical length.  granule: a client's tokens are filled up to a multiple of it.  rows: rows are filled
    up to a multiple of this where layers see one vector of each (pooled heads, images, a generated token).  longest:
    the most positions that the model has; None without limit.  apart: rows are a source, which the encoder reads, and
    an answer, grouped by the canonical lengths of both; sources: as longest, of sources.  exact: rows are not filled up
    to more tokens than this, for what fills them up would change them; None: to any number.  twins: rows that fill a
    pass up are those of others, for the model wants an end in each.  alone: a pass has one client, whose are all
    tokens.  padding: of models that count positions from their padding token's number on, and leave that token out, its
    number.
    """

    flat: bool = False
    granule: int = _ALIGNED
    rows: int = 1
    longest: int | None = None
    apart: bool = False
    sources: int | None = None
    exact: int | None = None
    twins: bool = False
    alone: bool = False
    pooled: str = ""
    padding: int | None = None

    def canonical(self, tokens: int) -> int:
        """The length at which attention sees a row of so many tokens: in eight steps from each power of two to the
        next.

        >>> [PassRule().canonical(tokens) for tokens in (1, 16, 17, 100, 130, 1000)]
        [16, 16, 32, 112, 144, 1024]
        >>> PassRule(longest=100).canonical(99), [PassRule(exact=40).canonical(tokens) for tokens in (30, 33, 50)]
        (100, [32, 33, 50])
        """
        step = max(_SHORTEST, self.granule, 1 << max(0, tokens.bit_length() - 4))
        rounded = -(-tokens // step) * step
        if self.exact is not None and rounded > self.exact:
            return tokens
        return rounded if self.longest is None else max(tokens, min(rounded, self.longest))

    def positions(self, ids_BT: NDArray[np.int64]) -> NDArray[np.int64]:
        """The position of each token in its row, as the model would count them.

        >>> PassRule().positions(np.array([[5, 1, 7]])), PassRule(padding=1).positions(np.array([[5, 1, 7]]))
        (array([[0, 1, 2]]), array([[2, 1, 3]]))
        """
        if self.padding is None:
            return np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
        counted_BT = ids_BT != self.padding
        place_BT: NDArray[np.int64] = counted_BT.cumsum(axis=1) * counted_BT + self.padding
        return place_BT

    def sees_rows(self, layer: str) -> bool:
        """True for a layer of a pooled classifier that takes one token of each row.

        >>> rule = PassRule(pooled="bert.encoder")
        >>> [rule.sees_rows(f"{name}.dense") for name in ("bert.encoder.layer.0.output", "bert.pooler", "classifier")]
        [False, True, True]
        """
        base = self.pooled.partition(".")[0]
        return not f"{layer}.".startswith(f"{base}.") or f"{layer}.".startswith(f"{base}.pooler.")

    def of_sources(self) -> PassRule:
        """The rule for sources alone."""
        return replace(self, longest=self.sources)


def pass_rule(model: nn.Module) -> PassRule:
    """The rule of a transformers model, on any device; worked out once and kept with it."""
    found = vars(model).get("_pass_rule")
    if isinstance(found, PassRule):
        return found
    owner: Any = model
    config, heads = getattr(model, "config", None), getattr(model, "get_output_embeddings", lambda: None)()
    part = _VECTOR // gcd(_VECTOR, *_inner_sizes(model))
    known = hasattr(config, "get_text_config")  # a module of the caller's own may call anything its config
    apart = bool(vars(model).get("text_to_text"))
    longest = position_limit(model, config, "decoder" if apart else "") if known else None
    sources = position_limit(model, config, "encoder") if apart else None
    flat = heads is not None and is_flat(config) and not vars(model).get("as_it_is", False)
    classifies = known and heads is None
    unfilled = classifies and getattr(config, "model_type", "") in UNFILLED
    twins = classifies and bool(getattr(config, "is_encoder_decoder", False))
    alone = bool(vars(model).get("one_at_a_time", False))
    pooled = _pooled_at(model) if classifies else ""
    padding = positions_padding(model) if pooled else None
    rule = PassRule(
        flat=flat,
        granule=max(_ALIGNED, part),
        rows=part,
        longest=longest,
        apart=apart,
        sources=sources,
        exact=0 if unfilled else unchanged_positions(model),
        twins=twins,
        alone=alone,
        pooled=pooled,
        padding=padding,
    )
    owner._pass_rule = rule
    return rule


def _inner_sizes(model: nn.Module) -> list[int]:
    """The input sizes of linear layers: what activations give out."""
    sizes = []
    for part in model.modules():
        weight = getattr(part, "weight", None)
        looks_up = isinstance(part, nn.Embedding | FrozenEmbedding)
        if isinstance(weight, Tensor | Quantised) and weight.ndim == 2 and not looks_up:
            turned = type(part).__name__ == "Conv1D" or getattr(part, "transposed", False)
            sizes.append(weight.shape[0 if turned else 1])
    return sizes


def _pooled_at(model: Any) -> str:
    """The name of a text classifier's stack of blocks, if rows may lie side by side up to its end; else empty."""
    config, base = model.config, getattr(model, "base_model_prefix", "")
    otherwise = _chunked(config) or getattr(config, "is_decoder", False) or vars(model).get("as_it_is", False)
    if otherwise or getattr(config, "model_type", "") not in FLAT_CLASSIFIERS:
        return ""
    names = (f"{base}.{name}" for name in ("encoder", "transformer"))
    modules = dict(model.named_modules())
    return next((name for name in names if name in modules), "")


def is_flat(config: Any) -> bool:
    """True where rows of a causal model of this configuration may lie side by side (`presets.FLAT`)."""
    return config.model_type in FLAT and not _chunked(config) and not changing(config)


def _chunked(config: Any) -> bool:
    """True where layers split a row's tokens into chunks.  A chunk of a flat row could mix clients."""
    return bool(getattr(config, "chunk_size_feed_forward", 0))


@dataclass(frozen=True, eq=False)
class FlatRows:
    """Places of rows in a flat row.  groups: (rows, canonical length) of each call of attention, in the order of P.
    source_P: the flat token at each of attention's places; filled_P: True at places that only fill a row up, which
    repeat its last token.  place_S: each flat token's place; strange_S: True at tokens that belong to no row: attention
    gives them zeros.  as_they_lie: attention's places are the flat tokens in their order, so nothing is moved.
    first_R: the first token of each row of a classification, with rows that fill up.  Attention looks both ways there,
    so rows as long as their canonical length, which need no mask, are groups of their own; filled: of each group,
    whether its rows are filled up."""

    groups: tuple[tuple[int, int], ...]
    source_P: Tensor
    filled_P: Tensor
    place_S: Tensor
    strange_S: Tensor
    as_they_lie: bool = False
    first_R: Tensor | None = None
    filled: tuple[bool, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> FlatRows:
        """The rows with their tensors changed, on their way to a device."""
        source_P, filled_P = change(self.source_P), change(self.filled_P)
        place_S, strange_S = change(self.place_S), change(self.strange_S)
        first_R = None if self.first_R is None else change(self.first_R)
        return replace(
            self, source_P=source_P, filled_P=filled_P, place_S=place_S, strange_S=strange_S, first_R=first_R
        )

    def real(self, group: int) -> Tensor:
        """Which places of a group's rows hold a token of theirs, (R, L) bool."""
        R, L = self.groups[group]
        begin = sum(rows * length for rows, length in self.groups[:group])
        return ~self.filled_P[begin : begin + R * L].view(R, L)


def flat_rows(
    begins: Sequence[int], lengths: Sequence[int], size: int, rule: PassRule, pooled: int | None = None
) -> FlatRows:
    """Rows of these lengths that begin at these tokens of a flat row of `size` tokens.  pooled: rows of a
    classification, with those that fill up.

    >>> rows = flat_rows([0, 3], [3, 2], 6, PassRule())
    >>> rows.groups, rows.place_S.tolist(), rows.strange_S.tolist()[4:]
    (((2, 16),), [0, 1, 2, 16, 17, 0], [False, True])
    """
    begin_R, length_R = np.array(begins), np.array(lengths)
    canonical_R = np.array([rule.canonical(length) for length in lengths])
    short_R = (length_R < canonical_R) & (pooled is not None)
    sources, filled, groups, kinds = [], [], [], sorted({*zip(canonical_R.tolist(), short_R.tolist(), strict=True)})
    for canonical, short in kinds:
        rows = (canonical_R == canonical) & (short_R == short)
        token_L, last_R1 = np.arange(canonical)[None], length_R[rows, None] - 1
        sources.append((begin_R[rows, None] + np.minimum(token_L, last_R1)).ravel())
        filled.append((token_L > last_R1).ravel())
        groups.append((int(rows.sum()), canonical))
    source_P, filled_P = np.concatenate(sources), np.concatenate(filled)
    place_S, strange_S = np.zeros(size, np.int64), np.ones(size, bool)
    (real_N,) = (~filled_P).nonzero()
    place_S[source_P[real_N]] = real_N
    strange_S[source_P[real_N]] = False
    as_they_lie = len(source_P) == size and bool((source_P == np.arange(size)).all())
    source, filled_, place, strange = map(torch.from_numpy, (source_P, filled_P, place_S, strange_S))
    first = None if pooled is None else torch.tensor([*begins, *[0] * (pooled - len(begins))])
    short_groups = tuple(short for _, short in kinds)
    return FlatRows(tuple(groups), source, filled_, place, strange, as_they_lie, first, short_groups)


@dataclass(eq=False)
class _Pass:
    """A forward pass: its rows, the implementation that the model has itself, the mask functions' arguments that the
    model asked masks with, and masks by the number of these and the group's."""

    rows: FlatRows
    plain: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)


_PASS: ContextVar[_Pass | None] = ContextVar("flat rows of the forward pass", default=None)


@contextmanager
def attending(model: nn.Module, rows: FlatRows) -> Iterator[None]:
    """Within it the model's attention sees each of the rows alone.  The model takes `input_ids`, `position_ids` (from 0
    in each row, or as `PassRule.positions` has them) and `attention_mask` (all ones), each (1, S).  A classification's
    head sees the rows' first tokens, (R, 1, h)."""
    _register()
    plain: str = _configs(model)[id(model.config)]._attn_implementation or "eager"
    with _pooled(model, rows.first_R), _entered(model, _Pass(rows, plain)):
        yield


@contextmanager
def _pooled(model: nn.Module, first_R: Tensor | None) -> Iterator[None]:
    """Makes the module at `PassRule.pooled` return the tokens `first_R` alone, (R, 1, h); None: all tokens."""
    if first_R is None:
        yield
        return

    def first_tokens(module: nn.Module, given: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][0].index_select(0, first_R)[:, None]
        return output

    handle = model.get_submodule(pass_rule(model).pooled).register_forward_hook(first_tokens)
    try:
        yield
    finally:
        handle.remove()


def same_rows(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What brings the forward pass of now back, for a part of the model that is computed once more."""
    current = _PASS.get()
    return nullcontext if current is None else partial(_entered, model, current)


def _configs(model: nn.Module) -> dict[int, Any]:
    return {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}


@contextmanager
def _entered(model: nn.Module, current: _Pass) -> Iterator[None]:
    before = [(config, config._attn_implementation) for config in _configs(model).values()]
    token = _PASS.set(current)
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        _PASS.reset(token)
        for config, old in before:
            config._attn_implementation = old


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if _NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, _mask)


def _mask(**asked: Any) -> Tensor:
    """Stands for a mask until attention knows a length: the number of what was asked for."""
    current = _PASS.get()
    assert current is not None
    current.asked.append(asked)
    return torch.full((1, 1, 1, 1), len(current.asked) - 1)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Attention of query (1, H, S, d), key and value likewise, to (1, S, H, d): row by row, by the model's own
    function."""
    current = _PASS.get()
    assert current is not None
    rows, plain = current.rows, _plain(module, current.plain)
    parts = [query[0], key[0], value[0]]
    if not rows.as_they_lie:
        parts = [_Spread.apply(x, rows) for x in parts]  # type: ignore[no-untyped-call]
    # One group is all there is: a slice's gradient would be zeros first.
    sizes = [R * L for R, L in rows.groups]
    by_group = [[x] if len(sizes) == 1 else x.split(sizes, dim=1) for x in parts]
    outputs = []
    for number, ((R, L), *group) in enumerate(zip(rows.groups, *by_group, strict=True)):
        given = [x.unflatten(1, (R, L)).transpose(0, 1) for x in group]
        mask = None if attention_mask is None else _mask_of(current, int(attention_mask.flatten()[0]), number)
        # The keys of several heads that share one are a copy for several rows, and for one row a view of stride 0,
        # whose products have other bits: a row alone goes in twice.
        alone = R == 1 and len(parts[1]) == 1
        if alone:
            given = [torch.cat([x, x]) for x in given]
        out_RLHd = plain(module, *given, mask, **how)[0]
        outputs.append((out_RLHd[:R] if alone else out_RLHd).flatten(0, 1))
    out_PHd = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not rows.as_they_lie:
        out_PHd = _Gathered.apply(out_PHd, rows)  # type: ignore[no-untyped-call]
    return out_PHd[None], None


def _plain(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the module's model would take itself."""
    from transformers import AttentionInterface

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Any]] = AttentionInterface().get_interface(name, eager)
    return function


def _mask_of(current: _Pass, asked: int, group: int) -> Tensor | None:
    """The mask that was asked for, for the rows of a group, by the model's own mask function; None where attention
    needs none.  Where it looks to the left alone, nothing that counts sees what fills rows up."""
    from transformers import AttentionMaskInterface

    if (asked, group) not in current.masks:
        R, L = current.rows.groups[group]
        both_ways = current.rows.first_R is not None
        here: dict[str, Any] = {"batch_size": R if both_ways else 1, "attention_mask": None}
        if both_ways and current.rows.filled[group]:
            here |= {"attention_mask": current.rows.real(group), "allow_is_bidirectional_skip": False}
        sizes = {"q_length": L, "kv_length": L, "q_offset": 0, "kv_offset": 0}
        made = AttentionMaskInterface._global_mapping[current.plain](**{**current.asked[asked], **sizes, **here})
        current.masks[asked, group] = made
    return current.masks[asked, group]


class _Spread(torch.autograd.Function):
    """Flat tokens (H, S, d) to attention's places (H, P, d)."""

    @staticmethod
    def forward(ctx: Any, x_HSd: Tensor, rows: FlatRows) -> Tensor:
        ctx.rows = rows
        return x_HSd.index_select(1, rows.source_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        """A row's last token stands at filled places too, but nothing looks at those: their gradient is zero."""
        (d_HPd,) = outputs
        return d_HPd.index_select(1, ctx.rows.place_S).masked_fill_(ctx.rows.strange_S[:, None], 0.0), None


class _Gathered(torch.autograd.Function):
    """Attention's places (P, H, d) to flat tokens (S, H, d)."""

    @staticmethod
    def forward(ctx: Any, y_PHd: Tensor, rows: FlatRows) -> Tensor:
        ctx.rows = rows
        return y_PHd.index_select(0, rows.place_S).masked_fill_(rows.strange_S[:, None, None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (d_SHd,) = outputs
        return d_SHd.index_select(0, ctx.rows.source_P).masked_fill_(ctx.rows.filled_P[:, None, None], 0.0), None
