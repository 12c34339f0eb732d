"""Patterns over layers' names, matched as peft matches rank_pattern and alpha_pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable


def pattern_key(patterns: Iterable[str], name: str) -> str | None:
    """The first of the regular expressions that matches the end of a layer's name, from its beginning or after a dot;
    None where none does.  Raises re.error for one that is none.

    >>> pattern_key(["proj", "layers.2.*", "up_proj"], "model.layers.10.mlp.up_proj")
    'up_proj'
    >>> pattern_key(["layers.1.*"], "model.layers.10.mlp.up_proj")  # a dot is any character, and .* the 0 too
    'layers.1.*'
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
