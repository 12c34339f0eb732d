"""The longest row that a model's positions allow, and rotary positions that follow from a row's length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import nn

from rayfed_sub.models.frozen_linear import FrozenEmbedding, FrozenLinear

_NAMED = re.compile(r"posit|pos_e|wpe")

_SPARE = 2  # rows that some models' tables have beyond the positions of the configuration

_CHANGING = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies follow from the longest row of a pass."""


def position_limit(module: nn.Module, hf_config: Any, side: str = "") -> int | None:
    """The longest row in tokens; None where positions have no table (rotary, ALiBi, relative biases), and no limit.
    side: of an encoder-decoder, encoder or decoder.

    A table is a matrix with a row for each configured position, learned (GPT-2, BERT, OPT) or computed (GPT-J).  Models
    of RoBERTa's kind count positions from the padding token's number on, so that their tables are used up earlier; they
    are known by the table's `padding_idx`.  CANINE's table is hashed; what ends there is the list of positions that is
    looked up, the buffer `position_ids` (1, P).  It counts beside a table only: others keep one and do not read it.
    MPT makes its biases by distance anew in each pass, for `max_seq_len` tokens and no more.
    """
    text = hf_config.get_text_config(decoder=True if side else None)
    if text.model_type == "mpt":
        return int(text.max_seq_len)
    keys = ("max_position_embeddings", "n_positions", "max_target_positions")
    configured = next((found for key in keys if (found := getattr(text, key, None))), None)
    configured = getattr(hf_config, f"max_{side}_position_embeddings", configured)  # LED has one for each side
    if not isinstance(configured, int):
        return None
    limits = []
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        owner = module.get_submodule(name.rpartition(".")[0])
        named = any(_NAMED.search(part) for part in name.split(".")[-2:])
        grows = hasattr(owner, "make_weights")  # computed positions that are made anew for longer rows (XGLM)
        named = named and (not side or side in name.split("."))
        table = named and tensor.ndim == 2 and not (grows or isinstance(owner, nn.Linear | FrozenLinear))
        if table and configured <= tensor.shape[0] <= configured + _SPARE:
            padding = getattr(owner, "padding_idx", None)
            limits.append(configured if padding is None else tensor.shape[0] - padding - 1)
        looked_up = any(_NAMED.search(at) and isinstance(module, nn.Embedding) for at, module in owner.named_children())
        if name.endswith("position_ids") and tensor.shape == (1, configured) and looked_up:
            limits.append(configured)
    return min(limits, default=None)


def positions_padding(module: nn.Module) -> int | None:
    """The padding token from whose number on a model of RoBERTa's kind counts positions; None of others."""
    tables = (part for name, part in module.named_modules() if name.endswith(".position_embeddings"))
    return next((part.padding_idx for part in tables if isinstance(part, nn.Embedding | FrozenEmbedding)), None)


def changing(config: Any) -> list[Mapping[str, Any]]:
    """The rotary positions of a configuration, one or one a kind of layer, whose frequencies follow from the longest
    row of a pass, so from a row's neighbours and what fills it up."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [one for one in rope.values() if isinstance(one, Mapping)] or [rope]
    return [one for one in layers if one.get("rope_type") in _CHANGING]


def unchanged_positions(module: nn.Module) -> int | None:
    """The longest row whose rotary frequencies are those of all shorter ones; None where they never change."""
    return min((limit for part in _rotary(module) for limit in _limits(part)), default=None)


def _rotary(module: nn.Module) -> Iterator[Any]:
    """The modules of rotary positions that change."""
    for part in module.modules():
        if hasattr(part, "original_max_seq_len") and changing(getattr(part, "config", None)):
            yield part


def _limits(part: Any) -> Iterator[int]:
    for one in changing(part.config):
        yield one["original_max_position_embeddings"] if one["rope_type"] == "longrope" else part.original_max_seq_len


def forget_rows(module: nn.Module) -> None:
    """Lets rotary positions that change begin each pass as the model's first one, in memory of their own: transformers
    writes into the frequencies (longrope), or keeps those of the longest row so far (dynamic)."""
    for part in _rotary(module):
        part.register_forward_pre_hook(_begin)


def _begin(part: Any, args: Any) -> None:
    for name, original in dict(part.named_buffers(recurse=False)).items():
        if name.endswith("original_inv_freq"):
            setattr(part, name.replace("original_inv_freq", "inv_freq"), original.clone())
    for name in [name for name in vars(part) if name.endswith("max_seq_len_cached")]:
        setattr(part, name, part.original_max_seq_len)
