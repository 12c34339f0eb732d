"""Masks of attention over rows of which the host knows whether they are filled up.

transformers asks the mask itself, to leave attention without one where it can; on a GPU that is a wait in each forward
pass.  Here its own mask function is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_NAME, _ASKING = "rayfed_sub_filled", "sdpa"
_SKIPS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
_FILLED: ContextVar[bool] = ContextVar("whether rows are filled up", default=True)


@contextmanager
def told(model: nn.Module, *, filled: bool) -> Iterator[None]:
    """Within it a forward pass of the model over rows with an `attention_mask` (R, L) does not ask whether that has
    zeros, but computes what it would have; filled: whether it has some.  A type whose attention does not go through
    transformers' interface still asks, as Falcon does: it looks at the name of what computes its attention."""
    if not getattr(model, "_supports_attention_backend", False):
        yield
        return
    _register()
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    asking: list[Any] = [own for own in configs if getattr(own, "_attn_implementation", None) == _ASKING]
    token = _FILLED.set(filled)
    try:
        for config in asking:
            config._attn_implementation = _NAME
        yield
    finally:
        _FILLED.reset(token)
        for config in asking:
            config._attn_implementation = _ASKING


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if _NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(_NAME, AttentionInterface._global_mapping[_ASKING])
        AttentionMaskInterface.register(_NAME, _mask)


def _mask(attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    from transformers import AttentionMaskInterface

    own = AttentionMaskInterface._global_mapping[_ASKING]
    if attention_mask is None or not _FILLED.get():
        whole: Tensor | None = own(attention_mask=None, **asked)
        return whole
    part: Tensor | None = own(attention_mask=attention_mask, **{**asked, **_SKIPS})
    return part
