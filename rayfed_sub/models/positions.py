"""The longest row that a model's table of positions allows."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from torch import nn

from rayfed_sub.models.frozen_linear import FrozenEmbedding, FrozenLinear

_NAMED = re.compile(r"posit|pos_e|wpe")

_SPARE = 2  # rows that some models' tables have beyond the positions of the configuration


def position_limit(module: nn.Module, hf_config: Any, side: str = "") -> int | None:
    """The longest row in tokens; None where positions have no table (rotary, ALiBi, relative biases), and no limit.
    side: of an encoder-decoder, encoder or decoder.

    A table is a matrix with a row for each configured position, learned (GPT-2, BERT, OPT) or computed (GPT-J).  Models
    of RoBERTa's kind count positions from the padding token's number on, so that their tables are used up earlier; they
    are known by the table's `padding_idx`.  CANINE's table is hashed; what ends there is the list of positions that is
    looked up, the buffer `position_ids` (1, P).  It counts beside a table only: others keep one and do not read it.
    """
    text = hf_config.get_text_config(decoder=True if side else None)
    configured = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
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
