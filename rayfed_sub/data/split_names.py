"""Names of splits, as files, folders and keys have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_WORDS: Mapping[str, Split] = {  # as `datasets` reads the names of files
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?<![^-_. 0-9])({'|'.join(_WORDS)})(?![^-_. 0-9])\d*", re.IGNORECASE)
"""A word that stands between the separators of `datasets`, digits among them, with its own number."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def named_split(name: str) -> Split | None:
    """The split that a word of the name says, the first of them.

    >>> named_split("test1"), named_split("a_val2017"), named_split("latest")
    ('test', 'validation', None)
    """
    word = _WORD.search(name)
    return _WORDS[word[1].lower()] if word else None


def bare_split(name: str) -> Split | None:
    """The split of a name that is such a word and nothing else.

    >>> bare_split("Test"), bare_split("dev1")  # a device, perhaps
    ('test', None)
    """
    return _WORDS.get(name.lower())


def split_of(path: Path) -> tuple[Split | None, str]:
    """The split that a relative path's words name, and the client: the first part that is no word of a split.

    >>> split_of(Path("a/train-00000-of-00002.parquet")), split_of(Path("test/b.csv")), split_of(Path("c_dev.csv"))
    (('train', 'a'), ('test', 'b'), ('validation', 'c'))
    """
    found: Split | None = None
    client = ""
    for part in (*path.parent.parts, _SHARD.sub("", path.stem)):
        found = named_split(part) or found
        client = client or _WORD.sub("", part).strip("-_. ")
    return found, client
