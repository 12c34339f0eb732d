"""The rows of a checkpoint's classification head, put into the order of the data's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNNAMED = re.compile(r"LABEL_\d+")
"""Names that transformers gives to classes without one."""


def named_classes(hf_config: Any) -> tuple[str, ...]:
    """The classes of a transformers configuration by their numbers; () where nobody has named them.

    >>> from types import SimpleNamespace
    >>> named_classes(SimpleNamespace(id2label={1: "yes", 0: "no"})), named_classes(
    ...     SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    ... )
    (('no', 'yes'), ())
    """
    found = {int(number): str(name) for number, name in (getattr(hf_config, "id2label", None) or {}).items()}
    names = tuple(found[number] for number in sorted(found))
    return () if all(map(_UNNAMED.fullmatch, names)) else names


def class_rows(own: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    """The rows of a head for the classes `own` in the order of `classes`; () where they are in it, None where the head
    is for other classes.  Names are the same but for case and spaces around them; data that number their classes from
    0 mean the head's rows.

    >>> class_rows(["no", "yes", "maybe"], ["Maybe", "No", "Yes"]), class_rows(["no", "yes"], ["no", "yes"])
    ((2, 0, 1), ())
    >>> class_rows(["no", "yes"], ["0", "1"]), class_rows(["no", "yes"], ["cat", "dog"]), class_rows([], ["cat", "dog"])
    ((), None, ())
    """
    if not own:
        return ()
    known, asked = ([name.strip().casefold() for name in names] for names in (own, classes))
    if sorted(known) == sorted(asked) and len(set(known)) == len(known):
        rows = [known.index(name) for name in asked]
    elif sorted(asked) == sorted(map(str, range(len(own)))):
        rows = list(map(int, asked))
    else:
        return None
    return () if rows == sorted(rows) else tuple(rows)
